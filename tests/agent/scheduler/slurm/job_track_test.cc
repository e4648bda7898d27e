#include "agent/scheduler/slurm/job_track.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace itwin::agent {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

absl::Time At(double seconds) { return absl::UnixEpoch() + absl::Seconds(1000 + seconds); }

SlurmJobRow Row(const std::string& id, const std::string& word, const std::string& reason = "None", std::vector<std::string> nodes = {}) {
  SlurmJobRow row;
  row.id = id;
  row.name = "itwin-x";
  row.word = word;
  row.state = ParseSlurmState(word);
  row.reason = reason;
  row.nodes = std::move(nodes);
  return row;
}

class JobTrackTest : public ::testing::Test {
 protected:
  JobTrack track_{*AttemptKey::Parse("00000000000000aa-1"), JobTrack::Rules()};

  // A look at that second.
  Judgement Look(double second, const std::vector<SlurmJobRow>& rows, const SpoolView& spool = {}, const std::vector<SlurmJobRow>& accounting = {}) {
    Judgement out = track_.Judge(rows, accounting, spool, At(second), At(second + 0.1));
    if (!out.fence) track_.Told(out.report);
    return out;
  }
  void Submitted(const std::string& id, double second = 0) {
    track_.Tried();
    track_.Submitted(id, At(second));
  }
  // Submitted and trusted.
  void Running(const std::string& id) {
    Submitted(id);
    Look(1, {Row(id, "RUNNING", "None", {"n1", "n2"})});
    EXPECT_TRUE(Look(4, {Row(id, "RUNNING", "None", {"n1", "n2"})}).record);
  }
};

TEST_F(JobTrackTest, KilledForItsMemoryIsNotJustLost) {
  Running("7");
  SpoolView spool;
  spool.lease = spool.over_memory = true;
  Look(30, {Row("7", "FAILED", "JobLaunchFailure", {"n1"})}, spool);
  const Judgement judgement = Look(90, {Row("7", "FAILED", "JobLaunchFailure", {"n1"})}, spool);
  EXPECT_EQ(judgement.report.cause, v1::END_CAUSE_OUT_OF_MEMORY);
  EXPECT_THAT(judgement.report.reason, HasSubstr("more memory"));
}

TEST_F(JobTrackTest, KilledForItsMemoryAndForgottenAtOnce) {
  Running("7");
  const SpoolView spool{.lease = true, .over_memory = true, .beat = "1"};
  Look(10, {}, spool);
  EXPECT_EQ(Look(100, {}, spool).report.cause, v1::END_CAUSE_OUT_OF_MEMORY);
}

TEST_F(JobTrackTest, TheSchedulersDeadlineIsNoTimeLimit) {
  EXPECT_EQ(CauseOfState(ParseSlurmState("DEADLINE"), false), v1::END_CAUSE_DEADLINE);
  EXPECT_EQ(CauseOfState(ParseSlurmState("TIMEOUT"), false), v1::END_CAUSE_TIME_LIMIT);
}

TEST_F(JobTrackTest, NothingTriedIsAbsent) {
  EXPECT_EQ(Look(1, {}).report.state, SchedulerState::kAbsent);
}

TEST_F(JobTrackTest, AnIdIsTrustedWhenSeenTwiceTwoSecondsApart) {
  Submitted("7");
  EXPECT_FALSE(Look(0.5, {Row("7", "PENDING", "Priority")}).record);
  EXPECT_FALSE(Look(1.5, {Row("7", "PENDING", "Priority")}).record);
  EXPECT_TRUE(Look(2.6, {Row("7", "PENDING", "Priority")}).record);
  EXPECT_TRUE(track_.trusted());
}

TEST_F(JobTrackTest, AnIdTheControllerForgotIsSubmittedAgain) {
  Submitted("7");
  Look(0.5, {Row("7", "PENDING", "Priority")});
  EXPECT_EQ(Look(1, {}).report.state, SchedulerState::kPending) << "one look is not enough";
  const Judgement judgement = Look(4, {});
  EXPECT_EQ(judgement.report.state, SchedulerState::kAbsent);
  EXPECT_THAT(judgement.report.reason, HasSubstr("forgotten job 7"));
  EXPECT_FALSE(track_.tried());
}

TEST_F(JobTrackTest, ALookFromBeforeTheSubmissionSaysNothing) {
  Submitted("7", 10);
  for (double second : {8.0, 9.0, 9.9}) EXPECT_EQ(Look(second, {}).report.state, SchedulerState::kPending);
}

TEST_F(JobTrackTest, AnUnansweredSbatchIsInDoubtUntilTheNameTurnsUp) {
  track_.Tried();
  track_.NoAnswer(At(0));
  EXPECT_EQ(Look(1, {}).report.state, SchedulerState::kUnknown);
  EXPECT_EQ(Look(5, {}).report.state, SchedulerState::kUnknown);
  EXPECT_EQ(Look(8, {Row("9", "PENDING", "Resources")}).report.state, SchedulerState::kPending);
  EXPECT_EQ(track_.id(), "9");
}

TEST_F(JobTrackTest, AnUnansweredSbatchIsNothingOnceTwoLooksSaySoForLongEnough) {
  track_.Tried();
  track_.NoAnswer(At(0));
  EXPECT_EQ(Look(1, {}).report.state, SchedulerState::kUnknown);
  EXPECT_EQ(Look(9, {}).report.state, SchedulerState::kUnknown);
  EXPECT_EQ(Look(10.5, {}).report.state, SchedulerState::kAbsent);
}

TEST_F(JobTrackTest, ALeaseEndsTheDoubtForGood) {
  track_.Tried();
  track_.NoAnswer(At(0));
  const SpoolView begun{.lease = true, .beat = "1"};
  Look(1, {}, begun);
  EXPECT_EQ(Look(20, {}, begun).report.state, SchedulerState::kUnknown) << "it runs; never submitted again";
}

TEST_F(JobTrackTest, ADeadRecordOfARefusalIsNoAdoption) {
  track_.Tried();
  track_.NoAnswer(At(0));
  const Judgement judgement = Look(1, {Row("9", "FAILED", "BadConstraints")});
  EXPECT_EQ(judgement.report.state, SchedulerState::kEnded);
  EXPECT_EQ(judgement.report.cause, v1::END_CAUSE_LAUNCH_FAILED);
  EXPECT_TRUE(judgement.fence);
}

TEST_F(JobTrackTest, AbsenceAloneIsNeverAVerdict) {
  Running("7");
  SpoolView spool{.lease = true, .beat = "1"};
  EXPECT_EQ(Look(10, {}, spool).report.state, SchedulerState::kUnknown);
  EXPECT_TRUE(Look(12, {}, spool).ask_accounting);
  for (int second = 20; second < 400; second += 10) {
    spool.beat = std::to_string(second);  // it lives
    EXPECT_EQ(Look(second, {}, spool).report.state, SchedulerState::kUnknown) << second;
  }
  EXPECT_EQ(Look(430, {}, spool).report.state, SchedulerState::kUnknown);
  const Judgement judgement = Look(455, {}, spool);
  EXPECT_EQ(judgement.report.state, SchedulerState::kEnded);
  EXPECT_EQ(judgement.report.cause, v1::END_CAUSE_LOST);
  EXPECT_FALSE(judgement.fence);
}

TEST_F(JobTrackTest, GoneWithItsExitRecordIsEnded) {
  Running("7");
  const Judgement judgement = Look(10, {}, {.lease = true, .exited = true});
  EXPECT_EQ(judgement.report.state, SchedulerState::kEnded);
  EXPECT_TRUE(judgement.ask_accounting) << "a record that says only 'killed' is explained by it";
}

TEST_F(JobTrackTest, GoneBeforeItBeganIsConcludedBehindAFence) {
  Running("7");
  EXPECT_EQ(Look(10, {}).report.state, SchedulerState::kUnknown);
  EXPECT_EQ(Look(50, {}).report.state, SchedulerState::kUnknown);
  const Judgement judgement = Look(75, {});
  EXPECT_EQ(judgement.report.cause, v1::END_CAUSE_LOST);
  EXPECT_TRUE(judgement.fence);
}

TEST_F(JobTrackTest, AccountingKnowsWhatTheQueueForgot) {
  Running("7");
  const std::vector<SlurmJobRow> accounting = {Row("7", "PREEMPTED", "None", {"n1"})};
  const SpoolView spool{.lease = true};
  Look(10, {}, spool, accounting);
  const Judgement judgement = Look(30, {}, spool, accounting);
  EXPECT_EQ(judgement.report.state, SchedulerState::kEnded);
  EXPECT_EQ(judgement.report.cause, v1::END_CAUSE_PREEMPTED);
  JobTrack other(*AttemptKey::Parse("00000000000000aa-1"), {});
  other.Restore("7", At(0));
  const Judgement stale = other.Judge({}, {Row("7", "RUNNING")}, spool, At(10), At(10));
  EXPECT_EQ(stale.report.state, SchedulerState::kUnknown) << "accounting may be late: only an end is believed";
}

TEST_F(JobTrackTest, AStepOutOfMemoryIsTheJobs) {
  Running("7");
  SlurmJobRow step = Row("7", "OUT_OF_MEMORY");
  step.step = true;
  const SpoolView spool{.lease = true};
  Look(10, {}, spool, {Row("7", "FAILED"), step});
  EXPECT_EQ(Look(30, {}, spool, {Row("7", "FAILED"), step}).report.cause, v1::END_CAUSE_OUT_OF_MEMORY);
}

TEST_F(JobTrackTest, AnEndWaitsForItsRecord) {
  Running("7");
  const SpoolView lease{.lease = true};
  EXPECT_EQ(Look(10, {Row("7", "FAILED", "JobLaunchFailure", {"n1"})}, lease).report.state, SchedulerState::kRunning);
  EXPECT_EQ(Look(20, {Row("7", "FAILED", "JobLaunchFailure", {"n1"})}, lease).report.state, SchedulerState::kRunning);
  const Judgement lost = Look(26, {Row("7", "FAILED", "JobLaunchFailure", {"n1"})}, lease);
  EXPECT_EQ(lost.report.state, SchedulerState::kEnded);
  EXPECT_EQ(lost.report.cause, v1::END_CAUSE_LOST);
  EXPECT_EQ(Look(27, {Row("7", "COMPLETED", "None", {"n1"})}, {.lease = true, .exited = true}).report.cause, v1::END_CAUSE_UNSPECIFIED);
}

TEST_F(JobTrackTest, ALostNodeDoesNotWait) {
  Running("7");
  const Judgement judgement = Look(10, {Row("7", "NODE_FAIL", "None", {"n1", "n2"})}, {.lease = true});
  EXPECT_EQ(judgement.report.cause, v1::END_CAUSE_NODE_FAILED);
  EXPECT_TRUE(judgement.ask_nodes);
  EXPECT_THAT(judgement.report.nodes, ElementsAre("n1", "n2"));
}

TEST_F(JobTrackTest, CompletedMayBeTheSecondLifeThatLeft) {
  Running("7");
  SpoolView spool{.lease = true, .duplicates = 1, .beat = "1"};
  Look(10, {Row("7", "COMPLETED", "None", {"n1"})}, spool);
  spool.beat = "2";
  EXPECT_EQ(Look(30, {Row("7", "COMPLETED", "None", {"n1"})}, spool).report.state, SchedulerState::kUnknown);
  EXPECT_EQ(Look(91, {Row("7", "COMPLETED", "None", {"n1"})}, spool).report.cause, v1::END_CAUSE_LOST);
}

TEST_F(JobTrackTest, ARequeuedJobIsNotStartedTwice) {
  Running("7");
  SlurmJobRow again = Row("7", "PENDING", "BeginTime");
  again.restarts = 1;
  const Judgement judgement = Look(10, {again}, {.lease = true});
  EXPECT_TRUE(judgement.cancel);
  EXPECT_EQ(judgement.report.state, SchedulerState::kUnknown);
  EXPECT_EQ(Look(12, {again}, {.lease = true, .exited = true}).report.cause, v1::END_CAUSE_PREEMPTED);
  // One that never began is only late.
  EXPECT_EQ(Look(13, {again}).report.state, SchedulerState::kPending);
  EXPECT_EQ(Look(14, {again}, {.lease = true, .lease_restart = 1}).report.state, SchedulerState::kPending);
}

TEST_F(JobTrackTest, WhatSlurmWouldNeverStartIsTakenOut) {
  Submitted("7");
  EXPECT_FALSE(Look(1, {Row("7", "PENDING", "PartitionTimeLimit")}).cancel);
  const Judgement judgement = Look(4, {Row("7", "PENDING", "PartitionTimeLimit")});
  EXPECT_TRUE(judgement.cancel);
  EXPECT_TRUE(judgement.fence);
  EXPECT_EQ(judgement.report.cause, v1::END_CAUSE_LAUNCH_FAILED);
  EXPECT_THAT(judgement.report.reason, HasSubstr("PartitionTimeLimit"));
}

TEST_F(JobTrackTest, AnUnheardOfWordChangesNothing) {
  Running("7");
  const Judgement judgement = Look(10, {Row("7", "HIBERNATING")}, {.lease = true});
  EXPECT_EQ(judgement.report.state, SchedulerState::kRunning);
  EXPECT_EQ(judgement.report.word, "HIBERNATING");
}

TEST_F(JobTrackTest, AStrangersJobWithOurIdIsNotOurs) {
  // The rows are those under our name, so the stranger's is not among them: forgotten, and found under another id.
  Submitted("7");
  EXPECT_EQ(Look(1, {}).report.state, SchedulerState::kPending);
  EXPECT_EQ(Look(2, {Row("8", "PENDING", "Priority")}).report.id, "8");
}

TEST_F(JobTrackTest, OneOfTwoUnderOurNameIsSurplus) {
  Running("7");
  const Judgement judgement = Look(10, {Row("7", "RUNNING", "None", {"n1"}), Row("8", "PENDING", "Priority")});
  EXPECT_EQ(judgement.report.id, "7");
  EXPECT_THAT(judgement.surplus, ElementsAre("8"));
}

TEST_F(JobTrackTest, StatesMapToOurs) {
  const std::pair<const char*, SchedulerState> table[] = {
      {"PENDING", SchedulerState::kPending},     {"REQUEUE_HOLD", SchedulerState::kHeld}, {"CONFIGURING", SchedulerState::kRunning},
      {"RUNNING", SchedulerState::kRunning},     {"SUSPENDED", SchedulerState::kSuspended}, {"STOPPED", SchedulerState::kSuspended},
      {"COMPLETING", SchedulerState::kRunning},  {"REVOKED", SchedulerState::kUnknown},   {"STAGE_OUT", SchedulerState::kRunning}};
  Submitted("7");
  double second = 1;
  for (const auto& [word, state] : table) EXPECT_EQ(Look(second++, {Row("7", word, "Priority")}).report.state, state) << word;
  EXPECT_EQ(Look(second, {Row("7", "PENDING", "JobHeldUser")}).report.state, SchedulerState::kHeld);
}

// Whatever SLURM shows in whatever order: an attempt that never took its lease is not told ended without a fence, one with
// a lease is never told absent, and no conclusion is made from absence that is younger than the rule says.
TEST_F(JobTrackTest, RandomHistoriesKeepTheRules) {
  for (unsigned seed = 1; seed <= 300; ++seed) {
    std::mt19937 random(seed);
    track_ = JobTrack(*AttemptKey::Parse("00000000000000aa-1"), JobTrack::Rules());
    SpoolView spool;
    double second = 0, absent_since = -1;
    for (int step = 0; step < 60; ++step) {
      second += 0.5 + static_cast<double>(random() % 200) / 10;
      if (random() % 12 == 0) Submitted(std::to_string(random() % 3 + 1), second);
      if (random() % 15 == 0) {
        track_.Tried();
        track_.NoAnswer(At(second));
      }
      if (random() % 20 == 0) spool.lease = true;
      if (spool.lease && random() % 3 == 0) spool.beat = std::to_string(second);
      std::vector<SlurmJobRow> rows;
      const char* words[] = {"PENDING", "RUNNING", "COMPLETING", "COMPLETED", "FAILED", "NODE_FAIL", "SUSPENDED", "WHAT", "CANCELLED"};
      if (random() % 3 != 0) rows.push_back(Row(std::to_string(random() % 3 + 1), words[random() % std::size(words)], "None", {"n1"}));
      if (!rows.empty() && random() % 10 == 0) rows.back().restarts = 1;
      const Judgement judgement = Look(second + 0.2, rows, spool);
      const bool seen = !rows.empty() && rows[0].id == track_.id();
      if (!seen && absent_since < 0) absent_since = second + 0.2;
      if (seen) absent_since = -1;
      const bool ended = judgement.report.state == SchedulerState::kEnded;
      if (!spool.lease && ended) {
        EXPECT_TRUE(judgement.fence) << "seed " << seed << " step " << step;
      }
      if (spool.lease) {
        EXPECT_NE(judgement.report.state, SchedulerState::kAbsent) << "seed " << seed << " step " << step;
      }
      if (!seen && ended) {
        EXPECT_GE(second + 0.3 - absent_since, 60) << "seed " << seed << " step " << step;
      }
    }
  }
}

}  // namespace
}  // namespace itwin::agent
