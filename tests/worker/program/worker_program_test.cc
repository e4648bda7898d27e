// The real program under the real mpirun.
#include <cstdlib>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/report/metric_sink.h"
#include "tests/testing/program.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using itwin::testing::PollUntil;
using itwin::testing::Program;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Scratch;
using Json = nlohmann::json;
namespace fs = std::filesystem;

class WorkerProgram : public ::testing::Test {
 protected:
  // A classification of synthetic data that learns within a second.
  static Json Job() {
    return Json::parse(R"({"name": "test", "train": {
        "model": {"builtin": "mlp", "options": {"hidden": [32, 32], "dropout": 0.1}},
        "data": {"synthetic": {"samples": "403", "input_shape": ["12"], "classes": "4"},
                 "split": {"validation_fraction": 0.1, "test_fraction": 0.2}},
        "loss": "cross_entropy", "optimizer": {"adam": {"lr": 0.003}}, "batch": 16, "epochs": 3, "seed": "5"}})");
  }

  fs::path Spool(const std::string& name) const { return scratch_ / name; }

  std::unique_ptr<Program> Start(int ranks, const Json& job, const std::string& spool,
                                 std::map<std::string, std::string> environment = {}) {
    const fs::path spec = scratch_.Write(spool + ".json", job.dump());
    std::vector<std::string> argv;
    if (ranks > 0) argv = {"mpirun", "-n", std::to_string(ranks), "--oversubscribe"};
    const char* bin = std::getenv("ITWIN_BIN");
    argv.push_back((bin == nullptr ? std::string("bin") : std::string(bin)) + "/itwin-worker");
    for (const std::string& a :
         {std::string("--spec"), spec.string(), std::string("--spool"), Spool(spool).string()}) {
      argv.push_back(a);
    }
    environment.insert({{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                        {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                        {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"}});
    return std::make_unique<Program>(argv, environment, scratch_ / (spool + ".log"));
  }
  int Run(int ranks, const Json& job, const std::string& spool,
          std::map<std::string, std::string> environment = {}) {
    const auto program = Start(ranks, job, spool, std::move(environment));
    const int code = program->Wait();
    log_ = program->Output();
    return code;
  }
  Json Result(const std::string& spool) const {
    return Json::parse(ReadWholeFile(Spool(spool) / "result.json"));
  }
  std::vector<Json> Lines(const std::string& spool) const {
    std::vector<Json> lines;
    std::istringstream in(ReadWholeFile(Spool(spool) / "metrics.jsonl"));
    for (std::string line; std::getline(in, line);) lines.push_back(Json::parse(line));
    return lines;
  }
  std::vector<std::pair<int64_t, double>> Losses(const std::string& spool) const {
    std::vector<std::pair<int64_t, double>> losses;
    for (const Json& line : Lines(spool)) {
      if (line.contains("metrics") && line["metrics"].contains("train/loss")) {
        losses.emplace_back(line["step"], line["metrics"]["train/loss"]);
      }
    }
    return losses;
  }
  static std::string Hash(const Json& result) { return result["info"]["weights_sha256"]; }

  Scratch scratch_;
  std::string log_;
};

TEST_F(WorkerProgram, TrainsAloneAndUnderMpi) {
  ASSERT_EQ(Run(0, Job(), "alone"), 0) << log_;
  ASSERT_EQ(Run(2, Job(), "two"), 0) << log_;
  EXPECT_THAT(log_, HasSubstr("2 rank(s)"));
  const Json alone = Result("alone"), two = Result("two");
  EXPECT_EQ(two["outcome"], "succeeded");
  EXPECT_EQ(two["info"]["ranks"], 2);
  EXPECT_EQ(two["info"]["strategy"], "ddp");
  EXPECT_EQ(alone["info"]["strategy"], "single");
  EXPECT_EQ(two["steps"], 54);
  EXPECT_GT(two["metrics"]["test/accuracy"].get<double>(), 0.5);
  for (const Json& output : two["outputs"]) {
    EXPECT_EQ(fs::file_size(Spool("two") / "outputs" / output["path"].get<std::string>()),
              output["size"]);
  }
  EXPECT_EQ(Losses("two").size(), 54u);
  EXPECT_TRUE(fs::exists(Spool("two") / "outputs" / "state_dict.pt"));
  const Json& energy = two["info"]["energy"];
  EXPECT_TRUE(energy.contains("gpu_joules") || energy.contains("gpu_note")) << energy;
  EXPECT_TRUE(energy.contains("cpu_joules") || energy.contains("cpu_note")) << energy;
  EXPECT_TRUE(fs::exists(Spool("two") / "checkpoints" / "step-54" / "manifest.json"));
}

TEST_F(WorkerProgram, EveryStrategyUnderMpiEqualsOneRankAndOneRankSaysThatItRanAlone) {
  Json job = Job();
  job["train"]["model"]["options"]["dropout"] = 0;
  job["train"]["optimizer"] = {{"sgd", {{"lr", 0.05}, {"momentum", 0.9}}}};
  job["train"]["check_every"] = 7;
  ASSERT_EQ(Run(0, job, "one"), 0) << log_;
  const double loss = Result("one")["metrics"]["test/loss"];
  for (const std::string strategy : {"ddp", "horovod", "zero1", "zero2", "zero3"}) {
    job["train"]["strategy"] = strategy;
    ASSERT_EQ(Run(2, job, strategy), 0) << log_;
    const Json result = Result(strategy);
    EXPECT_EQ(result["info"]["strategy"], strategy);
    EXPECT_NEAR(result["metrics"]["test/loss"].get<double>(), loss, 1e-4) << strategy;
  }
  ASSERT_EQ(Run(0, job, "alone"), 0) << log_;
  EXPECT_EQ(Result("alone")["info"]["strategy_note"],
            "ran single because the job has one rank (asked for: zero3)");
  EXPECT_THAT(log_, HasSubstr("note: ran single because the job has one rank"));
}

TEST_F(WorkerProgram, TheTextExampleIsSplitBetweenFourRanksAndLearns) {
  // deploy/examples/text-transformer at a small size: fewer windows, one epoch.
  const fs::path example =
      fs::path(std::getenv("ITWIN_SOURCE")) / "deploy/examples/text-transformer";
  fs::create_directories(Spool("text"));
  Program tokens({"/bin/sh", "-c",
                  "cd " + Spool("text").string() +
                      " && head -c 40000 /usr/share/common-licenses/GPL-3 > text && "
                      "/usr/bin/python3 " +
                      (example / "tokens.py").string() + " text"},
                 {}, scratch_ / "tokens.log");
  ASSERT_EQ(tokens.Wait(), 0) << tokens.Output();
  Json job = Json::parse(R"({"name": "text", "train": {
      "model": {"builtin": "transformer",
                "options": {"layers": 2, "heads": 4, "width": 32, "vocabulary": 128, "tied": false}},
      "data": {"npy": {}, "split": {"test_fraction": 0.1}},
      "loss": "cross_entropy", "optimizer": {"adamw": {"lr": 0.01}}, "batch": 16, "epochs": 3,
      "strategy": "mesh", "mesh": {"tensor": 2, "pipeline": 2}}})");
  job["train"]["data"]["npy"] = {{"input", (Spool("text") / "input.npy").string()},
                                 {"target", (Spool("text") / "target.npy").string()}};
  ASSERT_EQ(Run(4, job, "text"), 0) << log_;
  const Json result = Result("text");
  EXPECT_EQ(result["info"]["strategy"], "mesh");
  // Nats per byte; the frequencies of single bytes alone give about 3.1.
  EXPECT_LT(result["metrics"]["test/loss"].get<double>(), 2.9);
  EXPECT_TRUE(fs::exists(Spool("text") / "outputs" / "weights.safetensors"));
}

TEST_F(WorkerProgram, SameSeedSameRanksSameBits) {
  ASSERT_EQ(Run(2, Job(), "a"), 0);
  ASSERT_EQ(Run(2, Job(), "b"), 0);
  EXPECT_EQ(Hash(Result("a")), Hash(Result("b")));
  EXPECT_EQ(Losses("a"), Losses("b"));
}

TEST_F(WorkerProgram, StopFileSavesWith85AndTheNextAttemptEqualsTheWholeRun) {
  Json job = Job();
  job["train"]["epochs"] = 400;  // long enough for the stop file to be seen
  job["train"]["validate_every"] = 100;
  for (int ranks : {1, 2}) {
    const std::string n = std::to_string(ranks);
    ASSERT_EQ(Run(ranks, job, "whole" + n), 0) << log_;
    auto first = Start(ranks, job, "first" + n);
    ASSERT_TRUE(PollUntil([&] {
      std::error_code error;
      return fs::file_size(Spool("first" + n) / "metrics.jsonl", error) > 3000 && !error;
    }));
    scratch_.Write("first" + n + "/stop", "");
    ASSERT_EQ(first->Wait(), 85) << first->Output();
    const Json saved = Result("first" + n);
    EXPECT_EQ(saved["outcome"], "saved");
    EXPECT_THAT(saved["message"].get<std::string>(), HasSubstr("the stop file appeared"));
    ASSERT_EQ(Run(ranks, job, "second" + n, {{"ITWIN_RESUME", Spool("first" + n) / "checkpoints"}}),
              0)
        << log_;
    EXPECT_EQ(Hash(Result("whole" + n)), Hash(Result("second" + n)));
    EXPECT_EQ(Result("whole" + n)["metrics"]["test/loss"],
              Result("second" + n)["metrics"]["test/loss"]);
    // Together the attempts have each step's point once, with the whole run's value.
    auto losses = Losses("first" + n);
    for (const auto& point : Losses("second" + n)) losses.push_back(point);
    EXPECT_EQ(losses, Losses("whole" + n));
  }
}

TEST_F(WorkerProgram, OutputsHaveTheOptimizersStateWhereTheJobAsksForIt) {
  Json job = Job();
  job["train"]["checkpoint"] = {{"export_optimizer", true}};
  ASSERT_EQ(Run(2, job, "run"), 0) << log_;
  const fs::path saved = Spool("run") / "checkpoints" / "step-54" / "optimizer.safetensors";
  const std::string state = ReadWholeFile(saved);
  EXPECT_GT(state.size(), 2 * 1604 * sizeof(float));  // Adam's two
  const auto exported = [&](const std::string& spool) {
    for (const Json& output : Result(spool)["outputs"]) {
      if (output["path"] == "optimizer.safetensors") return output["sha256"].get<std::string>();
    }
    return std::string("none");
  };
  EXPECT_EQ(ReadWholeFile(Spool("run") / "outputs" / "optimizer.safetensors"), state);
  // An attempt that has nothing left to train takes it from the checkpoint that it went on from.
  fs::create_directories(Spool("again"));
  ASSERT_EQ(Run(2, job, "again", {{"ITWIN_RESUME", (Spool("run") / "checkpoints").string()}}), 0)
      << log_;
  EXPECT_EQ(ReadWholeFile(Spool("again") / "outputs" / "optimizer.safetensors"), state);
  EXPECT_EQ(exported("again"), exported("run"));
  job["train"].erase("checkpoint");
  ASSERT_EQ(Run(0, job, "without"), 0) << log_;
  EXPECT_EQ(exported("without"), "none");
}

TEST_F(WorkerProgram, SignalsAndTheDeadlineSaveToo) {
  Json job = Job();
  job["train"]["epochs"] = 100000;
  auto program = Start(0, job, "signal");
  ASSERT_TRUE(PollUntil([&] { return fs::exists(Spool("signal") / "metrics.jsonl"); }));
  program->Signal(SIGUSR1);
  EXPECT_EQ(program->Wait(), 85) << program->Output();
  EXPECT_THAT(Result("signal")["message"].get<std::string>(), HasSubstr("SIGUSR1"));
  EXPECT_EQ(Run(2, job, "deadline", {{"ITWIN_DEADLINE", std::to_string(Now() + 5)}}), 85) << log_;
  EXPECT_THAT(Result("deadline")["message"].get<std::string>(), HasSubstr("wall-time limit"));
}

TEST_F(WorkerProgram, FailuresHaveTheirExitCodeAndRecordUnderMpi) {
  Json user = Job();
  user["train"]["modle"] = 1;
  Json diverging = Job();
  diverging["train"]["optimizer"] = {{"sgd", {{"lr", 1e30}}}};
  for (int ranks : {0, 3}) {
    const std::string n = std::to_string(ranks);
    EXPECT_EQ(Run(ranks, user, "user" + n), 2) << log_;
    EXPECT_EQ(Result("user" + n)["failure"]["class"], "user");
    EXPECT_THAT(Result("user" + n)["message"].get<std::string>(), HasSubstr("train.modle"));
    EXPECT_EQ(Run(ranks, diverging, "nan" + n), 3) << log_;
    const Json result = Result("nan" + n);
    EXPECT_EQ(result["outcome"], "failed");
    EXPECT_EQ(result["failure"]["class"], "app");
    EXPECT_GT(result["failure"]["step"], 0);
    EXPECT_THAT(result["message"].get<std::string>(), HasSubstr("not finite at step"));
    EXPECT_EQ(Run(ranks, Job(), "full" + n, {{"ITWIN_METRICS", "/dev/full"}}), 4) << log_;
    EXPECT_EQ(Result("full" + n)["failure"]["class"], "resource");
  }
}

TEST_F(WorkerProgram, AJobForGpusSaysWhyItCannotRunHere) {
  Json asks = Job();
  asks["resources"] = {{"ranks_per_node", 2}, {"gpus_per_node", 2}};
  Json settings = Job();
  settings["train"]["gpu"] = {{"tf32", false}};
  const char* bin = std::getenv("ITWIN_BIN");
  Program self(
      {(bin == nullptr ? std::string("bin") : std::string(bin)) + "/itwin-worker", "--self-test"},
      {}, scratch_ / "self");
  EXPECT_EQ(self.Wait(), 0) << self.Output();
  const bool built =
      self.Output().find("GPUs: this worker is built without CUDA") == std::string::npos;
  for (const int ranks : {0, 2}) {
    const std::string n = std::to_string(ranks);
    EXPECT_EQ(Run(ranks, settings, "settings" + n), 2) << log_;
    EXPECT_THAT(Result("settings" + n)["message"].get<std::string>(),
                HasSubstr("train.gpu is for jobs with GPUs"));
    EXPECT_EQ(Run(ranks, asks, "asks" + n), built ? 5 : 2) << log_;
    EXPECT_EQ(Result("asks" + n)["failure"]["class"], built ? "infra" : "user");
    EXPECT_THAT(
        Result("asks" + n)["message"].get<std::string>(),
        HasSubstr(built ? "but the job was promised 2 per node"
                        : "resources.gpus_per_node is 2, but this worker is built on LibTorch"));
  }
}

TEST_F(WorkerProgram, FailureOfOneRankAloneEndsAllOfThemAtOnce) {
  Json bad = Job();
  bad["train"]["data"]["synthetic"]["samples"] = "0";
  Json long_job = Job();
  long_job["train"]["epochs"] = 200;
  const std::string good_spec = scratch_.Write("good.json", long_job.dump());
  const std::string bad_spec = scratch_.Write("bad.json", bad.dump());
  const std::string worker = std::string(std::getenv("ITWIN_BIN")) + "/itwin-worker";
  const std::map<std::string, std::string> environment = {{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                                          {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}};
  const auto start_ranks = [&](const std::string& name, const std::string& spec_of_1,
                               const std::string& setting_of_1) {
    const std::string script =
        scratch_.Write(name + ".sh", "spec=" + good_spec +
                                         "\n[ $OMPI_COMM_WORLD_RANK = 0 ] || { spec=" + spec_of_1 +
                                         "; " + setting_of_1 + "; }\nexec " + worker +
                                         " --spec $spec --spool " + Spool(name).string() + "\n");
    return Program({"mpirun", "--oversubscribe", "-n", "2", "sh", script}, environment,
                   scratch_ / (name + ".log"));
  };
  // Rank 1 has another spec: it fails while rank 0 waits for it.
  Program at_start = start_ranks("start", bad_spec, ":");
  EXPECT_EQ(at_start.Wait(), 2) << at_start.Output();
  EXPECT_EQ(Result("start")["failure"]["rank"], 1);
  // Rank 1 cannot write its part of the last checkpoint: it fails while rank 0 waits for its
  // checksum.
  Program at_save = start_ranks("save", good_spec,
                                "export ITWIN_CHECKPOINTS=" + (scratch_ / "no" / "such").string());
  EXPECT_EQ(at_save.Wait(), 3) << at_save.Output();
  EXPECT_EQ(Result("save")["failure"]["rank"], 1);
  EXPECT_THAT(Result("save")["message"].get<std::string>(), HasSubstr("rank-1.safetensors"));
}

TEST_F(WorkerProgram, KilledRankEndsTheJob) {
  Json job = Job();
  job["train"]["epochs"] = 100000;
  auto program = Start(2, job, "killed");
  ASSERT_TRUE(PollUntil([&] {
    std::error_code error;
    return fs::file_size(Spool("killed") / "metrics.jsonl", error) > 0 && !error;
  }));
  // mpirun's children are the ranks.
  std::vector<pid_t> ranks;
  std::istringstream children(ReadWholeFile("/proc/" + std::to_string(program->pid()) + "/task/" +
                                            std::to_string(program->pid()) + "/children"));
  for (pid_t pid; children >> pid;) ranks.push_back(pid);
  ASSERT_EQ(ranks.size(), 2u);
  kill(ranks[1], SIGKILL);
  const int code = program->Wait(std::chrono::seconds(30));
  EXPECT_NE(code, 0);
  EXPECT_NE(code, -1) << "the other rank went on";
  EXPECT_FALSE(fs::exists(Spool("killed") / "result.json"));
  EXPECT_TRUE(PollUntil([&] { return kill(ranks[0], 0) != 0; }));
}

TEST_F(WorkerProgram, DamagedCheckpointFallsBackToTheOneBefore) {
  Json job = Job();
  job["train"]["checkpoint"] = {{"every_epochs", 1}, {"keep", 3}};
  ASSERT_EQ(Run(2, job, "whole"), 0) << log_;
  fs::resize_file(Spool("whole") / "checkpoints/step-54/optimizer.safetensors", 100);
  ASSERT_EQ(Run(2, job, "again", {{"ITWIN_RESUME", Spool("whole") / "checkpoints"}}), 0) << log_;
  EXPECT_THAT(log_, HasSubstr("trying the checkpoint before it"));
  EXPECT_THAT(log_, HasSubstr("going on from step 36"));
  EXPECT_EQ(Hash(Result("whole")), Hash(Result("again")));
  for (const auto& step : fs::directory_iterator(Spool("whole") / "checkpoints")) {
    fs::remove(step.path() / "manifest.json");
  }
  EXPECT_EQ(Run(2, job, "none", {{"ITWIN_RESUME", Spool("whole") / "checkpoints"}}), 3) << log_;
  EXPECT_EQ(Run(2, job, "nowhere", {{"ITWIN_RESUME", Spool("nothing")}}), 2) << log_;
}

TEST_F(WorkerProgram, PredictsInTheOrderOfTheSamplesWhateverTheRanks) {
  Json job = Job();
  job["train"]["data"]["transforms"] = Json::parse(R"([{"standardize": {"arrays": ["input"]}}])");
  ASSERT_EQ(Run(2, job, "training"), 0) << log_;
  const std::string outputs = (Spool("training") / "outputs").string();
  std::map<std::string, std::string> files;
  for (const auto& [name, ranks, weights] : {std::tuple{"alone", 0, "weights.safetensors"},
                                             {"three", 3, "weights.safetensors"},
                                             {"dict", 2, "state_dict.pt"}}) {
    Json predict = job;
    predict["train"]["predict"] = {{"weights", outputs + "/" + weights},
                                   {"preprocessing", outputs + "/preprocessing.json"}};
    ASSERT_EQ(Run(ranks, predict, name), 0) << log_;
    EXPECT_EQ(Result(name)["info"]["shape"], Json({403, 4}));
    ASSERT_EQ(Result(name)["outputs"].size(), 1u);
    files[name] = ReadWholeFile(Spool(name) / "outputs" / "predictions.npy");
  }
  EXPECT_EQ(files["alone"], files["three"]);
  EXPECT_EQ(files["alone"], files["dict"]);
  EXPECT_FALSE(fs::exists(Spool("alone") / "checkpoints"));

  Json netcdf = job;
  netcdf["train"]["predict"] = {
      {"weights", outputs + "/weights.safetensors"}, {"split", "test"}, {"format", "netcdf"}};
  ASSERT_EQ(Run(2, netcdf, "nc"), 0) << log_;
  const int64_t samples = Result("nc")["info"]["samples"];
  EXPECT_EQ(samples, 81);
  EXPECT_GT(fs::file_size(Spool("nc") / "outputs" / "predictions.nc"), 81u * 16);
  scratch_.Python(
      "import numpy as np\n"
      "p = np.load('alone/outputs/predictions.npy')\n"
      "assert p.shape == (403, 4) and p.dtype == np.float32 and np.isfinite(p).all()\n");

  netcdf["train"]["predict"]["weights"] = outputs + "/preprocessing.json";
  EXPECT_EQ(Run(2, netcdf, "bad"), 2) << log_;
  EXPECT_THAT(Result("bad")["message"].get<std::string>(), HasSubstr("train.predict.weights"));
}

TEST_F(WorkerProgram, ADamagedAttemptFallsBackToTheAttemptBefore) {
  Json job = Job();
  ASSERT_EQ(Run(2, job, "one:first"), 0) << log_;  // a single directory may have any name
  const std::string first = (Spool("one:first") / "checkpoints").string();
  job["train"]["epochs"] = 4;
  ASSERT_EQ(Run(0, job, "second", {{"ITWIN_RESUME", first}}), 0) << log_;
  const fs::path second = Spool("second") / "checkpoints";
  fs::resize_file(second / "step-72/weights.safetensors", 100);
  const fs::path plain = scratch_ / "first";
  fs::create_directory_symlink(Spool("one:first"), plain);
  const std::string both = (scratch_ / "none").string() + ":" + second.string() + ":" + (plain / "checkpoints").string();
  job["train"]["checkpoint"] = {{"export_optimizer", true}};
  ASSERT_EQ(Run(2, job, "third", {{"ITWIN_RESUME", both}}), 0) << log_;
  EXPECT_THAT(log_, HasSubstr("there is no checkpoint in " + (scratch_ / "none").string()));
  EXPECT_THAT(log_, HasSubstr("has 100 bytes instead of"));
  EXPECT_THAT(log_, HasSubstr("going on from step 54"));
  EXPECT_EQ(Result("third")["steps"], 72);
  fs::remove_all(plain / "checkpoints" / "step-54");
  EXPECT_EQ(Run(0, job, "fourth", {{"ITWIN_RESUME", both}}), 3) << log_;
}

TEST_F(WorkerProgram, AnEqualSpecGoesOnAndAnotherOneIsRefusedByTheKeysThatDiffer) {
  Json job = Job();
  ASSERT_EQ(Run(0, job, "first"), 0) << log_;
  const std::map<std::string, std::string> resume = {{"ITWIN_RESUME", Spool("first") / "checkpoints"}};
  Json equal = job;
  equal["train"].merge_patch(Json::parse(R"({"clip_norm": 0, "stop_on_nan": true, "top_k": 5, "seed": 5, "epochs": 4,
      "batch": 16.0, "optimizer": {"adam": {"beta1": 0.9, "lr": 3e-3}}, "parameter_groups": [],
      "data": {"split": {"by_hash": false}, "synthetic": {"classes": 4}}})"));
  EXPECT_EQ(Run(0, equal, "equal", resume), 0) << log_;
  EXPECT_EQ(Result("equal")["steps"], 72);
  Json other = equal;
  other["train"].merge_patch(Json::parse(R"({"batch": 8, "clip_norm": 1, "optimizer": {"adam": {"lr": 0.01}}})"));
  EXPECT_EQ(Run(2, other, "other", resume), 2) << log_;
  EXPECT_THAT(Result("other")["message"].get<std::string>(),
              AllOf(HasSubstr("train.batch is 8, was 16"), HasSubstr("train.clip_norm is 1, was not given"),
                    HasSubstr("train.optimizer.adam.lr is 0.01, was 0.003"), Not(HasSubstr("seed"))));
}

TEST_F(WorkerProgram, OtherDataThanTheCheckpointsAreRefused) {
  const auto write = [&](int samples, double add) {
    scratch_.Python("import numpy as np\nr = np.random.default_rng(1)\nn = " + std::to_string(samples) +
                    "\nnp.save('x.npy', r.normal(size=(n, 6)).astype('f4') + np.float32(" + std::to_string(add) +
                    "))\nnp.save('y.npy', r.normal(size=(n, 1)).astype('f4'))\n");
  };
  Json job = Json::parse(R"({"name": "data", "train": {"model": {"builtin": "mlp"}, "loss": "mse", "batch": 8,
      "data": {"npy": {"input": "x.npy", "target": "y.npy"}}}})");
  const std::map<std::string, std::string> resume = {{"ITWIN_RESUME", Spool("first") / "checkpoints"}};
  write(43, 0);
  ASSERT_EQ(Run(2, job, "first"), 0) << log_;
  job["train"]["epochs"] = 2;
  ASSERT_EQ(Run(0, job, "same", resume), 0) << log_;
  write(60, 0);
  EXPECT_EQ(Run(2, job, "more", resume), 2) << log_;
  EXPECT_THAT(Result("more")["message"].get<std::string>(), AllOf(HasSubstr("60 training samples"), HasSubstr("43")));
  write(43, 0.01);
  EXPECT_EQ(Run(2, job, "changed", resume), 2) << log_;
  EXPECT_THAT(Result("changed")["message"].get<std::string>(), HasSubstr("the first training sample"));

  // A checkpoint of the version before knows neither data nor spec, only the hash of the latter.
  const fs::path manifest = Spool("first") / "checkpoints" / "step-6" / "manifest.json";
  auto old = nlohmann::ordered_json::parse(ReadWholeFile(manifest));
  for (const char* key : {"spec", "data", "manifest_sha256"}) old.erase(key);
  old["manifest_sha256"] = Sha256Hex(old.dump());
  WriteFileDurably(manifest, old.dump());
  EXPECT_EQ(Run(2, job, "old", resume), 0) << log_;
  EXPECT_THAT(log_, HasSubstr("does not say which data it was trained on"));
  job["train"]["batch"] = 4;
  EXPECT_EQ(Run(0, job, "old other", resume), 2) << log_;
  EXPECT_THAT(Result("old other")["message"].get<std::string>(), HasSubstr("belongs to another job"));
}

TEST_F(WorkerProgram, APredictionThatIsAskedToStopEndsAtOnceAndLeavesNothing) {
  Json job = Job();
  ASSERT_EQ(Run(0, job, "training"), 0) << log_;
  job["train"]["predict"] = {{"weights", Spool("training") / "outputs" / "weights.safetensors"}};
  fs::create_directories(Spool("before"));
  scratch_.Write("before/stop", "");
  EXPECT_EQ(Run(2, job, "before"), 3) << log_;
  EXPECT_THAT(Result("before")["message"].get<std::string>(),
              AllOf(HasSubstr("the stop file appeared"), HasSubstr("cannot be continued")));
  EXPECT_EQ(Run(2, job, "late", {{"ITWIN_DEADLINE", std::to_string(Now() + 1)}}), 2) << log_;
  EXPECT_THAT(Result("late")["message"].get<std::string>(),
              AllOf(HasSubstr("the wall-time limit is near"), HasSubstr("resources.time")));
  job["train"]["data"]["synthetic"]["samples"] = 3000000;
  job["train"]["batch"] = 1;
  auto program = Start(2, job, "signal");
  ASSERT_TRUE(PollUntil([&] { return fs::exists(Spool("signal") / "outputs" / "predictions.npy.tmp"); }));
  program->Signal(SIGUSR1);
  EXPECT_EQ(program->Wait(), 3) << program->Output();
  EXPECT_THAT(Result("signal")["message"].get<std::string>(), HasSubstr("SIGUSR1"));
  for (const char* spool : {"before", "late", "signal"}) EXPECT_TRUE(fs::is_empty(Spool(spool) / "outputs")) << spool;
}

TEST_F(WorkerProgram, PredictionHasTheWholeModelOnEachRankWhateverTheTrainingsStrategy) {
  Json job = Job();
  ASSERT_EQ(Run(0, job, "training"), 0) << log_;
  job["train"]["predict"] = {{"weights", Spool("training") / "outputs" / "weights.safetensors"}};
  ASSERT_EQ(Run(0, job, "alone"), 0) << log_;
  for (const char* strategy : {"single", "tensor", "pipeline", "zero3"}) {
    job["train"]["strategy"] = strategy;
    ASSERT_EQ(Run(2, job, strategy), 0) << log_;
    EXPECT_THAT(log_, HasSubstr(std::string("note: a prediction has the whole model on each rank, not strategy ") + strategy));
    EXPECT_EQ(ReadWholeFile(Spool(strategy) / "outputs" / "predictions.npy"),
              ReadWholeFile(Spool("alone") / "outputs" / "predictions.npy"));
  }
}

TEST_F(WorkerProgram, TracesTheStepsOfAllRanksOnOneClock) {
  Json job = Job();
  job["train"]["epochs"] = 100000;
  job["train"]["profile"] = {{"trace_steps", 5}, {"at_step", 3}};
  auto program = Start(2, job, "trace");
  const fs::path outputs = Spool("trace") / "outputs";
  ASSERT_TRUE(PollUntil([&] { return fs::exists(outputs / "trace.json"); }));
  scratch_.Write("trace/profile", "7\n");  // and once more, on demand
  const auto on_demand = [&]() -> fs::path {
    for (const auto& entry : fs::directory_iterator(outputs)) {
      if (entry.path().filename().string().starts_with("trace-step-") &&
          entry.path().extension() == ".json")
        return entry.path();
    }
    return {};
  };
  ASSERT_TRUE(PollUntil([&] { return !on_demand().empty(); })) << program->Output();
  const fs::path on_demand_first = on_demand();
  EXPECT_FALSE(fs::exists(Spool("trace") / "profile"));
  // With a name; and again by somebody who has not seen the answer: nothing more is traced.
  const auto ask = [&](const std::string& text) {
    scratch_.Write("trace/profile.new", text);
    fs::rename(Spool("trace") / "profile.new", Spool("trace") / "profile");
    return PollUntil([&] { return !fs::exists(Spool("trace") / "profile"); });
  };
  ASSERT_TRUE(ask("4 trace-1.json\n"));
  ASSERT_TRUE(PollUntil([&] { return fs::exists(outputs / "trace-1.json"); })) << program->Output();
  const fs::file_time_type first = fs::last_write_time(outputs / "trace-1.json");
  ASSERT_TRUE(ask("4 trace-1.json\n"));
  // No name leads out of the directory.
  ASSERT_TRUE(ask("3 ../trace-2.json\n"));
  const auto traces = [&] {
    return std::count_if(fs::directory_iterator(outputs), fs::directory_iterator(), [](const fs::directory_entry& entry) {
      return entry.path().filename().string().starts_with("trace-step-") && entry.path().extension() == ".json";
    });
  };
  ASSERT_TRUE(PollUntil([&] { return traces() == 2; })) << program->Output();
  EXPECT_EQ(fs::last_write_time(outputs / "trace-1.json"), first);
  EXPECT_FALSE(fs::exists(Spool("trace") / "trace-2.json"));
  program->Signal(SIGUSR1);
  EXPECT_EQ(program->Wait(), 85) << program->Output();
  for (const auto& [path, steps] : {std::pair{outputs / "trace.json", 5}, {on_demand_first, 7}, {outputs / "trace-1.json", 4}}) {
    const Json trace = Json::parse(ReadWholeFile(path));
    std::map<int, int> found;
    std::map<int, double> begin, end;
    int collectives = 0;
    for (const Json& event : trace["traceEvents"]) {
      if (event["ph"] != "X") continue;
      if (event["name"] == "all-reduce") ++collectives;
      if (event["name"] != "step") continue;
      const int rank = event["pid"];
      ++found[rank];
      const double at = event["ts"];
      if (!begin.contains(rank)) begin[rank] = at;
      end[rank] = at + event["dur"].get<double>();
    }
    EXPECT_EQ(found, (std::map<int, int>{{0, steps}, {1, steps}}));
    EXPECT_GE(collectives, 2 * steps);
    // Steps are synchronous: on one clock the ranks' spans overlap.
    EXPECT_LT(begin[0], end[1]);
    EXPECT_LT(begin[1], end[0]);
  }
}

TEST_F(WorkerProgram, AStoppedRankIsFoundAndNamed) {
  Json job = Job();
  job["train"]["epochs"] = 100000;
  job["train"]["profile"] = {{"hang_timeout", "3s"}};
  auto program = Start(2, job, "hang");
  ASSERT_TRUE(PollUntil([&] {
    std::error_code error;
    return fs::file_size(Spool("hang") / "metrics.jsonl", error) > 3000 && !error;
  }));
  const std::string sign = ReadWholeFile(Spool("hang") / "ranks" / "1.json");
  const pid_t laggard = Json::parse(sign)["pid"];
  kill(laggard, SIGSTOP);
  const int code = program->Wait(std::chrono::seconds(60));
  EXPECT_EQ(code, 5) << program->Output();
  const Json result = Result("hang");
  EXPECT_EQ(result["failure"]["class"], "infra");
  EXPECT_EQ(result["failure"]["rank"], 1) << result;
  EXPECT_FALSE(result["failure"]["host"].get<std::string>().empty());
  EXPECT_THAT(result["message"].get<std::string>(), HasSubstr("has not been running for"));
  // What the other rank was doing is in the log: a step's all-reduce, or the comparing of weights
  // at the end of an epoch.
  EXPECT_THAT(program->Output(), HasSubstr("the training thread"));
  EXPECT_THAT(program->Output(),
              AnyOf(AllOf(HasSubstr("gradients: in all-reduce number"), HasSubstr("MPI_Allreduce")),
                    AllOf(ContainsRegex("control: in [a-z-]+ number [0-9]+"),
                          ContainsRegex("MPI_[A-Z][a-z]+[+]0x"))));
  kill(laggard, SIGKILL);  // in case the launcher did not
}

TEST_F(WorkerProgram, ReportHasWhatAStudyNeeds) {
  ASSERT_EQ(Run(2, Job(), "report"), 0) << log_;
  const Json report = Json::parse(ReadWholeFile(Spool("report") / "outputs" / "report.json"));
  EXPECT_EQ(report["ranks"], 2);
  EXPECT_GT(report["parameter_bytes"], 1000);
  ASSERT_EQ(report["of_rank"].size(), 2u);
  for (const Json& of_rank : report["of_rank"]) {
    EXPECT_EQ(of_rank["steps"], 54);
    EXPECT_GT(of_rank["seconds_in"]["forward"], 0);
    EXPECT_GT(of_rank["seconds_in"]["backward"], 0);
    EXPECT_GT(of_rank["collectives"]["bytes"], 0);
    EXPECT_GT(of_rank["checkpoint"]["bytes_written"], 0);
    EXPECT_LE(of_rank["step_seconds"]["p50"], of_rank["step_seconds"]["p99"]);
  }
  const std::map<std::string, double> metrics = Result("report")["metrics"];
  for (const char* name :
       {"perf/forward_s", "perf/backward_s", "perf/optimizer_s", "perf/step_p50_s",
        "perf/rss_bytes", "perf/comm_bytes_per_second", "perf/checkpoint_stall_s"}) {
    EXPECT_TRUE(metrics.contains(name)) << name;
  }
}

TEST_F(WorkerProgram, SelfTestAndVersion) {
  const char* bin = std::getenv("ITWIN_BIN");
  const std::string worker =
      (bin == nullptr ? std::string("bin") : std::string(bin)) + "/itwin-worker";
  const std::map<std::string, std::string> environment = {{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                                          {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}};
  for (const char* ranks : {"1", "3"}) {
    Program program({"mpirun", "-n", ranks, "--oversubscribe", worker, "--self-test"}, environment,
                    scratch_ / "self");
    EXPECT_EQ(program.Wait(), 0) << program.Output();
    EXPECT_THAT(program.Output(), HasSubstr(std::string("ranks ") + ranks));
  }
  Program version({worker, "--version"}, environment, scratch_ / "version");
  EXPECT_EQ(version.Wait(), 0);
  EXPECT_THAT(version.Output(), HasSubstr("itwin-worker "));
  Program wrong({worker, "--sepc", "x"}, environment, scratch_ / "wrong");
  EXPECT_EQ(wrong.Wait(), 2);
  EXPECT_THAT(wrong.Output(), HasSubstr("unknown option --sepc"));
}

}  // namespace
}  // namespace itwin::worker
