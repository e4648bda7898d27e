#include "agent/worker/checkpoint/state_dict.h"

#include <ATen/core/Dict.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include "agent/worker/checkpoint/durable_file.h"

namespace itwin::worker {

void WriteStateDict(const std::filesystem::path& path, const NamedTensors& tensors) {
  c10::Dict<std::string, at::Tensor> state;
  // Compact copies: what is a view of a large buffer would be stored with all of it.
  for (const auto& [name, tensor] : tensors) state.insert(name, tensor.detach().cpu().clone());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::IValue(state));
  WriteFileDurably(path, {bytes.data(), bytes.size()});
}

}  // namespace itwin::worker
