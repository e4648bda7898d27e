#include "agent/worker/model/builtin_model.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/jit/api/module.h>

#include <optional>
#include <utility>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/model/loss.h"
#include "agent/worker/model/network.h"
#include "agent/worker/model/torchscript_export.h"

namespace itwin::worker {
namespace {

constexpr int64_t kEnsembleMembers = 8;

class BuiltinModel : public Model, public StagedModel {
 public:
  BuiltinModel(std::string name, SampleForm form, std::unique_ptr<Network> network, Loss loss,
               nlohmann::json preprocessing)
      : name_(std::move(name)),
        form_(std::move(form)),
        network_(std::move(network)),
        loss_(std::move(loss)),
        preprocessing_(std::move(preprocessing)) {}

  std::vector<std::pair<std::string, at::Tensor>> parameters() override {
    return network_->parameters();
  }
  std::vector<std::pair<std::string, at::Tensor>> buffers() override { return network_->buffers(); }

  StepOutput TrainingStep(const Batch& batch) override {
    return loss_(Forward(batch.at("input")), batch.at("target"), /*with_metrics=*/false);
  }
  StepOutput EvaluationStep(const Batch& batch) override {
    const at::NoGradGuard no_grad;
    return loss_(Forward(batch.at("input")), batch.at("target"));
  }
  at::Tensor Predict(const at::Tensor& input) override {
    const at::NoGradGuard no_grad;
    return Forward(input);
  }

  std::map<std::string, ParameterPart> parts() override { return network_->parts(); }
  StagedModel* staged() override { return this; }
  at::Tensor ForwardStage(const at::Tensor& input, int64_t) override { return network_->Forward(input); }
  StepOutput LossOf(const at::Tensor& output, const at::Tensor& target) override {
    return loss_(Predicted(output), target);
  }

  void Train(bool training) override { network_->Train(training); }

  void Save(const std::filesystem::path& dir) override {
    NamedTensors weights = parameters();
    for (auto& buffer : buffers()) weights.push_back(std::move(buffer));
    for (auto& [name, tensor] : weights) tensor = tensor.detach().to(at::kCPU);
    WriteSafetensors(dir / "weights.safetensors", weights, {{"format", "pt"}, {"builtin", name_}});
    const nlohmann::json description = {{"format", 1},
                                        {"builtin", name_},
                                        {"options", network_->options()},
                                        {"loss", loss_.name()},
                                        {"metrics", loss_.metrics()},
                                        {"input_shape", form_.input},
                                        {"target_shape", form_.target},
                                        {"classes", form_.classes}};
    WriteFileDurably(dir / "model.json", description.dump(2) + "\n");
    WriteFileDurably(dir / "preprocessing.json", preprocessing_.dump(2) + "\n");
  }

  std::shared_ptr<torch::jit::Module> Script(const Batch& samples) override {
    auto module = std::make_shared<torch::jit::Module>(ModuleWith(parameters(), buffers()));
    const at::Tensor& inputs = samples.at("input");
    RecordForward(*module, [this](const at::Tensor& input) { return Forward(input); },
                  inputs.narrow(0, 0, 2));
    CheckForward(*module, {inputs}, {Predict(inputs)});
    return module;
  }

  std::string description() override {
    int64_t elements = 0;
    for (const auto& [name, tensor] : parameters()) elements += tensor.numel();
    return name_ + ", " + std::to_string(elements) + " parameters";
  }

 private:
  at::Tensor Forward(const at::Tensor& input) { return Predicted(network_->Forward(input)); }
  // Some losses want logarithms of probabilities; networks put out scores.
  at::Tensor Predicted(const at::Tensor& output) const {
    return loss_.wants_log_probabilities() ? at::log_softmax(output, 1) : output;
  }

  const std::string name_;
  const SampleForm form_;
  const std::unique_ptr<Network> network_;
  const Loss loss_;
  const nlohmann::json preprocessing_;
};

}  // namespace

std::unique_ptr<Model> MakeBuiltinModel(const TrainSpec& spec, const Dataset& dataset,
                                        const MeshPlace& place) {
  const auto shapes = dataset.sample_shapes();
  const Loss loss(spec.loss, spec.metrics, spec.loss_options, spec.top_k);
  // Class numbers matter only to losses that read them as such: integers can also be regressed on.
  SampleForm form{shapes.at("input"), shapes.at("target"),
                  loss.classifies() ? dataset.classes() : 0};
  if (int64_t parts = loss.outputs_per_target(); parts != 1) {
    if (parts == 0) parts = kEnsembleMembers;
    if (form.target.empty()) form.target = {1};
    form.target[0] *= parts;  // the network puts out that many numbers for each of the target
  }
  auto network = MakeNetwork(spec.model.builtin, spec.model.options, form, spec.seed, place);
  return std::make_unique<BuiltinModel>(spec.model.builtin, form, std::move(network), loss,
                                        dataset.preprocessing());
}

}  // namespace itwin::worker
