#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "agent/scheduler/process_tree.h"
#include "common/files.h"

namespace itwin::agent {

// Who serves a root: `<root>/agent.json`.
struct OwnerRecord {
  std::string host = {};
  ProcessIdentity process = {};
  std::string place = {};    // where its process number means something: boot and process namespace
  int64_t term = 0;
  std::string socket = {};
  std::string version = {};
};

// One agent per root, also when several login nodes share it: a lease with a fencing term (docs/adr/0006).
//
// The term is a directory `<root>/terms/<n>` that appears by an atomic rename with its owner's record in it, so only one
// of many claimants gets n. Whoever holds the highest term may act; every step that changes something checks that first.
// The owner renews `<root>/agent.beat`. A claimant elsewhere asks it to retire (`<root>/retire`), and takes over when it
// has, or when no renewal was seen for Timing::timeout of the claimant's own monotonic clock. No file lock and no other host's
// clock is believed. An owner that could not renew for most of that time stops acting by itself.
class RootLock {
 public:
  struct Timing {
    absl::Duration renew = absl::Seconds(4);
    absl::Duration timeout = absl::Seconds(20);  // without a renewal, until an owner elsewhere is replaced
    // An agent that has only just taken over is not sent away again: two gateways at two login nodes would take turns.
    absl::Duration least_tenure = absl::Seconds(10);
  };
  // Waits up to `limit` for an agent elsewhere to retire or fall silent. kAlreadyExists: another agent has the root; the
  // message says where and who.
  static absl::StatusOr<std::unique_ptr<RootLock>> Take(const std::string& root, absl::Duration limit, const Timing& timing);
  static absl::StatusOr<std::unique_ptr<RootLock>> Take(const std::string& root, absl::Duration limit) {
    return Take(root, limit, Timing());
  }

  int64_t term() const { return term_; }
  // Publishes where we listen.
  absl::Status Publish(OwnerRecord record);
  enum class Standing {
    kHeld,
    kRootGone,
    kTakenOver,     // a higher term is there
    kAskedToLeave,  // an agent elsewhere waits for us
  };
  // Once in kLookInterval; says how we stand.
  Standing Renew();
  // Before each step that changes something at the site. kUnavailable: we may not act (any more). Thread-safe.
  absl::Status Check() const;
  // Takes the record away and lets the next one claim at once.
  void Withdraw();

  static constexpr absl::Duration kLookInterval = absl::Seconds(2);

 private:
  RootLock(std::string root, int64_t term, std::string nonce, const Timing& timing);
  const std::string root_;
  const int64_t term_;
  const std::string nonce_;
  const Timing timing_;
  const absl::Time taken_;
  std::atomic<int64_t> renewed_ns_;  // of a clock that does not jump
  absl::Time next_beat_ = absl::InfinitePast();
  int64_t beats_ = 0;
};

std::optional<OwnerRecord> ReadOwnerRecord(const std::string& root);
// Whether its process number means something here.
bool IsHere(const OwnerRecord& record);
// Whether the record's agent lives, as far as can be told from here: one elsewhere is believed until its term is given back.
bool OwnerLives(const std::string& root, const OwnerRecord& record);

}  // namespace itwin::agent
