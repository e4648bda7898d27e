#include "agent/scheduler/lease.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "agent/spool/fault_point.h"
#include "common/files.h"
#include "common/ids.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

using nlohmann::json;

constexpr size_t kReserveBytes = 64 << 10;

json ToJson(const ProcessIdentity& process) {
  return {{"pid", process.pid}, {"start_ticks", process.start_ticks}, {"boot_id", process.boot_id}};
}

ProcessIdentity ProcessFrom(const json& record) {
  ProcessIdentity out;
  if (!record.is_object()) return out;
  if (const auto it = record.find("pid"); it != record.end() && it->is_number_integer()) out.pid = it->get<pid_t>();
  if (const auto it = record.find("start_ticks"); it != record.end() && it->is_number_integer()) {
    out.start_ticks = it->get<int64_t>();
  }
  if (const auto it = record.find("boot_id"); it != record.end() && it->is_string()) {
    out.boot_id = it->get<std::string>();
  }
  return out;
}

std::string Text(const json& record, const char* key) {
  if (!record.is_object()) return "";
  const auto it = record.find(key);
  return it != record.end() && it->is_string() ? it->get<std::string>() : std::string();
}

json ParseFile(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, 1 << 16);
  return text.ok() ? json::parse(*text, nullptr, false) : json();
}

}  // namespace

absl::StatusOr<bool> TakeLease(const AttemptDirectory& directory, const LeaseOwner& owner) {
  // A rename would replace an empty directory; whoever made one has the lease.
  if (directory.HasLease()) return false;
  const std::string mine = absl::StrCat(directory.lease_path(), ".", RandomHex(6), ".tmp");
  if (mkdir(mine.c_str(), 0700) != 0) return ErrnoStatus(errno, mine);
  absl::Cleanup remove = [&] {
    std::error_code ignored;
    std::filesystem::remove_all(mine, ignored);
  };
  json record = ToJson(owner.process);
  record["nonce"] = owner.nonce;
  record["host"] = owner.host;
  record["scheduler_id"] = owner.scheduler_id;
  record["restart"] = owner.restart;
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(
      mine + "/owner.json", record.dump(-1, ' ', false, json::error_handler_t::replace) + "\n"));
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(mine + "/reserve", std::string(kReserveBytes, '.')));
  FaultPoint("script.before_lease");
  if (rename(mine.c_str(), directory.lease_path().c_str()) != 0) {
    const int error = errno;
    // A reply lost on a network file system makes the client ask again: it may be ours all the same.
    const std::optional<LeaseOwner> there = ReadLease(directory);
    if (there && there->nonce == owner.nonce) return true;
    if (error == EEXIST || error == ENOTEMPTY || there) return false;
    return ErrnoStatus(error, directory.lease_path());
  }
  FaultPoint("script.after_lease");
  ITWIN_RETURN_IF_ERROR(FsyncDirectory(directory.path()));
  return true;
}

std::optional<LeaseOwner> ReadLease(const AttemptDirectory& directory) {
  if (!directory.HasLease()) return std::nullopt;
  const json record = ParseFile(directory.owner_path());
  LeaseOwner out{.nonce = Text(record, "nonce"), .host = Text(record, "host"),
                 .scheduler_id = Text(record, "scheduler_id"), .process = ProcessFrom(record)};
  if (!record.is_object()) return out;
  if (const auto it = record.find("restart"); it != record.end() && it->is_number_integer()) out.restart = it->get<int>();
  return out;
}

absl::Status RecordProgram(const AttemptDirectory& directory, const ProcessIdentity& program) {
  return WriteFileAtomically(directory.program_path(), ToJson(program).dump() + "\n");
}

std::optional<ProcessIdentity> ReadProgram(const AttemptDirectory& directory) {
  const ProcessIdentity out = ProcessFrom(ParseFile(directory.program_path()));
  if (out.pid <= 0) return std::nullopt;
  return out;
}

}  // namespace itwin::agent
