#include "server/config.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/files.h"
#include "common/spec/nearest_name.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

constexpr int64_t kMaxConfigBytes = 1 << 20;
constexpr size_t kMaxSites = 100;
constexpr size_t kMaxProblems = 10;

// Reads one mapping: every key must have a reader, every problem is kept with its line.
class Reader {
 public:
  Reader(absl::string_view file_name, std::vector<std::string>* problems)
      : file_name_(file_name), problems_(problems) {}

  using Keys = std::vector<std::pair<std::string, std::function<void(const YAML::Node&, const std::string&)>>>;

  void Mapping(const YAML::Node& node, const std::string& path, const Keys& keys) {
    if (node.IsNull()) return;  // a section without entries
    if (!node.IsMap()) return Problem(node, path, "must be a mapping of keys to values");
    std::set<std::string> seen;
    for (const auto& entry : node) {
      const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : "?";
      const std::string where = path.empty() ? key : absl::StrCat(path, ".", key);
      const auto known = std::find_if(keys.begin(), keys.end(), [&](const auto& k) { return k.first == key; });
      if (known == keys.end()) {
        std::vector<std::string> names;
        for (const auto& k : keys) names.push_back(k.first);
        Problem(entry.first, where, absl::StrCat("unknown key; ", UnknownNameHint(key, names)));
      } else if (!seen.insert(key).second) {
        Problem(entry.first, where, "is there twice");
      } else {
        known->second(entry.second, where);
      }
    }
  }

  auto Text(std::string* out) {
    return [this, out](const YAML::Node& node, const std::string& path) {
      if (!node.IsScalar()) return Problem(node, path, "must be text");
      *out = node.Scalar();
    };
  }
  auto Integer(int* out) {
    return [this, out](const YAML::Node& node, const std::string& path) {
      if (!node.IsScalar() || !absl::SimpleAtoi(node.Scalar(), out)) Problem(node, path, "must be a whole number");
    };
  }
  auto Boolean(bool* out) {
    return [this, out](const YAML::Node& node, const std::string& path) {
      if (!node.IsScalar() || !absl::SimpleAtob(node.Scalar(), out)) Problem(node, path, "must be true or false");
    };
  }
  auto Time(absl::Duration* out) {
    return [this, out](const YAML::Node& node, const std::string& path) {
      if (!node.IsScalar() || !absl::ParseDuration(node.Scalar(), out) || *out < absl::ZeroDuration()) {
        Problem(node, path, "must be a duration such as 90s, 30m or 168h; 0 for never");
      }
    };
  }
  auto Words(std::vector<std::string>* out) {
    return [this, out](const YAML::Node& node, const std::string& path) {
      if (!node.IsSequence()) return Problem(node, path, "must be a list of words: [ssh, -T, host, itwin-agent, connect, --root, DIR]");
      for (const YAML::Node& word : node) {
        if (!word.IsScalar()) return Problem(word, path, "must be a list of words");
        out->push_back(word.Scalar());
      }
    };
  }

  void Problem(const YAML::Node& node, const std::string& path, absl::string_view what) {
    problems_->push_back(absl::StrCat(file_name_, ":", node.Mark().line + 1, ": ", path.empty() ? "" : path + ": ", what));
  }

 private:
  const std::string file_name_;
  std::vector<std::string>* const problems_;
};

absl::Status ProblemsStatus(std::vector<std::string> problems) {
  if (problems.empty()) return absl::OkStatus();
  if (problems.size() > kMaxProblems) {
    const size_t more = problems.size() - kMaxProblems;
    problems.resize(kMaxProblems);
    problems.push_back(absl::StrCat("and ", more, " more"));
  }
  return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
}

bool IsSiteName(const std::string& name) {
  return !name.empty() && name.size() <= 63 && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.';
  });
}

}  // namespace

absl::StatusOr<GatewayConfig> ParseConfig(absl::string_view text, absl::string_view file_name) {
  GatewayConfig config;
  std::vector<std::string> problems;
  Reader reader(file_name, &problems);
  // yaml-cpp reports by exceptions; they end here.
  try {
    const YAML::Node root = YAML::Load(std::string(text));
    const auto site = [&](const YAML::Node& node, const std::string& path) {
      SiteConfig& out = config.sites.emplace_back();
      reader.Mapping(node, path,
                     {{"name", reader.Text(&out.name)},
                      {"command", reader.Words(&out.command)},
                      {"max_waiting", reader.Integer(&out.max_waiting)},
                      {"spool_retention", reader.Time(&out.spool_retention)}});
    };
    reader.Mapping(
        root, "",
        {{"listen", reader.Text(&config.listen)},
         {"log_level", reader.Text(&config.log_level)},
         {"job_retention", reader.Time(&config.job_retention)},
         {"limits",
          [&](const YAML::Node& node, const std::string& path) {
            reader.Mapping(node, path,
                           {{"live_jobs_per_owner", reader.Integer(&config.live_jobs_per_owner)},
                            {"rpc_threads", reader.Integer(&config.rpc_threads)},
                            {"log_mirror_mib", reader.Integer(&config.log_mirror_mib)}});
          }},
         {"local",
          [&](const YAML::Node& node, const std::string& path) {
            reader.Mapping(node, path,
                           {{"enabled", reader.Boolean(&config.local.enabled)},
                            {"slots", reader.Integer(&config.local.slots)},
                            {"launcher", reader.Text(&config.local.launcher)},
                            {"max_waiting", reader.Integer(&config.local.max_waiting)},
                            {"spool_retention", reader.Time(&config.local.spool_retention)}});
          }},
         {"sites", [&](const YAML::Node& node, const std::string& path) {
            if (!node.IsSequence() || node.size() > kMaxSites) {
              return reader.Problem(node, path, absl::StrCat("must be a list of at most ", kMaxSites, " sites"));
            }
            int number = 0;
            for (const YAML::Node& entry : node) site(entry, absl::StrCat(path, "[", number++, "]"));
          }}});
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(file_name, ":", error.mark.line + 1, ": ", error.msg));
  }
  ITWIN_RETURN_IF_ERROR(ProblemsStatus(std::move(problems)));
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
    const SiteConfig& site = config.sites[i];
    const std::string path = absl::StrCat("sites[", i, "]");
    if (!IsSiteName(site.name) || site.name == "any") {
      problems.push_back(absl::StrCat(path, ".name: '", site.name,
                                      "' must be 1 to 63 of a-z, 0-9, '-', '_' and '.', and not 'any'"));
    } else if (!names.insert(site.name).second) {
      problems.push_back(absl::StrCat(path, ".name: '", site.name, "' is taken by another site"));
    }
    if (site.command.empty() || site.command[0].empty()) {
      problems.push_back(absl::StrCat(path, ".command: missing; give the command line that leads to `itwin-agent connect`"));
    }
    range(absl::StrCat(path, ".max_waiting"), site.max_waiting, 1, 100'000);
  }
  if (names.empty()) problems.push_back("sites: no site is left; add one, or leave local.enabled at true");
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
