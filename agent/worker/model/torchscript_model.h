// The user's TorchScript module.
#pragma once

#include <filesystem>
#include <memory>

#include "agent/worker/model/archive.h"
#include "agent/worker/model/model.h"

namespace itwin::worker {

// See MakeModel and docs/models.md. Refuses, with the reason: a file that is no TorchScript
// archive, operators that this LibTorch does not have, modules without parameters (frozen ones),
// and modules whose dropout or batch norm does not obey train() and eval() (traced ones). Saves
// model.pt, weights.safetensors and preprocessing.json. A module is a program: it runs with the
// rights of this process.
std::unique_ptr<Model> MakeTorchScriptModel(const TrainSpec& spec, const Dataset& dataset,
                                            const std::filesystem::path& work_dir);
// The same for the module in an archive.
std::unique_ptr<Model> MakeTorchScriptModel(const TrainSpec& spec, const Dataset& dataset,
                                            const ModelArchive& archive);

}  // namespace itwin::worker
