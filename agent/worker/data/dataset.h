// A dataset is a set of named arrays whose first dimension is the sample, cut into three splits.
// All of it is in memory, mapped, or read as it is needed (`load: stream`); every rank opens the same
// files and sees the same samples.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {

// Arrays of some samples by name; "input" and "target" are always there. First dimension: the
// sample.
using Batch = std::map<std::string, at::Tensor>;

enum class Split { kTrain, kValidation, kTest };

// Immutable after construction: every method may be called from several threads at once.
class Dataset {
 public:
  virtual ~Dataset() = default;

  // Samples in the split; 0 when there is no such split.
  virtual int64_t size(Split split) const = 0;

  // The samples with these indices (0 <= index < size(split), any order), as contiguous tensors
  // that the caller may keep. `indices` is not empty.
  virtual Batch Gather(Split split, const std::vector<int64_t>& indices) const = 0;

  // Predictions to compare a model with, such as "bilinear" and "bicubic"; empty for most data.
  virtual std::vector<std::string> baselines() const = 0;
  // Baseline name -> prediction for the batch, in the units of batch "target".
  virtual std::map<std::string, at::Tensor> BaselinePredictions(const Batch& batch) const = 0;

  // Array name -> shape without the sample dimension.
  virtual std::map<std::string, std::vector<int64_t>> sample_shapes() const = 0;

  // Number of classes when the target is a class number (int64), else 0.
  virtual int64_t classes() const = 0;

  // What was done to the arrays, with the statistics of the training split: what a user of the
  // trained model must do to new data. Models write it beside their weights as preprocessing.json.
  // Empty when nothing is known.
  virtual nlohmann::json preprocessing() const { return nlohmann::json::object(); }
};

void PrintNote(const std::string& note);  // "note: …" on stdout, the job's log

// How ranks share the work of opening: each computes a part of the statistics.
struct RankShare {
  int rank = 0, ranks = 1;
  int ranks_on_node = 1;
  // Sums over the ranks, in place; every rank calls it in the same order.
  std::function<void(std::span<double>)> sum = {};
  // Takes what the user should know of the data and is no error. Rank 0 alone calls it.
  std::function<void(const std::string&)> note = PrintNote;
};

// Reads, splits and transforms. The drawing of fractions depends on the seed alone. Throws
// UserError for a file, variable, shape or range that cannot work (naming it), and for an empty
// training split.
std::unique_ptr<Dataset> OpenDataset(const DataSpec& spec, uint64_t seed,
                                     const std::filesystem::path& work_dir,
                                     const RankShare& share = {});

}  // namespace itwin::worker
