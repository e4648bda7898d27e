#pragma once

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "agent/scheduler/process_tree.h"
#include "common/files.h"

namespace itwin::agent {

// Who serves a root: `<root>/agent.json`.
struct OwnerRecord {
  std::string host = {};
  ProcessIdentity process = {};
  std::string socket = {};
  std::string version = {};
};

// One agent per root. On this host the lock decides; where file locks do not reach other hosts, an owner elsewhere
// is believed as long as it renews its record.
class RootLock {
 public:
  // kAlreadyExists: another agent has it; the message says where and who.
  static absl::StatusOr<RootLock> Take(const std::string& root);
  // Publishes where we listen.
  absl::Status Publish(const OwnerRecord& record);
  // Once in kRenewInterval. False: the root is no longer there.
  bool Renew();
  // Takes the record away; the lock goes with the object.
  void Withdraw();

  static constexpr absl::Duration kRenewInterval = absl::Seconds(20);

 private:
  RootLock(std::string root, FileDescriptor lock) : root_(std::move(root)), lock_(std::move(lock)) {}
  std::string root_;
  FileDescriptor lock_;
};

std::optional<OwnerRecord> ReadOwnerRecord(const std::string& root);
// Whether the record's agent lives, as far as this host can tell.
bool OwnerLives(const std::string& root, const OwnerRecord& record);

}  // namespace itwin::agent
