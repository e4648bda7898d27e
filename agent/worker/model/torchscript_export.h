// A model's prediction as TorchScript, which C++ and Python run without the code that it was made
// from: a module in evaluation mode whose parameters and buffers have the model's names.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/model/model.h"

namespace torch::jit {
struct Graph;
struct Module;
}

namespace itwin::worker {

// Without methods. Modules are nested as the dots in the names say: "layers.0.weight".
torch::jit::Module ModuleWith(const NamedTensors& parameters, const NamedTensors& buffers);
// `graph`, which takes the module and the inputs, becomes its forward.
void SetForward(torch::jit::Module& module, std::shared_ptr<torch::jit::Graph> graph);

// Makes what `predict` does with `sample` [samples, …] the module's forward(input). Every use of the
// number of samples must go through operators; other tensors than the module's are constants.
void RecordForward(torch::jit::Module& module,
                   const std::function<at::Tensor(const at::Tensor&)>& predict,
                   const at::Tensor& sample);

// Throws what differs when forward(`inputs`), a tensor or a tuple of them, is not `expected`.
void CheckForward(torch::jit::Module& module, const std::vector<c10::IValue>& inputs,
                  const std::vector<at::Tensor>& expected);

// Tensors that are views are written without what lies around them. Throws ResourceError when the
// disk is full.
void WriteTorchScript(torch::jit::Module& module, const std::filesystem::path& path);

// Writes the model's Script(), tried out with some samples of `dataset`, to `path`. Returns "" or why
// there is none; then nothing is written. The model is in evaluation mode afterwards.
std::string ExportTorchScript(Model& model, const Dataset& dataset,
                              const std::filesystem::path& path);

}  // namespace itwin::worker
