#include "agent/worker/training/step_status.h"

#include <cmath>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

namespace itwin::worker {

void StepStatus::MoveTo(at::Device device) {
  on_device = at::zeros({kFigures}, at::TensorOptions().dtype(at::kDouble).device(device));
  if (stop != 0) on_device.narrow(0, 2, 1).fill_(stop);
  if (trace != 0) on_device.narrow(0, 3, 1).fill_(trace);
}

void StepStatus::NoteLoss(const at::Tensor& mean, double weight) {
  if (on_device.defined()) {
    const at::NoGradGuard no_grad;
    const at::Tensor value = mean.detach().to(at::kDouble);
    on_device.narrow(0, 0, 2).add_(
        at::stack({value.mul(weight), value.isfinite().logical_not().to(at::kDouble)}));
    return;
  }
  const double value = mean.item<double>();
  loss += value * weight;
  if (!std::isfinite(value)) not_finite = 1;
}

}  // namespace itwin::worker
