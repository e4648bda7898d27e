#include "server/dispatch/reconciler.h"

#include <signal.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/files.h"
#include "common/sha256.h"
#include "server/dispatch/failure_signs.h"

namespace itwin::server {
namespace {

using agent::v1::AttemptStatus;
using nlohmann::json;

constexpr int kExitUser = 2;
constexpr int kExitApp = 3;
constexpr int kExitResource = 4;
constexpr int kExitSaved = 85;
constexpr int kExitNotExecutable = 126;  // as shells say it
constexpr int kExitNotFound = 127;
constexpr int kMaxSignalExit = 192;
constexpr absl::string_view kGateway = "gateway";

absl::Time FromMicros(int64_t us) { return us == 0 ? absl::InfinitePast() : absl::FromUnixMicros(us); }

std::string Cut(std::string text) {
  if (text.size() <= kMaxReasonBytes) return text;
  text.resize(kMaxReasonBytes);
  while (!text.empty() && !IsValidUtf8(text)) text.pop_back();
  return absl::StrCat(text, "…");
}

// A clause from the site becomes part of our sentence.
std::string WithReason(absl::string_view sentence, absl::string_view reason) {
  return reason.empty() ? std::string(sentence) : Cut(absl::StrCat(sentence, ": ", reason));
}

Record Event(EventKind kind, const JobSnapshot& job, std::string message, absl::Time now, absl::string_view actor) {
  Record out;
  out.event.kind = kind;
  out.event.time = now;
  out.event.attempt = job.record.attempt;
  out.event.message = Cut(std::move(message));
  out.event.actor = std::string(actor);
  return out;
}

Record SiteEvent(EventKind kind, const JobSnapshot& job, std::string message, absl::Time now) {
  Record out = Event(kind, job, std::move(message), now, absl::StrCat("site:", job.record.site));
  if (job.seen) out.update = UpdateFrom(*job.seen);
  return out;
}

Record Fail(const JobSnapshot& job, FailureClass failure, std::string message, absl::Time now) {
  Record out = Event(EventKind::kFailed, job, std::move(message), now, kGateway);
  out.event.failure = failure;
  if (job.record.attempt > 0) {
    out.update.failure = failure;
    out.update.reason = out.event.message;
  }
  return out;
}

bool AbsenceConfirmed(const JobSnapshot& job) {
  return job.absences >= kAbsencesNeeded && job.last_absence - job.first_absence >= kAbsencesApart;
}

bool Due(const Errand& errand, absl::Time now) {
  return !errand.under_way && !errand.done && now >= errand.not_before;
}

std::string SignalName(int signal) {
  const char* abbreviation = sigabbrev_np(signal);
  const char* description = sigdescr_np(signal);
  return absl::StrCat(abbreviation ? absl::StrCat("SIG", abbreviation) : absl::StrCat("signal ", signal),
                      description ? absl::StrCat(" (", description, ")") : "");
}

// ---- the end of an attempt ----

// Whether and why the attempt failed, before budgets and cancel have their say.
struct Finding {
  enum class Kind { kSucceeded, kSaved, kCancelled, kFailed };
  Kind kind = Kind::kFailed;
  FailureClass failure = FailureClass::kUnknown;
  std::string sentence;
};

// Rank, host and step of the first failure, by the result record, else by what the launcher printed.
std::string Where(const ResultRecord* result, const JobSnapshot& job) {
  const std::vector<std::string> nodes(job.seen->nodes().begin(), job.seen->nodes().end());
  const FailureSigns signs = ReadSigns(job.collected ? job.collected->stderr_tail : "", nodes);
  std::vector<std::string> parts;
  if (result != nullptr && result->rank) {
    parts.push_back(absl::StrCat("rank ", *result->rank));
  } else if (signs.rank) {
    parts.push_back(absl::StrCat("rank ", *signs.rank));
  }
  if (result != nullptr && !result->host.empty()) {
    parts.push_back(absl::StrCat("host ", result->host));
  } else if (!signs.host.empty()) {
    parts.push_back(absl::StrCat("host ", signs.host));
  } else if (nodes.size() == 1) {
    parts.push_back(absl::StrCat("host ", nodes[0]));
  }
  if (result != nullptr && result->step) parts.push_back(absl::StrCat("step ", *result->step));
  return parts.empty() ? "" : absl::StrCat(" (", absl::StrJoin(parts, ", "), ")");
}

// The program's own words where it left any, else the end of its standard error.
std::string Explain(std::string sentence, const ResultRecord* result, const JobSnapshot& job) {
  const std::string where = Where(result, job);
  if (result != nullptr && !result->message.empty()) return absl::StrCat(sentence, ": ", result->message, where);
  absl::StrAppend(&sentence, where);
  const std::string tail(job.collected ? absl::StripAsciiWhitespace(job.collected->stderr_tail) : "");
  if (tail.empty()) return absl::StrCat(sentence, "; it wrote nothing to standard error");
  std::vector<std::string> lines = absl::StrSplit(tail, '\n');
  if (lines.size() > 8) lines.erase(lines.begin(), lines.end() - 8);
  std::string last = absl::StrJoin(lines, "\n");
  if (last.size() > 1200) last = absl::StrCat("…", last.substr(last.size() - 1200));
  while (!IsValidUtf8(last)) {
    const auto bad = std::find_if(last.begin(), last.end(), [](char c) { return static_cast<unsigned char>(c) >= 0x80; });
    if (bad == last.end()) break;
    *bad = '?';
  }
  return absl::StrCat(sentence, ". Last lines of standard error:\n", last);
}

Finding FindSignal(int signal, const ResultRecord* result, const JobSnapshot& job) {
  std::string sentence = absl::StrCat("the program was ended by ", SignalName(signal));
  if (signal == SIGKILL) {
    absl::StrAppend(&sentence, "; often the system was out of memory: ask for more memory or fewer ranks per node");
  }
  return {Finding::Kind::kFailed, FailureClass::kApp, Explain(std::move(sentence), result, job)};
}

// Every output that the result lists is here with that hash; else which one is not.
std::string MissingOutput(const ResultRecord& result, const JobSnapshot& job) {
  for (const v1::OutputFile& listed : result.outputs) {
    const auto here = std::find_if(job.collected->outputs.begin(), job.collected->outputs.end(),
                                   [&](const v1::OutputFile& file) { return file.path() == listed.path(); });
    if (here == job.collected->outputs.end()) return absl::StrCat("'", listed.path(), "' is missing");
    if (!listed.sha256().empty() && here->sha256() != listed.sha256()) {
      return absl::StrCat("'", listed.path(), "' is not the file that was written (SHA-256 ", here->sha256(),
                          " instead of ", listed.sha256(), ")");
    }
  }
  return "";
}

Finding FindExit(int code, const absl::StatusOr<ResultRecord>& parsed, const JobSnapshot& job) {
  using Kind = Finding::Kind;
  const ResultRecord* result = parsed.ok() ? &*parsed : nullptr;
  if (code == kExitSaved) return {Kind::kSaved, FailureClass::kLimit, "it saved its state and asked to be continued"};
  if (code == 0) {
    if (result == nullptr) {
      // Our worker writes its own; for other programs the script does, after they have ended.
      return {Kind::kFailed, job.train ? FailureClass::kApp : FailureClass::kInfra,
              Explain(absl::StrCat("the program ended with 0, but ", parsed.status().message()), nullptr, job)};
    }
    if (result->outcome == "saved") return {Kind::kSaved, FailureClass::kLimit, "it saved its state and asked to be continued"};
    if (result->outcome != "succeeded") {
      return {Kind::kFailed, FailureClass::kApp,
              Explain("the program ended with 0, but its result record says that it failed", result, job)};
    }
    const std::string missing = job.collected ? MissingOutput(*result, job) : "";
    if (!missing.empty()) {
      return {Kind::kFailed, FailureClass::kInfra, absl::StrCat("an output could not be brought back: ", missing)};
    }
    return {Kind::kSucceeded, FailureClass::kNone, ""};
  }
  if (code > 128 && code < kMaxSignalExit && sigabbrev_np(code - 128) != nullptr) {
    return FindSignal(code - 128, result, job);  // a launcher or shell that reports its child's end
  }
  FailureClass failure = FailureClass::kApp;
  absl::string_view what = "the program failed";
  if (code == kExitUser) {
    failure = FailureClass::kUser;
    what = "the request cannot work";
  } else if (code == kExitApp) {
    what = job.train ? "the training failed" : "the program failed";
  } else if (code == kExitResource) {
    failure = FailureClass::kResource;
    what = "out of memory or disk space";
  } else if (result != nullptr && result->failure != FailureClass::kNone) {
    failure = result->failure;
  } else if (code == kExitNotFound || code == kExitNotExecutable) {
    what = "the program could not be started";
  }
  return {Kind::kFailed, failure, Explain(absl::StrCat(what, " (exit code ", code, ")"), result, job)};
}

Finding FindEnd(const JobSnapshot& job, const absl::StatusOr<ResultRecord>& parsed) {
  using Kind = Finding::Kind;
  const AttemptStatus& status = *job.seen;
  const ResultRecord* result = parsed.ok() ? &*parsed : nullptr;
  const auto said = [&](absl::string_view sentence) { return WithReason(sentence, status.reason()); };
  switch (static_cast<int>(status.cause())) {
    case agent::v1::END_CAUSE_EXITED:
      if (status.signal() != 0) return FindSignal(status.signal(), result, job);
      if (status.has_exit_code()) return FindExit(status.exit_code(), parsed, job);
      return {Kind::kFailed, FailureClass::kUnknown, said("it ended, but nobody knows how")};
    case agent::v1::END_CAUSE_CANCELLED:
    case agent::v1::END_CAUSE_CANCELLED_EXTERNALLY:
      // A program that was asked to go may still have finished, or saved.
      if (status.has_exit_code() && status.exit_code() == 0 && status.signal() == 0 && result != nullptr) {
        const Finding exit = FindExit(0, parsed, job);
        if (exit.kind == Kind::kSucceeded) return exit;
      }
      if (status.cause() == agent::v1::END_CAUSE_CANCELLED) return {Kind::kCancelled, FailureClass::kUnknown, said("cancelled")};
      return {Kind::kFailed, FailureClass::kUnknown,
              said("somebody cancelled it at the site, outside of this service; submit it again with `itwin retry` if it "
                   "is still wanted")};
    case agent::v1::END_CAUSE_TIME_LIMIT:
      if (status.has_exit_code() && status.signal() == 0 && status.exit_code() == 0 && result != nullptr) {
        return FindExit(0, parsed, job);
      }
      return {Kind::kFailed, FailureClass::kLimit, said("the time limit of the attempt was reached")};
    case agent::v1::END_CAUSE_OUT_OF_MEMORY:
      return {Kind::kFailed, FailureClass::kResource,
              said("it used more memory than it had; ask for more with resources.memory_mib_per_node, or use a "
                   "smaller batch")};
    case agent::v1::END_CAUSE_PREEMPTED:
      return {Kind::kFailed, FailureClass::kPreempted, said("the site took the nodes for other work")};
    case agent::v1::END_CAUSE_NODE_FAILED:
      return {Kind::kFailed, FailureClass::kInfra, said("a node failed")};
    case agent::v1::END_CAUSE_LOST:
      return {Kind::kFailed, FailureClass::kInfra, said("its processes vanished without a word")};
    case agent::v1::END_CAUSE_LAUNCH_FAILED:
      return {Kind::kFailed, FailureClass::kUser, Explain(said("the program could not be started"), result, job)};
    case agent::v1::END_CAUSE_DEADLINE:
      return {Kind::kFailed, FailureClass::kLimit,
              said("its deadline at the site (sbatch --deadline) has passed, so it is not continued")};
    default:
      return {Kind::kFailed, FailureClass::kUnknown, said("it ended, but the site does not say how")};
  }
}

// Nodes that broke the attempt: what the site says, and what the program's last words give away. The latter turn a failure
// of the program into one of the infrastructure, which another node may well cure.
std::vector<std::string> BlameNodes(const JobSnapshot& job, const absl::StatusOr<ResultRecord>& parsed, Finding* finding) {
  std::vector<std::string> bad(job.seen->bad_nodes().begin(), job.seen->bad_nodes().end());
  const bool by_the_program = finding->kind == Finding::Kind::kFailed && finding->failure == FailureClass::kApp;
  if (by_the_program || finding->failure == FailureClass::kInfra) {
    const std::vector<std::string> nodes(job.seen->nodes().begin(), job.seen->nodes().end());
    const FailureSigns signs = ReadSigns(absl::StrCat(job.collected ? job.collected->stderr_tail : "", "\n",
                                                      parsed.ok() ? parsed->message : ""),
                                         nodes);
    if (by_the_program && !signs.hardware.empty()) {
      finding->failure = FailureClass::kInfra;
      finding->sentence = absl::StrCat("broken hardware ('", signs.hardware, "'): ", finding->sentence);
    }
    std::string node = signs.bad_node;
    if (!signs.hardware.empty() && node.empty() && parsed.ok()) node = parsed->host;
    if (!node.empty() && std::find(bad.begin(), bad.end(), node) == bad.end()) bad.push_back(node);
  }
  return finding->failure == FailureClass::kInfra ? bad : std::vector<std::string>();
}

// After its end: succeeded, or again, or the last word.
std::vector<Action> Conclude(const JobSnapshot& job, absl::Time now) {
  const JobRecord& record = job.record;
  const AttemptKey key(job.id, record.attempt);
  const bool ended = job.seen && job.seen->phase() == agent::v1::ATTEMPT_PHASE_ENDED;

  absl::StatusOr<ResultRecord> parsed = absl::NotFoundError("it left no result record");
  if (ended && !job.seen->result_json().empty()) parsed = ParseResult(job.seen->result_json(), key);
  Finding finding;
  if (!ended) {
    finding = {Finding::Kind::kFailed, FailureClass::kInfra,
               "the site does not know the attempt any more: its spool was removed or lost"};
  } else {
    finding = FindEnd(job, parsed);
    if (finding.kind == Finding::Kind::kSucceeded && !job.collected) {
      finding = {Finding::Kind::kFailed, FailureClass::kInfra,
                 absl::StrCat("the outputs could not be brought back whole: ", job.collect.last.message())};
    }
  }

  AttemptUpdate update;
  if (ended) update = UpdateFrom(*job.seen);
  if (ended) update.bad_nodes = BlameNodes(job, parsed, &finding);
  if (job.collected) update.outputs = job.collected->outputs;
  int64_t reached = job.max_step;
  if (parsed.ok()) {
    if (!parsed->metrics.empty()) update.summary = parsed->metrics;
    reached = std::max(reached, parsed->steps);
    update.max_step = reached;
  }
  // Further, and it will not have to be done again: saved here, or by a program that says it keeps its state elsewhere.
  const bool further = reached > job.max_step_before;
  const bool checkpoint = ended && job.seen->checkpoint();
  const bool progress = (checkpoint && (further || !job.train)) || (finding.kind == Finding::Kind::kSaved && further);
  const auto finish = [&](EventKind kind, std::string message, FailureClass failure) {
    Record out = Event(kind, job, std::move(message), now, kGateway);
    out.event.failure = failure;
    out.event.progress = progress;
    out.update = update;
    out.update.failure = failure;
    out.update.reason = out.event.message;
    return out;
  };

  if (finding.kind == Finding::Kind::kSucceeded) {
    std::vector<Action> actions;
    if (record.cancel_requested) {
      actions.push_back(Event(EventKind::kNote, job, "it had finished before the cancel request took effect; its result stands",
                              now, kGateway));
    }
    actions.push_back(finish(EventKind::kSucceeded, "finished successfully", FailureClass::kNone));
    return actions;
  }
  if (record.cancel_requested) {
    return {finish(EventKind::kCancelled, "cancelled on request", FailureClass::kNone)};
  }

  const absl::string_view from = checkpoint             ? "goes on from its checkpoint"
                                 : job.older_checkpoint ? "goes on from the checkpoint of an attempt before"
                                                        : "is started again";
  std::string away;
  if (update.bad_nodes && !update.bad_nodes->empty()) {
    away = absl::StrCat(", away from ", absl::StrJoin(*update.bad_nodes, ", "));
  }
  const auto stop = [&](std::string message) {
    return std::vector<Action>{finish(EventKind::kFailed, std::move(message), finding.failure)};
  };
  const auto within = [&](int used, int budget, absl::Duration wait) {
    if (used < budget) {
      Record out = finish(EventKind::kRequeued,
                          absl::StrCat(finding.sentence, "; it ", from, away, " (", used + 1, " of ", budget, ")"),
                          finding.failure);
      out.event.not_before = now + wait;
      return std::vector<Action>{out};
    }
    return stop(budget == 0 ? finding.sentence
                            : absl::StrCat(finding.sentence, "; it was started again ", budget,
                                           budget == 1 ? " time" : " times", " already"));
  };
  // Goes on from the checkpoint; a chain that does not move is stopped.
  const auto go_on = [&](absl::string_view sentence) {
    if (!progress && record.attempts_without_progress >= 1) {
      return stop(absl::StrCat(sentence, ", but two attempts in a row made no progress beyond step ", job.max_step_before,
                               " that was saved; give it more time with resources.time, and see that it saves in time and "
                               "reports its steps"));
    }
    Record out = finish(EventKind::kRequeued, absl::StrCat(sentence, "; it ", from), FailureClass::kLimit);
    out.event.not_before = now;
    return std::vector<Action>{out};
  };

  switch (finding.kind) {
    case Finding::Kind::kSaved:
      return go_on(finding.sentence);
    case Finding::Kind::kCancelled:
      finding.failure = FailureClass::kUnknown;
      return stop("the site says that we cancelled it, but nobody asked for that");
    case Finding::Kind::kSucceeded:
    case Finding::Kind::kFailed:
      break;
  }
  switch (finding.failure) {
    case FailureClass::kInfra:
      return within(record.retries_infra, job.retry.has_infra() ? job.retry.infra() : kDefaultInfraRetries,
                    Backoff(record.retries_infra, job.jitter));
    case FailureClass::kPreempted:  // the queue is the back-off
      return within(record.retries_preempted, job.retry.has_preempted() ? job.retry.preempted() : kDefaultPreemptedRetries,
                    Backoff(0, job.jitter));
    case FailureClass::kApp:
      return within(record.retries_app, job.retry.has_app() ? job.retry.app() : kDefaultAppRetries,
                    Backoff(record.retries_app, job.jitter));
    case FailureClass::kLimit:
      if (ended && job.seen->cause() == agent::v1::END_CAUSE_DEADLINE) return stop(finding.sentence);
      if (checkpoint || job.older_checkpoint) return go_on(finding.sentence);
      return stop(absl::StrCat(finding.sentence, ", and it left no checkpoint to go on from; ask for more time with "
                               "resources.time, or save more often (train.checkpoint.every_epochs)"));
    case FailureClass::kNone:
    case FailureClass::kUser:
    case FailureClass::kResource:
    case FailureClass::kUnknown:
      break;
  }
  return stop(finding.sentence);
}

// ---- before and during ----

std::vector<Action> Errands(const JobSnapshot& job, const Errand& errand, Action action, absl::Time now) {
  if (!job.connected || !Due(errand, now)) return {};
  return {std::move(action)};
}

std::vector<Action> InStaging(const JobSnapshot& job, absl::Time now) {
  if (job.staging.done) {
    return {Event(EventKind::kStaged, job, "its inputs are at the site; it is handed to the scheduler", now, kGateway)};
  }
  if (job.staging.failures > 0 && !job.staging.under_way) {
    const std::string why(job.staging.last.message());
    const absl::StatusCode code = job.staging.last.code();
    if (code == absl::StatusCode::kNotFound || code == absl::StatusCode::kInvalidArgument) {
      return {Fail(job, FailureClass::kUser, absl::StrCat("its inputs cannot be sent: ", why), now)};
    }
    if ((code == absl::StatusCode::kDataLoss || code == absl::StatusCode::kFailedPrecondition) &&
        job.staging.failures >= kMaxTriesOnDamage) {
      const int budget = job.retry.has_infra() ? job.retry.infra() : kDefaultInfraRetries;
      if (job.record.retries_infra >= budget) {
        return {Fail(job, FailureClass::kInfra, absl::StrCat("its inputs do not arrive whole: ", why), now)};
      }
      Record out = Event(EventKind::kRequeued, job, absl::StrCat("its inputs do not arrive whole, trying again: ", why), now,
                         kGateway);
      out.event.failure = FailureClass::kInfra;
      out.event.not_before = now + Backoff(job.record.retries_infra, job.jitter);
      return {out};
    }
    if (code == absl::StatusCode::kResourceExhausted) {
      // Waits for room where everybody can see why; a full disk fails no job.
      Record out = Event(EventKind::kRequeued, job, absl::StrCat("no space at the site for its inputs, trying again later: ", why),
                         now, kGateway);
      out.event.failure = FailureClass::kResource;
      out.event.not_before = now + Backoff(job.record.retries_other, job.jitter);
      return {out};
    }
  }
  return Errands(job, job.staging, StageInputs{}, now);
}

// Events for what the site says about an attempt that it knows.
std::vector<Action> Follow(const JobSnapshot& job, absl::Time now) {
  using S = JobState;
  const JobState state = job.record.state;
  const AttemptStatus& status = *job.seen;
  const auto in = [state](std::initializer_list<S> states) {
    return std::find(states.begin(), states.end(), state) != states.end();
  };
  const auto event = [&](EventKind kind, absl::string_view sentence) {
    return SiteEvent(kind, job, WithReason(sentence, status.reason()), now);
  };
  const std::string running = absl::StrCat("runs", status.host().empty() ? "" : " on ", status.host());
  switch (static_cast<int>(status.phase())) {
    case agent::v1::ATTEMPT_PHASE_PENDING:
      if (in({S::kSubmitting, S::kSubmitUnknown, S::kStateUnknown})) {
        return {SiteEvent(EventKind::kAccepted, job, WaitingWords(status, now), now)};
      }
      if (in({S::kHeld})) return {event(EventKind::kReleased, "released; waits in the site's queue")};
      return {};
    case agent::v1::ATTEMPT_PHASE_HELD:
      if (in({S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kStateUnknown})) {
        return {SiteEvent(EventKind::kHeld, job, WaitingWords(status, now), now)};
      }
      return {};
    case agent::v1::ATTEMPT_PHASE_RUNNING:
      if (in({S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kHeld, S::kStateUnknown, S::kSuspended})) {
        return {SiteEvent(EventKind::kStarted, job, running, now)};  // why it waited is over
      }
      return {};
    case agent::v1::ATTEMPT_PHASE_SUSPENDED:
      if (in({S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kHeld})) {
        return {SiteEvent(EventKind::kStarted, job, running, now), event(EventKind::kSuspended, "the site has stopped it for a while")};
      }
      if (in({S::kRunning, S::kStateUnknown})) return {event(EventKind::kSuspended, "the site has stopped it for a while")};
      return {};
    case agent::v1::ATTEMPT_PHASE_ENDED: {
      std::vector<Action> actions;
      if (status.started_us() != 0 && in({S::kSubmitting, S::kSubmitUnknown, S::kPending, S::kHeld})) {
        actions.push_back(SiteEvent(EventKind::kStarted, job, running, now));
      }
      actions.push_back(event(EventKind::kEnded, "has ended; its result comes back"));
      return actions;
    }
    case agent::v1::ATTEMPT_PHASE_UNKNOWN:
      if (in({S::kPending, S::kHeld, S::kRunning, S::kSuspended})) {
        return {event(EventKind::kStateUnclear, "the site cannot say how it is")};
      }
      return {};
    default:
      return {};
  }
}

bool KnownAtSite(const JobSnapshot& job) {
  return job.seen && job.seen->phase() != agent::v1::ATTEMPT_PHASE_ABSENT &&
         job.seen->phase() != agent::v1::ATTEMPT_PHASE_UNSPECIFIED;
}

bool SeenEnded(const JobSnapshot& job) {
  return job.seen && job.seen->phase() == agent::v1::ATTEMPT_PHASE_ENDED;
}

std::vector<Action> InSubmitting(const JobSnapshot& job, absl::Time now) {
  if (KnownAtSite(job)) {
    std::vector<Action> events = Follow(job, now);
    if (!events.empty()) return events;
  }
  const bool clear = job.record.state == JobState::kSubmitting;
  if (job.record.cancel_requested) {
    if (job.barred) return {Event(EventKind::kCancelled, job, "cancelled on request, before it was started", now, kGateway)};
    return Errands(job, job.cancel, CancelTheAttempt{}, now);
  }
  if (job.start.failures > 0 && !job.start.under_way) {
    if (IsRefusal(job.start.last)) {
      // An earlier call of which we have no answer may still arrive there: the bar makes the refusal final.
      if (!job.barred) return Errands(job, job.cancel, CancelTheAttempt{}, now);
      return {Fail(job, FailureClass::kUser, absl::StrCat("the site refused it: ", job.start.last.message()), now)};
    }
    if (clear) {
      return {Event(EventKind::kSubmitUnclear, job,
                    absl::StrCat("the site has not confirmed it, asking again: ", job.start.last.message()), now, kGateway)};
    }
  }
  return Errands(job, job.start, StartTheAttempt{}, now);
}

// Nothing depends on it: what does not work is tried again, and forgotten when the attempt ends.
std::vector<Action> InTracing(const JobSnapshot& job, absl::Time now) {
  if (job.trace) {
    Record out = SiteEvent(EventKind::kTraced, job,
                           absl::StrCat("the trace is among the outputs: ", job.trace->path(), "; open it at ui.perfetto.dev"), now);
    out.update.early_output = *job.trace;
    return {out};
  }
  const absl::StatusCode problem = job.tracing.failures > 0 ? job.tracing.last.code() : absl::StatusCode::kOk;
  if (problem == absl::StatusCode::kUnimplemented || problem == absl::StatusCode::kInvalidArgument) {
    return {SiteEvent(EventKind::kTraced, job,
                      absl::StrCat("the site's agent takes no traces (", job.tracing.last.message(),
                                   "); it may be older than the gateway: itwin site doctor ", job.record.site),
                      now)};
  }
  return Errands(job, job.tracing, TakeTrace{}, now);
}

std::vector<Action> AtSite(const JobSnapshot& job, absl::Time now) {
  if (KnownAtSite(job)) {
    std::vector<Action> events = Follow(job, now);
    if (!events.empty()) return events;
  }
  if (AbsenceConfirmed(job)) {
    return {Event(EventKind::kEnded, job, "the site does not know it any more", now, kGateway)};
  }
  if (job.record.cancel_requested) return Errands(job, job.cancel, CancelTheAttempt{}, now);
  if (job.record.trace_steps > 0 && job.record.state == JobState::kRunning) return InTracing(job, now);
  return {};
}

std::vector<Action> InCollecting(const JobSnapshot& job, absl::Time now) {
  if (!job.connected) return {};
  if (!SeenEnded(job)) return AbsenceConfirmed(job) ? Conclude(job, now) : std::vector<Action>{};
  if (!job.drained) return {};
  if (job.collected) return Conclude(job, now);
  const bool damaged = job.collect.failures >= kMaxTriesOnDamage && !job.collect.under_way &&
                       (job.collect.last.code() == absl::StatusCode::kDataLoss ||
                        job.collect.last.code() == absl::StatusCode::kInvalidArgument ||
                        job.collect.last.code() == absl::StatusCode::kNotFound ||
                        job.collect.last.code() == absl::StatusCode::kFailedPrecondition);
  if (damaged) return Conclude(job, now);
  return Errands(job, job.collect, CollectOutputs{}, now);
}

}  // namespace

std::vector<Action> Reconcile(const JobSnapshot& job, absl::Time now) {
  const bool cancel = job.record.cancel_requested;
  switch (job.record.state) {
    case JobState::kQueued:
      if (cancel) return {Event(EventKind::kCancelled, job, "cancelled on request, before it was placed", now, kGateway)};
      return {};
    case JobState::kStaging:
      if (cancel) return {Event(EventKind::kCancelled, job, "cancelled on request, before it was started", now, kGateway)};
      return InStaging(job, now);
    case JobState::kSubmitting:
    case JobState::kSubmitUnknown:
      return InSubmitting(job, now);
    case JobState::kPending:
    case JobState::kHeld:
    case JobState::kRunning:
    case JobState::kSuspended:
    case JobState::kStateUnknown:
      return AtSite(job, now);
    case JobState::kCollecting:
      return InCollecting(job, now);
    case JobState::kSucceeded:
    case JobState::kFailed:
    case JobState::kCancelled:
      return {};
  }
  return {};
}

absl::StatusOr<ResultRecord> ParseResult(const std::string& text, const AttemptKey& attempt) {
  const auto wrong = [](absl::string_view what) {
    return absl::DataLossError(absl::StrCat("its result record cannot be read: ", what));
  };
  if (!IsValidUtf8(text)) return wrong("it is not valid UTF-8");
  const json document = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!document.is_object()) return wrong("it is not a JSON object");
  const auto string_of = [](const json& object, const char* key) {
    const auto found = object.find(key);
    return found != object.end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  const auto integer_of = [](const json& object, const char* key) -> std::optional<int64_t> {
    const auto found = object.find(key);
    if (found == object.end() || !found->is_number_integer()) return std::nullopt;
    return found->get<int64_t>();
  };

  ResultRecord out;
  const std::string of = string_of(document, "attempt");
  if (!of.empty() && of != attempt.text()) return wrong(absl::StrCat("it is that of attempt ", of));
  out.outcome = string_of(document, "outcome");
  if (out.outcome != "succeeded" && out.outcome != "failed" && out.outcome != "saved") {
    return wrong("'outcome' must be succeeded, failed or saved");
  }
  out.message = string_of(document, "message");
  out.steps = std::max<int64_t>(0, integer_of(document, "steps").value_or(0));
  if (const auto metrics = document.find("metrics"); metrics != document.end() && metrics->is_object()) {
    for (const auto& [name, value] : metrics->items()) {
      if (value.is_number()) out.metrics[name] = value.get<double>();
      if (value == "NaN") out.metrics[name] = std::nan("");
      if (value == "Infinity") out.metrics[name] = HUGE_VAL;
      if (value == "-Infinity") out.metrics[name] = -HUGE_VAL;
    }
  }
  if (const auto outputs = document.find("outputs"); outputs != document.end()) {
    if (!outputs->is_array()) return wrong("'outputs' is not a list");
    for (const json& entry : *outputs) {
      if (!entry.is_object()) return wrong("an entry of 'outputs' is not an object");
      v1::OutputFile& file = out.outputs.emplace_back();
      file.set_path(string_of(entry, "path"));
      file.set_sha256(string_of(entry, "sha256"));
      file.set_size_bytes(integer_of(entry, "size").value_or(0));
      if (const absl::Status path = CheckRelativePath(file.path()); !path.ok()) return wrong(path.message());
      if (!file.sha256().empty() && !IsSha256Hex(file.sha256())) return wrong("a 'sha256' in 'outputs' is not one");
    }
  }
  if (const auto failure = document.find("failure"); failure != document.end() && failure->is_object()) {
    const std::string name = string_of(*failure, "class");
    if (name == "user") out.failure = FailureClass::kUser;
    if (name == "app") out.failure = FailureClass::kApp;
    if (name == "resource") out.failure = FailureClass::kResource;
    if (name == "infra") out.failure = FailureClass::kInfra;
    out.rank = integer_of(*failure, "rank");
    out.step = integer_of(*failure, "step");
    out.host = string_of(*failure, "host");
  }
  return out;
}

absl::Duration Backoff(int retry, double jitter) {
  absl::Duration wait = kFirstBackoff;
  for (int i = 0; i < retry && wait < kMaxBackoff; ++i) wait *= 4;
  return std::min(kMaxBackoff, std::min(wait, kMaxBackoff) * (0.5 + std::clamp(jitter, 0.0, 1.0)));
}

std::string ResumeFrom(const JobId& job, const std::vector<AttemptRow>& attempts, int number,
                       const std::optional<AttemptKey>& first) {
  for (auto attempt = attempts.rbegin(); attempt != attempts.rend(); ++attempt) {
    if (attempt->number < number && attempt->checkpoint) return AttemptKey(job, attempt->number).text();
  }
  return first ? first->text() : "";
}

std::string WaitingWords(const AttemptStatus& status, absl::Time now) {
  std::string out = WithReason(status.phase() == agent::v1::ATTEMPT_PHASE_HELD
                                   ? "held in the site's queue until somebody releases it"
                                   : "waits in the site's queue",
                               status.reason());
  const absl::Time start = FromMicros(status.expected_start_us());
  if (start > now) {
    absl::StrAppend(&out, "; expected to start about ", absl::FormatTime("%Y-%m-%d %H:%M UTC", start, absl::UTCTimeZone()));
  }
  return out;
}

AttemptUpdate UpdateFrom(const AttemptStatus& status) {
  AttemptUpdate update;
  if (!status.scheduler_id().empty()) update.scheduler_id = status.scheduler_id();
  if (status.submitted_us() != 0) update.submitted = FromMicros(status.submitted_us());
  if (status.started_us() != 0) update.started = FromMicros(status.started_us());
  if (!status.host().empty()) update.host = status.host();
  if (status.checkpoint()) update.checkpoint = true;
  if (status.phase() == agent::v1::ATTEMPT_PHASE_ENDED) {
    if (status.ended_us() != 0) update.ended = FromMicros(status.ended_us());
    update.cause = status.cause();
    if (status.has_exit_code()) update.exit_code = status.exit_code();
    update.signal = status.signal();
    if (status.cpu_seconds() > 0) update.cpu_seconds = status.cpu_seconds();
    if (status.max_rss_bytes() > 0) update.max_rss_bytes = status.max_rss_bytes();
    if (!status.result_json().empty()) update.result_json = status.result_json();
    update.final_sizes = status.sizes();
  } else if (!status.reason().empty()) {
    update.reason = status.reason();
  }
  return update;
}

bool IsRefusal(const absl::Status& status) {
  return status.code() == absl::StatusCode::kFailedPrecondition ||
         status.code() == absl::StatusCode::kInvalidArgument || status.code() == absl::StatusCode::kNotFound;
}

}  // namespace itwin::server
