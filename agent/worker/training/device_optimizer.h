// One optimiser step over a flat range of a device, by LibTorch's own operators: its fused ones on GPUs
// where the version has them, else a few passes over the range. The formulas are those of
// optimizer_kernels.h, which is for memory of the host.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {

struct DeviceRange {
  at::Tensor values, gradients;  // flat views, equally long
  std::vector<at::Tensor> state;
  int64_t dimensions = 0;  // of the parameter, for LARS
};

// `step` is 1 for the first. The gradient is multiplied by `scale` first, and is zero afterwards.
// LAMB and LARS take the range for a whole parameter.
void StepOnDevice(const OptimizerSpec& spec, const DeviceRange& range, int64_t step, double lr_factor,
                  double scale);

}  // namespace itwin::worker
