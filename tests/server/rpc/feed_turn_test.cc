#include "server/rpc/feed_turn.h"

#include <gtest/gtest.h>

namespace itwin::server {
namespace {

TEST(FeedTurn, IsFedFromTheStartAndWokenWhenItRests) {
  FeedTurn turn;
  EXPECT_FALSE(turn.Wake());  // whoever made it feeds it
  EXPECT_TRUE(turn.Look());
  EXPECT_TRUE(turn.Rest());
  EXPECT_TRUE(turn.Wake());
  EXPECT_FALSE(turn.Wake());  // one feeder is enough
}

// A commit that comes after the look at the store and before the rest would otherwise be told with the next one, or never.
TEST(FeedTurn, AWakeUpWhileItIsBeingFedMakesItLookAgain) {
  FeedTurn turn;
  ASSERT_TRUE(turn.Look());
  EXPECT_FALSE(turn.Wake());
  EXPECT_FALSE(turn.Rest());
  EXPECT_TRUE(turn.Look());
  EXPECT_TRUE(turn.Rest());
  EXPECT_TRUE(turn.Wake());
}

TEST(FeedTurn, TheClientsEndIsTheFeedersOrTheCallers) {
  FeedTurn resting;
  ASSERT_TRUE(resting.Look());
  ASSERT_TRUE(resting.Rest());
  EXPECT_TRUE(resting.Cancel());
  EXPECT_FALSE(resting.Wake());
  EXPECT_FALSE(resting.Cancel());

  FeedTurn fed;
  ASSERT_TRUE(fed.Look());
  EXPECT_FALSE(fed.Cancel());
  EXPECT_FALSE(fed.Rest());
  EXPECT_FALSE(fed.Look());
  fed.End();
  EXPECT_FALSE(fed.Wake());
}

}  // namespace
}  // namespace itwin::server
