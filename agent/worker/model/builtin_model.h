// A built-in network with a named loss.
#pragma once

#include <memory>

#include "agent/worker/model/model.h"
#include "agent/worker/model/network.h"

namespace itwin::worker {

// See MakeModel. Saves weights.safetensors, model.json (the architecture with every option) and
// preprocessing.json.
std::unique_ptr<Model> MakeBuiltinModel(const TrainSpec& spec, const Dataset& dataset,
                                        const MeshPlace& place = {});

}  // namespace itwin::worker
