// The user's model as an exported graph.
#pragma once

#include <memory>

#include "agent/worker/model/archive.h"
#include "agent/worker/model/model.h"

namespace itwin::worker {

// See MakeModel and graph.h. Saves graph.json, weights.safetensors and preprocessing.json.
std::unique_ptr<Model> MakeGraphModel(const TrainSpec& spec, const Dataset& dataset,
                                      const ModelArchive& archive);

// One stage of `stages`, cut by Graph::Units: a StagedModel that is not run as a whole. Throws UserError for a graph
// that cannot be cut into so many, and says why.
std::unique_ptr<Model> MakeGraphStage(const TrainSpec& spec, const ModelArchive& archive, int stage, int stages);

}  // namespace itwin::worker
