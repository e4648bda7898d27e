#include "agent/rpc/gateway_claims.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "tests/testing/fake_clock.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

using ::itwin::testing::FakeClock;
using ::itwin::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

v1::HelloRequest From(const std::string& place, const std::string& id = "00ff") {
  v1::HelloRequest request;
  request.set_gateway_id(id);
  request.set_gateway_place(place);
  request.set_gateway_label("host:/data/" + place);
  return request;
}

class GatewayClaimsTest : public ::testing::Test {
 protected:
  testing::TempDirectory directory_;
  FakeClock clock_;
};

TEST_F(GatewayClaimsTest, TheSameGatewayComesAndGoesAsItLikes) {
  GatewayClaims claims(directory_.path(), &clock_);
  EXPECT_OK(claims.Greet(From("first")));
  EXPECT_OK(claims.Greet(From("first")));
  clock_.Advance(absl::Hours(100));
  EXPECT_OK(claims.Greet(From("first")));
  GatewayClaims restarted(directory_.path(), &clock_);
  EXPECT_OK(restarted.Greet(From("first")));
}

TEST_F(GatewayClaimsTest, GatewaysOfTheirOwnShareASpool) {
  GatewayClaims claims(directory_.path(), &clock_);
  EXPECT_OK(claims.Greet(From("first", "01")));
  EXPECT_OK(claims.Greet(From("second", "02")));
  EXPECT_OK(claims.Greet(From("first", "01")));
}

TEST_F(GatewayClaimsTest, ACopyIsFencedAsLongAsTheFirstIsThere) {
  GatewayClaims claims(directory_.path(), &clock_);
  ASSERT_OK(claims.Greet(From("first")));
  for (int i = 0; i < 20; ++i) {
    clock_.Advance(absl::Seconds(30));
    EXPECT_THAT(claims.Greet(From("copy")),
                StatusIs(absl::StatusCode::kFailedPrecondition,
                         AllOf(HasSubstr("fenced"), HasSubstr("host:/data/first"), HasSubstr("host:/data/copy"))));
    EXPECT_OK(claims.Greet(From("first")));
  }
}

TEST_F(GatewayClaimsTest, AStandbyTakesOverFromOneThatHasGoneAndKeepsItOut) {
  GatewayClaims claims(directory_.path(), &clock_);
  ASSERT_OK(claims.Greet(From("first")));
  clock_.Advance(GatewayClaims::kGone - absl::Seconds(1));
  EXPECT_FALSE(claims.Greet(From("standby")).ok());
  clock_.Advance(absl::Seconds(1));
  EXPECT_OK(claims.Greet(From("standby")));
  EXPECT_THAT(claims.Greet(From("first")), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("standby")));
}

TEST_F(GatewayClaimsTest, AnAgentThatStartsAnewGivesAClaimItsWholeTime) {
  {
    GatewayClaims claims(directory_.path(), &clock_);
    ASSERT_OK(claims.Greet(From("first")));
  }
  clock_.Advance(absl::Hours(1));
  GatewayClaims claims(directory_.path(), &clock_);
  EXPECT_FALSE(claims.Greet(From("copy")).ok());
  clock_.Advance(GatewayClaims::kGone);
  EXPECT_OK(claims.Greet(From("copy")));
}

TEST_F(GatewayClaimsTest, WhatCannotBeCheckedIsLetIn) {
  GatewayClaims claims(directory_.path(), &clock_);
  EXPECT_OK(claims.Greet(From("")));
  EXPECT_OK(claims.Greet(From("x", "../../evil")));
  EXPECT_FALSE(std::filesystem::exists(directory_ / "gateways"));
}

}  // namespace
}  // namespace itwin::agent
