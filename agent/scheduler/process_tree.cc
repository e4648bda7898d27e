#include "agent/scheduler/process_tree.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/files.h"

namespace itwin::agent {
namespace {

struct StatLine {
  char state = 0;
  pid_t parent = 0;
  pid_t session = 0;
  int64_t start_ticks = 0;
};

// /proc files have no size, so the usual readers that ask for it do not do.
std::string ReadProc(const std::string& path, size_t limit) {
  std::string out;
  const absl::StatusOr<FileDescriptor> file = OpenFile(path, O_RDONLY);
  if (!file.ok()) return out;
  out.resize(limit);
  size_t used = 0;
  while (used < limit) {
    const ssize_t got = read(file->get(), out.data() + used, limit - used);
    if (got <= 0) break;
    used += static_cast<size_t>(got);
  }
  out.resize(used);
  return out;
}

bool ReadStat(pid_t pid, StatLine* out) {
  const std::string text = ReadProc(absl::StrCat("/proc/", pid, "/stat"), 4096);
  // The name in parentheses may hold anything; what counts comes after the last one.
  const size_t close = text.rfind(')');
  if (close == std::string::npos) return false;
  const std::vector<std::string> fields =
      absl::StrSplit(absl::string_view(text).substr(close + 1), ' ', absl::SkipEmpty());
  if (fields.size() < 20) return false;
  out->state = fields[0][0];
  return absl::SimpleAtoi(fields[1], &out->parent) && absl::SimpleAtoi(fields[3], &out->session) &&
         absl::SimpleAtoi(fields[19], &out->start_ticks);
}

std::vector<pid_t> AllProcesses() {
  std::vector<pid_t> out;
  std::unique_ptr<DIR, int (*)(DIR*)> proc(opendir("/proc"), closedir);
  if (proc == nullptr) return out;
  while (const dirent* entry = readdir(proc.get())) {
    pid_t pid;
    if (absl::SimpleAtoi(entry->d_name, &pid)) out.push_back(pid);
  }
  return out;
}

std::string BootId() {
  static const std::string id(absl::StripAsciiWhitespace(ReadProc("/proc/sys/kernel/random/boot_id", 64)));
  return id;
}

}  // namespace

ProcessIdentity IdentityOf(pid_t pid) {
  ProcessIdentity out{.boot_id = BootId(), .pid = pid == 0 ? getpid() : pid};
  StatLine line;
  if (ReadStat(out.pid, &line)) out.start_ticks = line.start_ticks;
  return out;
}

bool IsAlive(const ProcessIdentity& identity) {
  StatLine line;
  return identity.pid > 0 && identity.boot_id == BootId() && ReadStat(identity.pid, &line) &&
         line.start_ticks == identity.start_ticks && line.state != 'Z' && line.state != 'X';
}

std::vector<pid_t> DescendantsOf(pid_t ancestor) {
  std::multimap<pid_t, pid_t> children;
  for (pid_t pid : AllProcesses()) {
    StatLine line;
    if (ReadStat(pid, &line) && line.state != 'Z' && line.state != 'X') children.emplace(line.parent, pid);
  }
  std::vector<pid_t> out, open = {ancestor};
  while (!open.empty()) {
    const pid_t parent = open.back();
    open.pop_back();
    for (auto [it, end] = children.equal_range(parent); it != end; ++it) {
      out.push_back(it->second);
      open.push_back(it->second);
    }
  }
  return out;
}

std::vector<pid_t> ProcessesMarked(const std::string& variable, pid_t session) {
  std::vector<pid_t> out;
  const uid_t user = geteuid();
  const pid_t self = getpid();
  for (pid_t pid : AllProcesses()) {
    struct stat info;
    StatLine line;
    if (pid == self || stat(absl::StrCat("/proc/", pid).c_str(), &info) != 0 || info.st_uid != user ||
        !ReadStat(pid, &line) || line.state == 'Z' || line.state == 'X') {
      continue;
    }
    bool marked = session > 0 && line.session == session;
    if (!marked) {
      const std::string environment = ReadProc(absl::StrCat("/proc/", pid, "/environ"), 1 << 20);
      for (absl::string_view entry : absl::StrSplit(environment, '\0')) marked |= entry == variable;
    }
    if (marked) out.push_back(pid);
  }
  return out;
}

bool KillAll(const std::function<std::vector<pid_t>()>& find, absl::Duration limit) {
  const absl::Time deadline = absl::Now() + limit;
  while (true) {
    const std::vector<pid_t> found = find();
    if (found.empty()) return true;
    for (pid_t pid : found) kill(pid, SIGKILL);
    if (absl::Now() > deadline) return false;
    poll(nullptr, 0, 5);  // they are dying; none of them can outrun the next look
  }
}

std::string HostName() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace itwin::agent
