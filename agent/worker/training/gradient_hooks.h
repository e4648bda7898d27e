// Tells when backward has added into a parameter's gradient.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "agent/worker/dist/communicator.h"
#include "agent/worker/training/flat_parameters.h"

namespace itwin::worker {

class GradientHooks {
 public:
  // `ready(i)` is called by the thread that runs backward, once per backward pass in which parameter
  // i gets a gradient, after it was added; `before(i)`, if given, before it is added. The hooks stay
  // on the parameters for their life and do nothing once this is gone.
  GradientHooks(const FlatParameters& parameters, std::function<void(size_t)> ready,
                std::function<void(size_t)> before = nullptr);
  ~GradientHooks();
  GradientHooks(const GradientHooks&) = delete;

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
};

// The bytes of `flat` as a message's.
Buffer BufferOfTensor(const at::Tensor& flat);

// A 64-bit hash over the bits of tensors; a pass over memory, not made against attackers.
class ValueHash {
 public:
  void Add(const at::Tensor& values);  // contiguous
  uint64_t Get() const;

 private:
  uint64_t lanes_[4] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu, 0xd6e8feb86659fd93u};
};
// Of all buckets' values.
uint64_t HashValues(const FlatParameters& parameters);

// The ranks whose hash is not that of most (of several equally frequent ones: not rank 0's).
std::vector<int> FindDiffering(uint64_t hash, Communicator& control);

}  // namespace itwin::worker
