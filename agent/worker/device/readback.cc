#include "agent/worker/device/readback.h"

#include <ATen/ops/empty.h>

namespace itwin::worker {

Readback::Readback(at::Device device) : device_(device), beside_(StreamBeside(device)) {}

void Readback::Start(const at::Tensor& figures) {
  // Its own copy: the caller's tensor may be part of what the next step overwrites.
  figures_ = figures.detach().to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  if (!host_.defined() || host_.numel() != figures_.numel()) {
    host_ = at::empty(figures_.sizes(), at::TensorOptions().dtype(at::kDouble).pinned_memory(WantsPinnedMemory(device_)));
  }
  StreamMark(CurrentStream(device_)).HoldBack(beside_);
  const StreamScope scope(beside_);
  host_.copy_(figures_, /*non_blocking=*/true);
  mark_.emplace(beside_);
}

std::vector<double> Readback::Take(const std::function<void()>& meanwhile) {
  mark_->Wait(meanwhile);
  mark_.reset();
  figures_.reset();
  const double* values = host_.data_ptr<double>();
  return {values, values + host_.numel()};
}

}  // namespace itwin::worker
