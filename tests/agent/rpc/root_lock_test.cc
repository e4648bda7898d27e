#include "agent/rpc/root_lock.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <thread>
#include <vector>

#include "agent/spool/spool_files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::testing {
namespace {

using agent::RootLock;
using Standing = RootLock::Standing;
using ::testing::HasSubstr;

constexpr RootLock::Timing kQuick = {.renew = absl::Milliseconds(20), .timeout = absl::Milliseconds(400), .least_tenure = absl::ZeroDuration()};
constexpr RootLock::Timing kPatient = {.renew = absl::Milliseconds(20), .timeout = absl::Seconds(60), .least_tenure = absl::ZeroDuration()};

// Two places in one process: what one holds, the other sees as an agent on another host.
class RootLockTest : public ::testing::Test {
 protected:
  ~RootLockTest() override { unsetenv("ITWIN_TEST_PLACE"); }
  static void Be(const char* place) { setenv("ITWIN_TEST_PLACE", place, 1); }
  absl::StatusOr<std::unique_ptr<RootLock>> Take(absl::Duration limit = absl::ZeroDuration(), const RootLock::Timing& timing = kPatient) {
    return RootLock::Take(root_.path(), limit, timing);
  }
  TempDirectory root_;
};

TEST_F(RootLockTest, OneOfManyGetsIt) {
  std::vector<std::thread> threads;
  std::atomic<int> won{0};
  std::vector<std::unique_ptr<RootLock>> locks(16);
  for (int i = 0; i < 16; ++i) {
    threads.emplace_back([&, i] {
      auto lock = Take();
      if (!lock.ok()) return;
      locks[static_cast<size_t>(i)] = *std::move(lock);
      ++won;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(won, 1);
}

TEST_F(RootLockTest, TermsGrowAndTheOldOneIsFenced) {
  auto first = Take();
  ASSERT_OK(first);
  EXPECT_EQ((*first)->term(), 1);
  EXPECT_OK((*first)->Check());
  EXPECT_THAT(Take().status(), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("serves " + root_.path())));
  (*first)->Withdraw();
  auto second = Take();
  ASSERT_OK(second);
  EXPECT_EQ((*second)->term(), 2);
  EXPECT_THAT((*first)->Check(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("term 2, ours was 1")));
  EXPECT_EQ((*first)->Renew(), Standing::kTakenOver);
  // What the old one still does takes nothing from the new one.
  (*first)->Withdraw();
  EXPECT_OK((*second)->Check());
  EXPECT_THAT(Take().status(), StatusIs(absl::StatusCode::kAlreadyExists, ::testing::_));
}

TEST_F(RootLockTest, ALivingOneElsewhereIsAskedToLeave) {
  Be("here");
  auto first = Take();
  ASSERT_OK(first);
  EXPECT_EQ((*first)->Renew(), Standing::kHeld);
  Be("there");
  EXPECT_THAT(Take().status(), StatusIs(absl::StatusCode::kAlreadyExists, ::testing::_)) << "it lives, as far as we know";
  std::unique_ptr<RootLock> second;
  std::thread waits([&] {
    auto lock = Take(absl::Seconds(30));
    if (lock.ok()) second = *std::move(lock);
  });
  EXPECT_TRUE(WaitUntil([&] { return (*first)->Renew() == Standing::kAskedToLeave; }));
  EXPECT_OK((*first)->Check()) << "until it has gone it is the one";
  (*first)->Withdraw();
  waits.join();
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(second->term(), 2);
  EXPECT_EQ(second->Renew(), Standing::kHeld) << "the request to leave was for the other";
}

TEST_F(RootLockTest, ASilentOneElsewhereIsReplacedAndMayNotActAnyMore) {
  Be("here");
  auto first = Take(absl::ZeroDuration(), kQuick);
  ASSERT_OK(first);
  Be("there");
  auto second = Take(absl::Seconds(30), kQuick);
  ASSERT_OK(second);
  EXPECT_EQ((*second)->term(), 2);
  EXPECT_THAT((*first)->Check(), StatusIs(absl::StatusCode::kUnavailable, ::testing::_));
  EXPECT_EQ((*first)->Renew(), Standing::kTakenOver);
}

TEST_F(RootLockTest, RenewalsCountAndNoClockOfAFile) {
  Be("here");
  auto first = Take(absl::ZeroDuration(), kQuick);
  ASSERT_OK(first);
  std::atomic<bool> stop{false};
  std::thread renews([&] {
    while (!stop) {
      (void)(*first)->Renew();
      // As on a host whose clock is an hour behind, or on a server without one.
      const timespec old[2] = {{1, 0}, {1, 0}};
      utimensat(AT_FDCWD, (root_.path() + "/agent.beat").c_str(), old, 0);
      poll(nullptr, 0, 5);
    }
  });
  Be("there");
  EXPECT_THAT(Take(kQuick.timeout * 4, kQuick).status(), StatusIs(absl::StatusCode::kAlreadyExists, ::testing::_));
  stop = true;
  renews.join();
}

TEST_F(RootLockTest, OneThatCannotRenewStopsByItself) {
  auto first = Take(absl::ZeroDuration(), kQuick);
  ASSERT_OK(first);
  ASSERT_OK((*first)->Check());
  EXPECT_TRUE(WaitUntil([&] { return !(*first)->Check().ok(); }));
  (void)(*first)->Renew();
  EXPECT_OK((*first)->Check()) << "nobody has taken over meanwhile, and it knows that";
}

TEST_F(RootLockTest, ARemovedRootIsNoticed) {
  auto first = Take();
  ASSERT_OK(first);
  ASSERT_OK(agent::RemoveTree(root_.path() + "/terms"));
  EXPECT_EQ((*first)->Renew(), Standing::kRootGone);
}

}  // namespace
}  // namespace itwin::testing
