#include "server/jobs/job_watch.h"

#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "tests/testing/server_fixture.h"

namespace itwin::server {
namespace {

using itwin::testing::StatusIs;
using itwin::testing::TempDirectory;
using testing::Event;
using testing::LogBatch;
using testing::MetricsBatch;
using testing::OpenStore;
using testing::RunningJob;
using ::testing::_;

// All that a watcher was told, put together.
struct Told {
  v1::Job job;
  std::vector<int64_t> events;
  std::vector<double> points;
  std::map<int, std::string> out, err;  // by attempt
  v1::WatchCursor cursor;
  int updates = 0;
  bool finished = false;

  void Add(const std::string& encoded) {
    v1::JobUpdate update;
    ASSERT_TRUE(update.ParseFromString(encoded));
    ++updates;
    if (update.has_job()) job = update.job();
    for (const auto& event : update.events()) events.push_back(event.sequence());
    for (const auto& block : update.blocks()) points.insert(points.end(), block.values().begin(), block.values().end());
    out[update.cursor().log_attempt()] += update.stdout_data();
    err[update.cursor().log_attempt()] += update.stderr_data();
    cursor = update.cursor();
  }
};

class JobWatchTest : public ::testing::Test {
 protected:
  JobWatchTest() { store_->AddListener(&hub_); }
  ~JobWatchTest() override { store_->RemoveListener(&hub_); }

  std::unique_ptr<JobWatch> Open(const JobId& job, const v1::WatchCursor& cursor = {}, EventHub::Wake wake = [] {}) {
    auto watch = JobWatch::Open(store_.get(), &hub_, {.job = job, .cursor = cursor, .points = true, .logs = true}, std::move(wake));
    ITWIN_CHECK(watch.ok());
    return *std::move(watch);
  }
  // Until there is nothing new.
  void Drain(JobWatch& watch, Told* told) {
    while (!told->finished) {
      const auto step = watch.Next();
      ASSERT_OK(step);
      if (step->update != nullptr) told->Add(*step->update);
      told->finished = step->finished;
      if (step->update == nullptr) return;
    }
  }
  void Emit(const JobRow& job, int attempt, int points, const std::string& text) {
    const AttemptKey key(job.id, attempt);
    SpoolBatch batch = MetricsBatch(key, metrics_[attempt], metrics_[attempt] + points);
    PointColumns columns{"x", {}, {}, {}};
    for (int i = 0; i < points; ++i) {
      columns.steps.push_back(i);
      columns.times_us.push_back(i);
      columns.values.push_back(static_cast<double>(next_value_++));
    }
    batch.points.push_back(columns);
    ASSERT_OK(store_->CommitSpool({batch, LogBatch(key, out_[attempt], text)}));
    metrics_[attempt] += points;
    out_[attempt] += static_cast<int64_t>(text.size());
  }

  TempDirectory directory_;
  std::unique_ptr<SqliteJobStore> store_ = OpenStore(directory_ / "itwin.db");
  SystemClock clock_;
  EventHub hub_{{.max_watchers = 100}, &clock_};
  std::map<int, int64_t> metrics_, out_;
  int64_t next_value_ = 0;
};

TEST_F(JobWatchTest, TellsThePastThenEachChangeThenEnds) {
  const JobRow job = RunningJob(*store_, "r");
  Emit(job, 1, 10, "hello ");
  std::atomic<int> wakes = 0;
  auto watch = Open(job.id, {}, [&] { ++wakes; });
  Told told;
  Drain(*watch, &told);
  EXPECT_EQ(told.job.state(), v1::JOB_STATE_RUNNING);
  EXPECT_EQ(told.events.size(), 5u);
  EXPECT_EQ(told.points.size(), 10u);
  EXPECT_EQ(told.out[1], "hello ");
  EXPECT_EQ(watch->Next()->update, nullptr);
  EXPECT_EQ(wakes, 0);
  Emit(job, 1, 5, "world");
  EXPECT_EQ(wakes, 1);
  Drain(*watch, &told);
  EXPECT_EQ(told.points.size(), 15u);
  EXPECT_EQ(told.out[1], "hello world");
  RunningJob(*store_, "other");
  EXPECT_EQ(wakes, 1);
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1)));
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kSucceeded, 1)));
  Drain(*watch, &told);
  EXPECT_TRUE(told.finished);
  EXPECT_EQ(told.job.state(), v1::JOB_STATE_SUCCEEDED);
  for (size_t i = 0; i < told.points.size(); ++i) EXPECT_EQ(told.points[i], static_cast<double>(i));
  // A watch of a finished job tells all and ends at once.
  Told late;
  Drain(*Open(job.id), &late);
  EXPECT_TRUE(late.finished);
  EXPECT_EQ(late.events, told.events);
  EXPECT_EQ(late.points, told.points);
  EXPECT_EQ(late.out[1], told.out[1]);
}

TEST_F(JobWatchTest, GoesOnFromEveryCursorWithoutRepeatsOrGaps) {
  const JobRow job = RunningJob(*store_, "r");
  for (int i = 0; i < 60; ++i) Emit(job, 1, 1000, std::string(9'000, static_cast<char>('a' + i % 26)));
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1)));
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kSucceeded, 1)));
  std::vector<std::string> updates;
  {
    auto watch = Open(job.id);
    while (true) {
      const auto step = watch->Next();
      ASSERT_OK(step);
      if (step->update != nullptr) updates.push_back(*step->update);
      if (step->finished) break;
    }
  }
  ASSERT_GT(updates.size(), 2u);
  Told whole;
  for (const auto& update : updates) whole.Add(update);
  ASSERT_EQ(whole.points.size(), 60'000u);
  ASSERT_EQ(whole.out[1].size(), 540'000u);
  for (size_t cut = 0; cut < updates.size(); ++cut) {
    Told told;
    for (size_t i = 0; i <= cut; ++i) told.Add(updates[i]);
    auto watch = Open(job.id, told.cursor);
    Drain(*watch, &told);
    EXPECT_TRUE(told.finished);
    EXPECT_EQ(told.events, whole.events) << cut;
    EXPECT_EQ(told.points, whole.points) << cut;
    EXPECT_EQ(told.out[1], whole.out[1]) << cut;
  }
}

TEST_F(JobWatchTest, TellsTheRestOfAnAttemptsLogBeforeTheNext) {
  const JobRow job = RunningJob(*store_, "r");
  auto watch = Open(job.id);
  Told told;
  Emit(job, 1, 1, "first");
  Drain(*watch, &told);
  Emit(job, 1, 1, " attempt");
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1)));
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kRequeued, 1)));
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kPlaced, 2)));
  Emit(job, 2, 1, "second");
  Drain(*watch, &told);
  EXPECT_EQ(told.out[1], "first attempt");
  EXPECT_EQ(told.out[2], "second");
  EXPECT_EQ(told.cursor.log_attempt(), 2);
  // Who comes late hears the newest only.
  Told late;
  auto other = Open(job.id);
  Drain(*other, &late);
  EXPECT_EQ(late.out[1], "");
  EXPECT_EQ(late.out[2], "second");
}

TEST_F(JobWatchTest, WatchersWhoReadWhileOthersWriteMissNothing) {
  const JobRow job = RunningJob(*store_, "r");
  constexpr int kWatchers = 8, kRounds = 150;
  std::vector<Told> told(kWatchers);
  std::vector<std::thread> threads;
  for (int w = 0; w < kWatchers; ++w) {
    threads.emplace_back([&, w] {
      absl::Mutex mu;
      bool woken = false;
      auto watch = Open(job.id, {}, [&] {
        absl::MutexLock lock(&mu);
        woken = true;
      });
      while (!told[w].finished) {
        Drain(*watch, &told[w]);
        if (told[w].finished || ::testing::Test::HasFailure()) break;
        absl::MutexLock lock(&mu);
        if (!mu.AwaitWithTimeout(absl::Condition(&woken), absl::Seconds(20))) {
          ADD_FAILURE() << "not woken";
          break;
        }
        woken = false;
      }
    });
  }
  for (int i = 0; i < kRounds; ++i) Emit(job, 1, 1 + i % 7, absl::StrCat(i, "\n"));
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1)));
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kSucceeded, 1)));
  for (std::thread& thread : threads) thread.join();
  std::string log;
  for (int i = 0; i < kRounds; ++i) absl::StrAppend(&log, i, "\n");
  for (const Told& one : told) {
    ASSERT_EQ(static_cast<int64_t>(one.points.size()), next_value_);
    for (size_t i = 0; i < one.points.size(); ++i) ASSERT_EQ(one.points[i], static_cast<double>(i));
    EXPECT_EQ(one.out.at(1), log);
    EXPECT_EQ(one.events.size(), 7u);
  }
  EXPECT_EQ(hub_.watchers(), 0);
}

TEST_F(JobWatchTest, ClosingAndLimitsAreSaid) {
  const JobRow job = RunningJob(*store_, "r");
  EventHub small({.max_watchers = 1}, &clock_);
  auto first = JobWatch::Open(store_.get(), &small, {.job = job.id, .cursor = {}}, [] {});
  ASSERT_OK(first);
  EXPECT_THAT(JobWatch::Open(store_.get(), &small, {.job = job.id, .cursor = {}}, [] {}).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, _));
  absl::Notification woken;
  auto watch = Open(job.id, {}, [&] { woken.Notify(); });
  Told told;
  Drain(*watch, &told);
  EXPECT_TRUE(watch->Rests());
  hub_.Close();
  EXPECT_TRUE(woken.HasBeenNotified());
  EXPECT_FALSE(watch->Rests());  // nobody would wake it again
  EXPECT_THAT(watch->Next().status(), StatusIs(absl::StatusCode::kUnavailable, _));
  EXPECT_THAT(JobWatch::Open(store_.get(), &hub_, {.job = job.id, .cursor = {}}, [] {}).status(),
              StatusIs(absl::StatusCode::kUnavailable, _));
  v1::WatchCursor bad;
  bad.set_points(-1);
  EXPECT_THAT(JobWatch::Open(store_.get(), &hub_, {.job = job.id, .cursor = bad}, [] {}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, _));
}

}  // namespace
}  // namespace itwin::server
