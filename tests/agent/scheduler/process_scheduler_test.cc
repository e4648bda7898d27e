#include "agent/scheduler/process_scheduler.h"

#include <signal.h>

#include "agent/scheduler/lease.h"
#include "tests/contract/scheduler_contract.h"

namespace itwin::testing {
namespace {

using agent::ProcessScheduler;
using agent::SchedulerState;

class ProcessHarness : public SchedulerHarness {
 public:
  explicit ProcessHarness(int slots) : slots_(slots) { Restart(); }
  ~ProcessHarness() override {
    scheduler_.reset();
    // Programs of a failed test must not outlive it.
    agent::KillAll([&] {
      std::vector<pid_t> out;
      const auto keys = agent::ListAttemptDirectories(root_.path());
      for (const AttemptKey& key : keys.value()) {
        const auto owner = agent::ReadLease({root_.path(), key});
        if (!owner) continue;
        for (pid_t pid : agent::ProcessesMarked("ITWIN_LEASE=" + owner->nonce, 0)) out.push_back(pid);
        if (agent::IsAlive(owner->process)) out.push_back(owner->process.pid);
      }
      return out;
    }, absl::Seconds(5));
  }
  agent::Scheduler& scheduler() override { return *scheduler_; }
  void Restart() override {
    scheduler_.reset();
    auto made = ProcessScheduler::Create({.root = root_.path(), .slots = slots_, .kill_after = absl::Seconds(3)}, &clock_);
    ITWIN_CHECK(made.ok());
    scheduler_ = *std::move(made);
  }
  const std::string& root() const override { return root_.path(); }
  void set_slots(int slots) { slots_ = slots; }

 private:
  TempDirectory root_;
  SystemClock clock_;
  int slots_;
  std::unique_ptr<ProcessScheduler> scheduler_;
};

INSTANTIATE_TEST_SUITE_P(Process, SchedulerContract,
                         ::testing::Values(SchedulerContractParam{
                             "Process", [](int slots) { return std::make_unique<ProcessHarness>(slots); }}),
                         [](const auto& param) { return param.param.name; });

class ProcessSchedulerTest : public SchedulerContract {
 protected:
  ProcessHarness& harness() { return static_cast<ProcessHarness&>(*harness_); }
};
INSTANTIATE_TEST_SUITE_P(Process, ProcessSchedulerTest,
                         ::testing::Values(SchedulerContractParam{
                             "Process", [](int slots) { return std::make_unique<ProcessHarness>(slots); }}),
                         [](const auto& param) { return param.param.name; });

TEST_P(ProcessSchedulerTest, RunsInOrderOfSubmissionAndALargeJobIsNotOvertaken) {
  Make(2);
  const agent::Submission first = Shell(KeyNumber(9), "read line < \"$ITWIN_OUTPUTS/gate\"");
  Gate gate(DirectoryOf(KeyNumber(9)).outputs_path() + "/gate");
  ASSERT_OK(scheduler().Submit(first));
  ASSERT_TRUE(Started(KeyNumber(9)));
  // One slot is free, but the two-rank job is first in line.
  const std::string note = "echo $ITWIN_ATTEMPT >> " + harness_->root() + "/order";
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(5), note, 2)));
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(7), note, 2)));
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(6), note, 2)));
  EXPECT_EQ(Report(KeyNumber(5)).state, SchedulerState::kPending);
  EXPECT_THAT(Report(KeyNumber(5)).reason, ::testing::HasSubstr("next in line"));
  EXPECT_THAT(Report(KeyNumber(6)).reason, ::testing::HasSubstr("2 jobs ahead"));
  EXPECT_EQ(scheduler().Describe().slots_in_use, 1);
  harness_->Restart();  // the order is in the files
  gate.Open();
  for (int n : {5, 7, 6}) ASSERT_TRUE(Reaches(KeyNumber(n), SchedulerState::kEnded));
  EXPECT_EQ(*ReadFile(harness_->root() + "/order"),
            KeyNumber(5).text() + "\n" + KeyNumber(7).text() + "\n" + KeyNumber(6).text() + "\n");
}

TEST_P(ProcessSchedulerTest, NeverRunsMoreRanksThanSlots) {
  Make(2);
  // Each takes one of two places (an atomic directory) and fails when there is none.
  const std::string program = "cd " + harness_->root() +
                              "; mkdir a 2>/dev/null && p=a || { mkdir b && p=b; } || exit 9; echo x > $p/x; rm -r $p";
  for (int n = 1; n <= 12; ++n) ASSERT_OK(scheduler().Submit(Shell(KeyNumber(n), program)));
  for (int n = 1; n <= 12; ++n) {
    ASSERT_TRUE(Reaches(KeyNumber(n), SchedulerState::kEnded));
    EXPECT_EQ(LifecycleOf(KeyNumber(n)).exited->exit_code, 0) << n;
  }
}

TEST_P(ProcessSchedulerTest, AKilledScriptIsNoticedAndItsProgramDoesNotLiveOn) {
  Make(1);
  // A grandchild in a session of its own, without our variables, that a kill of the group would miss.
  ASSERT_OK(scheduler().Submit(Shell(
      KeyNumber(1), "setsid tail -f /dev/null & echo $! > \"$ITWIN_OUTPUTS/pid\"; env -i tail -f /dev/null")));
  ASSERT_TRUE(Started(KeyNumber(1)));
  ASSERT_TRUE(WaitUntil([&] { return agent::ReadProgram(DirectoryOf(KeyNumber(1))).has_value() &&
                                     !ReadFile(DirectoryOf(KeyNumber(1)).outputs_path() + "/pid").value_or("").empty(); }));
  const auto owner = agent::ReadLease(DirectoryOf(KeyNumber(1)));
  const auto program = agent::ReadProgram(DirectoryOf(KeyNumber(1)));
  kill(owner->process.pid, SIGKILL);
  ASSERT_TRUE(Reaches(KeyNumber(1), SchedulerState::kEnded));
  EXPECT_FALSE(LifecycleOf(KeyNumber(1)).exited.has_value());
  EXPECT_TRUE(agent::ProcessesMarked("ITWIN_LEASE=" + owner->nonce, program->pid).empty());
}

TEST_P(ProcessSchedulerTest, AScriptThatCannotRunSaysWhy) {
  Make(1);
  const agent::Submission submission = Shell(KeyNumber(1), "true");
  ASSERT_OK(WriteFileAtomically(submission.directory.script_path(), "#!/bin/sh\nexec /nowhere/itwin-agent\n", 0700));
  ASSERT_OK(scheduler().Submit(submission));
  ASSERT_TRUE(Reaches(KeyNumber(1), SchedulerState::kEnded));
  EXPECT_THAT(*ReadFile(submission.directory.launch_error_path()), ::testing::HasSubstr("/nowhere/itwin-agent"));
}

TEST_P(ProcessSchedulerTest, WaitsWhenRestartedWithTooFewSlots) {
  Make(2);
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(1), "true", 2)));
  harness().set_slots(1);
  harness_->Restart();
  (void)Report(KeyNumber(1));
  EXPECT_EQ(Report(KeyNumber(1)).state, SchedulerState::kPending);
  EXPECT_THAT(Report(KeyNumber(1)).reason, ::testing::HasSubstr("restarted with 1"));
  harness().set_slots(2);
  harness_->Restart();
  EXPECT_TRUE(Reaches(KeyNumber(1), SchedulerState::kEnded));
}

TEST_P(ProcessSchedulerTest, ASecondCopyOfTheScriptLeaves) {
  Make(1);
  const agent::Submission submission = Shell(KeyNumber(1), "echo ran >> \"$ITWIN_OUTPUTS/runs\"; read line < \"$ITWIN_OUTPUTS/gate\"");
  Gate gate(submission.directory.outputs_path() + "/gate");
  ASSERT_OK(scheduler().Submit(submission));
  ASSERT_TRUE(Started(KeyNumber(1)));
  const auto second = RunCommand({.argv = {"/bin/sh", submission.directory.script_path()}}, absl::Seconds(20));
  ASSERT_OK(second);
  EXPECT_EQ(second->exit.exit_code, 0);
  EXPECT_EQ(LifecycleOf(KeyNumber(1)).duplicates, 1);
  EXPECT_EQ(LifecycleOf(KeyNumber(1)).started.size(), 1u);
  gate.Open();
  EXPECT_TRUE(Reaches(KeyNumber(1), SchedulerState::kEnded));
  EXPECT_EQ(*ReadFile(submission.directory.outputs_path() + "/runs"), "ran\n");
}

}  // namespace
}  // namespace itwin::testing
