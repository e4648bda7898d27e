#include "agent/worker/device/device_dataset.h"

namespace itwin::worker {
namespace {

at::Tensor ChannelsLast(const at::Tensor& tensor) {
  if (tensor.dim() == 4) return tensor.contiguous(at::MemoryFormat::ChannelsLast);
  if (tensor.dim() == 5) return tensor.contiguous(at::MemoryFormat::ChannelsLast3d);
  return tensor;
}

}  // namespace

DeviceDataset::DeviceDataset(const Dataset& host, at::Device device, bool channels_last)
    : host_(host),
      device_(device),
      channels_last_(channels_last),
      compute_(CurrentStream(device)),
      beside_(StreamBeside(device)) {}

Batch DeviceDataset::Gather(Split split, const std::vector<int64_t>& indices) const {
  Batch batch = host_.Gather(split, indices);
  const StreamScope scope(beside_);
  for (auto& [name, tensor] : batch) {
    if (WantsPinnedMemory(device_)) tensor = tensor.pin_memory();
    if (!device_.is_cpu()) tensor = tensor.to(device_, /*non_blocking=*/true);
    if (channels_last_) tensor = ChannelsLast(tensor);
    // Its memory may be used anew only when the computing is done with it.
    if (!device_.is_cpu()) tensor.record_stream(compute_);
  }
  StreamMark(beside_).Wait();
  return batch;
}

std::map<std::string, at::Tensor> DeviceDataset::BaselinePredictions(const Batch& batch) const {
  Batch on_host;
  for (const auto& [name, tensor] : batch) on_host[name] = tensor.to(at::kCPU).contiguous();
  std::map<std::string, at::Tensor> predictions = host_.BaselinePredictions(on_host);
  for (auto& [name, tensor] : predictions) tensor = tensor.to(device_);
  return predictions;
}

}  // namespace itwin::worker
