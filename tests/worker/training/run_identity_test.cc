#include "agent/worker/training/run_identity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

Json Train(const std::string& more) {
  Json train = Json::parse(R"({"model": {"builtin": "mlp", "options": {"hidden": [32]}},
      "data": {"synthetic": {"samples": "10", "input_shape": ["2"]}}})");
  train.merge_patch(Json::parse(more));
  return train;
}

TEST(CanonicalTrain, IsTheSameForSpecsThatMeanTheSame) {
  for (const auto& [a, b] : std::vector<std::pair<std::string, std::string>>{
           {"{}", R"({"clip_norm": 0, "stop_on_nan": true, "top_k": 5, "seed": "0", "batch": 32})"},
           {"{}", R"({"top_k": 0, "optimizer": {"adam": {}}, "schedule": {"constant": {}}})"},
           {R"({"seed": 18446744073709551615})", R"({"seed": "18446744073709551615"})"},
           {R"({"optimizer": {"sgd": {"lr": 1}}})",
            R"({"optimizer": {"sgd": {"momentum": 0.0, "lr": "1.0"}}})"},
           {R"({"precision": "fp16"})", R"({"precision": "fp16", "loss_scale": {"window": 1000}})"},
           {R"({"data": {"transforms": [{"scale": {}}]}})",
            R"({"data": {"transforms": [{"scale": {"multiply": 1, "arrays": []}}]}})"},
           {"{}", R"({"model": {"options": {"hidden": [32.0]}}})"}}) {
    const Json canonical = CanonicalTrain(Train(a));
    EXPECT_EQ(canonical.dump(), CanonicalTrain(Train(b)).dump());
    EXPECT_EQ(CanonicalTrain(canonical).dump(), canonical.dump());
  }
}

TEST(CanonicalTrain, KeepsWhatMatters) {
  for (const char* other :
       {R"({"optimizer": {"adam": {"lr": 0.002}}})", R"({"optimizer": {"adamw": {}}})",
        R"({"seed": 1})", R"({"stop_on_nan": false})", R"({"data": {"input": "5"}})",
        R"({"data": {"transforms": [{"standardize": {}}]}})", R"({"ema": {}})",
        R"({"model": {"options": {"hidden": ["32"]}}})"}) {
    EXPECT_NE(CanonicalTrain(Train(other)), CanonicalTrain(Train("{}"))) << other;
  }
}

TEST(SpecDifference, NamesTheKeysWithBothValues) {
  EXPECT_EQ(SpecDifference(CanonicalTrain(Train("{}")), CanonicalTrain(Train("{}"))), "");
  EXPECT_EQ(SpecDifference(Train(R"({"batch": 8})"),
                           Train(R"({"model": {"options": {"hidden": [64]}}})")),
            "train.batch is not given, was 8; train.model.options.hidden[0] is 64, was 32");
}

TEST(DataDifference, BearsTheRoundingOfAnotherMachineAndNoMore) {
  const Json then = Json::parse(R"({"samples": 43, "shapes": {"input": [6]},
      "first": {"input": [0.001, 1.0, -0.5, null]}, "last": {"input": [0.2, 1.0, 3, 4]}})");
  const auto with = [&](const char* patch) {
    Json now = then;
    now.merge_patch(Json::parse(patch));
    return DataDifference(then, now);
  };
  EXPECT_EQ(DataDifference(then, then), "");
  Json now = then;
  now["first"]["input"][0] = 0.00100001;
  EXPECT_EQ(DataDifference(then, now), "");
  now["first"]["input"][2] = -0.501;
  EXPECT_THAT(DataDifference(then, now), HasSubstr("the first training sample's input is another"));
  EXPECT_EQ(with(R"({"samples": 60})"),
            "there are 60 training samples, the checkpoint's run had 43");
  EXPECT_THAT(with(R"({"shapes": {"input": [7]}})"), HasSubstr("is 7, was 6"));
  EXPECT_THAT(with(R"({"last": {"input": [0.2, 1.0, 3, 5]}})"),
              HasSubstr("the last training sample"));
}

}  // namespace
}  // namespace itwin::worker
