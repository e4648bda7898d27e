#include "agent/worker/model/torchscript_export.h"

#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/jit/serialization/export.h>
#include <torch/script.h>

#include <map>
#include <utility>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/data/array.h"
#include "agent/worker/error.h"
#include "agent/worker/model/torch_reason.h"

namespace itwin::worker {
namespace {

using torch::jit::Module;

// Graph and module run the same operators, but executors may fuse them.
constexpr double kRelative = 1e-4, kAbsolute = 1e-5;

// Makes the modules on the way to a name.
class Nest {
 public:
  explicit Nest(Module root) : unit_(root._ivalue()->compilation_unit()) {
    Prepare(root);
    modules_.emplace("", std::move(root));
  }

  Module& At(const std::string& path) {
    const auto found = modules_.find(path);
    if (found != modules_.end()) return found->second;
    const auto [parent, leaf] = Split(path);
    Module child("__torch__.itwin.Part" + std::to_string(++parts_), unit_);
    Prepare(child);
    At(parent).register_module(leaf, child);
    return modules_.emplace(path, child).first->second;
  }

  static std::pair<std::string, std::string> Split(const std::string& path) {
    const size_t dot = path.rfind('.');
    if (dot == std::string::npos) return {"", path};
    return {path.substr(0, dot), path.substr(dot + 1)};
  }

 private:
  // In evaluation mode, as Python's modules say it.
  static void Prepare(Module& module) { module.register_attribute("training", c10::BoolType::get(), false); }

  const std::shared_ptr<torch::jit::CompilationUnit> unit_;
  std::map<std::string, Module> modules_;
  int parts_ = 0;
};

// While it lives, tensors that were views of something larger have a storage of their own: what is
// written of a tensor is its storage.
class Compaction {
 public:
  void Add(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.storage().nbytes() <= tensor.nbytes()) return;
    held_.emplace_back(tensor, tensor.detach());
    tensor.set_data(tensor.detach().clone());
  }
  ~Compaction() {
    for (const auto& [tensor, held] : held_) tensor.set_data(held);
  }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> held_;
};

}  // namespace

Module ModuleWith(const NamedTensors& parameters, const NamedTensors& buffers) {
  Module root("__torch__.itwin.Model", std::make_shared<torch::jit::CompilationUnit>());
  Nest nest(root);
  for (const auto& [name, tensor] : parameters) {
    const auto [parent, leaf] = Nest::Split(name);
    nest.At(parent).register_parameter(leaf, tensor, /*is_buffer=*/false);
  }
  for (const auto& [name, tensor] : buffers) {
    const auto [parent, leaf] = Nest::Split(name);
    nest.At(parent).register_buffer(leaf, tensor);
  }
  return root;
}

void SetForward(Module& module, std::shared_ptr<torch::jit::Graph> graph) {
  module.type()->addMethod(module._ivalue()->compilation_unit()->create_function(
      c10::QualifiedName(*module.type()->name(), "forward"), std::move(graph)));
}

void RecordForward(Module& module, const std::function<at::Tensor(const at::Tensor&)>& predict,
                   const at::Tensor& sample) {
  const torch::NoGradGuard no_grad;
  const auto [state, outputs] = torch::jit::tracer::trace(
      {sample},
      [&predict](torch::jit::Stack inputs) {
        return torch::jit::Stack{predict(inputs[0].toTensor())};
      },
      [](const at::Tensor&) { return std::string(); }, /*strict=*/true, /*force_outplace=*/false,
      &module, {"input"});
  SetForward(module, state->graph);
}

void CheckForward(Module& module, const std::vector<c10::IValue>& inputs,
                  const std::vector<at::Tensor>& expected) {
  const torch::NoGradGuard no_grad;
  const c10::IValue result = module.forward(inputs);
  std::vector<at::Tensor> outputs;
  if (result.isTensor()) {
    outputs.push_back(result.toTensor());
  } else {
    for (const c10::IValue& element : result.toTupleRef().elements()) outputs.push_back(element.toTensor());
  }
  if (outputs.size() != expected.size()) throw AppError("it gives another number of outputs");
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].sizes() != expected[i].sizes()) {
      throw AppError("it gives " + ShapeText(outputs[i].sizes().vec()) + " where the model gives " +
                     ShapeText(expected[i].sizes().vec()));
    }
    if (!at::allclose(outputs[i].to(at::kDouble), expected[i].to(at::kDouble), kRelative, kAbsolute, /*equal_nan=*/true))
      throw AppError("it does not give what the model gives");
  }
}

void WriteTorchScript(Module& module, const std::filesystem::path& path) {
  const torch::NoGradGuard no_grad;
  Compaction compaction;
  for (const auto& parameter : module.named_parameters(true)) compaction.Add(parameter.value);
  for (const auto& buffer : module.named_buffers(true)) compaction.Add(buffer.value);
  OutputFile file(path);
  std::exception_ptr failure;
  try {
    // LibTorch hides why a write fails, so the writing is ours and the first failure is kept.
    torch::jit::ExportModule(module, [&](const void* data, size_t size) -> size_t {
      try {
        file.Write(data, size);
        return size;
      } catch (...) {
        failure = std::current_exception();
        return 0;
      }
    });
  } catch (const c10::Error&) {
    if (failure) std::rethrow_exception(failure);
    throw;
  }
  if (failure) std::rethrow_exception(failure);
  file.SyncAndClose();
}

std::string ExportTorchScript(Model& model, const Dataset& dataset, const std::filesystem::path& path) {
  std::shared_ptr<Module> module;
  try {
    model.Train(false);
    module = model.Script(dataset.Gather(Split::kTrain, {0, dataset.size(Split::kTrain) - 1, 0}));
  } catch (const std::exception& error) {
    return ReasonOf(error);
  }
  WriteTorchScript(*module, path);
  return "";
}

}  // namespace itwin::worker
