#include "server/jobs/housekeeper.h"

#include <gtest/gtest.h>

#include "tests/testing/fake_clock.h"
#include "tests/testing/server_fixture.h"

namespace itwin::server {
namespace {

using itwin::testing::FakeClock;
using itwin::testing::StatusIs;
using itwin::testing::TempDirectory;
using testing::Event;
using testing::LogBatch;
using testing::MetricsBatch;
using testing::OpenStore;
using testing::RunningJob;
using ::testing::_;

class HousekeeperTest : public ::testing::Test {
 protected:
  // A job with labels that never began, and one with one of everything; both ended now.
  JobRow Finished(const std::string& request_id) {
    NewJob made = testing::MakeJob(request_id);
    (*made.spec.mutable_labels())["kind"] = "old";
    const auto labelled = store_->Submit(made);
    ITWIN_CHECK(labelled.ok());
    ITWIN_CHECK(store_->AppendEvent(labelled->job.id, Event(EventKind::kFailed)).ok());
    const JobRow job = RunningJob(*store_, request_id + "-run");
    SpoolBatch points = MetricsBatch({job.id, 1}, 0, 10);
    points.points.push_back({"x", {1}, {1}, {1}});
    ITWIN_CHECK(store_->CommitSpool({points, LogBatch({job.id, 1}, 0, "words")}).ok());
    AttemptUpdate update;
    update.outputs.emplace(1).at(0).set_path("model.pt");
    ITWIN_CHECK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1), update).ok());
    ITWIN_CHECK(store_->AppendEvent(job.id, Event(EventKind::kSucceeded, 1)).ok());
    return *store_->GetJob(job.id);
  }

  TempDirectory directory_;
  FakeClock clock_{absl::Now()};
  std::unique_ptr<SqliteJobStore> store_ = OpenStore(directory_ / "itwin.db");
};

TEST_F(HousekeeperTest, RemovesWhatEndedLongAgoAndNothingElse) {
  const JobRow old = Finished("old");
  const JobRow live = RunningJob(*store_, "live");
  Housekeeper keeper({.job_retention = absl::Hours(24)}, store_.get(), &clock_);
  clock_.Advance(absl::Hours(23));
  EXPECT_EQ(keeper.RunOnce(), clock_.Now() + absl::Hours(1));
  EXPECT_OK(store_->GetJob(old.id));
  clock_.Advance(absl::Hours(2));
  keeper.RunOnce();
  EXPECT_THAT(store_->GetJob(old.id), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(store_->ListPoints(old.id, 0, {}, 10), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(store_->ListAttempts(old.id), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_EQ(store_->ListJobs({})->jobs.size(), 1u);  // the one that runs
  EXPECT_TRUE(store_->ListJobs({.labels = {{"kind", "old"}}})->jobs.empty());
  EXPECT_OK(store_->GetJob(live.id));
  EXPECT_OK(store_->Verify(/*all=*/true));
  // Its number may be given again: nothing of the old job shows through.
  const JobRow next = RunningJob(*store_, "next");
  EXPECT_TRUE(store_->ListPoints(next.id, 0, {}, 10)->blocks.empty());
  EXPECT_TRUE(store_->ListOutputs(next.id)->empty());
  EXPECT_EQ(store_->ReadLog(next.id, 1, v1::LOG_STREAM_STDOUT, 0, 100)->data, "");
  SpoolBatch points = MetricsBatch({next.id, 1}, 0, 10);
  points.points.push_back({"x", {1}, {1}, {7}});
  ASSERT_OK(store_->CommitSpool({points}));
  EXPECT_EQ(store_->ListPoints(next.id, 0, {}, 10)->blocks.at(0).values(0), 7);
}

TEST_F(HousekeeperTest, KeepsForEverUnlessTold) {
  const JobRow old = Finished("old");
  Housekeeper keeper({}, store_.get(), &clock_);
  clock_.Advance(absl::Hours(24 * 3650));
  EXPECT_EQ(keeper.RunOnce(), absl::InfiniteFuture());
  keeper.Start();
  keeper.Stop();
  EXPECT_OK(store_->GetJob(old.id));
}

}  // namespace
}  // namespace itwin::server
