// Runs of the training loop on 1 to 4 ranks (threads) that are compared with one process: the families of
// models, the job, and a fixture that trains it. The ranks are processors or simulated GPUs.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <set>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "agent/worker/device/device_dataset.h"
#include "agent/worker/error.h"
#include "agent/worker/model/model.h"
#include "agent/worker/training/mesh.h"
#include "agent/worker/training/training_loop.h"
#include "agent/worker/training/weights.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/training/ranks.h"
#include "tests/worker/training/tiny_model.h"

namespace itwin::worker::testing {

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

inline const std::vector<std::string> kStrategies = {"ddp", "horovod", "zero1", "zero2", "zero3"};

struct Family {
  std::string name;
  Json model;
  Json data;
  std::string loss;
  double tolerance = kFloat32Tolerance;
};

inline std::vector<Family> Families(const std::string& script) {
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
      {"torchscript in float64", Json{{"torchscript", "net64.pt"}}, synthetic({6}, {2}, 0), "", kFloat64Tolerance},
  };
}

struct MeshCase {
  int data, tensor, pipeline;
  std::string schedule = "1f1b";
};

inline Json SettingsOf(const MeshCase& c) {
  return {{"strategy", "mesh"},
          {"mesh",
           {{"data", c.data},
            {"tensor", c.tensor},
            {"pipeline", c.pipeline},
            {"schedule", c.schedule},
            {"micro_batches", 3}}}};
}

// Small buckets, so that there are several.
inline Json SettingsOf(const std::string& strategy) {
  Json settings = {{"strategy", strategy}};
  if (strategy == "ddp") settings["ddp"] = {{"bucket_mb", 1e-3}, {"first_bucket_mb", 1e-4}};
  if (strategy == "horovod") settings["horovod"] = {{"fusion_mb", 1e-3}, {"cycle_ms", 0.1}};
  if (strategy.starts_with("zero")) settings["zero"] = {{"bucket_mb", 1e-3}};
  return settings;
}

// Those that can be split: an mlp, a transformer, and one whose embedding is its output layer, too.
inline std::array<Family, 3> MeshFamilies() {
  Family mlp = Families("net.pt")[0], transformer = Families("net.pt")[6];
  mlp.model["options"]["hidden"] = {24, 12, 12};
  // 12 heads of one feature: for groups of 2, 3 and 4.
  transformer.model["options"].update({{"vocabulary", 12}, {"tied", false}, {"width", 12}, {"heads", 12}});
  Family tied = transformer;
  tied.model["options"]["tied"] = true;
  return {mlp, transformer, tied};
}

// What a rank of a run computes on.
struct Machine {
  at::Device device = at::kCPU;
  std::shared_ptr<void> while_it_runs{};
  std::unique_ptr<Communicator> gradients{};
};
using MakeMachine = std::function<Machine(int rank, InProcessGroup& ranks)>;

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
  void MoveTo(at::Device device) override { inner_->MoveTo(device); }
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

// Counts how often each sample is taken for training, by all ranks.
class CountedDataset : public Dataset {
 public:
  explicit CountedDataset(const Dataset& inner) : inner_(inner) {}
  int64_t size(Split split) const override { return inner_.size(split); }
  Batch Gather(Split split, const std::vector<int64_t>& indices) const override {
    if (split == Split::kTrain) {
      std::lock_guard lock(mutex_);
      for (const int64_t i : indices) ++uses_[i];
    }
    return inner_.Gather(split, indices);
  }
  std::vector<std::string> baselines() const override { return inner_.baselines(); }
  std::map<std::string, at::Tensor> BaselinePredictions(const Batch& batch) const override {
    return inner_.BaselinePredictions(batch);
  }
  std::map<std::string, std::vector<int64_t>> sample_shapes() const override { return inner_.sample_shapes(); }
  int64_t classes() const override { return inner_.classes(); }
  nlohmann::json preprocessing() const override { return inner_.preprocessing(); }

  const std::map<int64_t, int>& uses() const { return uses_; }  // when no rank runs

 private:
  const Dataset& inner_;
  mutable std::mutex mutex_;
  mutable std::map<int64_t, int> uses_;
};

inline Json JobOf(const Family& family, const Json& train) {
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
  if (family.loss.empty()) job["train"].erase("loss");  // the module's
  if (train.is_object()) job["train"].update(train);
  return job;
}

// How a test spoils the communication of gradients.
using Spoil = std::function<std::unique_ptr<Communicator>(Communicator&)>;

struct Outcome {
  NamedTensors parameters;
  std::map<std::string, double> metrics;
  std::vector<std::string> hashes;
  std::map<int64_t, int> uses;  // of each sample for training, by all ranks
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
from typing import Dict, Tuple
from torch import Tensor
class Net64(Net):
    def __init__(self):
        super().__init__()
        self.double()
    def forward(self, x):
        x = torch.tanh(self.a(x.double()))
        for i in range(2):
            x = torch.tanh(self.b(x))
        return self.c(x)
    @torch.jit.export
    def training_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        loss = nn.functional.mse_loss(self.forward(batch['input']), batch['target'].double())
        return loss, {'mse': loss}
torch.jit.script(Net64()).save('net64.pt')
)");
  }
  static void TearDownTestSuite() { delete scratch_; }

  static Outcome Run(const Json& job, int ranks, const Spoil& spoil = nullptr,
                     const std::filesystem::path& resume = {}, const MakeMachine& make_machine = nullptr) {
    const TrainSpec spec = ParseSpec(job);
    const bool tokens = spec.model.builtin == "transformer";
    const std::unique_ptr<Dataset> dataset =
        tokens ? std::make_unique<TokenDataset>() : OpenDataset(spec.data, spec.seed, "");
    Outcome outcome;
    outcome.hashes.resize(static_cast<size_t>(ranks));
    outcome.checkpoints = *scratch_ / std::to_string(count_++);
    const CountedDataset counted(*dataset);
    InProcessGroup of_machines(ranks);
    const auto errors = RunRanks(ranks, [&](Communicator& plain, Communicator& control) {
      at::set_num_threads(1);
      const int rank = control.rank();
      Machine machine = make_machine ? make_machine(rank, of_machines) : Machine{};
      const at::Device device = machine.device;
      Communicator& whole = machine.gradients ? *machine.gradients : plain;
      std::optional<DeviceDataset> on_device;
      if (!device.is_cpu()) on_device.emplace(counted, device, /*channels_last=*/false);
      std::string note;
      const std::string strategy = ChooseStrategy(spec, ranks, &note);
      std::optional<MeshGroups> mesh;
      const std::unique_ptr<Communicator> spoilt = spoil ? spoil(whole) : nullptr;
      Communicator& gradients = spoilt ? *spoilt : whole;
      if (IsMesh(strategy)) mesh.emplace(MeshOf(spec, strategy, ranks), gradients, device.is_cpu() && !spoilt ? control : gradients, control, device);
      const std::unique_ptr<Model> owned = MakeModelAlone(spec, *dataset, mesh ? &*mesh : nullptr);
      Model& model = *owned;
      // Ranks are threads here and share one generator, which the loop seeds: all draw their weights before.
      control.Barrier()->Wait();
      if (!device.is_cpu()) model.MoveTo(device);
      NullMetricSink drop;
      CheckpointStore store(outcome.checkpoints, 1, control);
      StopRequest stop("", std::nullopt);
      TrainingLoop loop({.spec = spec,
                         .dataset = on_device ? static_cast<const Dataset&>(*on_device) : counted,
                         .model = model,
                         .gradients = gradients,
                         .control = control,
                         .metrics = drop,
                         .checkpoints = store,
                         .stop = stop,
                         .print = [](const std::string&) {},
                         .spec_sha256 = "proof",
                         .mesh = mesh ? &*mesh : nullptr,
                         .device = device});
      if (!resume.empty())
        loop.Resume(LoadNewestCheckpoint({resume}, control, [](const std::string&) {}));
      const TrainingOutcome result = loop.Run();
      if (!device.is_cpu() && !result.in_pieces) model.MoveTo(at::kCPU);
      outcome.hashes[static_cast<size_t>(rank)] = result.in_pieces ? result.weights_sha256 : HashWeights(model);
      if (rank != 0) return;
      outcome.metrics = result.metrics;
      if (result.in_pieces) {
        for (const auto& [name, tensor] : result.weights) {
          const auto buffers = model.buffers();
          if (std::none_of(buffers.begin(), buffers.end(), [&](const auto& b) { return b.first == name; }))
            outcome.parameters.emplace_back(name, tensor);
        }
        return;
      }
      for (const auto& [parameter, tensor] : model.parameters())
        outcome.parameters.emplace_back(parameter, tensor.detach().clone());
    });
    for (const auto& error : errors) {
      try {
        if (error) std::rethrow_exception(error);
      } catch (const std::exception& e) {
        if (outcome.error.empty()) outcome.error = std::string(e.what()).substr(0, 500);
      }
    }
    outcome.uses = counted.uses();
    return outcome;
  }

  static inline Scratch* scratch_ = nullptr;

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
inline double Difference(const NamedTensors& a, const NamedTensors& b) {
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

inline void ExpectEqualRuns(const Outcome& one, const Outcome& many, double tolerance) {
  ASSERT_EQ(many.error, "");
  EXPECT_LE(Difference(one.parameters, many.parameters), tolerance);
  EXPECT_EQ(std::set<std::string>(many.hashes.begin(), many.hashes.end()).size(), 1u);
  for (const auto& [name, value] : one.metrics) {
    if (!name.starts_with("test/")) continue;
    EXPECT_NEAR(many.metrics.at(name), value, kMetricTolerance * (1 + std::abs(value))) << name;
  }
}

// Each sample once in each epoch, by `readers` ranks that share its work; but for so many that stand in where a
// rank has none, and do not count.
inline void ExpectEachSampleOnce(const Outcome& run, int readers = 1, int stand_ins = 0) {
  EXPECT_EQ(run.uses.size(), static_cast<size_t>(kSamples));
  int more = 0;
  for (const auto& [sample, times] : run.uses) {
    EXPECT_GE(times, kEpochs * readers) << "sample " << sample;
    more += times - kEpochs * readers;
  }
  EXPECT_EQ(more, stand_ins);
}

}  // namespace itwin::worker::testing
