// Batch prediction: a model over a split of the data, by all ranks together.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
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
// ranks, so that neither do the bits. Every rank calls it; `each_batch` is called for each one.
// Throws UserError for an empty split, ResourceError when the disk is full.
Prediction PredictSplit(Model& model, const Dataset& dataset, Split split, int64_t batch,
                        const std::string& format, const std::filesystem::path& outputs,
                        Communicator& control, const std::function<void()>& each_batch);

// Reads weights.safetensors or state_dict.pt into the model. Throws UserError for a file that is
// neither, or does not fit the model.
void LoadWeightsFile(Model& model, const std::filesystem::path& path);

}  // namespace itwin::worker
