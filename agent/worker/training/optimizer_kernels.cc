// Compiled with -O3 -fno-math-errno (so that sqrt is vectorised) and -ffp-contract=off: the
// versions for different processors then give the same bits, which ranks on mixed nodes need.
#include "agent/worker/training/optimizer_kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>

// One version of a function per kind of processor; the loader picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define ITWIN_VECTORISED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ITWIN_VECTORISED
#endif
#define ITWIN_INLINE inline __attribute__((always_inline))

namespace itwin::worker::kernels {
namespace {

template <typename T>
ITWIN_INLINE void SgdLoop(T* __restrict p, T* __restrict g, T* __restrict buffer, int64_t n,
                          double scale, const SgdArguments& a) {
  const T s = static_cast<T>(scale), lr = static_cast<T>(a.lr),
          decay = static_cast<T>(a.weight_decay);
  if (a.momentum == 0) {
    for (int64_t i = 0; i < n; ++i) {
      const T d = g[i] * s + decay * p[i];
      p[i] -= lr * d;
      g[i] = 0;
    }
    return;
  }
  // The first step's buffer is the gradient: 0 * buffer + 1 * gradient.
  const T keep = a.first_step ? T(0) : static_cast<T>(a.momentum);
  const T take = a.first_step ? T(1) : static_cast<T>(1 - a.dampening);
  const T ahead = static_cast<T>(a.momentum);
  if (a.nesterov) {
    for (int64_t i = 0; i < n; ++i) {
      const T d = g[i] * s + decay * p[i];
      const T b = keep * buffer[i] + take * d;
      buffer[i] = b;
      p[i] -= lr * (d + ahead * b);
      g[i] = 0;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const T d = g[i] * s + decay * p[i];
      const T b = keep * buffer[i] + take * d;
      buffer[i] = b;
      p[i] -= lr * b;
      g[i] = 0;
    }
  }
}

template <typename T>
ITWIN_INLINE void AdamLoop(T* __restrict p, T* __restrict g, T* __restrict m, T* __restrict v,
                           int64_t n, double scale, const AdamArguments& a) {
  const double correction1 = 1 - std::pow(a.beta1, static_cast<double>(a.step));
  const double correction2 = 1 - std::pow(a.beta2, static_cast<double>(a.step));
  const T s = static_cast<T>(scale), eps = static_cast<T>(a.eps);
  const T beta1 = static_cast<T>(a.beta1), take1 = static_cast<T>(1 - a.beta1);
  const T beta2 = static_cast<T>(a.beta2), take2 = static_cast<T>(1 - a.beta2);
  const T step_size = static_cast<T>(a.lr / correction1);
  const T root2 = static_cast<T>(std::sqrt(correction2));
  // Coupled decay joins the gradient; decoupled decay shrinks the parameter.
  const T decay = a.decoupled ? T(0) : static_cast<T>(a.weight_decay);
  const T shrink = a.decoupled ? static_cast<T>(1 - a.lr * a.weight_decay) : T(1);
  for (int64_t i = 0; i < n; ++i) {
    const T d = g[i] * s + decay * p[i];
    const T mi = beta1 * m[i] + take1 * d;
    const T vi = beta2 * v[i] + take2 * d * d;
    m[i] = mi;
    v[i] = vi;
    p[i] = p[i] * shrink - step_size * (mi / (std::sqrt(vi) / root2 + eps));
    g[i] = 0;
  }
}

template <typename T>
ITWIN_INLINE void RmsPropLoop(T* __restrict p, T* __restrict g, T* __restrict v,
                              T* __restrict buffer, int64_t n, double scale,
                              const RmsPropArguments& a) {
  const T s = static_cast<T>(scale), lr = static_cast<T>(a.lr),
          decay = static_cast<T>(a.weight_decay);
  const T alpha = static_cast<T>(a.alpha), take = static_cast<T>(1 - a.alpha),
          eps = static_cast<T>(a.eps);
  if (a.momentum == 0) {
    for (int64_t i = 0; i < n; ++i) {
      const T d = g[i] * s + decay * p[i];
      const T vi = alpha * v[i] + take * d * d;
      v[i] = vi;
      p[i] -= lr * (d / (std::sqrt(vi) + eps));
      g[i] = 0;
    }
    return;
  }
  const T momentum = static_cast<T>(a.momentum);
  for (int64_t i = 0; i < n; ++i) {
    const T d = g[i] * s + decay * p[i];
    const T vi = alpha * v[i] + take * d * d;
    v[i] = vi;
    const T b = momentum * buffer[i] + d / (std::sqrt(vi) + eps);
    buffer[i] = b;
    p[i] -= lr * b;
    g[i] = 0;
  }
}

template <typename T>
ITWIN_INLINE void AdagradLoop(T* __restrict p, T* __restrict g, T* __restrict sum, int64_t n,
                              double scale, const AdagradArguments& a) {
  const T s = static_cast<T>(scale), decay = static_cast<T>(a.weight_decay),
          eps = static_cast<T>(a.eps);
  const T lr = static_cast<T>(a.lr / (1 + static_cast<double>(a.step - 1) * a.lr_decay));
  for (int64_t i = 0; i < n; ++i) {
    const T d = g[i] * s + decay * p[i];
    const T squares = sum[i] + d * d;
    sum[i] = squares;
    p[i] -= lr * (d / (std::sqrt(squares) + eps));
    g[i] = 0;
  }
}

template <typename T>
ITWIN_INLINE void LambDirectionLoop(T* __restrict p, T* __restrict g, T* __restrict m,
                                    T* __restrict v, int64_t n, double scale,
                                    const AdamArguments& a) {
  const double correction1 = 1 - std::pow(a.beta1, static_cast<double>(a.step));
  const double correction2 = 1 - std::pow(a.beta2, static_cast<double>(a.step));
  const T s = static_cast<T>(scale), eps = static_cast<T>(a.eps),
          decay = static_cast<T>(a.weight_decay);
  const T beta1 = static_cast<T>(a.beta1), take1 = static_cast<T>(1 - a.beta1);
  const T beta2 = static_cast<T>(a.beta2), take2 = static_cast<T>(1 - a.beta2);
  const T unbias1 = static_cast<T>(1 / correction1);
  const T root2 = static_cast<T>(std::sqrt(correction2));
  for (int64_t i = 0; i < n; ++i) {
    const T d = g[i] * s;
    const T mi = beta1 * m[i] + take1 * d;
    const T vi = beta2 * v[i] + take2 * d * d;
    m[i] = mi;
    v[i] = vi;
    g[i] = mi * unbias1 / (std::sqrt(vi) / root2 + eps) + decay * p[i];
  }
}

template <typename T>
ITWIN_INLINE void DescendLoop(T* __restrict p, T* __restrict g, int64_t n, double rate) {
  const T r = static_cast<T>(rate);
  for (int64_t i = 0; i < n; ++i) {
    p[i] -= r * g[i];
    g[i] = 0;
  }
}

template <typename T>
ITWIN_INLINE void ScaleAndClampLoop(T* g, int64_t n, double scale, double limit) {
  const T s = static_cast<T>(scale), high = static_cast<T>(limit), low = -high;
  for (int64_t i = 0; i < n; ++i) {
    const T d = g[i] * s;
    g[i] = d > high ? high : d < low ? low : d;  // NaN stays
  }
}

// Eight sums of term(i), so that the order of additions is fixed and still fits vector registers.
template <typename Term>
ITWIN_INLINE double Sum(int64_t n, Term term) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int k = 0; k < 8; ++k) sums[k] += term(i + k);
  }
  for (int k = 0; i < n; ++i, ++k) sums[k] += term(i);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <typename T>
ITWIN_INLINE double DotLoop(const T* a, const T* b, int64_t n) {
  return Sum(n, [=](int64_t i) __attribute__((always_inline)) { return static_cast<double>(a[i]) * static_cast<double>(b[i]); });
}

template <typename T>
ITWIN_INLINE double SumOfAbsolutesLoop(const T* p, int64_t n) {
  return Sum(n, [=](int64_t i) __attribute__((always_inline)) { return std::abs(static_cast<double>(p[i])); });
}

template <typename T>
ITWIN_INLINE void AddScaledLoop(T* __restrict p, const T* __restrict d, int64_t n, double factor) {
  const T f = static_cast<T>(factor);
  for (int64_t i = 0; i < n; ++i) p[i] += f * d[i];
}

template <typename T>
ITWIN_INLINE bool AllFiniteLoop(const T* p, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits kExponent =
      sizeof(T) == 4 ? Bits{0x7f800000u} : static_cast<Bits>(0x7ff0000000000000ull);
  Bits bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, p + i, sizeof(bits));
    bad |= static_cast<Bits>((bits & kExponent) == kExponent);
  }
  return bad == 0;
}

}  // namespace

ITWIN_VECTORISED void Sgd(float* p, float* g, float* b, int64_t n, double s,
                          const SgdArguments& a) {
  SgdLoop(p, g, b, n, s, a);
}
ITWIN_VECTORISED void Sgd(double* p, double* g, double* b, int64_t n, double s,
                          const SgdArguments& a) {
  SgdLoop(p, g, b, n, s, a);
}
ITWIN_VECTORISED void Adam(float* p, float* g, float* m, float* v, int64_t n, double s,
                           const AdamArguments& a) {
  AdamLoop(p, g, m, v, n, s, a);
}
ITWIN_VECTORISED void Adam(double* p, double* g, double* m, double* v, int64_t n, double s,
                           const AdamArguments& a) {
  AdamLoop(p, g, m, v, n, s, a);
}
ITWIN_VECTORISED void RmsProp(float* p, float* g, float* v, float* b, int64_t n, double s,
                              const RmsPropArguments& a) {
  RmsPropLoop(p, g, v, b, n, s, a);
}
ITWIN_VECTORISED void RmsProp(double* p, double* g, double* v, double* b, int64_t n, double s,
                              const RmsPropArguments& a) {
  RmsPropLoop(p, g, v, b, n, s, a);
}
ITWIN_VECTORISED double SumOfSquares(const float* g, int64_t n) { return DotLoop(g, g, n); }
ITWIN_VECTORISED double SumOfSquares(const double* g, int64_t n) { return DotLoop(g, g, n); }
ITWIN_VECTORISED double Dot(const float* a, const float* b, int64_t n) { return DotLoop(a, b, n); }
ITWIN_VECTORISED double Dot(const double* a, const double* b, int64_t n) { return DotLoop(a, b, n); }
ITWIN_VECTORISED double SumOfAbsolutes(const float* p, int64_t n) { return SumOfAbsolutesLoop(p, n); }
ITWIN_VECTORISED double SumOfAbsolutes(const double* p, int64_t n) { return SumOfAbsolutesLoop(p, n); }
ITWIN_VECTORISED void AddScaled(float* p, const float* d, int64_t n, double factor) {
  AddScaledLoop(p, d, n, factor);
}
ITWIN_VECTORISED void AddScaled(double* p, const double* d, int64_t n, double factor) {
  AddScaledLoop(p, d, n, factor);
}
ITWIN_VECTORISED bool AllFinite(const float* p, int64_t n) { return AllFiniteLoop(p, n); }
ITWIN_VECTORISED bool AllFinite(const double* p, int64_t n) { return AllFiniteLoop(p, n); }

ITWIN_VECTORISED void Adagrad(float* p, float* g, float* sum, int64_t n, double s,
                              const AdagradArguments& a) {
  AdagradLoop(p, g, sum, n, s, a);
}
ITWIN_VECTORISED void Adagrad(double* p, double* g, double* sum, int64_t n, double s,
                              const AdagradArguments& a) {
  AdagradLoop(p, g, sum, n, s, a);
}
ITWIN_VECTORISED void LambDirection(float* p, float* g, float* m, float* v, int64_t n, double s,
                                    const AdamArguments& a) {
  LambDirectionLoop(p, g, m, v, n, s, a);
}
ITWIN_VECTORISED void LambDirection(double* p, double* g, double* m, double* v, int64_t n,
                                    double s, const AdamArguments& a) {
  LambDirectionLoop(p, g, m, v, n, s, a);
}
ITWIN_VECTORISED void Descend(float* p, float* g, int64_t n, double rate) {
  DescendLoop(p, g, n, rate);
}
ITWIN_VECTORISED void Descend(double* p, double* g, int64_t n, double rate) {
  DescendLoop(p, g, n, rate);
}
ITWIN_VECTORISED void ScaleAndClamp(float* g, int64_t n, double scale, double limit) {
  ScaleAndClampLoop(g, n, scale, limit);
}
ITWIN_VECTORISED void ScaleAndClamp(double* g, int64_t n, double scale, double limit) {
  ScaleAndClampLoop(g, n, scale, limit);
}

}  // namespace itwin::worker::kernels
