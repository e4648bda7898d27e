#include "server/config.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/spec/nearest_name.h"
#include "common/spec/strict_yaml.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

constexpr int64_t kMaxConfigBytes = 1 << 20;
constexpr size_t kMaxSites = 100;

}  // namespace

absl::StatusOr<GatewayConfig> ParseConfig(absl::string_view text, absl::string_view file_name) {
  GatewayConfig config;
  StrictYaml reader(file_name);
  const StrictYaml::Take limits = [&](const YAML::Node& node, const std::string& path) {
    reader.Mapping(node, path,
                   {{"live_jobs_per_owner", reader.Integer(&config.live_jobs_per_owner)},
                    {"rpc_threads", reader.Integer(&config.rpc_threads)},
                    {"log_mirror_mib", reader.Integer(&config.log_mirror_mib)}});
  };
  const StrictYaml::Take local = [&](const YAML::Node& node, const std::string& path) {
    reader.Mapping(node, path,
                   {{"enabled", reader.Boolean(&config.local.enabled)},
                    {"slots", reader.Integer(&config.local.slots)},
                    {"launcher", reader.Text(&config.local.launcher)},
                    {"max_waiting", reader.Integer(&config.local.max_waiting)},
                    {"spool_retention", reader.Time(&config.local.spool_retention)}});
  };
  const StrictYaml::Take sites = [&](const YAML::Node& node, const std::string& path) {
    reader.List(node, path, kMaxSites, [&](const YAML::Node& entry, const std::string& at) {
      SiteFile site;
      SiteKeys(&reader, &site)(entry, at);
      config.sites.push_back(std::move(site));
    });
  };
  ITWIN_RETURN_IF_ERROR(reader.Read(text, [&](const YAML::Node& root, const std::string& path) {
    reader.Mapping(root, path,
                   {{"listen", reader.Text(&config.listen)},
                    {"log_level", reader.Text(&config.log_level)},
                    {"job_retention", reader.Time(&config.job_retention)},
                    {"limits", limits},
                    {"local", local},
                    {"sites", sites}});
  }));
  return config;
}

absl::StatusOr<GatewayConfig> ReadConfig(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, kMaxConfigBytes);
  if (!text.ok()) {
    if (text.status().code() == absl::StatusCode::kNotFound) return GatewayConfig{};
    return text.status();
  }
  return ParseConfig(*text, path);
}

void Apply(const ConfigOverrides& overrides, GatewayConfig* config) {
  if (overrides.listen) config->listen = *overrides.listen;
  if (overrides.log_level) config->log_level = *overrides.log_level;
  if (overrides.slots) config->local.slots = *overrides.slots;
  if (overrides.local) config->local.enabled = *overrides.local;
}

absl::Status CheckConfig(const GatewayConfig& config) {
  std::vector<std::string> problems;
  const auto range = [&](absl::string_view key, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
      problems.push_back(absl::StrCat(key, ": ", value, " is out of range; use ", low, " to ", high));
    }
  };
  if (const auto listen = ParseListen(config.listen); !listen.ok()) {
    problems.push_back(absl::StrCat("listen: ", listen.status().message()));
  }
  const std::vector<std::string> levels = {"debug", "info", "warning", "error"};
  if (std::find(levels.begin(), levels.end(), config.log_level) == levels.end()) {
    problems.push_back(absl::StrCat("log_level: '", config.log_level, "' is unknown; ", UnknownNameHint(config.log_level, levels)));
  }
  range("limits.live_jobs_per_owner", config.live_jobs_per_owner, 1, 10'000'000);
  range("limits.rpc_threads", config.rpc_threads, 8, 10'000);
  range("limits.log_mirror_mib", config.log_mirror_mib, 1, 1024);
  range("local.slots", config.local.slots, 0, 100'000);
  range("local.max_waiting", config.local.max_waiting, 1, 100'000);
  std::set<std::string> names;
  if (config.local.enabled) names.insert("local");
  for (size_t i = 0; i < config.sites.size(); ++i) {
    const SiteFile& site = config.sites[i];
    const std::string path = absl::StrCat("sites[", i, "]");
    for (std::string& problem : SiteProblems(site, path)) problems.push_back(std::move(problem));
    if (IsSiteName(site.name) && site.name != "any" && !names.insert(site.name).second) {
      problems.push_back(absl::StrCat(path, ".name: '", site.name, "' is taken by another site"));
    }
  }
  return ProblemsStatus(std::move(problems));
}

absl::StatusOr<HostAndPort> ParseListen(absl::string_view text) {
  const auto wrong = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not an address to listen at; write 127.0.0.1:7443, [::1]:7443 or 0.0.0.0:7443"));
  };
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return wrong();
  HostAndPort out;
  out.host = std::string(text.substr(0, colon));
  if (!absl::SimpleAtoi(text.substr(colon + 1), &out.port) || out.port < 0 || out.port > 65535) return wrong();
  if (out.host.size() > 2 && out.host.front() == '[' && out.host.back() == ']') {
    out.host = out.host.substr(1, out.host.size() - 2);
  } else if (out.host.empty() || out.host.find(':') != std::string::npos) {
    return wrong();
  }
  return out;
}

}  // namespace itwin::server
