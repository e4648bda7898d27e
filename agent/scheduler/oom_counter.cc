#include "agent/scheduler/oom_counter.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/files.h"

namespace itwin::agent {
namespace {

constexpr int64_t kMaxFileBytes = 1 << 20;
constexpr char kCount[] = "oom_kill";

// The value of a line "<name> <value>"; -1 when the file has none.
int64_t Field(const std::string& path, absl::string_view name) {
  const absl::StatusOr<std::string> text = ReadFile(path, kMaxFileBytes);
  if (!text.ok()) return -1;
  for (const absl::string_view line : absl::StrSplit(*text, '\n')) {
    const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(line, absl::MaxSplits(' ', 1));
    int64_t value = 0;
    if (parts.first == name && absl::SimpleAtoi(parts.second, &value)) return value;
  }
  return -1;
}

}  // namespace

OomCounter::OomCounter(std::string proc, std::string cgroup) {
  std::vector<std::string> candidates;
  // Lines "<hierarchy>:<controllers>:<path>"; version 2 has no controllers there. In a container the path may be that of
  // the host, and the group's files then lie at the root of what is mounted.
  const absl::StatusOr<std::string> groups = ReadFile(proc + "/self/cgroup", kMaxFileBytes);
  for (const absl::string_view line : absl::StrSplit(groups.value_or(""), '\n')) {
    const std::vector<absl::string_view> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const absl::string_view path = parts[2] == "/" ? absl::string_view() : parts[2];
    for (const absl::string_view controller : absl::StrSplit(parts[1], ',')) {
      if (controller == "memory") {
        candidates.push_back(absl::StrCat(cgroup, "/memory", path, "/memory.oom_control"));
        candidates.push_back(absl::StrCat(cgroup, "/memory/memory.oom_control"));
      } else if (controller.empty()) {
        candidates.push_back(absl::StrCat(cgroup, path, "/memory.events"));
        candidates.push_back(absl::StrCat(cgroup, "/memory.events"));
      }
    }
  }
  for (std::string& candidate : candidates) {
    if (Field(candidate, kCount) < 0) continue;
    path_ = std::move(candidate);
    of_group_ = true;
    return;
  }
  path_ = proc + "/vmstat";
}

int64_t OomCounter::Read() const { return path_.empty() ? 0 : std::max<int64_t>(0, Field(path_, kCount)); }

}  // namespace itwin::agent
