#include "agent/worker/report/result.h"

#include <cmath>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/report/contract.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Scratch;
using testing::UserErrorOf;
using Json = nlohmann::json;

TEST(Result, SaysWhatTheContractSays) {
  Result result;
  result.attempt = "7f3c-1";
  result.metrics = {{"test/rmse", 0.25}, {"bad", std::nan("")}};
  result.steps = 540;
  result.epochs = 60;
  result.outputs = {{.path = "model.pt", .size = 3, .sha256 = "ab"}};
  result.info = {{"ranks", 2}};
  const Json json = Json::parse(RenderResult(result));
  EXPECT_EQ(json["format"], 1);
  EXPECT_EQ(json["outcome"], "succeeded");
  EXPECT_EQ(json["metrics"]["test/rmse"], 0.25);
  EXPECT_EQ(json["metrics"]["bad"], "NaN");
  EXPECT_EQ(json["outputs"][0]["sha256"], "ab");
  EXPECT_EQ(json["info"]["ranks"], 2);
  EXPECT_FALSE(json.contains("failure"));
  EXPECT_EQ(ExitCode(result), 0);
  result.outcome = Outcome::kSaved;
  EXPECT_EQ(ExitCode(result), 85);
}

TEST(Result, FailureHasClassRankStepAndExitCode) {
  Result result;
  result.outcome = Outcome::kFailed;
  result.message = "bad \xff byte";
  result.failure =
      Failure{.failure_class = FailureClass::kResource, .rank = 1, .step = 37, .host = "n2"};
  const Json json = Json::parse(RenderResult(result));
  EXPECT_EQ(json["failure"], Json::parse(R"({"class":"resource","rank":1,"step":37,"host":"n2"})"));
  EXPECT_EQ(ExitCode(result), 4);
  result.failure->failure_class = FailureClass::kUser;
  EXPECT_EQ(ExitCode(result), 2);
  result.failure->failure_class = FailureClass::kApp;
  EXPECT_EQ(ExitCode(result), 3);
}

TEST(Result, ListsOutputsWithDigests) {
  const Scratch scratch;
  std::filesystem::create_directories(scratch / "a");
  scratch.Write("z.txt", "abc");
  scratch.Write("a/b.txt", "");
  const auto outputs = ListOutputs(scratch.path());
  ASSERT_EQ(outputs.size(), 2u);
  EXPECT_EQ(outputs[0].path, "a/b.txt");
  EXPECT_EQ(outputs[1].size, 3);
  EXPECT_THAT(outputs[1].sha256, HasSubstr("ba7816bf"));
}

TEST(Contract, EnvironmentWinsOverOptions) {
  std::map<std::string, std::string> environment;
  const auto get = [&](const char* name) -> const char* {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  };
  EXPECT_THAT(UserErrorOf([&] { ReadContract("", "/s", get); }), HasSubstr("--spec"));
  EXPECT_THAT(UserErrorOf([&] { ReadContract("/j.json", "", get); }), HasSubstr("--spool"));
  Contract c = ReadContract("/d/j.json", "/s", get);
  EXPECT_EQ(c.metrics, "/s/metrics.jsonl");
  EXPECT_EQ(c.checkpoints, "/s/checkpoints");
  EXPECT_EQ(c.stop, "/s/stop");
  EXPECT_EQ(c.work, "/d");
  EXPECT_FALSE(c.deadline);
  environment = {{"ITWIN_SPEC", "/e/spec.json"}, {"ITWIN_METRICS", "/e/m.jsonl"},
                 {"ITWIN_RESUME", "/old"},       {"ITWIN_DEADLINE", "1732370000.5"},
                 {"ITWIN_ATTEMPT", "a-1"},       {"ITWIN_OUTPUTS", ""}};
  c = ReadContract("/d/j.json", "/s", get);
  EXPECT_EQ(c.spec, "/e/spec.json");
  EXPECT_EQ(c.metrics, "/e/m.jsonl");
  EXPECT_EQ(c.outputs, "/s/outputs");
  EXPECT_THAT(c.resume, ElementsAre("/old"));
  EXPECT_EQ(c.deadline, 1732370000.5);
  environment["ITWIN_RESUME"] = "/newest::/older:";
  EXPECT_THAT(ReadContract("/d/j.json", "/s", get).resume, ElementsAre("/newest", "/older"));
  const Scratch scratch;
  std::filesystem::create_directory(scratch / "a:b");
  environment["ITWIN_RESUME"] = (scratch / "a:b").string();
  EXPECT_THAT(ReadContract("/d/j.json", "/s", get).resume, ElementsAre(scratch / "a:b"));
  environment["ITWIN_RESUME"] = "";
  EXPECT_TRUE(ReadContract("/d/j.json", "/s", get).resume.empty());
  environment["ITWIN_DEADLINE"] = "soon";
  EXPECT_THAT(UserErrorOf([&] { ReadContract("/d/j.json", "/s", get); }),
              HasSubstr("ITWIN_DEADLINE"));
}

}  // namespace
}  // namespace itwin::worker
