// A job handed over as one file (`.itw`): the model, how to train it, the operators it uses, and one
// sample batch with the loss it must give. A safetensors file: the texts lie in its metadata, so
// reading one runs no code. docs/models.md defines it.
#pragma once

#include <filesystem>
#include <set>
#include <string>

#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/model/model.h"

namespace itwin::worker {

struct ModelArchive {
  std::string file;  // name, for messages
  nlohmann::json manifest{};
  nlohmann::json graph{};   // null: a scripted module
  std::string script{};     // TorchScript's bytes; empty: a graph
  NamedTensors weights{};   // of the graph
  Batch sample{};           // empty: none
};

// Throws UserError, beginning with "train.model.archive", for what is no such file or of another
// format.
ModelArchive ReadModelArchive(const std::filesystem::path& path);

// The job with what its archive says about training (loss, optimizer, schedule, …) where the job
// itself says nothing. A job without an archive comes back as it is.
nlohmann::json WithArchive(nlohmann::json job, const std::filesystem::path& work_dir);

// How far the loss here may be from the one that was recorded: kAbsolute + kRelative · |recorded|.
inline constexpr double kHandshakeAbsolute = 1e-5;
inline constexpr double kHandshakeRelative = 1e-4;

// The numerical handshake: the loss of the sample batch in evaluation mode, and in training mode
// where the model draws nothing at random, against those recorded at the export. Leaves the model,
// its buffers and the random generator as they were. Throws UserError that names both values. Does
// nothing without a recorded loss.
void ShakeHands(Model& model, const ModelArchive& archive);

}  // namespace itwin::worker
