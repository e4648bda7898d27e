// Layers that several ranks share, each holding a part of the weights: what their activations need
// of each other. Every rank of the communicator calls these in the same order, forward and backward.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace itwin::worker {

class Communicator;

// How this rank's part of a parameter lies in the whole one: `count` rows (dim 0) or columns (dim 1)
// from `first` on.
struct ParameterPart {
  std::vector<int64_t> shape;  // of the whole
  int64_t dim = 0;
  int64_t first = 0;
};

// x, the same on every rank, on its way into parts of a layer; the gradient is the sum over ranks.
at::Tensor IntoParts(const at::Tensor& x, Communicator& ranks);
// The sum of the ranks' parts; the gradient goes to each as it is.
at::Tensor SumOfParts(const at::Tensor& part, Communicator& ranks);
// The ranks' parts side by side in the last dimension; each gets the gradient of its own.
at::Tensor JoinParts(const at::Tensor& part, Communicator& ranks);

}  // namespace itwin::worker
