#include "agent/rpc/root_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

using nlohmann::json;

constexpr absl::Duration kOwnerTimeout = absl::Seconds(90);

std::string RecordPath(const std::string& root) { return root + "/agent.json"; }

}  // namespace

std::optional<OwnerRecord> ReadOwnerRecord(const std::string& root) {
  const absl::StatusOr<std::string> text = ReadFile(RecordPath(root), 1 << 16);
  if (!text.ok()) return std::nullopt;
  const json record = json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!record.is_object()) return std::nullopt;
  const auto word = [&](const char* key) {
    const auto it = record.find(key);
    return it != record.end() && it->is_string() ? it->get<std::string>() : std::string();
  };
  const auto number = [&](const char* key) {
    const auto it = record.find(key);
    return it != record.end() && it->is_number_integer() ? it->get<int64_t>() : 0;
  };
  OwnerRecord out{.host = word("host"), .process = {}, .socket = word("socket"), .version = word("version")};
  out.process = {.boot_id = word("boot_id"), .pid = static_cast<pid_t>(number("pid")), .start_ticks = number("start_ticks")};
  return out;
}

bool OwnerLives(const std::string& root, const OwnerRecord& record) {
  if (record.process.boot_id == IdentityOf(0).boot_id) return IsAlive(record.process);
  if (record.host == HostName()) return false;  // before a restart of this machine
  struct stat info;
  return stat(RecordPath(root).c_str(), &info) == 0 &&
         absl::Now() - absl::TimeFromTimespec(info.st_mtim) < kOwnerTimeout;
}

absl::StatusOr<RootLock> RootLock::Take(const std::string& root) {
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor file, OpenFile(root + "/agent.lock", O_RDWR | O_CREAT));
  const bool locked = flock(file.get(), LOCK_EX | LOCK_NB) == 0;
  const int error = errno;
  const std::optional<OwnerRecord> owner = ReadOwnerRecord(root);
  if (!locked && error != EWOULDBLOCK) return ErrnoStatus(error, root + "/agent.lock");
  if (!locked || (owner && OwnerLives(root, *owner))) {
    return absl::AlreadyExistsError(absl::StrCat(
        "an agent serves ", root, " already",
        owner ? absl::StrCat(" (process ", owner->process.pid, " on ", owner->host, ")") : std::string(),
        "; stop it there with: itwin-agent stop --root ", root));
  }
  return RootLock(root, std::move(file));
}

absl::Status RootLock::Publish(const OwnerRecord& record) {
  const json out = {{"host", record.host}, {"pid", record.process.pid}, {"start_ticks", record.process.start_ticks},
                    {"boot_id", record.process.boot_id}, {"socket", record.socket}, {"version", record.version}};
  return WriteFileAtomically(RecordPath(root_), out.dump(-1, ' ', false, json::error_handler_t::replace) + "\n");
}

bool RootLock::Renew() {
  return utimensat(AT_FDCWD, RecordPath(root_).c_str(), nullptr, 0) == 0 || access(root_.c_str(), F_OK) == 0;
}

void RootLock::Withdraw() { unlink(RecordPath(root_).c_str()); }

}  // namespace itwin::agent
