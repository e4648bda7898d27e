// Named arrays as tensors on their way to samples, and the transforms that work on them. Inside
// data/ only.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "agent/worker/data/array.h"
#include "agent/worker/data/row_source.h"
#include "agent/worker/data/split.h"

namespace itwin::worker {

// One array of samples. Bytes stay as they lie in the (shared, mapped) file and become float32
// sample by sample: float32(values) * multiply + add. A *streamed* array (rows set) is float32 and
// not in memory: its samples are read when they are selected, and every transform is a step that is
// applied then.
struct StoredArray {
  at::Tensor values;      // [samples, …]; never written in place: it may be mapped read-only. Of a
                          // streamed array it has the shape alone (a meta tensor)
  bool is_float = false;  // what Gather returns: float32, else int64
  int64_t channel_dim =
      1;  // statistics are per index of this dimension (none for one-dimensional arrays)
  at::Tensor multiply, add;  // float32 [1] or [channels]; undefined: nothing to apply

  std::shared_ptr<const RowCache> rows;  // streamed
  int64_t first_row = 0;                 // of sample 0
  int64_t window = 0;                    // rows per sample; 0: one, without a dimension for it
  using Step = std::function<at::Tensor(const at::Tensor& samples)>;
  std::vector<Step> row_steps, sample_steps;  // before and after the rows of a window are put together

  bool streamed() const { return rows != nullptr; }
  // Adds a step to a streamed array; `shape` is that of a sample behind it.
  void Then(Step step, const std::vector<int64_t>& sample_shape);

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
StoredArray StoreTensor(const at::Tensor& tensor, bool as_classes);
// A streamed array of all rows.
StoredArray StreamArray(std::shared_ptr<const RowCache> rows);

// All arrays of the data. Part 0 holds every sample but those of separate test files, which are
// part 1.
struct SampleStore {
  std::vector<std::map<std::string, StoredArray>> parts;
  std::string input, target;  // names of the arrays; empty until known
  SplitIndices splits;        // train and validation index part 0, test the last part
  std::vector<std::string> baselines;
  nlohmann::json record = nlohmann::json::array();  // the transforms with their statistics
  std::vector<int64_t> jumps;     // steps that do not follow the one before in time, sorted; see window
  std::vector<int64_t> left_out;  // windows that no split has, sorted: a jump lies within them
  std::vector<std::string> notes;  // for the job's log
  // Of a training before: what standardize uses instead of this data's own; null: nothing.
  nlohmann::json statistics;

  bool separate_test() const { return parts.size() == 2; }
  // The array to coarsen or to cut into windows: the input, else "field", else the only one.
  // `field`: for errors.
  std::string SourceName(const std::string& field) const;
};

// Applies one transform; `field` is its path in the spec, for errors. Throws UserError where it
// does not fit.
// Statistics are computed by all ranks together, each a part: the same bits whatever their number.
void ApplyTransform(const Transform& transform, const std::string& field, const RankShare& share,
                    SampleStore* store);

}  // namespace itwin::worker
