// The user's model as an exported graph.
#pragma once

#include <memory>

#include "agent/worker/model/archive.h"
#include "agent/worker/model/model.h"

namespace itwin::worker {

// See MakeModel and graph.h. Saves graph.json, weights.safetensors and preprocessing.json.
std::unique_ptr<Model> MakeGraphModel(const TrainSpec& spec, const Dataset& dataset,
                                      const ModelArchive& archive);

}  // namespace itwin::worker
