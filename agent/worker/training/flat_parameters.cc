#include "agent/worker/training/flat_parameters.h"

#include <cstring>
#include <set>

#include <ATen/ops/zeros.h>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr int64_t kAlignmentBytes = 64;  // vector loads and cache lines
constexpr auto kStatusElements = static_cast<int64_t>(StepStatus::kFigures);

int64_t RoundUp(int64_t elements, int64_t element_size) {
  const int64_t unit = kAlignmentBytes / element_size;
  return (elements + unit - 1) / unit * unit;
}

}  // namespace

FlatParameters::FlatParameters(const std::vector<std::pair<std::string, at::Tensor>>& named,
                               int64_t first_bytes, int64_t bucket_bytes, int parts) {
  std::set<const void*> seen;
  for (const auto& [name, tensor] : named) {
    if (!tensor.requires_grad() || !seen.insert(tensor.unsafeGetTensorImpl()).second) continue;
    if (tensor.scalar_type() != at::kFloat && tensor.scalar_type() != at::kDouble) {
      throw UserError("parameter " + name + " is of type " + c10::toString(tensor.scalar_type()) +
                      "; the worker trains float32 and float64 parameters");
    }
    parameters_.push_back({.name = name, .tensor = tensor});
  }
  if (parameters_.empty()) {
    throw UserError(
        "the model has no parameter that can be trained (a frozen TorchScript module has none: "
        "export it with "
        "torch.jit.script and without torch.jit.freeze)");
  }

  std::vector<int64_t> sizes;
  int64_t open = -1;  // bucket under way
  for (size_t i = parameters_.size(); i-- > 0;) {
    Parameter& p = parameters_[i];
    if (open < 0 || buckets_[open].type != p.tensor.scalar_type()) {
      open = static_cast<int64_t>(buckets_.size());
      buckets_.push_back({.type = p.tensor.scalar_type()});
      sizes.push_back(0);
    }
    const int64_t element = static_cast<int64_t>(p.tensor.element_size());
    p.bucket = static_cast<size_t>(open);
    p.offset = sizes[open];
    buckets_[open].parameters.push_back(i);
    sizes[open] += RoundUp(p.tensor.numel(), element);
    if (sizes[open] * element >= (open == 0 ? first_bytes : bucket_bytes)) open = -1;
  }
  for (size_t b = 0; b < buckets_.size(); ++b) {
    const at::Device device = parameters_[buckets_[b].parameters.front()].tensor.device();
    const auto options = at::TensorOptions().dtype(buckets_[b].type).device(device);
    const int64_t element = buckets_[b].type == at::kFloat ? 4 : 8;
    sizes[b] = parts * RoundUp((sizes[b] + parts - 1) / parts, element);
    buckets_[b].values = at::zeros({sizes[b]}, options);
    buckets_[b].gradients =
        at::zeros({sizes[b] + (b + 1 == buckets_.size() ? kStatusElements : 0)}, options);
  }
  for (size_t i = 0; i < parameters_.size(); ++i) {
    Parameter& p = parameters_[i];
    at::Tensor values = ViewOf(buckets_[p.bucket].values, i);
    values.copy_(p.tensor.detach());
    p.tensor.set_data(values);
    p.tensor.mutable_grad() = ViewOf(buckets_[p.bucket].gradients, i);
  }
}

at::Tensor FlatParameters::ViewOf(const at::Tensor& flat, size_t i) const {
  const Parameter& p = parameters_[i];
  return flat.narrow(0, p.offset, p.tensor.numel()).view(p.tensor.sizes());
}

void FlatParameters::WriteStatus(const StepStatus& status) {
  at::Tensor& flat = buckets_.back().gradients;
  late_ = status.on_device.defined();
  if (late_) {
    flat.narrow(0, flat.numel() - kStatusElements, kStatusElements).copy_(status.on_device);
    return;
  }
  const int64_t at = flat.numel() - kStatusElements;
  int64_t i = at;
  for (const double value : status.figures()) {
    if (flat.scalar_type() == at::kFloat) {
      flat.data_ptr<float>()[i++] = static_cast<float>(value);
    } else {
      flat.data_ptr<double>()[i++] = value;
    }
  }
}

StepStatus FlatParameters::ReadStatus() const {
  const at::Tensor& flat = buckets_.back().gradients;
  const int64_t at = flat.numel() - kStatusElements;
  if (late_) return {.on_device = flat.narrow(0, at, kStatusElements).to(at::kDouble, false, /*copy=*/true)};
  const auto value = [&](int64_t i) {
    return flat.scalar_type() == at::kFloat ? static_cast<double>(flat.data_ptr<float>()[at + i])
                                            : flat.data_ptr<double>()[at + i];
  };
  return StepStatus::Of({value(0), value(1), value(2), value(3)});
}

void FlatParameters::CheckGradientViews() const {
  for (const Parameter& p : parameters_) {
    const at::Tensor& flat = buckets_[p.bucket].gradients;
    const char* expected =
        static_cast<const char*>(flat.data_ptr()) + p.offset * flat.element_size();
    if (!p.tensor.grad().defined() || p.tensor.grad().data_ptr() != expected) {
      throw AppError(
          "the model replaced the gradient of parameter " + p.name +
          " (by zero_grad or an assignment to .grad); gradients are the worker's to clear");
    }
  }
}

void CopyFlat(const at::Tensor& to, const at::Tensor& from) {
  if (to.is_cpu() && from.is_cpu()) {
    std::memcpy(to.data_ptr(), from.data_ptr(), from.nbytes());
  } else {
    at::Tensor(to).copy_(from, /*non_blocking=*/true);
  }
}

void ClearFlat(const at::Tensor& flat) {
  if (flat.is_cpu()) {
    std::memset(flat.data_ptr(), 0, flat.nbytes());
  } else {
    at::Tensor(flat).zero_();
  }
}

}  // namespace itwin::worker
