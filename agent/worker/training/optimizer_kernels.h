// One optimiser step over a flat range: reads each value once, updates it, and clears the gradient
// for the next step. The formulas are PyTorch's; `gradient_scale` is applied first (gradient
// clipping).
#pragma once

#include <cstdint>

namespace itwin::worker::kernels {

struct SgdArguments {
  double lr, momentum, dampening, weight_decay;
  bool nesterov;
  bool first_step;  // the momentum buffer starts as the gradient itself
};
struct AdamArguments {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;  // AdamW
  int64_t step;    // 1 for the first
};
struct RmsPropArguments {
  double lr, alpha, eps, weight_decay, momentum;
};

// `momentum` may be null when the argument is 0.
void Sgd(float* p, float* g, float* momentum, int64_t n, double gradient_scale,
         const SgdArguments& a);
void Sgd(double* p, double* g, double* momentum, int64_t n, double gradient_scale,
         const SgdArguments& a);
void Adam(float* p, float* g, float* m, float* v, int64_t n, double gradient_scale,
          const AdamArguments& a);
void Adam(double* p, double* g, double* m, double* v, int64_t n, double gradient_scale,
          const AdamArguments& a);
// `momentum` may be null when the argument is 0.
void RmsProp(float* p, float* g, float* v, float* momentum, int64_t n, double gradient_scale,
             const RmsPropArguments& a);
void RmsProp(double* p, double* g, double* v, double* momentum, int64_t n, double gradient_scale,
             const RmsPropArguments& a);

struct AdagradArguments {
  double lr, lr_decay, eps, weight_decay;
  int64_t step;  // 1 for the first
};
void Adagrad(float* p, float* g, float* sum, int64_t n, double gradient_scale,
             const AdagradArguments& a);
void Adagrad(double* p, double* g, double* sum, int64_t n, double gradient_scale,
             const AdagradArguments& a);

// LAMB in two passes, between which the lengths of whole parameters are known. The first replaces
// the gradient by Adam's direction (with decoupled weight decay).
void LambDirection(float* p, float* g, float* m, float* v, int64_t n, double gradient_scale,
                   const AdamArguments& a);
void LambDirection(double* p, double* g, double* m, double* v, int64_t n, double gradient_scale,
                   const AdamArguments& a);
// p -= rate * g, g = 0.
void Descend(float* p, float* g, int64_t n, double rate);
void Descend(double* p, double* g, int64_t n, double rate);

// Limits each element to [-limit, limit] after it was multiplied by `scale`.
void ScaleAndClamp(float* g, int64_t n, double scale, double limit);
void ScaleAndClamp(double* g, int64_t n, double scale, double limit);

// Sum of squares, in double and in a fixed order.
double SumOfSquares(const float* g, int64_t n);
double SumOfSquares(const double* g, int64_t n);
// Sums in double, in a fixed order.
double Dot(const float* a, const float* b, int64_t n);
double Dot(const double* a, const double* b, int64_t n);
double SumOfAbsolutes(const float* p, int64_t n);
double SumOfAbsolutes(const double* p, int64_t n);
// p += factor * d.
void AddScaled(float* p, const float* d, int64_t n, double factor);
void AddScaled(double* p, const double* d, int64_t n, double factor);
// Whether every value is finite.
bool AllFinite(const float* p, int64_t n);
bool AllFinite(const double* p, int64_t n);

}  // namespace itwin::worker::kernels
