// What must be the same for a run to go on from a checkpoint: the spec, as far as it decides the
// numbers, and the data. The checkpoint has both as JSON documents, so that a refusal can say what
// differs.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "agent/worker/data/dataset.h"

namespace itwin::worker {

// The `train` part of a spec in one spelling: what only repeats a default is left out, and numbers
// are numbers (5 for "5" and 5.0). ParseSpec is the judge: both documents mean the same to it. One
// that it refuses comes back as it is. Options of built-in models are only spelled alike.
nlohmann::json CanonicalTrain(const nlohmann::json& train);

// The training split: how many samples, their shapes, and figures of the first and the last one,
// which stand for all. Cheap: it reads two samples.
nlohmann::json DescribeTrainingData(const Dataset& dataset);

// How two documents of the same kind differ, as part of a sentence; "" when they do not.
// Canonical specs: "train.batch is 8, was 16; …".
std::string SpecDifference(const nlohmann::json& then, const nlohmann::json& now);
// Descriptions of data. Figures may differ as much as processors and libraries make them.
std::string DataDifference(const nlohmann::json& then, const nlohmann::json& now);

}  // namespace itwin::worker
