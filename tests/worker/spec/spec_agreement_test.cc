// What the gateway accepts at submission, as far as the document tells, the worker does not refuse on the node: each
// document here is asked of both, and both give the same answer about the same field.
#include <atomic>
#include <mutex>
#include <optional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "agent/worker/device/device.h"
#include "agent/worker/error.h"
#include "agent/worker/model/network.h"
#include "agent/worker/spec/train_spec.h"
#include "agent/worker/training/training_loop.h"
#include "common/spec/spec_document.h"
#include "common/spec/validate.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/training/ranks.h"

namespace itwin::worker {
namespace {

using ::itwin::worker::testing::RunRanks;
using ::itwin::worker::testing::Scratch;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using Json = nlohmann::json;

constexpr char kDocument[] = R"(
resources: {ranks_per_node: 4}
train:
  model: {builtin: mlp}
  data: {synthetic: {samples: 40, input_shape: [4], target_shape: [2]}, split: {validation_fraction: 0.25}}
  loss: mse
  batch: 8
)";

v1::JobSpec Parse(const std::vector<std::string>& changes) {
  absl::StatusOr<v1::JobSpec> spec = ParseSpecDocument(kDocument, changes);
  EXPECT_TRUE(spec.ok()) << spec.status();
  return spec.ok() ? *spec : v1::JobSpec();
}

std::string GatewaySays(const v1::JobSpec& spec) { return std::string(ValidateSpec(spec).message()); }

// What the worker says before the first step; "" when it would train.
std::string WorkerSays(const v1::JobSpec& job) {
  const Scratch scratch;
  std::mutex mutex;
  std::string said;
  const auto say = [&](const std::exception_ptr& error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const WorkerError& e) {  // not that of a rank which another one's leaves alone
      if (said.empty() && e.failure == FailureClass::kUser) said = e.what();
    }
  };
  try {
    const TrainSpec spec = ParseSpec(Json::parse(SpecToJson(job)));
    const int ranks = spec.resources.nodes * spec.resources.ranks_per_node;
    const auto errors = RunRanks(ranks, [&](Communicator& gradients, Communicator& control) {
      std::string note;
      const std::string strategy = ChooseStrategy(spec, ranks, &note);
      CheckGpuSettings(spec, strategy);
      const std::unique_ptr<Dataset> dataset = OpenDataset(spec.data, spec.seed, scratch.path());
      std::optional<MeshGroups> mesh;
      if (IsMesh(strategy)) mesh.emplace(MeshOf(spec, strategy, ranks), gradients, control, control);
      std::unique_ptr<Model> model;
      {
        const std::lock_guard lock(mutex);  // models draw their weights from one generator
        model = mesh ? MakeMeshModel(spec, *dataset, scratch.path(), *mesh) : MakeModel(spec, *dataset, scratch.path());
      }
      NullMetricSink drop;
      CheckpointStore store(scratch / "c", 1, control);
      StopRequest stop("", std::nullopt);
      const TrainingLoop loop({.spec = spec,
                               .dataset = *dataset,
                               .model = *model,
                               .gradients = gradients,
                               .control = control,
                               .metrics = drop,
                               .checkpoints = store,
                               .stop = stop,
                               .print = [](const std::string&) {},
                               .spec_sha256 = "agreement",
                               .mesh = mesh ? &*mesh : nullptr});
      control.Barrier()->Wait();
    });
    for (const auto& error : errors) {
      try {
        say(error);
      } catch (const std::exception&) {  // a rank that was let out of a collective
      }
    }
  } catch (...) {
    say(std::current_exception());
  }
  return said;
}

// `field` as both name it: the gateway with a colon behind, the worker with or without.
void ExpectBothRefuse(const std::vector<std::string>& changes, const std::string& field) {
  const v1::JobSpec spec = Parse(changes);
  SCOPED_TRACE(changes.front());
  EXPECT_THAT("\n" + GatewaySays(spec), HasSubstr("\n" + field));
  EXPECT_THAT(WorkerSays(spec), HasSubstr(field));
}
void ExpectBothAccept(const std::vector<std::string>& changes) {
  const v1::JobSpec spec = Parse(changes);
  SCOPED_TRACE(changes.empty() ? "" : changes.front());
  EXPECT_EQ(GatewaySays(spec), "");
  EXPECT_EQ(WorkerSays(spec), "");
}

TEST(SpecAgreement, StrategiesAndFeatures) {
  ExpectBothAccept({});
  for (const char* strategy : {"ddp", "horovod"}) ExpectBothAccept({std::string("train.strategy=") + strategy, "train.ema={}"});
  for (const char* strategy : {"zero1", "zero2", "zero3"}) {
    ExpectBothAccept({std::string("train.strategy=") + strategy, "train.best={}"});
    ExpectBothRefuse({std::string("train.strategy=") + strategy, "train.ema={}"}, "train.ema");
    ExpectBothAccept({std::string("train.strategy=") + strategy, "train.ema={}", "resources={}"});
  }
  ExpectBothRefuse({"train.local_sgd={every: 3}", "train.ema={}"}, "train.ema");
  ExpectBothRefuse({"train.local_sgd={every: 3}", "train.precision=fp16"}, "train.precision");
  ExpectBothAccept({"train.local_sgd={every: 3}", "train.precision=bf16"});
  ExpectBothAccept({"train.local_sgd={every: 1}", "train.ema={}"});
  ExpectBothRefuse({"train.strategy=single"}, "train.strategy");
  ExpectBothRefuse({"train.precision=fp16", "train.loss_scale={smallest: 1000000}"}, "train.loss_scale.initial");
  ExpectBothRefuse({"train.best={}", "train.data.split={}"}, "train.best");
  ExpectBothRefuse({"train.validate_every_steps=3", "train.data.split={}"}, "train.validate_every_steps");
  ExpectBothRefuse({"train.accumulate=9"}, "train.accumulate");
  ExpectBothAccept({"train.accumulate=8"});
  ExpectBothRefuse({"train.gpu={}"}, "train.gpu");
  ExpectBothRefuse({"train.optimizer=lbfgs", "train.strategy=zero1"}, "train.strategy");
}

TEST(SpecAgreement, Meshes) {
  const std::string deep = "train.model.options={hidden: [8, 8, 8]}";
  for (const char* strategy : {"tensor", "pipeline"}) ExpectBothAccept({deep, std::string("train.strategy=") + strategy});
  ExpectBothAccept({deep, "train.strategy=mesh", "train.mesh={tensor: 2, pipeline: 2}"});
  ExpectBothAccept({deep, "train.strategy=pipeline", "train.mesh={data: 2}"});
  ExpectBothAccept({"train.model.options={hidden: [8]}", "train.strategy=pipeline", "train.mesh={tensor: 2}"});
  ExpectBothRefuse({"train.strategy=pipeline"}, "train.mesh.pipeline");
  ExpectBothRefuse({"train.strategy=pipeline", "train.model.options={hidden: [8, 8]}"}, "train.mesh.pipeline");
  ExpectBothRefuse({"train.strategy=mesh", "train.mesh={pipeline: 4}"}, "train.mesh.pipeline");
  ExpectBothRefuse({"train.strategy=tensor", "resources={ranks_per_node: 3}"}, "train.model.options.hidden");
  ExpectBothRefuse({"train.strategy=tensor", "train.model.options={hidden: [8, 8, 6]}"}, "train.model.options.hidden");
  ExpectBothRefuse({"train.strategy=tensor", "train.model.options={dropout: 0.1}"}, "train.model.options.dropout");
  ExpectBothRefuse({"train.strategy=tensor", "train.mesh={tensor: 2, data: 3}"}, "train.mesh");
  ExpectBothRefuse({deep, "train.strategy=tensor", "train.ema={}"}, "train.ema");
  ExpectBothRefuse({deep, "train.strategy=pipeline", "train.precision=bf16"}, "train.precision");
  ExpectBothRefuse({deep, "train.strategy=pipeline", "train.optimizer=lamb"}, "train.optimizer");
  ExpectBothRefuse({deep, "train.strategy=pipeline", "train.best={}"}, "train.best");
}

TEST(SpecAgreement, LossesAndMetrics) {
  ExpectBothRefuse({"train.loss="}, "train.loss");
  const auto classes = [](const std::string& loss) {
    return std::vector<std::string>{"train.loss=" + loss, "train.data.synthetic={samples: 40, input_shape: [4], classes: 3}"};
  };
  for (const std::string& metric : MetricNames()) {
    const std::string metrics = "train.metrics=[" + metric + "]";
    for (const std::string& loss : LossNames()) {
      SCOPED_TRACE(loss + " " + metric);
      std::vector<std::string> changes = classes(loss);
      changes.push_back(metrics);
      changes.push_back("resources={}");
      if (loss == "quantile") changes.push_back("train.loss_options={quantiles: [0.5]}");
      const v1::JobSpec spec = Parse(changes);
      const std::string worker = WorkerSays(spec), gateway = GatewaySays(spec);
      // Data that do not fit the loss are another matter.
      EXPECT_EQ(worker.starts_with("train.metrics"), gateway != "") << worker << "\n" << gateway;
    }
  }
}

TEST(SpecAgreement, LimitsOfNumbers) {
  Json job = Json::parse(SpecToJson(Parse({})));
  const auto worker = [&](const char* key, const Json& value) -> std::string {
    Json changed = job;
    changed["train"][key] = value;
    try {
      ParseSpec(changed);
    } catch (const WorkerError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(worker("batch", 2147483647), "");
  EXPECT_THAT(worker("batch", int64_t{2147483648}), StartsWith("train.batch"));
  EXPECT_THAT(worker("batch", "9223372036854775807"), StartsWith("train.batch"));
  EXPECT_THAT(worker("accumulate", 2000000000), StartsWith("train.accumulate"));
  job["train"]["batch"] = 2147483647;
  EXPECT_EQ(worker("accumulate", 1000000), "");
  EXPECT_THAT(worker("accumulate", 1000001), StartsWith("train.accumulate"));
  EXPECT_EQ(GatewaySays(Parse({"train.batch=2147483647", "train.accumulate=1000000"})), "");
  EXPECT_THAT(GatewaySays(Parse({"train.batch=2147483647", "train.accumulate=1000001"})), StartsWith("train.accumulate"));
}

// Every option of every built-in model, with values around its limits and of other kinds.
TEST(SpecAgreement, OptionsOfBuiltInModels) {
  const std::map<std::string, SampleForm> forms = {
      {"mlp", {{4}, {2}}},          {"cnn", {{1, 8, 8}, {}, 3}},        {"resnet18", {{2, 8, 8}, {}, 3}},
      {"unet", {{1, 16, 16}, {1, 16, 16}}}, {"lstm", {{5, 3}, {2}}},    {"downscale", {{1, 4, 4}, {1, 8, 8}}},
      {"transformer", {{6}, {6}, 11}}};
  constexpr double kLargest = 20;  // made here: the time that larger ones take
  const Json values = {-1, 0, 1, 2, 3, 8, 9, 16, 17, 0.5, 0.95, 0.96, 257, 1025, 1.5, 1e12, true, "a", nullptr, Json::array(), {0}, {1},
                       {2}, {3}, {3, 3}, {3, 5, 3}, {3, 4, 3}, {1.5}, {"a"}};
  for (const std::string& name : BuiltinModels()) {
    ASSERT_TRUE(forms.contains(name)) << name << ": give the form of its samples here";
    Json tried = MakeNetwork(name, Json::object(), forms.at(name), 0)->options();
    tried["optoin"] = 0;
    for (const auto& [option, unused] : tried.items()) {
      for (const Json& value : values) {
        Json options = name == "resnet18" ? Json{{"width", 4}} : Json::object();  // small, for the time
        options[option] = value;
        const std::string gateway =
            GatewaySays(Parse({"train.model={builtin: " + name + ", options: " + options.dump() + "}"}));
        if (gateway == "" && value.is_number() && value > kLargest) continue;
        std::string worker;
        try {
          MakeNetwork(name, options, forms.at(name), 0);
        } catch (const WorkerError& error) {
          worker = error.what();
        }
        const bool by_shapes = worker.starts_with("train.model.builtin") || worker.find("too few") != std::string::npos ||
                               worker.find("there are none") != std::string::npos || worker.find("does not fit") != std::string::npos;
        if (by_shapes) continue;
        EXPECT_EQ(worker == "", gateway == "") << name << " " << options << "\nworker: " << worker << "\ngateway: " << gateway;
        if (worker != "" && gateway != "") {
          EXPECT_THAT(gateway, StartsWith("train.model.options"));
          EXPECT_THAT(worker, StartsWith("train.model.options"));
        }
      }
    }
  }
}

}  // namespace
}  // namespace itwin::worker
