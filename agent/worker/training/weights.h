// The model's state as a whole: hashing it, comparing it over ranks, copying it in.
#pragma once

#include <string>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/model/model.h"

namespace itwin::worker {

// SHA-256 over names, shapes and bytes of the parameters, in the order of the names.
std::string HashWeights(Model& model);
std::string HashTensors(const NamedTensors& tensors);
// The same of tensors that come one at a time, in the order of the names.
class WeightsHash {
 public:
  void Add(const std::string& name, const at::Tensor& tensor);
  std::string Hex() { return hash_.Hex(); }

 private:
  Sha256 hash_;
};

// Copies tensors into the model's parameters and buffers of the same names. Throws AppError when
// one is missing or does not fit; names that the model does not have are errors, too.
void LoadWeights(Model& model, const NamedTensors& tensors);
void LoadTensors(const NamedTensors& targets, const NamedTensors& tensors);

// Floating-point buffers (running statistics of batch norm) become their mean over the ranks,
// others rank 0's.
void AverageBuffers(Model& model, Communicator& communicator);

}  // namespace itwin::worker
