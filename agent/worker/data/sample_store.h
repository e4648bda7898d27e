// Named arrays as tensors on their way to samples, and the transforms that work on them. Inside
// data/ only.
#pragma once

#include <map>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "agent/worker/data/array.h"
#include "agent/worker/data/split.h"

namespace itwin::worker {

// One array of samples. Bytes stay as they lie in the (shared, mapped) file and become float32
// sample by sample: float32(values) * multiply + add.
struct StoredArray {
  at::Tensor values;      // [samples, …]; never written in place: it may be mapped read-only
  bool is_float = false;  // what Gather returns: float32, else int64
  int64_t channel_dim =
      1;  // statistics are per index of this dimension (none for one-dimensional arrays)
  at::Tensor multiply, add;  // float32 [1] or [channels]; undefined: nothing to apply

  int64_t samples() const { return values.size(0); }
  std::vector<int64_t> sample_shape() const;
  // Samples of these indices (int64 tensor), contiguous.
  at::Tensor Select(const at::Tensor& indices) const;
  // The whole as float32 with multiply and add applied.
  at::Tensor Materialize() const;
  // Composes x -> x * m + a, with m and a float32 [1] or [channels].
  void Apply(const at::Tensor& m, const at::Tensor& a);
  at::Tensor AlongChannels(
      const at::Tensor& per_channel) const;  // shaped to broadcast over `values`
};

// A view of the bytes (kept alive), or a copy where the type has to change: floats become float32,
// uint8 and bool stay and are read as floats, unless `as_classes`; other integers become int64.
StoredArray StoreArray(const Array& array, bool as_classes);

// All arrays of the data. Part 0 holds every sample but those of separate test files, which are
// part 1.
struct SampleStore {
  std::vector<std::map<std::string, StoredArray>> parts;
  std::string input, target;  // names of the arrays; empty until known
  SplitIndices splits;        // train and validation index part 0, test the last part
  std::vector<std::string> baselines;
  nlohmann::json record = nlohmann::json::array();  // the transforms with their statistics

  bool separate_test() const { return parts.size() == 2; }
  // The array to coarsen or to cut into windows: the input, else "field", else the only one.
  // `field`: for errors.
  std::string SourceName(const std::string& field) const;
};

// Applies one transform; `field` is its path in the spec, for errors. Throws UserError where it
// does not fit.
void ApplyTransform(const Transform& transform, const std::string& field, SampleStore* store);

}  // namespace itwin::worker
