#include "agent/worker/checkpoint/state_dict.h"

#include <ATen/core/Dict.h>
#include <ATen/core/ivalue.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/pickler.h>

#include <string>

#include "agent/worker/checkpoint/durable_file.h"

namespace itwin::worker {

void WriteStateDict(const std::filesystem::path& path, const NamedTensors& tensors) {
  c10::Dict<std::string, at::Tensor> state;
  // Compact copies: what is a view of a large buffer would be stored with all of it.
  for (const auto& [name, tensor] : tensors) state.insert(name, tensor.detach().cpu().clone());
  // As torch::jit::pickle_save, but without the types of containers: these call a function of
  // TorchScript's, which torch.load refuses from 2.6 on unless it is told to trust the file.
  std::string pickled;
  torch::jit::Pickler pickler([&](const char* data, size_t size) { pickled.append(data, size); },
                              nullptr, nullptr, nullptr, nullptr, /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(c10::IValue(state));
  pickler.stop();
  std::string bytes;
  caffe2::serialize::PyTorchStreamWriter writer([&](const void* data, size_t size) {
    bytes.append(static_cast<const char*>(data), size);
    return size;
  });
  size_t number = 0;
  for (const at::Tensor& tensor : pickler.tensorData()) {
    const torch::jit::WriteableTensorData data = torch::jit::getWriteableTensorData(tensor);
    writer.writeRecord("data/" + std::to_string(number++), data.data(), data.sizeInBytes());
  }
  writer.writeRecord("data.pkl", pickled.data(), pickled.size());
  writer.writeEndOfFile();
  WriteFileDurably(path, bytes);
}

}  // namespace itwin::worker
