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
    EXPECT_TRUE((*subscription)->Rest((*subscription)->topic().counts()));
    return *std::move(subscription);
  }
  std::vector<std::unique_ptr<EventHub::Subscription>> SubscribeMany(int count, std::atomic<int>* wakes) {
    std::vector<std::unique_ptr<EventHub::Subscription>> watchers;
    for (int i = 0; i < count; ++i) watchers.push_back(Subscribe(job_, wakes));
    return watchers;
  }
  void Commit(const JobId& job) { hub_.OnCommit({{.job = job, .points = true}}); }
  static bool Rest(EventHub::Subscription& watcher) { return watcher.Rest(watcher.topic().counts()); }

  FakeClock clock_;
  EventHub hub_{{.max_watchers = 100, .longest_round = absl::Milliseconds(250)}, &clock_};
  const JobId job_ = JobId::Random(), other_ = JobId::Random();
};

TEST_F(EventHubTest, WatchersThatAreDoneAtOnceAreToldWithinEachCommit) {
  std::atomic<int> wakes = 0, others = 0;
  const auto one = Subscribe(job_, &wakes), two = Subscribe(job_, &wakes), three = Subscribe(other_, &others);
  for (int i = 1; i <= 5; ++i) {
    Commit(job_);
    EXPECT_EQ(wakes, 2 * i);
    EXPECT_TRUE(Rest(*one));
    EXPECT_TRUE(Rest(*two));
  }
  EXPECT_EQ(others, 0);
}

TEST_F(EventHubTest, AWatcherWithNewsDoesNotRest) {
  std::atomic<int> wakes = 0;
  const auto watcher = Subscribe(job_, &wakes);
  const ChangeCounts seen = watcher->topic().counts();
  Commit(job_);
  EXPECT_FALSE(watcher->Rest(seen));
  EXPECT_TRUE(Rest(*watcher));
}

TEST_F(EventHubTest, TheNextRoundWaitsForDeliveryAndHalfAsLongAgain) {
  std::atomic<int> wakes = 0;
  const auto watchers = SubscribeMany(10, &wakes);
  Commit(job_);
  EXPECT_EQ(wakes, 10);  // the first is not kept waiting
  const ChangeCounts before = watchers[0]->topic().counts();
  Commit(job_);
  hub_.OnCommit({{.job = job_, .event = true}});
  clock_.Advance(absl::Milliseconds(100));
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(Rest(*watchers[i]));
  Commit(job_);
  EXPECT_EQ(wakes, 10);  // not yet delivered
  EXPECT_EQ(watchers[0]->topic().counts(), before);
  EXPECT_TRUE(Rest(*watchers[8]));  // nine of ten: after 100 ms
  Commit(job_);
  clock_.Advance(absl::Milliseconds(49));
  Commit(job_);
  EXPECT_EQ(wakes, 10);
  clock_.Advance(absl::Milliseconds(2));
  ASSERT_TRUE(WaitUntil([&] { return wakes == 20; }));  // once for all
  const ChangeCounts after = watchers[0]->topic().counts();
  EXPECT_EQ(after.points, before.points + 1);
  EXPECT_EQ(after.events, before.events + 1);
}

TEST_F(EventHubTest, AWatcherThatTakesNothingHoldsUpOneRoundOnly) {
  std::atomic<int> wakes = 0;
  const auto watchers = SubscribeMany(3, &wakes);
  Commit(job_);
  Commit(job_);
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(Rest(*watchers[i]));
  clock_.Advance(absl::Milliseconds(249));
  EXPECT_EQ(wakes, 3);
  clock_.Advance(absl::Milliseconds(2));
  ASSERT_TRUE(WaitUntil([&] { return wakes == 6; }));  // the longest round
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(Rest(*watchers[i]));
  Commit(job_);  // the other two are done
  EXPECT_EQ(wakes, 9);
}

TEST_F(EventHubTest, AWatcherThatGoesHoldsUpNobody) {
  std::atomic<int> wakes = 0;
  auto watchers = SubscribeMany(3, &wakes);
  Commit(job_);
  EXPECT_TRUE(Rest(*watchers[0]));
  watchers.pop_back();  // without having rested
  EXPECT_TRUE(Rest(*watchers[1]));
  Commit(job_);
  EXPECT_EQ(wakes, 3 + 2);
  EXPECT_TRUE(Rest(*watchers[0]));
  watchers.pop_back();
  Commit(job_);
  EXPECT_EQ(wakes, 3 + 2 + 1);
}

TEST_F(EventHubTest, JobsHaveTheirOwnRounds) {
  std::atomic<int> wakes = 0, others = 0;
  const auto watchers = SubscribeMany(10, &wakes);
  const auto other = Subscribe(other_, &others);
  Commit(job_);
  Commit(other_);
  EXPECT_TRUE(Rest(*other));
  Commit(job_);
  Commit(other_);
  EXPECT_EQ(wakes, 10);
  EXPECT_EQ(others, 2);
  clock_.Advance(absl::Seconds(1));
  EXPECT_TRUE(WaitUntil([&] { return wakes == 20; }));
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
