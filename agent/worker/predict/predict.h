// Batch prediction: a model over a split of the data, by all ranks together.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "agent/worker/data/dataset.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/model/model.h"

namespace itwin::worker {

struct Prediction {
  std::filesystem::path file;  // within the outputs
  std::vector<int64_t> shape;  // [samples, …]
};

// Writes the model's float32 predictions in the order of the samples, as predictions.npy or (format
// "netcdf") predictions.nc. The samples are cut into batches that do not depend on the number of
// ranks, so that neither do the bits. Every rank calls it. `go_on` is asked before each batch; once
// it says no on any rank, all of them end before their next batch, leave no file, and nothing is
// returned. Throws UserError for an empty split, ResourceError when the disk is full.
std::optional<Prediction> PredictSplit(Model& model, const Dataset& dataset, Split split,
                                       int64_t batch, const std::string& format,
                                       const std::filesystem::path& outputs, Communicator& control,
                                       const std::function<bool()>& go_on);

// Reads weights.safetensors or state_dict.pt into the model. Throws UserError for a file that is
// neither, or does not fit the model.
void LoadWeightsFile(Model& model, const std::filesystem::path& path);

}  // namespace itwin::worker
