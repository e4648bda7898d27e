// Mixed precision: forward and loss under LibTorch's autocast, which picks the operators that run in
// the 16-bit type; weights, gradients and optimiser stay as they are. The differences between
// LibTorch's versions are in precision.cc.
#pragma once

#include <c10/core/Device.h>

#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {

// Throws UserError when this LibTorch cannot compute in that precision on this machine: tried with a
// product, a convolution and their gradients.
void RequirePrecision(Precision precision, at::Device device = at::kCPU);

// Autocast while it lives, on this thread; nothing for fp32. Casts of weights are kept within one
// scope only, so an optimiser step in between is seen.
class AutocastScope {
 public:
  explicit AutocastScope(Precision precision, at::Device device = at::kCPU);
  ~AutocastScope();
  AutocastScope(const AutocastScope&) = delete;
  AutocastScope& operator=(const AutocastScope&) = delete;

 private:
  const bool on_;
  const at::DeviceType device_;
};

}  // namespace itwin::worker
