#include "agent/worker/training/precision.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/version.h>

#include "agent/worker/error.h"
#include "agent/worker/model/torch_reason.h"

namespace itwin::worker {
namespace {

at::ScalarType TypeOf(Precision precision) {
  return precision == Precision::kFloat16 ? at::kHalf : at::kBFloat16;
}

void SetAutocast(at::DeviceType device, bool on, at::ScalarType type) {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 4)
  at::autocast::set_autocast_enabled(device, on);
  if (on) at::autocast::set_autocast_dtype(device, type);
#else
  if (device == at::kCUDA) {
    at::autocast::set_enabled(on);
    if (on) at::autocast::set_autocast_gpu_dtype(type);
    return;
  }
  at::autocast::set_cpu_enabled(on);
  if (on) at::autocast::set_autocast_cpu_dtype(type);
#endif
}

}  // namespace

AutocastScope::AutocastScope(Precision precision, at::Device device)
    : on_(precision != Precision::kFloat32), device_(device.type()) {
  if (!on_) return;
  at::autocast::increment_nesting();
  SetAutocast(device_, true, TypeOf(precision));
}

AutocastScope::~AutocastScope() {
  if (!on_) return;
  SetAutocast(device_, false, at::kBFloat16);
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
}

void RequirePrecision(Precision precision, at::Device device) {
  if (precision == Precision::kFloat32) return;
  const std::string name = precision == Precision::kFloat16 ? "fp16" : "bf16";
  try {
    const at::TensorOptions there(device);
    const at::Tensor matrix = at::ones({8, 8}, there).requires_grad_(true);
    const at::Tensor kernel = at::ones({2, 2, 3, 3}, there).requires_grad_(true);
    at::Tensor sum;
    {
      const AutocastScope autocast(precision, device);
      sum = at::linear(at::ones({8, 8}, there), matrix).sum() +
            at::conv2d(at::ones({1, 2, 8, 8}, there), kernel).sum();
    }
    sum.to(at::kFloat).backward();
  } catch (const c10::Error& error) {
    throw UserError("train.precision: LibTorch " TORCH_VERSION " cannot train in " + name +
                    " on this " + (device.is_cpu() ? "processor" : "GPU") + " (" + FirstLineOf(error) + "); use " +
                    (precision != Precision::kFloat16 ? "fp32" : device.is_cpu() ? "bf16, fp32 or a GPU" : "bf16 or fp32"));
  }
}

}  // namespace itwin::worker
