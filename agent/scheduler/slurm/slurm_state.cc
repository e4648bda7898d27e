#include "agent/scheduler/slurm/slurm_state.h"

#include <string.h>

#include <algorithm>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace itwin::agent {
namespace {

struct StateWord {
  absl::string_view word;
  SlurmState state;
};
constexpr StateWord kStates[] = {
    {"PENDING", SlurmState::kPending},
    {"REQUEUED", SlurmState::kPending},
    {"REQUEUE_FED", SlurmState::kPending},
    {"REQUEUE_HOLD", SlurmState::kHeld},
    {"SPECIAL_EXIT", SlurmState::kHeld},
    {"RESV_DEL_HOLD", SlurmState::kHeld},
    {"CONFIGURING", SlurmState::kConfiguring},
    {"POWER_UP_NODE", SlurmState::kConfiguring},
    {"EXPEDITING", SlurmState::kConfiguring},
    {"RUNNING", SlurmState::kRunning},
    {"RESIZING", SlurmState::kRunning},
    {"SIGNALING", SlurmState::kRunning},
    {"SUSPENDED", SlurmState::kSuspended},
    {"STOPPED", SlurmState::kSuspended},
    {"COMPLETING", SlurmState::kCompleting},
    {"STAGE_OUT", SlurmState::kCompleting},
    {"UPDATE_DB", SlurmState::kCompleting},
    {"COMPLETED", SlurmState::kCompleted},
    {"CANCELLED", SlurmState::kCancelled},
    {"FAILED", SlurmState::kFailed},
    {"TIMEOUT", SlurmState::kTimeout},
    {"DEADLINE", SlurmState::kDeadline},
    {"NODE_FAIL", SlurmState::kNodeFail},
    {"RECONFIG_FAIL", SlurmState::kNodeFail},
    {"BOOT_FAIL", SlurmState::kBootFail},
    {"LAUNCH_FAILED", SlurmState::kLaunchFailed},
    {"OUT_OF_MEMORY", SlurmState::kOutOfMemory},
    {"PREEMPTED", SlurmState::kPreempted},
    {"REVOKED", SlurmState::kRevoked},
};

// What each state means to us; in the order of the enum.
struct StateFacts {
  SlurmState state;
  SchedulerState means;
  absl::string_view words = {};  // while it lives
  v1::EndCause cause = v1::END_CAUSE_UNSPECIFIED;
};
constexpr StateFacts kFacts[] = {
    {SlurmState::kUnrecognized, SchedulerState::kUnknown},
    {SlurmState::kPending, SchedulerState::kPending},
    {SlurmState::kHeld, SchedulerState::kHeld, "held by SLURM until somebody releases it"},
    {SlurmState::kConfiguring, SchedulerState::kRunning, "its nodes are being started"},
    {SlurmState::kRunning, SchedulerState::kRunning},
    {SlurmState::kSuspended, SchedulerState::kSuspended, "suspended by SLURM"},
    {SlurmState::kCompleting, SchedulerState::kRunning, "is being ended"},
    {SlurmState::kCompleted, SchedulerState::kEnded},
    {SlurmState::kCancelled, SchedulerState::kEnded, "", v1::END_CAUSE_CANCELLED_EXTERNALLY},
    {SlurmState::kFailed, SchedulerState::kEnded},
    {SlurmState::kTimeout, SchedulerState::kEnded, "", v1::END_CAUSE_TIME_LIMIT},
    {SlurmState::kDeadline, SchedulerState::kEnded, "", v1::END_CAUSE_DEADLINE},
    {SlurmState::kNodeFail, SchedulerState::kEnded, "", v1::END_CAUSE_NODE_FAILED},
    {SlurmState::kBootFail, SchedulerState::kEnded, "", v1::END_CAUSE_NODE_FAILED},
    {SlurmState::kLaunchFailed, SchedulerState::kEnded, "", v1::END_CAUSE_NODE_FAILED},
    {SlurmState::kOutOfMemory, SchedulerState::kEnded, "", v1::END_CAUSE_OUT_OF_MEMORY},
    {SlurmState::kPreempted, SchedulerState::kEnded, "", v1::END_CAUSE_PREEMPTED},
    {SlurmState::kRevoked, SchedulerState::kUnknown, "a sibling cluster runs it"},
};
constexpr bool InOrder() {
  for (size_t i = 0; i < std::size(kFacts); ++i) {
    if (kFacts[i].state != static_cast<SlurmState>(i)) return false;
  }
  return std::size(kFacts) == static_cast<size_t>(SlurmState::kRevoked) + 1;
}
static_assert(InOrder(), "one row for each state");
const StateFacts& FactsOf(SlurmState state) { return kFacts[static_cast<size_t>(state)]; }

struct ReasonWord {
  absl::string_view word;
  ReasonKind kind;
  absl::string_view words;
};
constexpr ReasonWord kReasons[] = {
    {"None", ReasonKind::kWaiting, "waits to be looked at by SLURM"},
    {"Priority", ReasonKind::kWaiting, "waits behind jobs of higher priority"},
    {"Resources", ReasonKind::kWaiting, "waits for free nodes"},
    {"Dependency", ReasonKind::kWaiting, "waits for another job"},
    {"BeginTime", ReasonKind::kWaiting, "its earliest start time has not come"},
    {"Licenses", ReasonKind::kWaiting, "waits for a licence"},
    {"Cleaning", ReasonKind::kWaiting, "is cleaned up after a requeue"},
    {"Prolog", ReasonKind::kWaiting, "the site prepares its nodes"},
    {"Reservation", ReasonKind::kWaiting, "waits for its reservation to begin"},
    {"ReqNodeNotAvail", ReasonKind::kWaiting,
     "a node it needs is not available now; often a maintenance that begins before it would end"},
    {"NodeDown", ReasonKind::kWaiting, "a node it needs is down"},
    {"PartitionDown", ReasonKind::kWaiting, "the partition is down"},
    {"PartitionInactive", ReasonKind::kWaiting, "the partition takes jobs but starts none now"},
    {"FrontEndDown", ReasonKind::kWaiting, "the site's front end is down"},
    {"JobArrayTaskLimit", ReasonKind::kWaiting, "as many tasks of the array run as may"},
    {"SchedDefer", ReasonKind::kWaiting, "SLURM looks at it later"},
    {"JobHeldUser", ReasonKind::kHeld, "held by its user; release it with: scontrol release ID"},
    {"JobHeldAdmin", ReasonKind::kHeld, "held by an administrator of the site; ask there"},
    {"AccountNotAllowed", ReasonKind::kPermanent, "the account may not use this partition"},
    {"QOSNotAllowed", ReasonKind::kPermanent, "the QOS may not be used in this partition"},
    {"BadConstraints", ReasonKind::kPermanent, "no nodes of the site can ever satisfy what it asks for"},
    {"InvalidAccount", ReasonKind::kPermanent, "the account is not valid"},
    {"InvalidQOS", ReasonKind::kPermanent, "the QOS is not valid"},
    {"PartitionTimeLimit", ReasonKind::kPermanent, "it asks for more time than the partition allows"},
    {"PartitionNodeLimit", ReasonKind::kPermanent, "it asks for more nodes than the partition has or allows"},
    {"PartitionConfig", ReasonKind::kPermanent, "it asks for more than the partition has or allows"},
    {"ReservationDeleted", ReasonKind::kPermanent, "its reservation was deleted"},
    {"DependencyNeverSatisfied", ReasonKind::kPermanent, "the job it waits for failed"},
};

}  // namespace

SlurmState ParseSlurmState(absl::string_view word) {
  word = word.substr(0, word.find_first_of(" +"));
  for (const StateWord& known : kStates) {
    if (known.word == word) return known.state;
  }
  return SlurmState::kUnrecognized;
}

bool IsTerminal(SlurmState state) { return FactsOf(state).means == SchedulerState::kEnded; }

LiveState LiveStateOf(SlurmState state) {
  const StateFacts& facts = FactsOf(state);
  return {facts.means, facts.words};
}

v1::EndCause CauseOfState(SlurmState state, bool we_cancelled) {
  if (state == SlurmState::kCancelled && we_cancelled) return v1::END_CAUSE_CANCELLED;
  return FactsOf(state).cause;
}

PendingReason ExplainPending(absl::string_view reason) {
  PendingReason out;
  absl::string_view words = "waits in SLURM's queue";
  // Some carry more text: "ReqNodeNotAvail, UnavailableNodes:n[1-2]", "JobHeldUser(...)".
  const absl::string_view head = reason.substr(0, reason.find_first_of(",( :"));
  const auto known = std::find_if(std::begin(kReasons), std::end(kReasons),
                                  [&](const ReasonWord& r) { return r.word == head; });
  if (known != std::end(kReasons)) {
    out.kind = known->kind;
    words = known->words;
  } else if (absl::StartsWithIgnoreCase(reason, "launch failed requeued held") || absl::StrContains(reason, "requeued_held") ||
             absl::StartsWith(reason, "launch_failed_requeued_held") || absl::StartsWith(reason, "job_requeued_in_held")) {
    out.kind = ReasonKind::kHeld;
    words = "its start failed on a node, and SLURM holds it; release it with: scontrol release ID";
  } else if (absl::StartsWith(head, "QOS") || absl::StartsWith(head, "Assoc") || absl::StartsWith(head, "MaxJobs")) {
    // One job alone is over a limit that is counted per job: waiting does not help.
    if (absl::StrContains(head, "PerJob") || absl::StrContains(head, "MinCpu") || absl::StrContains(head, "MinNode")) {
      out.kind = ReasonKind::kPermanent;
      words = "it asks for more (or less) than a single job may have there";
    } else {
      words = "waits for a limit on the user, account or QOS";
    }
  } else if (absl::StartsWith(head, "BurstBuffer") || absl::StartsWith(head, "StageIn")) {
    words = "the site brings its data";
  }
  out.words = absl::StrCat(words, " (", reason.empty() ? "no reason given" : reason, ")");
  return out;
}

std::optional<SlurmExit> ParseExit(absl::string_view text) {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ':');
  int first = 0, second = 0;
  if (parts.size() == 2 && absl::SimpleAtoi(parts[0], &first) && absl::SimpleAtoi(parts[1], &second) && first >= 0 &&
      second >= 0 && first < 256 && second < 128) {
    return SlurmExit{first, second};
  }
  if (parts.size() == 1 && absl::SimpleAtoi(text, &first) && first >= 0 && first < 65536) {
    return SlurmExit{(first >> 8) & 0xff, first & 0x7f};
  }
  return std::nullopt;
}

std::string DescribeEnd(absl::string_view word, absl::string_view reason, const std::optional<SlurmExit>& exit) {
  std::string out = absl::StrCat("SLURM says ", word);
  const bool killed = exit && exit->signal == 9;
  if (!reason.empty() && reason != "None" && !(killed && reason == "JobLaunchFailure")) absl::StrAppend(&out, " (", reason, ")");
  if (exit && exit->signal != 0) {
    const char* name = sigabbrev_np(exit->signal);
    absl::StrAppend(&out, ", ended by signal ", exit->signal, name == nullptr ? "" : absl::StrCat(" (", name, ")"));
  } else if (exit && exit->code != 0) {
    absl::StrAppend(&out, ", exit code ", exit->code);
  }
  return out;
}

}  // namespace itwin::agent
