#include "server/tunnel/login_rotation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace itwin::server {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

const absl::Time kStart = absl::FromUnixSeconds(1'700'000'000);

TEST(LoginRotation, LastGoodHostComesFirstAndTheOthersFollowInACircle) {
  LoginRotation rotation(3, {}, 1);
  EXPECT_THAT(rotation.Choose(kStart), ElementsAre(0, 1, 2));
  rotation.Opened(1);
  EXPECT_THAT(rotation.Choose(kStart), ElementsAre(1, 2, 0));
  rotation.Failed(1, false, kStart);
  EXPECT_THAT(rotation.Choose(kStart), ElementsAre(2, 0, 1));
}

TEST(LoginRotation, FirstFailuresAreFreeAndLaterOnesWaitLongerAndLonger) {
  LoginRotationOptions options;
  LoginRotation rotation(1, options, 7);
  absl::Time now = kStart;
  for (int i = 0; i < options.free_failures; ++i) {
    EXPECT_THAT(rotation.Choose(now), ElementsAre(0));
    rotation.Failed(0, false, now);
  }
  absl::Duration expected = options.first_wait;
  for (int i = 0; i < 8; ++i) {
    EXPECT_THAT(rotation.Choose(now), ElementsAre(0));
    rotation.Failed(0, false, now);
    const absl::Duration wait = rotation.next_try(0) - now;
    EXPECT_GE(wait, expected * 0.75);
    EXPECT_LE(wait, expected * 1.25);
    EXPECT_THAT(rotation.Choose(now + wait - absl::Milliseconds(1)), IsEmpty());
    now += wait;
    expected = std::min(expected * 2, options.most_wait);
  }
  EXPECT_EQ(expected, options.most_wait);
  rotation.Succeeded(0);
  EXPECT_EQ(rotation.next_try(0), absl::InfinitePast());
}

TEST(LoginRotation, ConnectionsThatDoNotLastCountAsFailures) {
  LoginRotationOptions options;
  LoginRotation rotation(1, options, 1);
  for (int i = 0; i <= options.free_failures; ++i) {
    EXPECT_THAT(rotation.Choose(kStart), ElementsAre(0));
    rotation.Opened(0);
    rotation.Failed(0, false, kStart);
  }
  EXPECT_THAT(rotation.Choose(kStart), IsEmpty());
  EXPECT_THAT(rotation.Choose(rotation.next_try(0)), ElementsAre(0));
  rotation.Opened(0);
  rotation.Succeeded(0);
  rotation.Failed(0, false, kStart);
  EXPECT_THAT(rotation.Choose(kStart), ElementsAre(0));
}

TEST(LoginRotation, WaitsOfTwoGatewaysDiffer) {
  LoginRotation one(1, {}, 1), other(1, {}, 2);
  for (LoginRotation* rotation : {&one, &other}) rotation->Failed(0, true, kStart);
  EXPECT_NE(one.next_try(0), other.next_try(0));
}

TEST(LoginRotation, HalfOpenHostIsTriedByOneOnly) {
  LoginRotation rotation(1, {}, 1);
  rotation.Failed(0, true, kStart);
  const absl::Time due = rotation.next_try(0);
  EXPECT_THAT(rotation.Choose(due), ElementsAre(0));
  EXPECT_THAT(rotation.Choose(due), IsEmpty());
}

TEST(LoginRotation, HostsAreLeftAloneEachForItself) {
  LoginRotation rotation(2, {}, 1);
  rotation.Failed(0, true, kStart);
  EXPECT_THAT(rotation.Choose(kStart), ElementsAre(1));
}

TEST(LoginRotation, RefusalsWaitFromTheFirstOnUntilCredentialsChange) {
  LoginRotationOptions options;
  LoginRotation rotation(2, options, 1);
  rotation.Failed(0, true, kStart);
  rotation.Failed(1, true, kStart);
  EXPECT_THAT(rotation.Choose(kStart + options.first_refused_wait * 0.74), IsEmpty());
  rotation.CredentialsChanged();
  EXPECT_THAT(rotation.Choose(kStart), ElementsAre(0, 1));
  // What was unreachable is not made reachable by new credentials.
  for (int i = 0; i <= options.free_failures; ++i) rotation.Failed(0, false, kStart);
  rotation.CredentialsChanged();
  EXPECT_THAT(rotation.Choose(kStart), ElementsAre(1));
}

}  // namespace
}  // namespace itwin::server
