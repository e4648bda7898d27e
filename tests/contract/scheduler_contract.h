#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/scheduler/launch.h"
#include "agent/scheduler/scheduler.h"
#include "agent/spool/lifecycle.h"
#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::testing {

// A pipe at which a shell program waits: read line < PATH.
class Gate {
 public:
  explicit Gate(const std::string& path) {
    EXPECT_EQ(mkfifo(path.c_str(), 0600), 0);
    fd_ = FileDescriptor(open(path.c_str(), O_RDWR | O_CLOEXEC));
  }
  void Open() { EXPECT_OK(WriteAll(fd_.get(), "go\n", "gate")); }

 private:
  FileDescriptor fd_;
};

// What every Scheduler has to do, whatever is behind it. An implementation's test instantiates SchedulerContract
// with a factory of harnesses. The scripts are real: they run `itwin-agent run-attempt`.
class SchedulerHarness {
 public:
  virtual ~SchedulerHarness() = default;
  virtual agent::Scheduler& scheduler() = 0;
  // As after kill -9 of the agent: a new object over the same spool.
  virtual void Restart() = 0;
  virtual const std::string& root() const = 0;
};

struct SchedulerContractParam {
  std::string name;
  // With room for `slots` ranks at once.
  std::function<std::unique_ptr<SchedulerHarness>(int slots)> make;
};

inline AttemptKey KeyNumber(int n) {
  char text[32];
  snprintf(text, sizeof text, "%016x-1", n);
  return *AttemptKey::Parse(text);
}

class SchedulerContract : public ::testing::TestWithParam<SchedulerContractParam> {
 protected:
  void Make(int slots) { harness_ = GetParam().make(slots); }
  agent::Scheduler& scheduler() { return harness_->scheduler(); }

  agent::AttemptDirectory DirectoryOf(const AttemptKey& key) { return {harness_->root(), key}; }

  // An attempt that runs this shell program.
  agent::Submission Shell(const AttemptKey& key, const std::string& program, int ranks = 1) {
    const agent::AttemptDirectory directory = DirectoryOf(key);
    for (const std::string& path : {directory.work_path(), directory.outputs_path(), directory.checkpoints_path()}) {
      EXPECT_OK(MakeDirectories(path));
    }
    agent::v1::StartAttemptRequest request;
    request.set_attempt(key.text());
    for (const char* word : {"/bin/sh", "-c"}) request.add_argv(word);
    request.add_argv(program);
    EXPECT_OK(WriteFileAtomically(directory.request_path(), request.SerializeAsString()));
    EXPECT_OK(WriteFileAtomically(directory.spec_path(), "{}"));
    EXPECT_OK(WriteFileAtomically(
        directory.script_path(),
        agent::RenderScript(directory, std::string(getenv("ITWIN_BIN")) + "/itwin-agent", {.grace = absl::Seconds(1)}),
        0700));
    return {.directory = directory, .ranks_per_node = ranks};
  }

  agent::SchedulerReport Report(const AttemptKey& key) {
    auto reports = scheduler().Query({key});
    EXPECT_OK(reports);
    return reports.ok() ? reports->at(key) : agent::SchedulerReport{};
  }
  bool Reaches(const AttemptKey& key, agent::SchedulerState state) {
    return WaitUntil([&] { return Report(key).state == state; });
  }
  agent::Lifecycle LifecycleOf(const AttemptKey& key) {
    return agent::ReadLifecycle(DirectoryOf(key).lifecycle_path());
  }
  bool Started(const AttemptKey& key) {
    return WaitUntil([&] { return (void)Report(key), !LifecycleOf(key).started.empty(); });
  }
  absl::Status Cancel(const AttemptKey& key) {
    EXPECT_OK(MakeDirectories(DirectoryOf(key).path()));
    EXPECT_OK(WriteFileAtomically(DirectoryOf(key).cancelled_path(), ""));
    return scheduler().Cancel(key);
  }

  std::unique_ptr<SchedulerHarness> harness_;
};

TEST_P(SchedulerContract, RunsTheScriptAndTellsItsEnd) {
  Make(1);
  const AttemptKey key = KeyNumber(1);
  ASSERT_OK(scheduler().Submit(Shell(key, "exit 7")));
  ASSERT_TRUE(Reaches(key, agent::SchedulerState::kEnded));
  ASSERT_TRUE(LifecycleOf(key).exited.has_value());
  EXPECT_EQ(LifecycleOf(key).exited->exit_code, 7);
}

TEST_P(SchedulerContract, SubmittedTwiceRunsOnce) {
  Make(2);
  const AttemptKey key = KeyNumber(1);
  const agent::Submission submission = Shell(key, "echo ran >> \"$ITWIN_OUTPUTS/runs\"");
  ASSERT_OK(scheduler().Submit(submission));
  ASSERT_OK(scheduler().Submit(submission));
  ASSERT_TRUE(Reaches(key, agent::SchedulerState::kEnded));
  ASSERT_OK(scheduler().Submit(submission));  // also after its end
  EXPECT_EQ(Report(key).state, agent::SchedulerState::kEnded);
  EXPECT_EQ(*ReadFile(DirectoryOf(key).outputs_path() + "/runs"), "ran\n");
}

TEST_P(SchedulerContract, KnowsNothingOfAnUnknownKey) {
  Make(1);
  EXPECT_EQ(Report(KeyNumber(99)).state, agent::SchedulerState::kAbsent);
  EXPECT_OK(scheduler().Cancel(KeyNumber(99)));
}

TEST_P(SchedulerContract, AnswersForManyKeysAtOnce) {
  Make(1);
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(1), "exec tail -f /dev/null")));
  ASSERT_TRUE(Started(KeyNumber(1)));
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(2), "true")));
  const auto reports = scheduler().Query({KeyNumber(1), KeyNumber(2), KeyNumber(3)});
  ASSERT_OK(reports);
  EXPECT_EQ(reports->at(KeyNumber(1)).state, agent::SchedulerState::kRunning);
  EXPECT_EQ(reports->at(KeyNumber(2)).state, agent::SchedulerState::kPending);
  EXPECT_FALSE(reports->at(KeyNumber(2)).reason.empty());
  EXPECT_EQ(reports->at(KeyNumber(3)).state, agent::SchedulerState::kAbsent);
  EXPECT_OK(Cancel(KeyNumber(1)));
  EXPECT_TRUE(Reaches(KeyNumber(1), agent::SchedulerState::kEnded));
  EXPECT_TRUE(Reaches(KeyNumber(2), agent::SchedulerState::kEnded));
}

TEST_P(SchedulerContract, CancelledWhilePendingNeverRuns) {
  Make(1);
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(1), "exec tail -f /dev/null")));
  ASSERT_TRUE(Started(KeyNumber(1)));
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(2), "true")));
  ASSERT_OK(Cancel(KeyNumber(2)));
  ASSERT_OK(Cancel(KeyNumber(1)));
  ASSERT_TRUE(Reaches(KeyNumber(1), agent::SchedulerState::kEnded));
  ASSERT_TRUE(WaitUntil([&] {
    const agent::SchedulerState state = Report(KeyNumber(2)).state;
    return state == agent::SchedulerState::kAbsent || state == agent::SchedulerState::kEnded;
  }));
  EXPECT_TRUE(LifecycleOf(KeyNumber(2)).started.empty());
}

TEST_P(SchedulerContract, CancelledWhileRunningEnds) {
  Make(1);
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(1), "exec tail -f /dev/null")));
  ASSERT_TRUE(Started(KeyNumber(1)));
  ASSERT_OK(Cancel(KeyNumber(1)));
  ASSERT_OK(Cancel(KeyNumber(1)));
  ASSERT_TRUE(Reaches(KeyNumber(1), agent::SchedulerState::kEnded));
  ASSERT_TRUE(LifecycleOf(KeyNumber(1)).exited.has_value());
  EXPECT_EQ(LifecycleOf(KeyNumber(1)).exited->cause, agent::kCauseCancelled);
}

TEST_P(SchedulerContract, AfterARestartNothingIsLostAndNothingRunsTwice) {
  Make(1);
  const std::string count = "echo x >> \"$ITWIN_OUTPUTS/runs\"; ";
  const agent::Submission gated = Shell(KeyNumber(1), count + "read line < \"$ITWIN_OUTPUTS/gate\"; exit 3");
  Gate gate(DirectoryOf(KeyNumber(1)).outputs_path() + "/gate");
  ASSERT_OK(scheduler().Submit(gated));
  ASSERT_OK(scheduler().Submit(Shell(KeyNumber(2), count + "exit 4")));
  ASSERT_TRUE(Started(KeyNumber(1)));
  harness_->Restart();
  EXPECT_EQ(Report(KeyNumber(1)).state, agent::SchedulerState::kRunning);
  EXPECT_EQ(Report(KeyNumber(2)).state, agent::SchedulerState::kPending);
  gate.Open();
  ASSERT_TRUE(Reaches(KeyNumber(1), agent::SchedulerState::kEnded));
  ASSERT_TRUE(Reaches(KeyNumber(2), agent::SchedulerState::kEnded));
  harness_->Restart();
  EXPECT_EQ(Report(KeyNumber(1)).state, agent::SchedulerState::kEnded);
  for (int n : {1, 2}) {
    EXPECT_EQ(*ReadFile(DirectoryOf(KeyNumber(n)).outputs_path() + "/runs"), "x\n");
    EXPECT_EQ(LifecycleOf(KeyNumber(n)).started.size(), 1u);
    EXPECT_EQ(LifecycleOf(KeyNumber(n)).exited->exit_code, n + 2);
  }
}

TEST_P(SchedulerContract, WhatCannotRunIsRefusedAndLeavesNothing) {
  Make(2);
  const absl::Status refused = scheduler().Submit(Shell(KeyNumber(1), "true", /*ranks=*/1'000'000));
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kFailedPrecondition, ::testing::Not(::testing::IsEmpty())));
  EXPECT_EQ(Report(KeyNumber(1)).state, agent::SchedulerState::kAbsent);
}

}  // namespace itwin::testing
