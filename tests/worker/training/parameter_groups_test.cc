#include "agent/worker/training/parameter_groups.h"

#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/error.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::UserErrorOf;

TEST(ParameterGroups, PatternsMatchNames) {
  EXPECT_TRUE(MatchesPattern("encoder.*", "encoder.0.weight"));
  EXPECT_TRUE(MatchesPattern("*.bias", "encoder.0.bias"));
  EXPECT_TRUE(MatchesPattern("layer?.weight", "layer3.weight"));
  EXPECT_TRUE(MatchesPattern("*a*b*c", "xxaxxabbc"));
  EXPECT_TRUE(MatchesPattern("encoder", "encoder.0.bias"));
  EXPECT_TRUE(MatchesPattern("encoder", "encoder"));
  EXPECT_FALSE(MatchesPattern("encoder", "encoder2.bias"));
  EXPECT_FALSE(MatchesPattern("*.bias", "encoder.0.weight"));
  EXPECT_FALSE(MatchesPattern("layer?", "layer"));
}

TEST(ParameterGroups, TheFirstThatMatchesCounts) {
  const std::vector<ParameterGroupSpec> groups = {{.match = {"*.bias"}, .weight_decay = 0},
                                                  {.match = {"head", "*"}, .lr = 0.5}};
  EXPECT_EQ(GroupOf(groups, "head.bias"), &groups[0]);
  EXPECT_EQ(GroupOf(groups, "head.weight"), &groups[1]);
  EXPECT_EQ(GroupOf({groups[0]}, "head.weight"), nullptr);
}

TEST(ParameterGroups, FreezeAndRefuse) {
  const auto parameters = [] {
    std::vector<std::pair<std::string, at::Tensor>> p = {{"encoder.weight", at::ones({2})},
                                                         {"head.weight", at::ones({2})}};
    for (auto& [name, tensor] : p) tensor.requires_grad_(true);
    return p;
  };
  auto some = parameters();
  FreezeParameters({{.match = {"encoder.*"}, .freeze = true}}, some);
  EXPECT_FALSE(some[0].second.requires_grad());
  EXPECT_TRUE(some[1].second.requires_grad());
  EXPECT_THAT(UserErrorOf([&] { FreezeParameters({{.match = {"*"}, .freeze = true}}, parameters()); }),
              HasSubstr("nothing is left to train"));
  EXPECT_THAT(UserErrorOf([&] { FreezeParameters({{.match = {"encodr.weight"}}}, parameters()); }),
              AllOf(HasSubstr("train.parameter_groups[0].match"), HasSubstr("encodr.weight"),
                    HasSubstr("encoder.weight")));
}

}  // namespace
}  // namespace itwin::worker
