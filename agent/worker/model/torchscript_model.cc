#include "agent/worker/model/torchscript_model.h"

#include <caffe2/serialize/file_adapter.h>
#include <caffe2/serialize/istream_adapter.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/script.h>
#include <torch/version.h>

#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <utility>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/error.h"
#include "agent/worker/model/loss.h"
#include "agent/worker/model/operators.h"
#include "agent/worker/model/torch_reason.h"
#include "agent/worker/model/torchscript_import.h"
#include "agent/worker/model/training_flags.h"

namespace itwin::worker {
namespace {

using caffe2::serialize::FileAdapter;
using caffe2::serialize::IStreamAdapter;

template <typename MakeReader>
torch::jit::Module Load(const MakeReader& reader, const std::string& field,
                        const std::string& file) {
  try {
    return ImportTorchScript(reader(), field);
  } catch (const WorkerError&) {
    throw;
  } catch (const std::exception& error) {
    const std::string reason = ReasonOf(error);
    constexpr std::string_view kUnknown = "Unknown builtin op: ";
    if (const size_t at = reason.find(kUnknown); at != std::string::npos) {
      std::string name = reason.substr(at + kUnknown.size());
      name = name.substr(0, name.find_first_of(" \n"));
      while (!name.empty() && name.back() == '.') name.pop_back();
      throw UserError(field + " uses the operator " + name +
                      ", which LibTorch " TORCH_VERSION
                      " of this site does not have; write it with older operators, or use a site "
                      "with a newer LibTorch");
    }
    throw UserError(field +
                    " is not a TorchScript module that can be loaded; write it by "
                    "torch.jit.script(model).save(\"" +
                    file + "\"). LibTorch says: " + reason);
  }
}

// The value of an operator's argument where it is fixed.
std::optional<torch::jit::IValue> FixedArgument(const torch::jit::Node* node, size_t index) {
  if (index >= node->inputs().size()) return std::nullopt;
  const torch::jit::Value* input = node->input(index);
  if (input->type()->kind() == c10::TypeKind::NoneType) return torch::jit::IValue();
  const auto value = torch::jit::toIValue(input);
  if (!value)
    return std::nullopt;  // said outright: an IValue can be made of LibTorch's own empty optional
  return *value;
}

// Whether an operator's training flag is a constant where it matters: it would not obey train() and
// eval().
bool HasFixedTrainingFlag(const torch::jit::Node* node) {
  const c10::FunctionSchema* schema = node->maybeSchema();
  if (schema == nullptr) return false;
  const std::optional<TrainingFlag> flag = FindTrainingFlag(*schema);
  if (!flag) return false;
  const auto value = FixedArgument(node, flag->argument);
  if (!value) return false;
  if (value->isDouble()) return value->toDouble() != flag->off.toDouble();
  if (flag->statistic) {
    const auto statistic = FixedArgument(node, *flag->statistic);
    return !statistic || !statistic->isNone();
  }
  const auto share = flag->share ? FixedArgument(node, *flag->share) : std::nullopt;
  return !share || !share->isDouble() || share->toDouble() != 0;
}

const torch::jit::Node* FindFixedTrainingFlag(const torch::jit::Block* block) {
  for (const torch::jit::Node* node : block->nodes()) {
    if (HasFixedTrainingFlag(node)) return node;
    for (const torch::jit::Block* inner : node->blocks()) {
      if (const torch::jit::Node* found = FindFixedTrainingFlag(inner)) return found;
    }
  }
  return nullptr;
}

void RefuseFixedTrainingFlags(const torch::jit::Module& module, const std::string& field) {
  for (const auto& method : module.get_methods()) {
    const auto graph = method.graph()->copy();
    torch::jit::Inline(*graph);
    if (const torch::jit::Node* node = FindFixedTrainingFlag(graph->block())) {
      const std::string name = node->kind().toUnqualString();
      throw UserError(
          field + ": " + name + " in \"" + method.name() +
          "\" has a fixed training flag, so it would behave the same in training and in "
          "evaluation. "
          "The module was traced (torch.jit.trace), or calls the function without "
          "training=self.training; export it with torch.jit.script and the module forms "
          "(nn.Dropout, nn.BatchNorm2d)");
    }
  }
}

bool TakesBatchGivesLossAndMetrics(const torch::jit::Method& method) {
  const c10::FunctionSchema& schema = method.function().getSchema();
  return schema.arguments().size() == 2 &&
         schema.arguments()[1].type()->str() == "Dict(str, Tensor)" &&
         schema.returns().size() == 1 &&
         schema.returns()[0].type()->str() == "(Tensor, Dict(str, Tensor))";
}

std::string SchemaText(const torch::jit::Method& method) {
  const c10::FunctionSchema& schema = method.function().getSchema();
  std::string text = "(self";
  for (size_t i = 1; i < schema.arguments().size(); ++i)
    text += ", " + schema.arguments()[i].type()->annotation_str();
  text += ") -> ";
  return text + (schema.returns().empty() ? "None" : schema.returns()[0].type()->annotation_str());
}

class TorchScriptModel : public Model {
 public:
  TorchScriptModel(std::string file, torch::jit::Module module, std::optional<Loss> loss,
                   nlohmann::json preprocessing)
      : file_(std::move(file)),
        module_(std::move(module)),
        loss_(std::move(loss)),
        preprocessing_(std::move(preprocessing)) {}

  std::vector<std::pair<std::string, at::Tensor>> parameters() override {
    return Distinct(module_.named_parameters(/*recurse=*/true), /*trainable_only=*/true);
  }
  std::vector<std::pair<std::string, at::Tensor>> buffers() override {
    auto buffers = Distinct(module_.named_buffers(/*recurse=*/true), false);
    std::erase_if(buffers, [](const auto& buffer) { return !buffer.second.defined(); });
    return buffers;
  }

  StepOutput TrainingStep(const Batch& batch) override { return Step("training_step", batch); }
  StepOutput PhaseStep(const std::string& method, const Batch& batch) override {
    return Step(method.c_str(), batch);
  }
  StepOutput EvaluationStep(const Batch& batch) override {
    const at::NoGradGuard no_grad;
    return Step(module_.find_method("evaluation_step") ? "evaluation_step" : "training_step",
                batch);
  }
  at::Tensor Predict(const at::Tensor& input) override {
    const at::NoGradGuard no_grad;
    return Forward(input);
  }

  void Train(bool training) override { module_.train(training); }
  void MoveTo(at::Device device) override { module_.to(device); }  // frozen parameters, too

  void Save(const std::filesystem::path& dir) override {
    NamedTensors weights;
    const auto add = [&](const std::string& name, const at::Tensor& tensor) {
      if (tensor.defined()) weights.emplace_back(name, tensor.detach().to(at::kCPU).contiguous());
    };
    for (const auto& parameter : module_.named_parameters(true)) add(parameter.name, parameter.value);
    for (const auto& buffer : module_.named_buffers(true)) add(buffer.name, buffer.value);
    WriteSafetensors(dir / "weights.safetensors", weights, {{"format", "pt"}});
    WriteFileDurably(dir / "preprocessing.json", preprocessing_.dump(2) + "\n");
  }
  // The user's own, with all its methods.
  std::shared_ptr<torch::jit::Module> Script(const Batch& /*samples*/) override {
    return std::make_shared<torch::jit::Module>(module_);
  }

  std::string description() override {
    int64_t elements = 0;
    for (const auto& [name, tensor] : parameters()) elements += tensor.numel();
    return file_ + " (TorchScript), " + std::to_string(elements) + " parameters";
  }

 private:
  // Tied tensors have several names; the first stands for all.
  template <typename List>
  static std::vector<std::pair<std::string, at::Tensor>> Distinct(const List& list,
                                                                  bool trainable_only) {
    std::vector<std::pair<std::string, at::Tensor>> pairs;
    std::set<const void*> seen;
    for (const auto& entry : list) {
      if (trainable_only && !entry.value.requires_grad()) continue;
      if (entry.value.defined() && !seen.insert(entry.value.unsafeGetTensorImpl()).second) continue;
      pairs.emplace_back(entry.name, entry.value);
    }
    return pairs;
  }

  at::Tensor Forward(const at::Tensor& input) {
    const torch::jit::IValue output = module_.forward({input});
    if (!output.isTensor()) {
      throw UserError("train.model.torchscript: forward(input) of " + file_ + " gives " +
                      output.tagKind() +
                      ", not a tensor; give the module a training_step that returns the loss");
    }
    return output.toTensor();
  }

  StepOutput Step(const char* method, const Batch& batch) {
    if (loss_) {
      return (*loss_)(Forward(batch.at("input")), batch.at("target"),
                      /*with_metrics=*/!at::GradMode::is_enabled());
    }
    c10::Dict<std::string, at::Tensor> arrays;
    for (const auto& [name, tensor] : batch) arrays.insert(name, tensor);
    const auto result = module_.get_method(method)({arrays}).toTuple();
    StepOutput output;
    output.loss = Scalar(result->elements()[0].toTensor(), method, "loss");
    for (const auto& entry : result->elements()[1].toGenericDict()) {
      const std::string name = entry.key().toStringRef();
      output.metrics[name] = Scalar(entry.value().toTensor().detach(), method, name);
    }
    return output;
  }

  at::Tensor Scalar(const at::Tensor& tensor, const char* method, const std::string& name) const {
    if (tensor.numel() != 1) {
      throw UserError("train.model.torchscript: " + std::string(method) + " of " + file_ +
                      " gives \"" + name + "\" with " + std::to_string(tensor.numel()) +
                      " elements; it must be one number, the mean over the batch's samples");
    }
    return tensor.dim() == 0 ? tensor : tensor.reshape({});
  }

  const std::string file_;
  torch::jit::Module module_;
  const std::optional<Loss> loss_;
  const nlohmann::json preprocessing_;
};

}  // namespace

namespace {

std::unique_ptr<Model> FromModule(const TrainSpec& spec, const Dataset& dataset,
                                  torch::jit::Module module, const std::string& file,
                                  const std::string& field) {
  if (spec.model.options.is_object() && !spec.model.options.empty()) {
    throw UserError(
        "train.model.options: are for built-in models; a TorchScript module brings its own");
  }
  CheckOperators(OperatorsOf(module), field);
  const auto parameters = module.parameters(true);
  if (parameters.size() == 0) {
    throw UserError(
        field +
        " has no parameters, so there is nothing to train; was it frozen (torch.jit.freeze)? "
        "Export it with torch.jit.script(model).save(…) alone");
  }
  bool trainable = false;
  for (const at::Tensor& parameter : parameters) trainable = trainable || parameter.requires_grad();
  if (!trainable) {
    throw UserError(field + ": no parameter requires a gradient, so there is nothing to train");
  }
  std::optional<Loss> loss;
  if (!spec.phases.empty()) {
    std::vector<std::string> methods = {"evaluation_step"};
    for (const PhaseSpec& phase : spec.phases) methods.push_back(phase.method);
    for (const std::string& name : methods) {
      const auto method = module.find_method(name);
      if (!method || !TakesBatchGivesLossAndMetrics(*method)) {
        throw UserError(field + (method ? ": " + name + " is " + SchemaText(*method) + "; it"
                                        : " has no method " + name + ", which the phases need; it") +
                        " must be (self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]], marked with "
                        "@torch.jit.export");
      }
    }
  } else if (const auto training_step = module.find_method("training_step")) {
    if (!spec.loss.empty() || !spec.metrics.empty()) {
      throw UserError(std::string("train.") + (spec.loss.empty() ? "metrics" : "loss") + ": " +
                      file +
                      " brings its own loss and metrics by its training_step; leave this out");
    }
    for (const char* name : {"training_step", "evaluation_step"}) {
      const auto method = module.find_method(name);
      if (method && !TakesBatchGivesLossAndMetrics(*method)) {
        throw UserError(field + ": " + name + " is " + SchemaText(*method) +
                        "; it must be (self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, "
                        "Tensor]], the loss "
                        "and the metrics");
      }
    }
  } else {
    if (!module.find_method("forward")) {
      throw UserError(
          field +
          " has neither a training_step nor a forward; mark training_step with @torch.jit.export");
    }
    const torch::jit::Method forward = module.get_method("forward");
    if (forward.function().getSchema().arguments().size() < 2) {
      throw UserError(field + ": forward is " + SchemaText(forward) + "; it must take the input");
    }
    if (spec.loss.empty()) {
      throw UserError("train.loss: is not given, and " + file +
                      " has no training_step of its own; name a loss, or mark training_step with "
                      "@torch.jit.export");
    }
    loss.emplace(spec.loss, spec.metrics, spec.loss_options, spec.top_k);
  }
  RefuseFixedTrainingFlags(module, field);
  return std::make_unique<TorchScriptModel>(file, std::move(module),
                                            std::move(loss), dataset.preprocessing());
}

}  // namespace

std::unique_ptr<Model> MakeTorchScriptModel(const TrainSpec& spec, const Dataset& dataset,
                                            const std::filesystem::path& work_dir) {
  // The optimising executor hands all gradients over at the very end of backward, and hangs in some
  // versions.
  torch::jit::getProfilingMode() = false;
  const std::filesystem::path path =
      ResolveFile(spec.model.torchscript, work_dir, "train.model.torchscript");
  const std::string file = path.filename().string(), field = "train.model.torchscript: " + file;
  return FromModule(spec, dataset,
                    Load([&] { return std::make_shared<FileAdapter>(path.string()); }, field, file),
                    file, field);
}

std::unique_ptr<Model> MakeTorchScriptModel(const TrainSpec& spec, const Dataset& dataset,
                                            const ModelArchive& archive) {
  torch::jit::getProfilingMode() = false;
  const std::string field = "train.model.archive: " + archive.file;
  std::istringstream bytes(archive.script);
  return FromModule(spec, dataset,
                    Load([&] { return std::make_shared<IStreamAdapter>(&bytes); }, field,
                         archive.file),
                    archive.file, field);
}

}  // namespace itwin::worker
