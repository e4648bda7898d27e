#include "agent/worker/model/graph_model.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/jit/api/module.h>

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/error.h"
#include "agent/worker/model/graph.h"
#include "agent/worker/model/loss.h"
#include "agent/worker/model/torchscript_export.h"

namespace itwin::worker {
namespace {

std::vector<std::pair<std::string, at::Tensor>> Trainable(const Graph& graph) {
  std::vector<std::pair<std::string, at::Tensor>> trainable;
  for (const auto& parameter : graph.parameters()) {
    if (parameter.second.requires_grad()) trainable.push_back(parameter);
  }
  return trainable;
}

class GraphModel : public Model {
 public:
  GraphModel(std::string file, nlohmann::json json, std::unique_ptr<Graph> graph,
             std::optional<Loss> loss, nlohmann::json preprocessing)
      : file_(std::move(file)),
        json_(std::move(json)),
        graph_(std::move(graph)),
        loss_(std::move(loss)),
        preprocessing_(std::move(preprocessing)) {}

  std::vector<std::pair<std::string, at::Tensor>> parameters() override { return Trainable(*graph_); }
  std::vector<std::pair<std::string, at::Tensor>> buffers() override { return graph_->buffers(); }

  StepOutput TrainingStep(const Batch& batch) override { return Step(batch, /*with_metrics=*/false); }
  StepOutput EvaluationStep(const Batch& batch) override {
    const at::NoGradGuard no_grad;
    return Step(batch, /*with_metrics=*/true);
  }
  at::Tensor Predict(const at::Tensor& input) override {
    const at::NoGradGuard no_grad;
    if (!loss_) {
      throw UserError("train.model.archive: " + file_ +
                      " gives a loss, not predictions; export the module with a named loss");
    }
    return graph_->Run({{graph_->inputs()[0], input}})[0];
  }
  void Train(bool training) override { graph_->Train(training); }
  void MoveTo(at::Device device) override { graph_->MoveTo(device); }

  void Save(const std::filesystem::path& dir) override {
    NamedTensors weights;
    for (const auto& [name, tensor] : graph_->parameters())
      weights.emplace_back(name, tensor.detach().to(at::kCPU).contiguous());
    for (const auto& [name, tensor] : graph_->buffers())
      weights.emplace_back(name, tensor.detach().to(at::kCPU).contiguous());
    WriteSafetensors(dir / "weights.safetensors", weights, {{"format", "pt"}});
    WriteFileDurably(dir / "graph.json", json_.dump() + "\n");
    WriteFileDurably(dir / "preprocessing.json", preprocessing_.dump(2) + "\n");
  }

  std::shared_ptr<torch::jit::Module> Script(const Batch& samples) override {
    auto module = std::make_shared<torch::jit::Module>(graph_->Script());
    for (const int64_t count : {int64_t{2}, samples.begin()->second.size(0)}) {
      Batch batch;
      std::vector<c10::IValue> inputs;
      for (const std::string& name : graph_->inputs()) {
        batch[name] = samples.at(name).narrow(0, 0, count);
        inputs.emplace_back(batch[name]);
      }
      const at::NoGradGuard no_grad;
      CheckForward(*module, inputs, graph_->Run(batch));
    }
    return module;
  }

  std::string description() override {
    int64_t elements = 0;
    for (const auto& [name, tensor] : parameters()) elements += tensor.numel();
    return file_ + " (exported graph), " + std::to_string(elements) + " parameters";
  }

 private:
  StepOutput Step(const Batch& batch, bool with_metrics) {
    std::vector<at::Tensor> outputs = graph_->Run(batch);
    if (loss_) return (*loss_)(outputs[0], batch.at("target"), with_metrics);
    StepOutput step{.loss = Scalar(outputs[0], "loss"), .metrics = {}};
    for (size_t i = 1; with_metrics && i < outputs.size(); ++i) {
      step.metrics[graph_->outputs()[i]] = Scalar(outputs[i].detach(), graph_->outputs()[i]);
    }
    return step;
  }
  at::Tensor Scalar(const at::Tensor& tensor, const std::string& name) const {
    if (tensor.numel() != 1) {
      throw UserError("train.model.archive: " + file_ + " gives \"" + name + "\" with " +
                      std::to_string(tensor.numel()) +
                      " elements; it must be one number, the mean over the batch's samples");
    }
    return tensor.dim() == 0 ? tensor : tensor.reshape({});
  }

  const std::string file_;
  const nlohmann::json json_;
  const std::unique_ptr<Graph> graph_;
  const std::optional<Loss> loss_;
  const nlohmann::json preprocessing_;
};

// The layers of a pipeline's stage.
class GraphStage : public Model, public StagedModel {
 public:
  GraphStage(std::string name, std::unique_ptr<Graph> graph, GraphUnit unit, Loss loss)
      : name_(std::move(name)), graph_(std::move(graph)), unit_(std::move(unit)), loss_(std::move(loss)) {
    graph_->KeepOnly(unit_);
  }

  std::vector<std::pair<std::string, at::Tensor>> parameters() override { return Trainable(*graph_); }
  std::vector<std::pair<std::string, at::Tensor>> buffers() override { return {}; }
  void Train(bool training) override { graph_->Train(training); }
  std::string description() override {
    return name_ + " (exported graph), " + std::to_string(unit_.elements) + " parameters";
  }
  StagedModel* staged() override { return this; }
  at::Tensor ForwardStage(const at::Tensor& input, int64_t samples) override {
    return graph_->RunUnit(unit_, input, samples);
  }
  StepOutput LossOf(const at::Tensor& output, const at::Tensor& target) override {
    return loss_(output, target, /*with_metrics=*/!at::GradMode::is_enabled());
  }

  StepOutput TrainingStep(const Batch&) override { throw NotWhole(); }
  StepOutput EvaluationStep(const Batch&) override { throw NotWhole(); }
  at::Tensor Predict(const at::Tensor&) override { throw NotWhole(); }
  void Save(const std::filesystem::path&) override { throw NotWhole(); }

 private:
  WorkerError NotWhole() const { return AppError("a stage of " + name_ + " is not run as a whole model"); }

  const std::string name_;
  const std::unique_ptr<Graph> graph_;
  const GraphUnit unit_;
  const Loss loss_;
};

}  // namespace

std::unique_ptr<Model> MakeGraphModel(const TrainSpec& spec, const Dataset& dataset,
                                      const ModelArchive& archive) {
  const std::string field = "train.model.archive: " + archive.file;
  auto graph = std::make_unique<Graph>(archive.graph, archive.weights, field);
  if (Trainable(*graph).empty()) throw UserError(field + ": no parameter requires a gradient, so there is nothing to train");
  std::optional<Loss> loss;
  if (graph->outputs()[0] == "loss") {
    if (!spec.loss.empty() || !spec.metrics.empty()) {
      throw UserError(std::string("train.") + (spec.loss.empty() ? "metrics" : "loss") + ": " +
                      archive.file + " brings its own loss and metrics; leave this out");
    }
  } else {
    if (spec.loss.empty()) {
      throw UserError("train.loss: is not given, and " + archive.file +
                      " gives predictions, no loss of its own; name a loss");
    }
    loss.emplace(spec.loss, spec.metrics, spec.loss_options, spec.top_k);
  }
  return std::make_unique<GraphModel>(archive.file, archive.graph, std::move(graph), std::move(loss),
                                      dataset.preprocessing());
}

std::unique_ptr<Model> MakeGraphStage(const TrainSpec& spec, const ModelArchive& archive, int stage, int stages) {
  const std::string field = "train.model.archive: " + archive.file;
  auto graph = std::make_unique<Graph>(archive.graph, archive.weights, field);
  const auto refuse = [&](const std::string& why) {
    return UserError(field + " cannot be cut into the stages of a pipeline: " + why + "; use ddp or zero1, zero2, zero3");
  };
  if (graph->outputs()[0] == "loss" || graph->inputs().size() != 1 || graph->outputs().size() != 1)
    throw refuse("it must have one input and give the prediction alone (export it with a named loss)");
  if (spec.loss.empty()) throw UserError("train.loss: is not given; name a loss");
  if (!graph->buffers().empty())
    throw refuse("it has buffers (" + graph->buffers()[0].first + "), which stages do not exchange");
  std::vector<GraphUnit> units = graph->Units(stages);
  if (static_cast<int>(units.size()) < stages) {
    throw refuse("there are places for " + std::to_string(units.size()) + " stages, where a single tensor goes from one to the next, and " +
                 std::to_string(stages) + " are wanted");
  }
  std::set<std::string> seen;
  for (const GraphUnit& unit : units) {
    bool trainable = false;
    for (const auto& [name, tensor] : Trainable(*graph))
      trainable = trainable || std::find(unit.parameters.begin(), unit.parameters.end(), name) != unit.parameters.end();
    if (!trainable) throw refuse("a stage would have nothing to train");
    for (const std::string& name : unit.parameters) {
      if (!seen.insert(name).second) throw refuse("two stages would use " + name);
    }
  }
  return std::make_unique<GraphStage>(archive.file, std::move(graph), std::move(units[static_cast<size_t>(stage)]),
                                      Loss(spec.loss, spec.metrics, spec.loss_options, spec.top_k));
}

}  // namespace itwin::worker
