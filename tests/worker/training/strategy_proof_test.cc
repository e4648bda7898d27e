// Every strategy with every family of models on 1 to 4 ranks (threads): after some steps from one
// seed the parameters are those of one process with the whole batch. And the proof of the proof: a
// communicator that does one thing wrong must make the comparison fail.
#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>

#include <ATen/Parallel.h>
#include <ATen/ops/linear.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/error.h"
#include "agent/worker/model/model.h"
#include "agent/worker/training/horovod.h"
#include "agent/worker/training/mesh.h"
#include "agent/worker/training/training_loop.h"
#include "agent/worker/training/weights.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/dist/forwarding_communicator.h"
#include "tests/worker/training/ranks.h"
#include "tests/worker/training/tiny_model.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::ForwardingCommunicator;
using testing::RunRanks;
using testing::Scratch;
using testing::TinyDataset;
using testing::TinyModel;
using Json = nlohmann::json;

// Largest difference of a parameter from the large-batch run: float32 sums in another order, over
// kSteps steps; in float64 next to nothing.
constexpr double kFloat32Tolerance = 2e-6;
constexpr double kFloat64Tolerance = 1e-13;
// Relative difference of an evaluation's means.
constexpr double kMetricTolerance = 1e-5;
// What training moves the parameters, at least: far more than the tolerance.
constexpr double kLeastMovement = 1e-3;

constexpr int kSamples = 19, kBatch = 8;  // 8, 8 and 3: with 4 ranks one has none
constexpr int kEpochs = 2;

const std::vector<std::string> kStrategies = {"ddp", "horovod", "zero1", "zero2", "zero3"};

struct Family {
  std::string name;
  Json model;
  Json data;
  std::string loss;
};

std::vector<Family> Families(const std::string& script) {
  const auto synthetic = [](const Json& input, const Json& target, int classes) {
    Json data = {{"samples", kSamples + 5}, {"input_shape", input}};
    if (!target.is_null()) data["target_shape"] = target;
    if (classes > 0) data["classes"] = classes;
    return Json{{"synthetic", data}, {"split", {{"train", "0..19"}, {"test", "19..24"}}}};
  };
  const auto builtin = [](const std::string& name, const Json& options) {
    return Json{{"builtin", name}, {"options", options}};
  };
  return {
      {"mlp", builtin("mlp", {{"hidden", {24, 16}}}), synthetic({6}, {2}, 0), "mse"},
      {"cnn", builtin("cnn", {{"channels", {4, 6}}, {"hidden", 16}, {"dropout", 0}}),
       synthetic({1, 8, 8}, nullptr, 3), "cross_entropy"},
      {"resnet18", builtin("resnet18", {{"width", 4}}), synthetic({2, 8, 8}, nullptr, 3),
       "cross_entropy"},
      {"unet", builtin("unet", {{"base", 3}, {"depth", 2}}), synthetic({1, 8, 8}, {1, 8, 8}, 0),
       "mse"},
      {"lstm", builtin("lstm", {{"hidden", 10}, {"layers", 2}}), synthetic({5, 3}, {2}, 0), "mse"},
      {"downscale", builtin("downscale", {{"hidden", {6}}, {"position_channels", 2}}),
       synthetic({1, 4, 4}, {1, 8, 8}, 0), "mse"},
      {"transformer", builtin("transformer", {{"layers", 2}, {"width", 16}, {"heads", 2}}),
       synthetic({6}, {6}, 0), "tokens"},
      {"torchscript", Json{{"torchscript", script}}, synthetic({6}, {2}, 0), "mse"},
  };
}

// Batch norm behaves as in evaluation: its statistics are a rank's own, so that with them no number
// of ranks equals another. Everything else of the model trains.
class FixedStatistics : public Model {
 public:
  explicit FixedStatistics(std::unique_ptr<Model> inner) : inner_(std::move(inner)) {
    inner_->Train(false);
  }
  std::vector<std::pair<std::string, at::Tensor>> parameters() override {
    return inner_->parameters();
  }
  std::vector<std::pair<std::string, at::Tensor>> buffers() override { return inner_->buffers(); }
  StepOutput TrainingStep(const Batch& batch) override { return inner_->TrainingStep(batch); }
  StepOutput EvaluationStep(const Batch& batch) override { return inner_->EvaluationStep(batch); }
  at::Tensor Predict(const at::Tensor& input) override { return inner_->Predict(input); }
  void Train(bool) override {}
  void Save(const std::filesystem::path& dir) override { inner_->Save(dir); }
  std::string description() override { return inner_->description(); }

 private:
  const std::unique_ptr<Model> inner_;
};

// Text as numbers: the next of a short repeating series.
class TokenDataset : public Dataset {
 public:
  int64_t size(Split split) const override {
    return split == Split::kTrain ? kSamples : split == Split::kTest ? 5 : 0;
  }
  Batch Gather(Split split, const std::vector<int64_t>& indices) const override {
    at::Tensor text = at::empty({static_cast<int64_t>(indices.size()), 7},
                                at::TensorOptions().dtype(at::kLong));
    for (size_t i = 0; i < indices.size(); ++i) {
      for (int64_t k = 0; k < 7; ++k) {
        text.data_ptr<int64_t>()[7 * static_cast<int64_t>(i) + k] =
            (indices[i] * indices[i] + 3 * k + (split == Split::kTest ? 1 : 0)) % 11;
      }
    }
    return {{"input", text.narrow(1, 0, 6).contiguous()},
            {"target", text.narrow(1, 1, 6).contiguous()}};
  }
  std::vector<std::string> baselines() const override { return {}; }
  std::map<std::string, at::Tensor> BaselinePredictions(const Batch&) const override { return {}; }
  std::map<std::string, std::vector<int64_t>> sample_shapes() const override {
    return {{"input", {6}}, {"target", {6}}};
  }
  int64_t classes() const override { return 11; }
};

Json JobOf(const Family& family, const Json& train) {
  Json job = {{"name", "proof"},
              {"train",
               {{"model", family.model},
                {"data", family.data},
                {"loss", family.loss == "tokens" ? "cross_entropy" : family.loss},
                {"optimizer", {{"sgd", {{"lr", 0.05}, {"momentum", 0.9}}}}},
                {"batch", kBatch},
                {"epochs", kEpochs},
                {"seed", 3u},
                {"check_every", 1}}}};
  if (train.is_object()) job["train"].update(train);
  return job;
}

// How a test spoils the communication of gradients.
using Spoil = std::function<std::unique_ptr<Communicator>(Communicator&)>;

struct Outcome {
  NamedTensors parameters;
  std::map<std::string, double> metrics;
  std::vector<std::string> hashes;
  std::string error;  // of the first rank that has one
  std::filesystem::path checkpoints;
};

class Proof : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    at::set_num_threads(1);
    scratch_ = new Scratch;
    scratch_->Python(R"(
import torch
from torch import nn
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.b = nn.Linear(12, 12)
        self.c = nn.Linear(12, 2)
    def forward(self, x):
        x = torch.tanh(self.a(x))
        for i in range(2):
            x = torch.tanh(self.b(x))
        return self.c(x)
torch.jit.script(Net()).save('net.pt')
)");
  }
  static void TearDownTestSuite() { delete scratch_; }

  static Outcome Run(const Json& job, int ranks, const Spoil& spoil = nullptr,
                     const std::filesystem::path& resume = {}) {
    const TrainSpec spec = ParseSpec(job);
    const bool tokens = spec.model.builtin == "transformer";
    const std::unique_ptr<Dataset> dataset =
        tokens ? std::make_unique<TokenDataset>() : OpenDataset(spec.data, spec.seed, "");
    Outcome outcome;
    outcome.hashes.resize(static_cast<size_t>(ranks));
    outcome.checkpoints = *scratch_ / std::to_string(count_++);
    const auto errors = RunRanks(ranks, [&](Communicator& plain, Communicator& control) {
      at::set_num_threads(1);
      const int rank = control.rank();
      std::string note;
      const std::string strategy = ChooseStrategy(spec, ranks, &note);
      std::optional<MeshGroups> mesh;
      if (IsMesh(strategy)) mesh.emplace(MeshOf(spec, strategy, ranks), plain, control);
      const std::unique_ptr<Model> owned = MakeModelAlone(spec, *dataset, mesh ? &*mesh : nullptr);
      Model& model = *owned;
      // Ranks are threads here and share one generator, which the loop seeds: all draw their weights before.
      control.Barrier()->Wait();
      const std::unique_ptr<Communicator> spoilt = spoil ? spoil(plain) : nullptr;
      NullMetricSink drop;
      CheckpointStore store(outcome.checkpoints, 1, control);
      StopRequest stop("", std::nullopt);
      TrainingLoop loop({.spec = spec,
                         .dataset = *dataset,
                         .model = model,
                         .gradients = spoilt ? *spoilt : plain,
                         .control = control,
                         .metrics = drop,
                         .checkpoints = store,
                         .stop = stop,
                         .print = [](const std::string&) {},
                         .spec_sha256 = "proof",
                         .mesh = mesh ? &*mesh : nullptr});
      if (!resume.empty())
        loop.Resume(LoadNewestCheckpoint({resume}, control, [](const std::string&) {}));
      const TrainingOutcome result = loop.Run();
      outcome.hashes[static_cast<size_t>(rank)] =
          mesh ? result.weights_sha256 : HashWeights(model);
      if (rank != 0) return;
      outcome.metrics = result.metrics;
      if (mesh) {
        outcome.parameters = result.weights;
        return;
      }
      for (const auto& [parameter, tensor] : model.parameters())
        outcome.parameters.emplace_back(parameter, tensor.detach().clone());
    });
    for (const auto& error : errors) {
      try {
        if (error) std::rethrow_exception(error);
      } catch (const std::exception& e) {
        if (outcome.error.empty()) outcome.error = e.what();
      }
    }
    return outcome;
  }

  static Scratch* scratch_;

 private:
  // Models draw their weights from LibTorch's one generator: not two at once.
  static std::unique_ptr<Model> MakeModelAlone(const TrainSpec& spec, const Dataset& dataset,
                                               MeshGroups* mesh) {
    // Stages of a graph draw nothing, and shake hands together.
    if (mesh != nullptr && spec.model.builtin.empty()) return MakeMeshModel(spec, dataset, scratch_->path(), *mesh);
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    if (mesh != nullptr) return MakeMeshModel(spec, dataset, scratch_->path(), *mesh);
    return std::make_unique<FixedStatistics>(MakeModel(spec, dataset, scratch_->path()));
  }
  static inline std::atomic<int> count_ = 0;
};
Scratch* Proof::scratch_ = nullptr;

double Difference(const NamedTensors& a, const NamedTensors& b) {
  if (a.size() != b.size() || a.empty()) return INFINITY;
  const std::map<std::string, at::Tensor> by_name(b.begin(), b.end());
  double worst = 0;
  for (const auto& [name, tensor] : a) {
    const auto found = by_name.find(name);
    if (found == by_name.end() || found->second.sizes() != tensor.sizes()) return INFINITY;
    const double d = tensor.sub(found->second).abs().max().item<double>();
    if (!(d <= worst)) worst = d;  // a NaN, too
  }
  return worst;
}

void ExpectEqualRuns(const Outcome& one, const Outcome& many, double tolerance) {
  ASSERT_EQ(many.error, "");
  EXPECT_LE(Difference(one.parameters, many.parameters), tolerance);
  EXPECT_EQ(std::set<std::string>(many.hashes.begin(), many.hashes.end()).size(), 1u);
  for (const auto& [name, value] : one.metrics) {
    if (!name.starts_with("test/")) continue;
    EXPECT_NEAR(many.metrics.at(name), value, kMetricTolerance * (1 + std::abs(value))) << name;
  }
}

TEST_F(Proof, EveryStrategyOnEveryFamilyEqualsOneProcess) {
  for (const Family& family : Families("net.pt")) {
    const Outcome one = Run(JobOf(family, {}), 1);
    ASSERT_EQ(one.error, "") << family.name;
    Json still = JobOf(family, Json{{"steps", 1}});
    still["train"]["optimizer"]["sgd"]["lr"] = 1e-12;
    EXPECT_GT(Difference(one.parameters, Run(still, 1).parameters), kLeastMovement) << family.name;
    for (const std::string& strategy : kStrategies) {
      for (const int ranks : {1, 2, 3, 4}) {
        SCOPED_TRACE(family.name + ", " + strategy + ", " + std::to_string(ranks) + " ranks");
        // Small buckets, so that there are several.
        Json settings = {{"strategy", strategy}};
        if (strategy == "ddp") settings["ddp"] = {{"bucket_mb", 1e-3}, {"first_bucket_mb", 1e-4}};
        if (strategy == "horovod") settings["horovod"] = {{"fusion_mb", 1e-3}, {"cycle_ms", 0.1}};
        if (strategy.starts_with("zero")) settings["zero"] = {{"bucket_mb", 1e-3}};
        ExpectEqualRuns(one, Run(JobOf(family, settings), ranks), kFloat32Tolerance);
      }
    }
  }
}

struct MeshCase {
  int data, tensor, pipeline;
  std::string schedule = "1f1b";
};

TEST_F(Proof, EveryMeshEqualsOneProcess) {
  Family mlp = Families("net.pt")[0], transformer = Families("net.pt")[6];
  mlp.model["options"]["hidden"] = {24, 12, 6};
  transformer.model["options"].update({{"vocabulary", 12}, {"tied", false}});
  Family tied = transformer;
  tied.model["options"]["tied"] = true;
  const std::vector<MeshCase> cases = {{1, 2, 1}, {2, 2, 1}, {1, 1, 2}, {1, 1, 3},
                                       {2, 1, 2}, {1, 2, 2}, {1, 1, 4}, {1, 1, 2, "gpipe"},
                                       {2, 1, 2, "gpipe"}};
  for (const Family& family : {mlp, transformer, tied}) {
    for (const double clip : {0.0, 0.1}) {
      const Outcome one = Run(JobOf(family, {{"clip_norm", clip}}), 1);
      for (const MeshCase& c : cases) {
        if (c.pipeline > 1 && family.model["options"].value("tied", false)) continue;
        if (clip > 0 && c.data * c.tensor * c.pipeline < 4) continue;
        const Json shape = {{"data", c.data},
                            {"tensor", c.tensor},
                            {"pipeline", c.pipeline},
                            {"schedule", c.schedule},
                            {"micro_batches", 3}};
        SCOPED_TRACE(family.name + shape.dump());
        const Json settings = {{"strategy", "mesh"}, {"mesh", shape}, {"clip_norm", clip}};
        ExpectEqualRuns(one, Run(JobOf(family, settings), c.data * c.tensor * c.pipeline),
                        kFloat32Tolerance);
      }
    }
  }
}

TEST_F(Proof, AMeshGoesOnAsAnotherOneAndAsOneProcess) {
  Family mlp = Families("net.pt")[0];
  mlp.model["options"]["hidden"] = {24, 12, 6};
  const Outcome whole = Run(JobOf(mlp, {}), 1);
  const Json pipeline = {{"strategy", "pipeline"}}, tensor = {{"strategy", "tensor"}},
             zero = {{"strategy", "zero2"}, {"zero", {{"bucket_mb", 1e-3}}}};
  for (const auto& [first, second] :
       {std::pair{pipeline, tensor}, {tensor, zero}, {zero, pipeline}}) {
    Json begin = first;
    begin["steps"] = 4;
    const Outcome half = Run(JobOf(mlp, begin), 2);
    ASSERT_EQ(half.error, "");
    for (const int ranks : {1, 2}) {
      ExpectEqualRuns(whole, Run(JobOf(mlp, second), ranks, nullptr, half.checkpoints),
                      kFloat32Tolerance);
    }
  }
}

// An archive with a graph of three layers; sizes go through the number of samples, as an export has them.
void WriteGraphArchive(const std::filesystem::path& path, double handshake_error) {
  const auto wave = [](std::vector<int64_t> shape, double frequency) {
    return testing::Wave(std::move(shape), frequency, at::kFloat).mul(0.4).contiguous();
  };
  const NamedTensors weights = {{"a.weight", wave({16, 6}, 0.7)}, {"a.bias", wave({16}, 0.3)},
                                {"b.weight", wave({16, 16}, 1.1)}, {"b.bias", wave({16}, 0.9)},
                                {"c.weight", wave({2, 16}, 0.5)},  {"c.bias", wave({2}, 0.4)}};
  Json graph = {{"format", 1},
                {"inputs", {{{"value", "x"}, {"name", "input"}}}},
                {"outputs", {{{"value", "y"}, {"name", "prediction"}}}}};
  for (const auto& [name, tensor] : weights) graph["weights"].push_back({{"value", name}, {"name", name}, {"kind", "parameter"}});
  const auto node = [&](const std::string& op, const Json& args, const std::string& out) {
    graph["nodes"].push_back({{"op", op}, {"args", args}, {"out", {out}}});
  };
  const auto value = [](const std::string& name) { return Json{{"v", name}}; };
  const auto linear = [&](const std::string& in, const std::string& layer, const std::string& out) {
    node("aten::linear", {{"input", value(in)}, {"weight", value(layer + ".weight")}, {"bias", value(layer + ".bias")}}, out);
  };
  node("size", {{"self", value("x")}, {"dim", 0}}, "rows");
  linear("x", "a", "h1");
  node("aten::tanh", {{"self", value("h1")}}, "h2");
  node("mul", {{"a", value("rows")}, {"b", 2}}, "twice");
  node("aten::reshape", {{"self", value("h2")}, {"shape", {value("twice"), 8}}}, "h3");  // no sample in a row
  node("aten::reshape", {{"self", value("h3")}, {"shape", {value("rows"), 16}}}, "h4");
  linear("h4", "b", "h5");
  node("aten::tanh", {{"self", value("h5")}}, "h6");
  linear("h6", "c", "y");
  const at::Tensor input = wave({5, 6}, 1.7), target = wave({5, 2}, 2.3);
  std::map<std::string, at::Tensor> w(weights.begin(), weights.end());
  const auto layer = [&](const at::Tensor& x, const std::string& name) { return at::linear(x, w.at(name + ".weight"), w.at(name + ".bias")); };
  const at::Tensor output = layer(layer(layer(input, "a").tanh(), "b").tanh(), "c");
  const double loss = at::mse_loss(output, target).item<double>() + handshake_error;
  const Json manifest = {{"format", 1}, {"handshake", {{"loss", loss}, {"training_loss", loss}}}};
  NamedTensors tensors = {{"sample/input", input}, {"sample/target", target}};
  for (const auto& [name, tensor] : weights) tensors.emplace_back("weights/" + name, tensor);
  WriteSafetensors(path, tensors, {{"itwin.manifest", manifest.dump()}, {"itwin.graph", graph.dump()}});
}

TEST_F(Proof, AnExportedGraphIsCutIntoStagesAndEqualsOneProcess) {
  WriteGraphArchive(*scratch_ / "net.itw", 0);
  Family family = Families("net.pt")[0];
  family.model = {{"archive", "net.itw"}};
  const Outcome one = Run(JobOf(family, {}), 1);
  ASSERT_EQ(one.error, "");
  Json still = JobOf(family, Json{{"steps", 1}});
  still["train"]["optimizer"]["sgd"]["lr"] = 1e-12;
  EXPECT_GT(Difference(one.parameters, Run(still, 1).parameters), kLeastMovement);
  for (const MeshCase& c : {MeshCase{1, 1, 2}, {1, 1, 3}, {2, 1, 2}, {1, 1, 3, "gpipe"}}) {
    const Json shape = {{"data", c.data}, {"pipeline", c.pipeline}, {"schedule", c.schedule}, {"micro_batches", 3}};
    SCOPED_TRACE(shape.dump());
    ExpectEqualRuns(one, Run(JobOf(family, {{"strategy", "mesh"}, {"mesh", shape}}), c.data * c.pipeline), kFloat32Tolerance);
  }
  // From stages to one process and back.
  const Outcome half = Run(JobOf(family, {{"strategy", "pipeline"}, {"steps", 4}}), 3);
  ASSERT_EQ(half.error, "");
  ExpectEqualRuns(one, Run(JobOf(family, {}), 1, nullptr, half.checkpoints), kFloat32Tolerance);
  ExpectEqualRuns(one, Run(JobOf(family, {{"strategy", "pipeline"}}), 2, nullptr, half.checkpoints), kFloat32Tolerance);
}

TEST_F(Proof, StagesOfAGraphThatCannotBeSaySo) {
  WriteGraphArchive(*scratch_ / "net.itw", 0);
  WriteGraphArchive(*scratch_ / "other.itw", 0.01);
  Family family = Families("net.pt")[0];
  const auto error = [&](const std::string& file, const Json& train, int ranks) {
    family.model = {{"archive", file}};
    return Run(JobOf(family, train), ranks).error;
  };
  EXPECT_THAT(error("net.itw", {{"strategy", "pipeline"}}, 4), HasSubstr("there are places for 3 stages"));
  EXPECT_THAT(error("net.itw", {{"strategy", "tensor"}}, 2), HasSubstr("only built-in models"));
  EXPECT_THAT(error("other.itw", {{"strategy", "pipeline"}}, 2), HasSubstr("does not compute here what it computed"));
}

TEST_F(Proof, AModelThatCannotBeSplitSaysSo) {
  const auto error = [](const Family& family, const Json& mesh, int ranks) {
    return Run(JobOf(family, {{"strategy", "mesh"}, {"mesh", mesh}}), ranks).error;
  };
  const auto families = Families("net.pt");
  EXPECT_THAT(error(families[1], {{"tensor", 2}}, 2), HasSubstr("cannot be split between ranks"));
  EXPECT_THAT(error(families[7], {{"tensor", 2}}, 2), HasSubstr("only built-in models"));
  EXPECT_THAT(error(families[0], {{"tensor", 5}}, 2), HasSubstr("but the job has 2"));
  EXPECT_THAT(error(families[6], {{"pipeline", 2}}, 2), HasSubstr("tied"));
  EXPECT_THAT(error(families[6], {{"tensor", 3}}, 3), HasSubstr("cannot be shared by 3 ranks"));
}

TEST_F(Proof, AccumulationAndClippingEqualOneProcessUnderEveryStrategy) {
  const Family mlp = Families("net.pt")[0];
  const Outcome one = Run(JobOf(mlp, {{"clip_norm", 0.1}}), 1);
  EXPECT_GT(Difference(one.parameters, Run(JobOf(mlp, {}), 1).parameters), kLeastMovement);
  for (const std::string& strategy : kStrategies) {
    SCOPED_TRACE(strategy);
    Json settings = {{"strategy", strategy}, {"clip_norm", 0.1}, {"accumulate", 3}};
    if (strategy.starts_with("zero")) settings["zero"] = {{"bucket_mb", 1e-3}};
    ExpectEqualRuns(one, Run(JobOf(mlp, settings), 3), kFloat32Tolerance);
  }
}

TEST_F(Proof, EveryOptimiserWorksOnShards) {
  const Family mlp = Families("net.pt")[0];
  for (const Json& optimizer :
       {Json{{"adam", {{"lr", 1e-3}, {"eps", 1e-3}}}}, Json{{"rmsprop", {{"lr", 1e-3}, {"eps", 1e-3}}}}}) {
    const Outcome one = Run(JobOf(mlp, {{"optimizer", optimizer}}), 1);
    for (const std::string strategy : {"zero1", "zero2", "zero3"}) {
      SCOPED_TRACE(strategy + optimizer.dump());
      ExpectEqualRuns(one,
                      Run(JobOf(mlp, {{"optimizer", optimizer},
                                      {"strategy", strategy},
                                      {"zero", {{"bucket_mb", 1e-3}}}}),
                          3),
                      kFloat32Tolerance);
    }
  }
}

TEST_F(Proof, CompressedGradientsStayWithinTheStatedError) {
  // One step of gradient descent: the difference is the learning rate times the gradient's error,
  // which compression.h bounds by (1 + ceil(log2 ranks)) u of the sum of the ranks' absolute parts.
  const Family mlp = Families("net.pt")[0];
  Json sgd = {{"optimizer", {{"sgd", {{"lr", 1.0}}}}}, {"steps", 1}};
  const Outcome exact = Run(JobOf(mlp, sgd), 1);
  Json still = sgd;
  still["optimizer"]["sgd"]["lr"] = 1e-12;
  const double largest = Difference(exact.parameters, Run(JobOf(mlp, still), 1).parameters);
  for (const auto& [format, unit] :
       {std::pair{"fp16", std::ldexp(1.0, -11)}, std::pair{"bf16", std::ldexp(1.0, -9)}}) {
    for (const int ranks : {2, 4}) {
      sgd["ddp"] = {{"compression", format}};
      const Outcome rounded = Run(JobOf(mlp, sgd), ranks);
      ASSERT_EQ(rounded.error, "");
      const double error = Difference(exact.parameters, rounded.parameters);
      // The ranks' parts may cancel in the sum; here they are at most a few times as large.
      EXPECT_LE(error, 4 * (1 + std::ceil(std::log2(ranks))) * unit * largest) << format;
      EXPECT_GT(error, kFloat32Tolerance) << format << " changed nothing: was it used?";
    }
  }
}

TEST_F(Proof, LocalSgdIsTheMeanOfRanksThatTrainAlone) {
  // With one average at the very end: each rank alone on its own samples, then the mean.
  const TinyDataset dataset(12, 0, 0);
  TrainSpec spec;
  spec.batch = 6;
  spec.epochs = 1;
  spec.optimizer = Sgd{.lr = 0.1};
  spec.seed = 4;
  spec.local_sgd.every = 2;
  std::vector<NamedTensors> ends(2);
  Scratch scratch;
  const auto errors = RunRanks(2, [&](Communicator& gradients, Communicator& control) {
    TinyModel model;
    NullMetricSink drop;
    CheckpointStore store(scratch / "c", 1, control);
    StopRequest stop("", std::nullopt);
    TrainingLoop loop({.spec = spec,
                       .dataset = dataset,
                       .model = model,
                       .gradients = gradients,
                       .control = control,
                       .metrics = drop,
                       .checkpoints = store,
                       .stop = stop,
                       .print = [](const std::string&) {},
                       .spec_sha256 = ""});
    loop.Run();
    for (const auto& [name, tensor] : model.parameters())
      ends[static_cast<size_t>(control.rank())].emplace_back(name, tensor.detach().clone());
  });
  for (const auto& error : errors) ASSERT_FALSE(error);
  const EpochOrder order(12, 6, spec.seed, 0);
  NamedTensors mean;
  for (int rank = 0; rank < 2; ++rank) {
    TinyModel model;
    for (int64_t g = 0; g < order.batches(); ++g) {
      const auto mine = order.OfRank(g, rank, 2);
      model.TrainingStep(dataset.Gather(Split::kTrain, {mine.begin(), mine.end()})).loss.backward();
      for (auto& [name, tensor] : model.parameters()) {
        tensor.detach().sub_(tensor.grad(), 0.1);
        tensor.mutable_grad().zero_();
      }
    }
    for (size_t i = 0; i < model.parameters().size(); ++i) {
      const at::Tensor half = model.parameters()[i].second.detach().mul(0.5);
      if (rank == 0) {
        mean.emplace_back(model.parameters()[i].first, half);
      } else {
        mean[i].second += half;
      }
    }
  }
  EXPECT_LE(Difference(mean, ends[0]), kFloat64Tolerance);
  EXPECT_EQ(Difference(ends[0], ends[1]), 0);
}

TEST(Adasum, FollowsTheFormulaPairByPair) {
  // Orthogonal gradients add up, equal ones count once.
  std::vector<double> a = {1, 0}, b = {0, 2};
  std::vector<double*> two = {a.data(), b.data()};
  Adasum(std::span<double*>(two), 2);
  EXPECT_EQ(a, (std::vector<double>{1, 2}));
  a = {3, -1}, b = {3, -1};
  Adasum(std::span<double*>(two), 2);
  EXPECT_EQ(a, (std::vector<double>{3, -1}));
  // Four ranks: ((0, 1), (2, 3)) by the formula written out.
  const auto pair = [](std::vector<double> x, const std::vector<double>& y) {
    double xx = 0, yy = 0, xy = 0;
    for (size_t i = 0; i < x.size(); ++i) xx += x[i] * x[i], yy += y[i] * y[i], xy += x[i] * y[i];
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = (1 - xy / (2 * xx)) * x[i] + (1 - xy / (2 * yy)) * y[i];
    return x;
  };
  std::vector<std::vector<double>> ranks = {{1, 2, 3}, {-1, 0.5, 2}, {0.1, 4, -2}, {2, 2, 2}};
  const std::vector<double> expected = pair(pair(ranks[0], ranks[1]), pair(ranks[2], ranks[3]));
  std::vector<double*> pointers;
  for (auto& r : ranks) pointers.push_back(r.data());
  Adasum(std::span<double*>(pointers), 3);
  for (size_t i = 0; i < 3; ++i) EXPECT_NEAR(ranks[0][i], expected[i], 1e-14);
}

TEST_F(Proof, AdasumTrainsAndItsRanksAgree) {
  const Family mlp = Families("net.pt")[0];
  const Json settings = {{"strategy", "horovod"}, {"horovod", {{"adasum", true}}}};
  const Outcome one = Run(JobOf(mlp, {}), 1), two = Run(JobOf(mlp, settings), 2);
  ASSERT_EQ(two.error, "");
  EXPECT_EQ(two.hashes[0], two.hashes[1]);
  EXPECT_GT(Difference(one.parameters, two.parameters), kFloat32Tolerance);
}

TEST_F(Proof, ShardedStrategiesHoldTheirPartOnly) {
  const Family base = Families("net.pt")[0];
  Family wide = base;
  wide.model["options"]["hidden"] = {128, 128, 128, 128};
  const Outcome whole = Run(JobOf(wide, {{"optimizer", {{"adam", Json::object()}}}}), 1);
  const auto of = [](const Outcome& o, const std::string& what) {
    return o.metrics.at("perf/memory_" + what);
  };
  const double all = of(whole, "parameters");
  EXPECT_EQ(of(whole, "optimizer"), 2 * all);
  for (const int stage : {1, 2, 3}) {
    for (const int ranks : {2, 4}) {
      SCOPED_TRACE(std::to_string(stage) + " on " + std::to_string(ranks));
      const Outcome part = Run(JobOf(wide, {{"optimizer", {{"adam", Json::object()}}},
                                            {"strategy", "zero" + std::to_string(stage)},
                                            {"zero", {{"bucket_mb", 0.06}}}}),
                               ranks);
      ASSERT_EQ(part.error, "");
      const double share = all / ranks, padding = 0.02 * all;
      const double bucket = 0.07 * (1 << 20) + 128 * 128 * 4;  // when it is closed
      EXPECT_NEAR(of(part, "optimizer"), 2 * share, padding);
      if (stage == 1) {
        EXPECT_NEAR(of(part, "parameters"), all, padding);
        EXPECT_NEAR(of(part, "gradients"), all + share, padding);
      }
      if (stage >= 2) {
        EXPECT_NEAR(of(part, "gradients"), share, padding);
        EXPECT_LE(of(part, "gradients_peak"), share + 2 * bucket);
      }
      if (stage == 3) {
        EXPECT_NEAR(of(part, "parameters"), share, padding);
        EXPECT_LE(of(part, "parameters_peak"), share + 2 * bucket);
      }
    }
  }
}

// ---- The comparison itself

// Spoils the exchange of gradients: float buffers that are reduced after the start.
class Spoilt : public ForwardingCommunicator {
 public:
  enum class How { kSkipOne, kWrongDivisor, kDroppedBucket };
  Spoilt(Communicator& inner, How how) : ForwardingCommunicator(inner), how_(how) {}

  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override {
    if (!OfGradients(buffer)) return inner_.AllReduce(buffer, reduction);
    const int64_t n = count_++;
    if (how_ == How::kSkipOne && n == 1) return inner_.Barrier();
    auto work = inner_.AllReduce(buffer, reduction);
    Change(buffer, n);
    return work;
  }
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override {
    const int64_t n = count_++;
    if (how_ == How::kSkipOne && n == 1) return inner_.Barrier();
    auto work = inner_.ReduceScatter(all, mine, reduction);
    Change(mine, n);
    return work;
  }

 private:
  static bool OfGradients(const Buffer& buffer) { return buffer.type == ElementType::kFloat32; }
  void Change(const Buffer& buffer, int64_t n) const {
    auto* values = static_cast<float*>(buffer.data);
    if (how_ == How::kWrongDivisor) {
      for (int64_t i = 0; i < buffer.count; ++i) values[i] *= 0.5f;
    }
    if (how_ == How::kDroppedBucket && n % 3 == 1) std::fill_n(values, buffer.count, 0.0f);
  }

  const How how_;
  int64_t count_ = 0;
};

TEST_F(Proof, AMistakeInTheExchangeTurnsTheComparisonRed) {
  const Family mlp = Families("net.pt")[0];
  const Outcome one = Run(JobOf(mlp, {}), 1);
  for (const std::string& strategy : kStrategies) {
    for (const Spoilt::How how :
         {Spoilt::How::kSkipOne, Spoilt::How::kWrongDivisor, Spoilt::How::kDroppedBucket}) {
      SCOPED_TRACE(strategy + ", mistake " + std::to_string(static_cast<int>(how)));
      Json settings = {{"strategy", strategy}};
      if (strategy == "ddp") settings["ddp"] = {{"bucket_mb", 1e-3}, {"first_bucket_mb", 1e-4}};
      if (strategy == "horovod") settings["horovod"] = {{"fusion_mb", 1e-3}};
      if (strategy.starts_with("zero")) settings["zero"] = {{"bucket_mb", 1e-3}};
      const Outcome wrong = Run(JobOf(mlp, settings), 2, [how](Communicator& plain) {
        return std::make_unique<Spoilt>(plain, how);
      });
      // Red: the numbers are others, or the run itself has noticed that the ranks differ.
      if (wrong.error.empty()) {
        EXPECT_GT(Difference(one.parameters, wrong.parameters), 10 * kFloat32Tolerance);
      } else {
        EXPECT_THAT(wrong.error, ::testing::AnyOf(HasSubstr("are not those of the other ranks"),
                                                  HasSubstr("the weights differ")));
      }
    }
  }
}

TEST_F(Proof, EachSampleOncePerEpochWithUnevenSizes) {
  for (const std::string& strategy : kStrategies) {
    for (const int ranks : {2, 3}) {
      const TinyDataset dataset(43, 0, 7);
      TrainSpec spec;
      spec.batch = 8;
      spec.epochs = 2;
      spec.optimizer = Sgd{.lr = 0.1};
      spec.strategy = strategy;
      Scratch scratch;
      const auto errors = RunRanks(ranks, [&](Communicator& gradients, Communicator& control) {
        TinyModel model;
        NullMetricSink drop;
        CheckpointStore store(scratch / "c", 1, control);
        StopRequest stop("", std::nullopt);
        TrainingLoop loop({.spec = spec,
                           .dataset = dataset,
                           .model = model,
                           .gradients = gradients,
                           .control = control,
                           .metrics = drop,
                           .checkpoints = store,
                           .stop = stop,
                           .print = [](const std::string&) {},
                           .spec_sha256 = ""});
        loop.Run();
      });
      for (const auto& error : errors) ASSERT_FALSE(error) << strategy;
      std::map<int64_t, int> seen;
      for (const int64_t i : dataset.Seen(Split::kTrain)) ++seen[i];
      EXPECT_EQ(seen.size(), 43u);
      for (const auto& [sample, times] : seen) EXPECT_EQ(times, 2) << strategy << " " << sample;
    }
  }
}

}  // namespace
}  // namespace itwin::worker
