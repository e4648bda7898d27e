#include "common/spec/nearest_name.h"

#include <gmock/gmock.h>

namespace itwin {
namespace {

using ::testing::Eq;
using ::testing::Optional;

const std::vector<std::string> kNames = {"optimizer", "loss", "lr", "ranks_per_node", "resnet18"};

TEST(NearestName, FindsTypingErrors) {
  EXPECT_THAT(NearestName("optimiser", kNames), Optional(Eq("optimizer")));
  EXPECT_THAT(NearestName("optimzer", kNames), Optional(Eq("optimizer")));
  EXPECT_THAT(NearestName("lsos", kNames), Optional(Eq("loss")));  // a swap is one edit
  EXPECT_THAT(NearestName("resnet", kNames), Optional(Eq("resnet18")));
  EXPECT_THAT(NearestName("ranksPerNode", kNames), Optional(Eq("ranks_per_node")));
  EXPECT_THAT(NearestName("ranks-per-node", kNames), Optional(Eq("ranks_per_node")));
}

TEST(NearestName, FindsTheOnlyOneThatBeginsSo) {
  EXPECT_THAT(NearestName("stat", {"status", "sites"}), Optional(Eq("status")));
  EXPECT_THAT(NearestName("opt", kNames), Optional(Eq("optimizer")));
  EXPECT_EQ(NearestName("sta", {"status", "starting"}), std::nullopt);
  EXPECT_EQ(NearestName("op", kNames), std::nullopt);
}

TEST(NearestName, KeepsSilentWhenNothingIsNear) {
  EXPECT_EQ(NearestName("gpu", kNames), std::nullopt);
  EXPECT_EQ(NearestName("", kNames), std::nullopt);
  EXPECT_EQ(NearestName("x", {"y"}), std::nullopt);
  EXPECT_EQ(NearestName(std::string(10'000, 'a'), kNames), std::nullopt);
  EXPECT_EQ(NearestName("loss", {}), std::nullopt);
}

TEST(UnknownNameHint, ListsTheNamesWhenNothingIsNear) {
  EXPECT_EQ(UnknownNameHint("optimiser", kNames), "did you mean 'optimizer'?");
  EXPECT_EQ(UnknownNameHint("zzz", {"a", "b"}), "use one of a, b");
  EXPECT_EQ(UnknownNameHint("zzz", {"only"}), "use only");
  std::vector<std::string> many;
  for (int i = 0; i < 100; ++i) many.push_back("name" + std::to_string(1000 + i));
  EXPECT_LT(UnknownNameHint("zzz", many).size(), 300u);
}

TEST(ListNames, SaysHowManyMoreThereAre) {
  EXPECT_EQ(ListNames({}, 2), "");
  EXPECT_EQ(ListNames({"a", "b"}, 2), "a, b");
  EXPECT_EQ(ListNames({"a", "b", "c", "d"}, 2), "a, b and 2 more");
}

}  // namespace
}  // namespace itwin
