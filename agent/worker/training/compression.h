// Gradients as 16-bit numbers for the network.
//
// A float32 gradient g becomes g (1 + e), |e| <= 2^-11 for fp16 and 2^-9 for bf16 (for fp16 below
// 2^-14 an absolute error of at most 2^-25 instead, above 65504 it is cut off); the reduction rounds
// again by the same bound at each of its at most ceil(log2(ranks)) stages. With n ranks and unit
// u = 2^-11 or 2^-9, the sum is within (1 + ceil(log2 n)) u of the sum of the absolute gradients.
#pragma once

#include <cstdint>

namespace itwin::worker {

enum class Compression { kNone, kFloat16, kBfloat16 };

void Compress(const float* from, uint16_t* to, int64_t n, Compression format);
void Compress(const double* from, uint16_t* to, int64_t n, Compression format);
void Expand(const uint16_t* from, float* to, int64_t n, Compression format);
void Expand(const uint16_t* from, double* to, int64_t n, Compression format);

}  // namespace itwin::worker
