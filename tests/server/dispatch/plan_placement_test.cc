#include "server/dispatch/plan_placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace itwin::server {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

SiteOffer Site(const char* name, int slots, int free_slots, bool ready = true) {
  return {.name = name, .ready = ready, .known = true, .slots = slots, .free_slots = free_slots, .trains = true};
}

TEST(PlanPlacement, TakesTheSiteThatIsNamed) {
  const std::vector<SiteOffer> offers = {Site("big", 64, 64), Site("local", 4, 0)};
  EXPECT_EQ(ChooseSite({.site = "local", .bound_site = "", .ranks = 4}, offers), 1u);
  EXPECT_EQ(ChooseSite({.site = "nowhere", .bound_site = ""}, offers), std::nullopt);
}

TEST(PlanPlacement, TakesTheReadySiteWithMostRoomThatFits) {
  EXPECT_EQ(ChooseSite({.site = "any", .bound_site = "", .ranks = 2}, {Site("a", 4, 1), Site("b", 8, 3), Site("c", 99, 50, false)}), 1u);
  EXPECT_EQ(ChooseSite({.site = "", .bound_site = "", .ranks = 16}, {Site("a", 4, 4), Site("cluster", 0, 0)}), 1u);
  EXPECT_EQ(ChooseSite({.site = "any", .bound_site = "", .ranks = 16}, {Site("a", 4, 4)}), std::nullopt);
}

TEST(PlanPlacement, GoesBackToItsCheckpoint) {
  EXPECT_EQ(ChooseSite({.site = "any", .bound_site = "a", .ranks = 1}, {Site("a", 4, -10), Site("b", 8, 8)}), 0u);
}

TEST(PlanPlacement, SaysWhatCanNeverRun) {
  const std::vector<SiteOffer> offers = {Site("local", 4, 4)};
  EXPECT_EQ(WhyImpossible({.site = "any", .bound_site = "", .ranks = 4}, offers), "");
  EXPECT_THAT(WhyImpossible({.site = "any", .bound_site = "", .ranks = 5}, offers), AllOf(HasSubstr("5 ranks"), HasSubstr("4 slots")));
  EXPECT_THAT(WhyImpossible({.site = "gone", .bound_site = ""}, offers), HasSubstr("'gone' is not configured"));
  SiteOffer bare = Site("bare", 4, 4);
  bare.trains = false;
  EXPECT_THAT(WhyImpossible({.site = "bare", .bound_site = "", .ranks = 1, .train = true}, {bare}), HasSubstr("itwin-worker"));
  EXPECT_EQ(ChooseSite({.site = "any", .bound_site = "", .ranks = 1, .train = true}, {bare}), std::nullopt);
}

TEST(PlanPlacement, SiteThatHasNotAnsweredYetMayFit) {
  SiteOffer silent = Site("silent", 0, 0, false);
  silent.known = false;
  EXPECT_EQ(WhyImpossible({.site = "any", .bound_site = "", .ranks = 5}, {Site("local", 4, 4), silent}), "");
}

}  // namespace
}  // namespace itwin::server
