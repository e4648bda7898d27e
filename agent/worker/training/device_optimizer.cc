#include "agent/worker/training/device_optimizer.h"

#include <cmath>
#include <type_traits>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/version.h>

#include "agent/worker/error.h"

// What LibTorch has on GPUs: _fused_adam_ since 1.13, _fused_adamw_ since 2.0, _fused_sgd_ since 2.3.
#define ITWIN_TORCH_FROM(major, minor) \
  (TORCH_VERSION_MAJOR > (major) || (TORCH_VERSION_MAJOR == (major) && TORCH_VERSION_MINOR >= (minor)))

namespace itwin::worker {
namespace {

// The step's number as the fused operators want it.
at::Tensor StepTensor(const DeviceRange& r, int64_t step) {
  return at::full({}, static_cast<double>(step), r.values.options().dtype(at::kFloat));
}

void Momentum(const DeviceRange& r, const at::Tensor& direction, double lr, double momentum,
              double dampening, bool nesterov, bool first) {
  if (momentum == 0) {
    at::Tensor(r.values).add_(direction, -lr);
    return;
  }
  at::Tensor buffer = r.state[0];
  if (first) {
    buffer.copy_(direction);
  } else {
    buffer.mul_(momentum).add_(direction, 1 - dampening);
  }
  at::Tensor(r.values).add_(nesterov ? direction.add(buffer, momentum) : buffer, -lr);
}

void Step(const Sgd& o, const DeviceRange& r, int64_t step, double factor) {
#if ITWIN_TORCH_FROM(2, 3)
  if (r.values.is_cuda()) {
    at::_fused_sgd_({r.values}, {r.gradients},
                    o.momentum == 0 ? at::TensorList() : at::TensorList(r.state), o.weight_decay,
                    o.momentum, o.lr * factor, o.dampening, o.nesterov, /*maximize=*/false,
                    /*is_first_step=*/step == 1);
    return;
  }
#endif
  if (o.weight_decay != 0) at::Tensor(r.gradients).add_(r.values, o.weight_decay);
  Momentum(r, r.gradients, o.lr * factor, o.momentum, o.dampening, o.nesterov, step == 1);
}

// The moments, and m̂ / (√v̂ + eps) of them in two factors: numerator, and what it is divided by.
struct Direction {
  at::Tensor denominator;
  double numerator;  // of the first moment
};
template <typename O>
Direction Moments(const O& o, const DeviceRange& r, int64_t step) {
  const auto t = static_cast<double>(step);
  at::Tensor(r.state[0]).mul_(o.beta1).add_(r.gradients, 1 - o.beta1);
  at::Tensor(r.state[1]).mul_(o.beta2).addcmul_(r.gradients, r.gradients, 1 - o.beta2);
  return {r.state[1].sqrt().div_(std::sqrt(1 - std::pow(o.beta2, t))).add_(o.eps),
          1 / (1 - std::pow(o.beta1, t))};
}

template <typename O>
void StepAdam(const O& o, const DeviceRange& r, int64_t step, double factor) {
  constexpr bool kDecoupled = std::is_same_v<O, AdamW>;
  const double lr = o.lr * factor;
  if (r.values.is_cuda()) {
    const at::Tensor t = StepTensor(r, step);
    if constexpr (!kDecoupled) {
      at::_fused_adam_({r.values}, {r.gradients}, {r.state[0]}, {r.state[1]}, {}, {t}, lr, o.beta1,
                       o.beta2, o.weight_decay, o.eps, /*amsgrad=*/false, /*maximize=*/false);
      return;
    }
#if ITWIN_TORCH_FROM(2, 0)
    at::_fused_adamw_({r.values}, {r.gradients}, {r.state[0]}, {r.state[1]}, {}, {t}, lr, o.beta1,
                      o.beta2, o.weight_decay, o.eps, /*amsgrad=*/false, /*maximize=*/false);
    return;
#endif
  }
  if (kDecoupled) {
    at::Tensor(r.values).mul_(1 - lr * o.weight_decay);
  } else if (o.weight_decay != 0) {
    at::Tensor(r.gradients).add_(r.values, o.weight_decay);
  }
  const Direction d = Moments(o, r, step);
  at::Tensor(r.values).addcdiv_(r.state[0], d.denominator, -lr * d.numerator);
}
void Step(const Adam& o, const DeviceRange& r, int64_t step, double factor) { StepAdam(o, r, step, factor); }
void Step(const AdamW& o, const DeviceRange& r, int64_t step, double factor) { StepAdam(o, r, step, factor); }

void Step(const RmsProp& o, const DeviceRange& r, int64_t, double factor) {
  if (o.weight_decay != 0) at::Tensor(r.gradients).add_(r.values, o.weight_decay);
  at::Tensor(r.state[0]).mul_(o.alpha).addcmul_(r.gradients, r.gradients, 1 - o.alpha);
  const at::Tensor root = r.state[0].sqrt().add_(o.eps);
  if (o.momentum == 0) {
    at::Tensor(r.values).addcdiv_(r.gradients, root, -o.lr * factor);
  } else {
    at::Tensor(r.state[1]).mul_(o.momentum).addcdiv_(r.gradients, root);
    at::Tensor(r.values).add_(r.state[1], -o.lr * factor);
  }
}

void Step(const Adagrad& o, const DeviceRange& r, int64_t step, double factor) {
  if (o.weight_decay != 0) at::Tensor(r.gradients).add_(r.values, o.weight_decay);
  at::Tensor(r.state[0]).addcmul_(r.gradients, r.gradients, 1);
  const double lr = o.lr * factor / (1 + static_cast<double>(step - 1) * o.lr_decay);
  at::Tensor(r.values).addcdiv_(r.gradients, r.state[0].sqrt().add_(o.eps), -lr);
}

// `ratio` where both lengths are above zero, else 1; on the device, so that nobody waits for it.
at::Tensor TrustOr1(const at::Tensor& length, const at::Tensor& pull, const at::Tensor& ratio) {
  return at::where(length.gt(0).logical_and(pull.gt(0)), ratio, at::ones_like(ratio));
}

void Step(const Lamb& o, const DeviceRange& r, int64_t step, double factor) {
  const Direction d = Moments(o, r, step);
  const at::Tensor u =
      r.state[0].mul(d.numerator).div_(d.denominator).add_(r.values, o.weight_decay);
  const at::Tensor length = r.values.norm(), along = u.norm();
  const at::Tensor trust = TrustOr1(length, along, length / along);
  at::Tensor(r.values).sub_(u.mul(trust.mul(o.lr * factor)));
}

void Step(const Lars& o, const DeviceRange& r, int64_t step, double factor) {
  at::Tensor d = r.gradients.add(r.values, o.weight_decay);
  if (r.dimensions > 1) {  // see StepMeasured in optimizer.cc
    const at::Tensor length = r.values.norm();
    const at::Tensor pull = r.gradients.norm().add(length, o.weight_decay);
    d.mul_(TrustOr1(length, pull, length.mul(o.trust) / pull));
  }
  Momentum(r, d, o.lr * factor, o.momentum, /*dampening=*/0, o.nesterov, step == 1);
}

template <typename O>
void Step(const O&, const DeviceRange&, int64_t, double) {
  throw UserError("train.optimizer: this optimizer does not work on GPUs; use sgd, adam, adamw, "
                  "rmsprop, adagrad, lamb or lars");
}

}  // namespace

void StepOnDevice(const OptimizerSpec& spec, const DeviceRange& range, int64_t step, double lr_factor,
                  double scale) {
  const at::NoGradGuard no_grad;
  if (scale != 1) at::Tensor(range.gradients).mul_(scale);
  std::visit([&](const auto& o) { Step(o, range, step, lr_factor); }, spec);
  at::Tensor(range.gradients).zero_();
}

}  // namespace itwin::worker
