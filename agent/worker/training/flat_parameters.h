// The trainable parameters of a model as a few flat buffers. A *bucket* is a run of parameters, in
// reverse order of the model (gradients become ready about in that order), whose values and
// gradients are each one contiguous tensor: one all-reduce, one optimiser loop. The model's tensors
// and their gradients become views into it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/training/step_status.h"

namespace itwin::worker {

class FlatParameters {
 public:
  struct Parameter {
    std::string name;
    at::Tensor tensor;
    size_t bucket = 0;
    int64_t offset = 0;  // elements from the bucket's start
  };
  struct Bucket {
    at::ScalarType type = at::kFloat;
    at::Tensor values{};     // flat; between parameters there is a little padding, which stays zero
    at::Tensor gradients{};  // as long as values; the last bucket's is longer by the status
    std::vector<size_t> parameters{};
  };

  // Moves the parameters' storage into the buckets. The first bucket is closed when it has reached
  // `first_bytes`, the others at `bucket_bytes`. Parameters that need no gradient stay as they are,
  // a tensor that appears under two names counts once. A bucket's length is a multiple of `parts`
  // (and of what vector loads like). Throws UserError when there is nothing to
  // train, or for an element type other than float32 and float64.
  FlatParameters(const std::vector<std::pair<std::string, at::Tensor>>& named, int64_t first_bytes,
                 int64_t bucket_bytes, int parts = 1);

  const std::vector<Parameter>& parameters() const { return parameters_; }  // the model's order
  std::vector<Bucket>& buckets() { return buckets_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }

  // A view of `flat`, which is laid out like a bucket's values, where parameter i lies.
  at::Tensor ViewOf(const at::Tensor& flat, size_t i) const;

  void WriteStatus(const StepStatus& status);
  StepStatus ReadStatus() const;  // `on_device`, where it was written so

  // Whether each gradient is still the view that was set; a model that replaces it cannot be
  // averaged. Throws AppError that names the parameter.
  void CheckGradientViews() const;

 private:
  std::vector<Parameter> parameters_;
  std::vector<Bucket> buckets_;
  bool late_ = false;  // the status written last is on a device
};

// Flat tensors of the same type and length, on the host or on one device, in the order of what the
// thread has given the device; nothing waits.
void CopyFlat(const at::Tensor& to, const at::Tensor& from);
void ClearFlat(const at::Tensor& flat);

}  // namespace itwin::worker
