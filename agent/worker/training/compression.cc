#include "agent/worker/training/compression.h"

#include "agent/worker/dist/half.h"

namespace itwin::worker {
namespace {

template <typename T>
void CompressOf(const T* from, uint16_t* to, int64_t n, Compression format) {
  if (format == Compression::kBfloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = ToBfloat16(static_cast<float>(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = ToFloat16(static_cast<float>(from[i]));
  }
}
template <typename T>
void ExpandOf(const uint16_t* from, T* to, int64_t n, Compression format) {
  if (format == Compression::kBfloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(FromBfloat16(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(FromFloat16(from[i]));
  }
}

}  // namespace

void Compress(const float* from, uint16_t* to, int64_t n, Compression format) {
  CompressOf(from, to, n, format);
}
void Compress(const double* from, uint16_t* to, int64_t n, Compression format) {
  CompressOf(from, to, n, format);
}
void Expand(const uint16_t* from, float* to, int64_t n, Compression format) {
  ExpandOf(from, to, n, format);
}
void Expand(const uint16_t* from, double* to, int64_t n, Compression format) {
  ExpandOf(from, to, n, format);
}

}  // namespace itwin::worker
