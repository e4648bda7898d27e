#include "agent/worker/report/contract.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace fs = std::filesystem;

namespace {

// Directories as PATH has them. One that is there by the whole text is meant, whatever its name.
std::vector<fs::path> SplitDirectories(const std::string& text) {
  std::error_code ignored;
  if (!text.empty() && fs::is_directory(text, ignored)) return {text};
  std::vector<fs::path> directories;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(':', begin), text.size());
    if (end > begin) directories.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return directories;
}

}  // namespace

Contract ReadContract(const std::string& spec, const std::string& spool,
                      const std::function<const char*(const char*)>& environment) {
  const auto from = [&](const char* name) -> std::string {
    const char* value = environment(name);
    return value == nullptr ? "" : value;
  };
  const auto path = [&](const char* name, const fs::path& fallback) -> fs::path {
    const std::string value = from(name);
    return value.empty() ? fallback : fs::path(value);
  };
  Contract c;
  c.spec = path("ITWIN_SPEC", spec);
  if (c.spec.empty()) throw UserError("no job spec: give --spec FILE or set ITWIN_SPEC");
  c.spool = spool;
  if (c.spool.empty() && !from("ITWIN_METRICS").empty()) {
    c.spool = fs::absolute(from("ITWIN_METRICS")).parent_path();
  }
  if (c.spool.empty()) throw UserError("no spool directory: give --spool DIR or set ITWIN_METRICS");
  c.spool = fs::absolute(c.spool);
  c.spec = fs::absolute(c.spec);
  std::error_code ignored;
  c.work = fs::is_directory(c.spool / "work", ignored) ? c.spool / "work" : c.spec.parent_path();
  c.metrics = path("ITWIN_METRICS", c.spool / "metrics.jsonl");
  c.outputs = path("ITWIN_OUTPUTS", c.spool / "outputs");
  c.checkpoints = path("ITWIN_CHECKPOINTS", c.spool / "checkpoints");
  c.resume = SplitDirectories(from("ITWIN_RESUME"));
  c.stop = path("ITWIN_STOP", c.spool / "stop");
  c.result = path("ITWIN_RESULT", c.spool / "result.json");
  c.attempt = from("ITWIN_ATTEMPT");
  if (const std::string text = from("ITWIN_DEADLINE"); !text.empty()) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (end != text.c_str() + text.size() || !std::isfinite(value)) {
      throw UserError("ITWIN_DEADLINE is \"" + text + "\"; it must be seconds since 1970");
    }
    if (value > 0) c.deadline = value;
  }
  return c;
}

}  // namespace itwin::worker
