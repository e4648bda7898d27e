#include "server/jobs/event_hub.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <vector>

#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait.h"

namespace itwin::server {
namespace {

using itwin::testing::FakeClock;
using itwin::testing::WaitUntil;

class EventHubTest : public ::testing::Test {
 protected:
  std::unique_ptr<EventHub::Subscription> Subscribe(const JobId& job, std::atomic<int>* wakes) {
    auto subscription = hub_.Subscribe(job, [wakes] { ++*wakes; });
    EXPECT_OK(subscription);
    return *std::move(subscription);
  }
  void Commit(const JobId& job) { hub_.OnCommit({{.job = job, .points = true}}); }

  FakeClock clock_;
  EventHub hub_{{.max_watchers = 100, .updates_per_second = 100, .shortest_round = absl::Milliseconds(50)}, &clock_};
  const JobId job_ = JobId::Random(), other_ = JobId::Random();
};

TEST_F(EventHubTest, FewWatchersAreToldWithinEachCommit) {
  std::atomic<int> wakes = 0, others = 0;
  const auto one = Subscribe(job_, &wakes), two = Subscribe(job_, &wakes), three = Subscribe(other_, &others);
  for (int i = 1; i <= 5; ++i) {
    Commit(job_);
    EXPECT_EQ(wakes, 2 * i);
  }
  EXPECT_EQ(others, 0);
}

TEST_F(EventHubTest, ManyWatchersAreToldInRoundsAndSeeNothingNewBetweenThem) {
  std::atomic<int> wakes = 0;
  std::vector<std::unique_ptr<EventHub::Subscription>> watchers;
  for (int i = 0; i < 10; ++i) watchers.push_back(Subscribe(job_, &wakes));  // a round takes 100 ms
  Commit(job_);
  EXPECT_EQ(wakes, 10);  // the first is not kept waiting
  const ChangeCounts before = watchers[0]->topic().counts();
  Commit(job_);
  hub_.OnCommit({{.job = job_, .event = true}});
  EXPECT_EQ(wakes, 10);
  EXPECT_EQ(watchers[0]->topic().counts(), before);
  clock_.Advance(absl::Milliseconds(101));
  ASSERT_TRUE(WaitUntil([&] { return wakes == 20; }));  // once for both
  const ChangeCounts after = watchers[0]->topic().counts();
  EXPECT_EQ(after.points, before.points + 1);
  EXPECT_EQ(after.events, before.events + 1);
  // Nothing waits any more: the next commit after the round is told at once again.
  clock_.Advance(absl::Milliseconds(101));
  Commit(job_);
  EXPECT_EQ(wakes, 30);
}

TEST_F(EventHubTest, JobsHaveTheirOwnRounds) {
  std::atomic<int> wakes = 0, others = 0;
  std::vector<std::unique_ptr<EventHub::Subscription>> watchers;
  for (int i = 0; i < 10; ++i) watchers.push_back(Subscribe(job_, &wakes));
  watchers.push_back(Subscribe(other_, &others));
  Commit(job_);
  Commit(other_);
  EXPECT_EQ(wakes, 10);
  EXPECT_EQ(others, 1);
  Commit(job_);
  Commit(other_);
  clock_.Advance(absl::Seconds(1));
  EXPECT_TRUE(WaitUntil([&] { return wakes == 20 && others == 2; }));
}

TEST_F(EventHubTest, ClosingTellsEverybodyAtOnce) {
  std::atomic<int> wakes = 0;
  std::vector<std::unique_ptr<EventHub::Subscription>> watchers;
  for (int i = 0; i < 10; ++i) watchers.push_back(Subscribe(job_, &wakes));
  Commit(job_);
  Commit(job_);
  hub_.Close();
  EXPECT_EQ(wakes, 20);
  EXPECT_TRUE(hub_.closed());
}

}  // namespace
}  // namespace itwin::server
