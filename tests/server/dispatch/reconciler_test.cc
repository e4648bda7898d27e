#include "server/dispatch/reconciler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using S = JobState;

const absl::Time kNow = absl::FromUnixSeconds(1'700'000'000);
constexpr char kJob[] = "0123456789abcdef";

JobId TheJob() { return *JobId::Parse(kJob); }

std::string ResultJson(const std::string& outcome, const std::string& rest = "") {
  return absl::StrCat(R"({"format":1,"attempt":")", kJob, R"(-1","outcome":")", outcome, R"(","steps":100)", rest, "}");
}

// A job whose site says nothing special; rows change what matters to them.
JobSnapshot In(JobState state) {
  JobSnapshot job;
  job.id = TheJob();
  job.record.state = state;
  job.record.attempt = state == S::kQueued ? 0 : 1;
  job.record.site = "vega";
  job.connected = true;
  return job;
}

agent::v1::AttemptStatus Says(agent::v1::AttemptPhase phase) {
  agent::v1::AttemptStatus status;
  status.set_attempt(absl::StrCat(kJob, "-1"));
  status.set_phase(phase);
  return status;
}

JobSnapshot In(JobState state, agent::v1::AttemptPhase phase) {
  JobSnapshot job = In(state);
  job.seen = Says(phase);
  return job;
}

// Ended, drained and collected: ready for the verdict.
JobSnapshot Over(agent::v1::EndCause cause, std::optional<int> exit_code, const std::string& result = "") {
  JobSnapshot job = In(S::kCollecting, agent::v1::ATTEMPT_PHASE_ENDED);
  job.seen->set_cause(cause);
  if (exit_code) job.seen->set_exit_code(*exit_code);
  job.seen->set_result_json(result);
  job.drained = true;
  job.collected = Collected{};
  job.max_step = 100;
  return job;
}
JobSnapshot Exited(int code, const std::string& result = "") {
  return Over(agent::v1::END_CAUSE_EXITED, code, result);
}
template <typename F>
JobSnapshot With(JobSnapshot job, F change) {
  change(job);
  return job;
}

std::string Describe(const std::vector<Action>& actions) {
  std::vector<std::string> words;
  for (const Action& action : actions) {
    if (const Record* record = std::get_if<Record>(&action)) {
      words.push_back(std::string(Name(record->event.kind)));
      if (record->event.failure != FailureClass::kNone) {
        words.back() += absl::StrCat("(", std::string(Name(record->event.failure)), ")");
      }
    } else if (std::holds_alternative<StageInputs>(action)) {
      words.push_back("STAGE");
    } else if (std::holds_alternative<StartTheAttempt>(action)) {
      words.push_back("START");
    } else if (std::holds_alternative<CancelTheAttempt>(action)) {
      words.push_back("CANCEL");
    } else if (std::holds_alternative<TakeTrace>(action)) {
      words.push_back("TRACE");
    } else {
      words.push_back("COLLECT");
    }
  }
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : " ") + word;
  return out;
}

const JobEvent& Only(const std::vector<Action>& actions) {
  EXPECT_EQ(actions.size(), 1u);
  return std::get<Record>(actions.back()).event;
}

Errand Failed(absl::Status why, int failures = 1) {
  Errand errand;
  errand.failures = failures;
  errand.last = std::move(why);
  return errand;
}

struct Row {
  const char* name;
  JobSnapshot job;
  const char* expected;
};

JobSnapshot Traced(JobState state) {
  return With(In(state, agent::v1::ATTEMPT_PHASE_RUNNING), [](auto& j) {
    j.record.trace_steps = 20;
    j.record.traces = 1;
  });
}
void Cancel(JobSnapshot& job) { job.record.cancel_requested = true; }
void Absent(JobSnapshot& job) {
  job.absences = 2;
  job.first_absence = kNow - absl::Seconds(3);
  job.last_absence = kNow;
}

TEST(Reconciler, Table) {
  using namespace agent::v1;  // NOLINT: the phases' names
  const auto cancel = [](JobSnapshot job) { return With(std::move(job), Cancel); };
  const Row rows[] = {
      {"queued waits for placement", In(S::kQueued), ""},
      {"a trace is wanted", Traced(S::kRunning), "TRACE"},
      {"a trace is wanted, but so is the end", cancel(Traced(S::kRunning)), "CANCEL"},
      {"a trace is being asked for", With(Traced(S::kRunning), [](auto& j) { j.tracing.under_way = true; }), ""},
      {"a trace is asked for again later", With(Traced(S::kRunning), [](auto& j) { j.tracing.not_before = kNow + kTraceInterval; }), ""},
      {"a trace waits for the connection", With(Traced(S::kRunning), [](auto& j) { j.connected = false; }), ""},
      {"a trace is here", With(Traced(S::kRunning), [](auto& j) { j.trace.emplace().set_path("trace-1.json"); }), "traced"},
      {"a trace failed for want of a connection", With(Traced(S::kRunning), [](auto& j) { j.tracing = Failed(absl::UnavailableError("x")); }), "TRACE"},
      {"the agent knows no traces", With(Traced(S::kRunning), [](auto& j) { j.tracing = Failed(absl::UnimplementedError("x")); }), "traced"},
      {"a trace of a job that ends", With(Traced(S::kRunning), [](auto& j) { j.seen->set_phase(ATTEMPT_PHASE_ENDED); }), "ended"},
      {"queued and cancelled", cancel(In(S::kQueued)), "cancelled"},
      {"staging begins", In(S::kStaging), "STAGE"},
      {"staging under way", With(In(S::kStaging), [](auto& j) { j.staging.under_way = true; }), ""},
      {"staging done is recorded before anything starts", With(In(S::kStaging), [](auto& j) { j.staging.done = true; }), "staged"},
      {"staging waits for the site", With(In(S::kStaging), [](auto& j) { j.connected = false; }), ""},
      {"staging failed for want of a connection", With(In(S::kStaging), [](auto& j) { j.staging = Failed(absl::UnavailableError("x")); }), "STAGE"},
      {"staging backs off", With(In(S::kStaging), [](auto& j) { j.staging = Failed(absl::UnavailableError("x")); j.staging.not_before = kNow + absl::Seconds(1); }), ""},
      {"an input we do not have", With(In(S::kStaging), [](auto& j) { j.staging = Failed(absl::NotFoundError("x")); }), "failed(user)"},
      {"no room for inputs", With(In(S::kStaging), [](auto& j) { j.staging = Failed(absl::ResourceExhaustedError("x")); }), "requeued(resource)"},
      {"inputs damaged on the way, again and again", With(In(S::kStaging), [](auto& j) { j.staging = Failed(absl::DataLossError("x"), 3); }), "requeued(infra)"},
      {"staging and cancelled", cancel(In(S::kStaging)), "cancelled"},
      {"intent recorded: start", In(S::kSubmitting), "START"},
      {"not connected: no start", With(In(S::kSubmitting), [](auto& j) { j.connected = false; }), ""},
      {"start under way", With(In(S::kSubmitting), [](auto& j) { j.start.under_way = true; }), ""},
      {"start refused: bar it, an earlier call may still arrive", With(In(S::kSubmitting), [](auto& j) { j.start = Failed(absl::FailedPreconditionError("no")); }), "CANCEL"},
      {"start refused and barred", With(In(S::kSubmitting), [](auto& j) { j.start = Failed(absl::FailedPreconditionError("no")); j.barred = true; }), "failed(user)"},
      {"start unclear", With(In(S::kSubmitting), [](auto& j) { j.start = Failed(absl::DeadlineExceededError("late")); }), "submit_unclear"},
      {"unclear: the same call again", With(In(S::kSubmitUnknown), [](auto& j) { j.start = Failed(absl::DeadlineExceededError("late")); }), "START"},
      {"unclear, then refused", With(In(S::kSubmitUnknown), [](auto& j) { j.start = Failed(absl::InvalidArgumentError("no")); j.barred = true; }), "failed(user)"},
      {"unclear, but it is there", In(S::kSubmitUnknown, ATTEMPT_PHASE_PENDING), "accepted"},
      {"unclear, but it has ended", In(S::kSubmitUnknown, ATTEMPT_PHASE_ENDED), "ended"},
      {"unclear and absent, however often: only a start or a bar decides", With(In(S::kSubmitUnknown), Absent), "START"},
      {"submitting and cancelled: ask the site", cancel(In(S::kSubmitting)), "CANCEL"},
      {"submitting, cancelled, barred", cancel(With(In(S::kSubmitting), [](auto& j) { j.barred = true; })), "cancelled"},
      {"submitting, cancelled, but it runs", cancel(In(S::kSubmitting, ATTEMPT_PHASE_RUNNING)), "started"},
      {"pending", In(S::kSubmitting, ATTEMPT_PHASE_PENDING), "accepted"},
      {"held", In(S::kPending, ATTEMPT_PHASE_HELD), "held"},
      {"released", In(S::kHeld, ATTEMPT_PHASE_PENDING), "released"},
      {"started", In(S::kPending, ATTEMPT_PHASE_RUNNING), "started"},
      {"nothing new", In(S::kRunning, ATTEMPT_PHASE_RUNNING), ""},
      {"late news of the queue", In(S::kRunning, ATTEMPT_PHASE_PENDING), ""},
      {"suspended", In(S::kRunning, ATTEMPT_PHASE_SUSPENDED), "suspended"},
      {"suspended before we saw it run", In(S::kPending, ATTEMPT_PHASE_SUSPENDED), "started suspended"},
      {"goes on", In(S::kSuspended, ATTEMPT_PHASE_RUNNING), "started"},
      {"the site cannot tell", In(S::kRunning, ATTEMPT_PHASE_UNKNOWN), "state_unclear"},
      {"the site can tell again", In(S::kStateUnknown, ATTEMPT_PHASE_RUNNING), "started"},
      {"ended", In(S::kRunning, ATTEMPT_PHASE_ENDED), "ended"},
      {"ended before we saw it run", With(In(S::kPending, ATTEMPT_PHASE_ENDED), [](auto& j) { j.seen->set_started_us(5); }), "started ended"},
      {"not connected: nothing is concluded", With(In(S::kRunning), [](auto& j) { j.connected = false; }), ""},
      {"absent once", With(In(S::kRunning, ATTEMPT_PHASE_RUNNING), [](auto& j) { j.absences = 1; j.first_absence = j.last_absence = kNow; }), ""},
      {"absent twice at once", With(In(S::kRunning, ATTEMPT_PHASE_RUNNING), [](auto& j) { j.absences = 2; j.first_absence = j.last_absence = kNow; }), ""},
      {"absent for long enough", With(In(S::kRunning, ATTEMPT_PHASE_RUNNING), Absent), "ended"},
      {"running and cancelled", cancel(In(S::kRunning, ATTEMPT_PHASE_RUNNING)), "CANCEL"},
      {"cancel was asked for just now", cancel(With(In(S::kRunning, ATTEMPT_PHASE_RUNNING), [](auto& j) { j.cancel.not_before = kNow + absl::Seconds(9); })), ""},
      {"cancelled, not connected", cancel(With(In(S::kRunning), [](auto& j) { j.connected = false; })), ""},
      {"collecting waits for the last byte", In(S::kCollecting, ATTEMPT_PHASE_ENDED), ""},
      {"collecting", With(In(S::kCollecting, ATTEMPT_PHASE_ENDED), [](auto& j) { j.drained = true; }), "COLLECT"},
      {"collecting fails for want of a connection", With(Exited(0, ResultJson("succeeded")), [](auto& j) { j.collected.reset(); j.collect = Failed(absl::UnavailableError("x"), 50); }), "COLLECT"},
      {"our disk is full: it waits", With(Exited(0, ResultJson("succeeded")), [](auto& j) { j.collected.reset(); j.collect = Failed(absl::ResourceExhaustedError("x"), 50); }), "COLLECT"},
      {"outputs are damaged", With(Exited(0, ResultJson("succeeded")), [](auto& j) { j.collected.reset(); j.collect = Failed(absl::DataLossError("x"), 3); }), "requeued(infra)"},
      {"success", Exited(0, ResultJson("succeeded")), "succeeded"},
      {"success wins over cancel", cancel(Exited(0, ResultJson("succeeded"))), "note succeeded"},
      {"training without a result record", With(Exited(0), [](auto& j) { j.train = true; }), "failed(app)"},
      {"command without a result record", Exited(0), "requeued(infra)"},
      {"result record of another attempt", With(Exited(0, R"({"attempt":"0123456789abcdef-2","outcome":"succeeded"})"), [](auto& j) { j.train = true; }), "failed(app)"},
      {"exit 0 and a record of failure", Exited(0, ResultJson("failed")), "failed(app)"},
      {"exit 1 and a record of success", Exited(1, ResultJson("succeeded")), "failed(app)"},
      {"a listed output is missing", Exited(0, ResultJson("succeeded", R"(,"outputs":[{"path":"model.pt"}])")), "requeued(infra)"},
      {"user", Exited(2, ResultJson("failed")), "failed(user)"},
      {"app", Exited(3, ResultJson("failed")), "failed(app)"},
      {"resource", Exited(4), "failed(resource)"},
      {"a hang that the worker found", Exited(5, ResultJson("failed", R"(,"failure":{"class":"infra","rank":3})")), "requeued(infra)"},
      {"class from the record", Exited(9, ResultJson("failed", R"(,"failure":{"class":"resource"})")), "failed(resource)"},
      {"app with a budget", With(Exited(1), [](auto& j) { j.retry.set_app(1); }), "requeued(app)"},
      {"app, budget used up", With(Exited(1), [](auto& j) { j.retry.set_app(1); j.record.retries_app = 1; }), "failed(app)"},
      {"saved", Exited(85), "requeued(limit)"},
      {"saved by the record", Exited(0, ResultJson("saved")), "requeued(limit)"},
      {"saved without progress, the first time", With(Exited(85), [](auto& j) { j.max_step_before = 100; }), "requeued(limit)"},
      {"saved without progress, the second time", With(Exited(85), [](auto& j) { j.max_step_before = 100; j.record.attempts_without_progress = 1; }), "failed(limit)"},
      {"saved and cancelled", cancel(Exited(85)), "cancelled"},
      {"time limit with a checkpoint", With(Over(END_CAUSE_TIME_LIMIT, std::nullopt), [](auto& j) { j.seen->set_checkpoint(true); }), "requeued(limit)"},
      {"time limit without one of its own, but an older one", With(Over(END_CAUSE_TIME_LIMIT, std::nullopt), [](auto& j) { j.older_checkpoint = true; }), "requeued(limit)"},
      {"time limit twice without saving", With(Over(END_CAUSE_TIME_LIMIT, std::nullopt), [](auto& j) { j.older_checkpoint = true; j.record.attempts_without_progress = 1; }), "failed(limit)"},
      {"a command that saved anew has made progress, steps or not", With(Exited(85), [](auto& j) { j.max_step = j.max_step_before = 0; j.seen->set_checkpoint(true); j.record.attempts_without_progress = 1; }), "requeued(limit)"},
      {"a training has not", With(Exited(85), [](auto& j) { j.train = true; j.max_step_before = 100; j.seen->set_checkpoint(true); j.record.attempts_without_progress = 1; }), "failed(limit)"},
      {"the scheduler's deadline is never gone on after", With(Over(END_CAUSE_DEADLINE, std::nullopt), [](auto& j) { j.seen->set_checkpoint(true); }), "failed(limit)"},
      {"cancelled by somebody else after it had finished", Over(END_CAUSE_CANCELLED_EXTERNALLY, 0, ResultJson("succeeded")), "succeeded"},
      {"the program died of broken hardware", With(Exited(1), [](auto& j) { j.collected->stderr_tail = "uncorrectable ECC error encountered"; }), "requeued(infra)"},
      {"broken hardware, but the request cannot work", With(Exited(2), [](auto& j) { j.collected->stderr_tail = "uncorrectable ECC error encountered"; }), "failed(user)"},
      {"broken hardware, and cancelled", cancel(With(Exited(1), [](auto& j) { j.collected->stderr_tail = "GPU has fallen off the bus"; })), "cancelled"},
      {"preempted for the hundred-and-first time", With(Over(END_CAUSE_PREEMPTED, std::nullopt), [](auto& j) { j.record.retries_preempted = 100; }), "failed(preempted)"},
      {"preempted often, with infra used up", With(Over(END_CAUSE_PREEMPTED, std::nullopt), [](auto& j) { j.record.retries_preempted = 99; j.record.retries_infra = 3; }), "requeued(preempted)"},
      {"time limit without", Over(END_CAUSE_TIME_LIMIT, std::nullopt), "failed(limit)"},
      {"out of memory", Over(END_CAUSE_OUT_OF_MEMORY, std::nullopt), "failed(resource)"},
      {"preempted", Over(END_CAUSE_PREEMPTED, std::nullopt), "requeued(preempted)"},
      {"node failed", Over(END_CAUSE_NODE_FAILED, std::nullopt), "requeued(infra)"},
      {"lost", Over(END_CAUSE_LOST, std::nullopt), "requeued(infra)"},
      {"lost for the fourth time", With(Over(END_CAUSE_LOST, std::nullopt), [](auto& j) { j.record.retries_infra = 3; }), "failed(infra)"},
      {"lost, no retries wanted", With(Over(END_CAUSE_LOST, std::nullopt), [](auto& j) { j.retry.set_infra(0); }), "failed(infra)"},
      {"lost and cancelled: cancel wins over retry", cancel(Over(END_CAUSE_LOST, std::nullopt)), "cancelled"},
      {"failed and cancelled", cancel(Exited(1)), "cancelled"},
      {"launch failed", Over(END_CAUSE_LAUNCH_FAILED, std::nullopt), "failed(user)"},
      {"cancelled by us", cancel(Over(END_CAUSE_CANCELLED, std::nullopt)), "cancelled"},
      {"cancelled by somebody else", Over(END_CAUSE_CANCELLED_EXTERNALLY, std::nullopt), "failed(unknown)"},
      {"nobody knows how it ended", Over(END_CAUSE_UNSPECIFIED, std::nullopt), "failed(unknown)"},
      {"spool gone while collecting", With(In(S::kCollecting), Absent), "requeued(infra)"},
      {"final states are left alone", In(S::kSucceeded, ATTEMPT_PHASE_RUNNING), ""},
  };
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    const std::vector<Action> actions = Reconcile(row.job, kNow);
    EXPECT_EQ(Describe(actions), row.expected);
    EXPECT_EQ(Describe(Reconcile(row.job, kNow)), row.expected) << "not a function of its input";
    // Whatever it wants to record, the table of states allows.
    JobRecord record = row.job.record;
    for (const Action& action : actions) {
      if (const Record* step = std::get_if<Record>(&action)) {
        EXPECT_OK(Apply(step->event, &record));
      }
    }
  }
}

TEST(Reconciler, EveryStateAndPhaseGivesLegalEvents) {
  for (const JobState state : AllJobStates()) {
    for (int phase = 0; phase <= 7; ++phase) {
      for (const bool cancel : {false, true}) {
        for (const bool ready : {false, true}) {
          JobSnapshot job = In(state, static_cast<agent::v1::AttemptPhase>(phase));
          job.record.cancel_requested = cancel;
          job.drained = ready;
          if (ready) job.collected = Collected{};
          JobRecord record = job.record;
          for (const Action& action : Reconcile(job, kNow)) {
            if (const Record* step = std::get_if<Record>(&action)) {
              EXPECT_OK(Apply(step->event, &record)) << Name(state) << " phase " << phase;
            }
          }
        }
      }
    }
  }
}

TEST(Reconciler, SaysWhyInWords) {
  JobSnapshot job = Exited(3, ResultJson("failed", R"(,"message":"the loss is nan","failure":{"class":"app","rank":1,"step":37,"host":"n2"})"));
  job.train = true;
  EXPECT_THAT(Only(Reconcile(job, kNow)).message,
              AllOf(HasSubstr("the loss is nan"), HasSubstr("rank 1"), HasSubstr("step 37"), HasSubstr("n2"), HasSubstr("exit code 3")));

  job = Exited(7);
  job.collected->stderr_tail = "first\nsecond\nTraceback: bad luck\n";
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, AllOf(HasSubstr("exit code 7"), HasSubstr("bad luck")));

  job = Over(agent::v1::END_CAUSE_EXITED, std::nullopt);
  job.seen->set_signal(11);
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, HasSubstr("SIGSEGV"));
  job.seen->set_signal(9);
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, AllOf(HasSubstr("SIGKILL"), HasSubstr("out of memory")));
  EXPECT_THAT(Only(Reconcile(Exited(137), kNow)).message, AllOf(HasSubstr("SIGKILL"), HasSubstr("out of memory")));

  job = Over(agent::v1::END_CAUSE_TIME_LIMIT, std::nullopt);
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, AllOf(HasSubstr("resources.time"), HasSubstr("no checkpoint")));

  job = In(S::kSubmitting, agent::v1::ATTEMPT_PHASE_PENDING);
  job.seen->set_reason("4 of 4 slots are taken");
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, HasSubstr("4 of 4 slots are taken"));
}

TEST(Reconciler, NamesTheRankTheNodeAndTheLastLines) {
  JobSnapshot job = Exited(1);
  for (const char* node : {"n1", "n2"}) job.seen->add_nodes(node);
  job.collected->stderr_tail = "Traceback: bad luck\nsrun: error: n2: task 3: Exited with exit code 1\n";
  EXPECT_THAT(Only(Reconcile(job, kNow)).message,
              AllOf(HasSubstr("exit code 1"), HasSubstr("(rank 3, host n2)"), HasSubstr("bad luck")));
  job.collected->stderr_tail = "no luck";
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, Not(HasSubstr("host")));
  job.seen->mutable_nodes()->RemoveLast();
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, HasSubstr("(host n1)"));
}

TEST(Reconciler, KeepsBadNodesForTheAttemptsToCome) {
  const auto update_of = [](const JobSnapshot& job) { return std::get<Record>(Reconcile(job, kNow).back()).update; };
  JobSnapshot job = Over(agent::v1::END_CAUSE_NODE_FAILED, std::nullopt);
  job.seen->add_bad_nodes("n3");
  EXPECT_THAT(*update_of(job).bad_nodes, ElementsAre("n3"));
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, HasSubstr("away from n3"));

  job = Exited(1);
  for (const char* node : {"n1", "n2"}) job.seen->add_nodes(node);
  job.collected->stderr_tail = "[n2:77] Signal: Bus error (7)\n";
  EXPECT_THAT(*update_of(job).bad_nodes, ElementsAre("n2"));
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, AllOf(HasSubstr("broken hardware"), HasSubstr("away from n2"), HasSubstr("Bus error")));

  // The worker names its host; the launcher's noise names nobody.
  job = Exited(3, ResultJson("failed", R"(,"message":"NCCL: unhandled system error","failure":{"class":"app","rank":1,"host":"n1"})"));
  for (const char* node : {"n1", "n2"}) job.seen->add_nodes(node);
  EXPECT_THAT(*update_of(job).bad_nodes, ElementsAre("n1"));

  job = Exited(1);
  job.seen->add_bad_nodes("n1");
  EXPECT_THAT(*update_of(job).bad_nodes, IsEmpty()) << "a program's own failure is nobody else's fault";
}

TEST(Reconciler, BackoffGoesByClass) {
  const auto wait_of = [](const JobSnapshot& job) { return Only(Reconcile(job, kNow)).not_before - kNow; };
  JobSnapshot job = Over(agent::v1::END_CAUSE_LOST, std::nullopt);
  job.record.retries_infra = 2;
  EXPECT_EQ(wait_of(job), Backoff(2, 0.5));
  job = Over(agent::v1::END_CAUSE_PREEMPTED, std::nullopt);
  job.record.retries_preempted = 50;
  EXPECT_EQ(wait_of(job), Backoff(0, 0.5)) << "the queue is its back-off";
  EXPECT_EQ(wait_of(Exited(85)), absl::ZeroDuration());
}

TEST(Reconciler, ProgressIsWhatNeedNotBeDoneAgain) {
  const auto progress_of = [](const JobSnapshot& job) { return Only(Reconcile(job, kNow)).progress; };
  JobSnapshot job = Over(agent::v1::END_CAUSE_TIME_LIMIT, std::nullopt);
  job.older_checkpoint = true;
  EXPECT_FALSE(progress_of(job)) << "further, but nothing was saved";
  job.seen->set_checkpoint(true);
  EXPECT_TRUE(progress_of(job));
  job.train = true;
  EXPECT_TRUE(progress_of(job));
  job.max_step_before = 100;
  EXPECT_FALSE(progress_of(job)) << "saved, but no further";
}

TEST(Reconciler, OnceItRunsNobodyCaresWhyItWaited) {
  JobSnapshot job = In(S::kPending, agent::v1::ATTEMPT_PHASE_RUNNING);
  job.seen->set_host("n1");
  job.seen->set_reason("waits to be looked at by SLURM (None)");
  EXPECT_EQ(Only(Reconcile(job, kNow)).message, "runs on n1");
}

TEST(Reconciler, SaysWhyItWaitsAndUntilWhen) {
  agent::v1::AttemptStatus status = Says(agent::v1::ATTEMPT_PHASE_PENDING);
  EXPECT_EQ(WaitingWords(status, kNow), "waits in the site's queue");
  status.set_reason("the nodes it asks for are busy (Resources)");
  status.set_expected_start_us(absl::ToUnixMicros(kNow + absl::Minutes(90)));
  EXPECT_EQ(WaitingWords(status, kNow),
            "waits in the site's queue: the nodes it asks for are busy (Resources); expected to start about 2023-11-14 23:43 UTC");
  EXPECT_THAT(WaitingWords(status, kNow + absl::Hours(2)), Not(HasSubstr("expected"))) << "an estimate of the past";
  status.set_phase(agent::v1::ATTEMPT_PHASE_HELD);
  EXPECT_THAT(WaitingWords(status, kNow), HasSubstr("until somebody releases it"));
}

TEST(Reconciler, ReasonsStayBoundedAndValid) {
  JobSnapshot job = Exited(1);
  job.collected->stderr_tail = std::string(3000, '\xc3') + "\n" + std::string(5000, 'x');
  const std::string message = Only(Reconcile(job, kNow)).message;
  EXPECT_LE(message.size(), kMaxReasonBytes + 8);
  job = Exited(2, ResultJson("failed", absl::StrCat(R"(,"message":")", std::string(100'000, 'y'), "\"")));
  EXPECT_LE(Only(Reconcile(job, kNow)).message.size(), kMaxReasonBytes + 8);
}

TEST(Reconciler, ResultBecomesSummaryAndOutputs) {
  JobSnapshot job = Exited(0, ResultJson("succeeded", absl::StrCat(R"(,"metrics":{"test/rmse":0.25,"bad":"NaN"},"outputs":[{"path":"model.pt","size":3,"sha256":")",
                                                                    std::string(64, 'a'), "\"}]")));
  v1::OutputFile file;
  file.set_path("model.pt");
  file.set_sha256(std::string(64, 'b'));
  job.collected->outputs = {file};
  EXPECT_THAT(Only(Reconcile(job, kNow)).message, HasSubstr("model.pt"));  // wrong hash
  job.collected->outputs[0].set_sha256(std::string(64, 'a'));
  const std::vector<Action> actions = Reconcile(job, kNow);
  const Record& record = std::get<Record>(actions[0]);
  EXPECT_EQ(record.event.kind, EventKind::kSucceeded);
  EXPECT_EQ(record.update.summary->at("test/rmse"), 0.25);
  EXPECT_EQ(record.update.outputs->size(), 1u);
  EXPECT_EQ(record.update.max_step, 100);
}

TEST(Reconciler, BackoffGrowsFourfoldAndIsCapped) {
  EXPECT_EQ(Backoff(0, 0.5), absl::Seconds(1));
  EXPECT_EQ(Backoff(1, 0.5), absl::Seconds(4));
  EXPECT_EQ(Backoff(2, 0.5), absl::Seconds(16));
  EXPECT_EQ(Backoff(50, 0.5), kMaxBackoff);
  EXPECT_EQ(Backoff(50, 1), kMaxBackoff);
  EXPECT_EQ(Backoff(0, 0), absl::Milliseconds(500));
}

TEST(Reconciler, GoesOnFromTheNewestCheckpoint) {
  std::vector<AttemptRow> attempts(3);
  for (int i = 0; i < 3; ++i) attempts[i].number = i + 1;
  const AttemptKey other(*JobId::Parse("fedcba9876543210"), 2);
  EXPECT_EQ(ResumeFrom(TheJob(), attempts, 4, std::nullopt), "");
  EXPECT_EQ(ResumeFrom(TheJob(), attempts, 4, other), other.text());
  attempts[1].checkpoint = true;
  EXPECT_EQ(ResumeFrom(TheJob(), attempts, 4, other), absl::StrCat(kJob, "-2"));
  attempts[2].checkpoint = true;
  EXPECT_EQ(ResumeFrom(TheJob(), attempts, 3, other), absl::StrCat(kJob, "-2")) << "never from itself";
}

TEST(ParseResult, RefusesWhatIsNotOne) {
  const AttemptKey key(TheJob(), 1);
  for (const char* bad : {"", "[]", "{", "{}", R"({"outcome":"perhaps"})", R"({"outcome":"failed","outputs":{}})",
                          R"({"outcome":"failed","outputs":[{"path":"../x"}]})", R"({"outcome":"failed","outputs":[3]})",
                          R"({"attempt":"0123456789abcdef-7","outcome":"failed"})"}) {
    EXPECT_THAT(ParseResult(bad, key), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("result record"))) << bad;
  }
  EXPECT_OK(ParseResult(R"({"outcome":"saved","steps":"many","metrics":[1]})", key));
  std::string deep(200'000, '[');
  EXPECT_THAT(ParseResult(deep, key), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("result record")));
}

// ---- a whole life against a site that misbehaves ----

// A site with a memory: what is true there, whatever we hear of it.
class ModelSite {
 public:
  struct Attempt {
    agent::v1::AttemptPhase phase = agent::v1::ATTEMPT_PHASE_PENDING;
    agent::v1::EndCause cause = agent::v1::END_CAUSE_UNSPECIFIED;
    int exit_code = 0;
    int starts = 0;
    bool cancel = false;
    bool barred = false;
    std::string result;
  };

  // The agent's side of StartAttempt: once, however often it is called.
  absl::StatusOr<agent::v1::AttemptStatus> Start(const std::string& key, std::mt19937& random) {
    const auto found = attempts_.find(key);
    if (found == attempts_.end()) {
      if (random() % 40 == 0) return absl::FailedPreconditionError("the partition is down for good");
      attempts_[key].starts = 1;
    } else if (found->second.barred) {
      return absl::FailedPreconditionError("it was cancelled before it began");
    }
    return Status(key);
  }
  agent::v1::AttemptStatus Cancel(const std::string& key) {
    const auto found = attempts_.find(key);
    if (found == attempts_.end() || found->second.barred) {
      attempts_[key].barred = true;
      attempts_[key].phase = agent::v1::ATTEMPT_PHASE_ABSENT;
    } else {
      found->second.cancel = true;
    }
    return Status(key);
  }
  agent::v1::AttemptStatus Status(const std::string& key) const {
    agent::v1::AttemptStatus status;
    status.set_attempt(key);
    const auto found = attempts_.find(key);
    if (found == attempts_.end()) {
      status.set_phase(agent::v1::ATTEMPT_PHASE_ABSENT);
      return status;
    }
    const Attempt& attempt = found->second;
    status.set_phase(attempt.phase);
    if (attempt.phase == agent::v1::ATTEMPT_PHASE_ENDED) {
      status.set_cause(attempt.cause);
      if (attempt.cause == agent::v1::END_CAUSE_EXITED) status.set_exit_code(attempt.exit_code);
      status.set_result_json(attempt.result);
    }
    return status;
  }
  // Something happens by itself.
  void Live(std::mt19937& random) {
    for (auto& [key, attempt] : attempts_) {
      if (attempt.phase == agent::v1::ATTEMPT_PHASE_ABSENT || attempt.phase == agent::v1::ATTEMPT_PHASE_ENDED) continue;
      if (random() % 3 != 0) continue;
      if (attempt.phase == agent::v1::ATTEMPT_PHASE_RUNNING && random() % 2 == 0) {
        attempt.phase = agent::v1::ATTEMPT_PHASE_ENDED;
        switch (random() % 8) {
          case 0: attempt.cause = agent::v1::END_CAUSE_LOST; break;
          case 1: attempt.cause = agent::v1::END_CAUSE_NODE_FAILED; break;
          case 2: attempt.cause = agent::v1::END_CAUSE_EXITED; attempt.exit_code = 1; break;
          case 3: attempt.cause = agent::v1::END_CAUSE_EXITED; attempt.exit_code = 85; break;
          case 4: attempt.cause = agent::v1::END_CAUSE_PREEMPTED; break;
          default:
            attempt.cause = agent::v1::END_CAUSE_EXITED;
            attempt.result = absl::StrCat(R"({"attempt":")", key, R"(","outcome":"succeeded"})");
        }
      } else if (attempt.cancel) {
        attempt.phase = agent::v1::ATTEMPT_PHASE_ENDED;
        attempt.cause = agent::v1::END_CAUSE_CANCELLED;
      } else {
        constexpr agent::v1::AttemptPhase kPhases[] = {
            agent::v1::ATTEMPT_PHASE_PENDING, agent::v1::ATTEMPT_PHASE_HELD, agent::v1::ATTEMPT_PHASE_RUNNING,
            agent::v1::ATTEMPT_PHASE_RUNNING, agent::v1::ATTEMPT_PHASE_SUSPENDED};
        attempt.phase = kPhases[random() % 5];
      }
    }
  }
  void Wipe(const std::string& key) { attempts_.erase(key); }
  const std::map<std::string, Attempt>& attempts() const { return attempts_; }

 private:
  std::map<std::string, Attempt> attempts_;
};

class ModelRun {
 public:
  explicit ModelRun(uint32_t seed) : random_(seed) {
    job_.id = TheJob();
    JobEvent first;
    first.kind = EventKind::kSubmitted;
    EXPECT_OK(ApplyFirst(first, &job_.record));
    job_.connected = true;
  }

  void Run() {
    for (int turn = 0; turn < 400 && !IsFinal(job_.record.state); ++turn) {
      chaos_ = turn < 250;
      now_ += absl::Milliseconds(200 + random_() % 2000);
      Turn();
      Check();
    }
    ASSERT_TRUE(IsFinal(job_.record.state)) << "still " << Name(job_.record.state) << ": " << job_.record.reason;
  }

  int attempts() const { return job_.record.attempt; }
  JobState end() const { return job_.record.state; }

 private:
  std::string Key() const { return AttemptKey(job_.id, job_.record.attempt).text(); }
  bool Chance(unsigned one_in) { return chaos_ && random_() % one_in == 0; }

  void Turn() {
    site_.Live(random_);
    if (Chance(12)) job_.connected = !job_.connected;
    if (!chaos_) job_.connected = true;
    if (Chance(40)) Restart();
    if (Chance(60) && !job_.record.cancel_requested) Cancel();
    if (Chance(150) && job_.record.attempt > 0) {
      site_.Wipe(Key());
      wiped_ = true;
    }
    if (job_.record.state == S::kQueued && !job_.record.cancel_requested && job_.record.not_before <= now_) {
      JobEvent placed;
      placed.kind = EventKind::kPlaced;
      placed.attempt = job_.record.attempt + 1;
      placed.site = "vega";
      Append(placed);
    }
    // News: on time, late, or twice.
    if (job_.connected && MayBeAtSite(job_.record.state)) {
      if (!late_.empty() && random_() % 2 == 0) Hear(late_[random_() % late_.size()]);
      agent::v1::AttemptStatus status = site_.Status(Key());
      late_.push_back(status);
      if (late_.size() > 4) late_.erase(late_.begin());
      if (!Chance(3)) Hear(status);
    }
    Act();
  }

  void Restart() {
    const JobRecord record = job_.record;
    JobSnapshot fresh;
    fresh.id = job_.id;
    fresh.record = record;
    fresh.max_step = job_.max_step;
    job_ = fresh;
  }

  void Cancel() {
    JobEvent event;
    event.kind = EventKind::kCancelRequested;
    Append(event);
  }

  void Hear(const agent::v1::AttemptStatus& status) {
    if (status.attempt() != Key()) return;
    const bool ended = job_.seen && job_.seen->phase() == agent::v1::ATTEMPT_PHASE_ENDED;
    if (status.phase() == agent::v1::ATTEMPT_PHASE_ABSENT) {
      if (ended || job_.record.state == S::kSubmitting || job_.record.state == S::kSubmitUnknown) return;
      // A late ABSENT was asked for before the attempt was accepted: the dispatcher leaves it out.
      if (site_.attempts().contains(Key()) && site_.attempts().at(Key()).phase != agent::v1::ATTEMPT_PHASE_ABSENT) return;
      ++job_.absences;
      job_.first_absence = std::min(job_.first_absence, now_);
      job_.last_absence = now_;
      return;
    }
    job_.absences = 0;
    job_.first_absence = absl::InfiniteFuture();
    if (ended && status.phase() != agent::v1::ATTEMPT_PHASE_ENDED) return;
    job_.seen = status;
    job_.drained = status.phase() == agent::v1::ATTEMPT_PHASE_ENDED;
  }

  void Append(const JobEvent& event) {
    const int before = job_.record.attempt;
    ASSERT_OK(Apply(event, &job_.record)) << Name(event.kind);
    if (job_.record.attempt != before) {
      JobSnapshot fresh;
      fresh.id = job_.id;
      fresh.record = job_.record;
      fresh.connected = job_.connected;
      fresh.max_step_before = job_.max_step;
      fresh.max_step = job_.max_step + static_cast<int64_t>(random_() % 3);
      job_ = fresh;
      late_.clear();
      wiped_ = false;
    }
  }

  void Act() {
    for (int round = 0; round < 20; ++round) {
      job_.jitter = static_cast<double>(random_() % 100) / 100;
      const std::vector<Action> actions = Reconcile(job_, now_);
      bool recorded = false;
      for (const Action& action : actions) {
        if (const Record* record = std::get_if<Record>(&action)) {
          recorded = true;
          Append(record->event);
          if (::testing::Test::HasFatalFailure()) return;
        } else {
          Errand(action);
        }
      }
      if (!recorded) return;
    }
    FAIL() << "it records without end";
  }

  void Errand(const Action& action) {
    EXPECT_TRUE(job_.connected);
    const bool request_lost = Chance(5), reply_lost = Chance(5);
    const absl::Status lost = absl::UnavailableError("the connection broke");
    if (std::holds_alternative<StageInputs>(action)) {
      if (request_lost) {
        job_.staging = Failed(lost);
      } else {
        job_.staging.done = true;
      }
    } else if (std::holds_alternative<StartTheAttempt>(action)) {
      EXPECT_TRUE(job_.record.state == S::kSubmitting || job_.record.state == S::kSubmitUnknown);
      absl::StatusOr<agent::v1::AttemptStatus> status = lost;
      if (!request_lost) status = site_.Start(Key(), random_);
      if (Chance(6)) site_.Start(Key(), random_).IgnoreError();  // the wire said it twice
      if (reply_lost && status.ok()) status = lost;
      if (status.ok()) {
        job_.start.done = true;
        Hear(*status);
      } else {
        job_.start = Failed(status.status());
      }
    } else if (std::holds_alternative<CancelTheAttempt>(action)) {
      EXPECT_TRUE(job_.record.cancel_requested || IsRefusal(job_.start.last));
      if (request_lost) return;
      const agent::v1::AttemptStatus status = site_.Cancel(Key());
      if (reply_lost) return;
      if (status.phase() == agent::v1::ATTEMPT_PHASE_ABSENT) job_.barred = true;
      Hear(status);
      job_.cancel.not_before = now_ + absl::Seconds(1);
    } else {
      if (request_lost) {
        job_.collect = Failed(lost);
      } else {
        job_.collected = Collected{};
      }
    }
  }

  void Check() {
    for (const auto& [key, attempt] : site_.attempts()) ASSERT_LE(attempt.starts, 1) << key;
    const auto truth = site_.attempts().find(Key());
    const bool there = truth != site_.attempts().end() && !truth->second.barred;
    switch (job_.record.state) {
      case S::kSucceeded:
        ASSERT_TRUE(there || wiped_);
        if (there) {
          ASSERT_EQ(truth->second.phase, agent::v1::ATTEMPT_PHASE_ENDED);
          ASSERT_FALSE(truth->second.result.empty());
        }
        break;
      case S::kCancelled:
        ASSERT_TRUE(job_.record.cancel_requested);
        // Nothing of it runs, and it is not a success thrown away.
        if (there) {
          ASSERT_EQ(truth->second.phase, agent::v1::ATTEMPT_PHASE_ENDED);
          ASSERT_TRUE(truth->second.result.empty());
        }
        break;
      case S::kFailed:
        if (there) {
          ASSERT_EQ(truth->second.phase, agent::v1::ATTEMPT_PHASE_ENDED);
          ASSERT_TRUE(truth->second.result.empty());
        }
        break;
      case S::kQueued:
        // The attempt before is over, or will never be.
        if (job_.record.attempt > 0 && there) {
          ASSERT_EQ(truth->second.phase, agent::v1::ATTEMPT_PHASE_ENDED);
        }
        break;
      case S::kStaging:
      case S::kSubmitting:
      case S::kSubmitUnknown:
      case S::kPending:
      case S::kHeld:
      case S::kRunning:
      case S::kSuspended:
      case S::kStateUnknown:
      case S::kCollecting:
        break;
    }
  }

  std::mt19937 random_;
  absl::Time now_ = kNow;
  bool chaos_ = true;
  bool wiped_ = false;
  JobSnapshot job_;
  ModelSite site_;
  std::vector<agent::v1::AttemptStatus> late_;
};

TEST(ReconcilerModel, EverySiteThatGetsWellAgainBringsTheJobToItsTrueEnd) {
  std::map<JobState, int> ends;
  int most_attempts = 0;
  for (uint32_t seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    ModelRun run(seed);
    run.Run();
    if (::testing::Test::HasFatalFailure()) return;
    ++ends[run.end()];
    most_attempts = std::max(most_attempts, run.attempts());
  }
  // The chaos was worth something: every end occurs, and so do retries.
  EXPECT_GT(ends[S::kSucceeded], 50);
  EXPECT_GT(ends[S::kFailed], 50);
  EXPECT_GT(ends[S::kCancelled], 50);
  EXPECT_GT(most_attempts, 3);
}

}  // namespace
}  // namespace itwin::server
