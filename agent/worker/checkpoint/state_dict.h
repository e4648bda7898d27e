// A file that Python's `torch.load` reads as a plain dictionary of tensors.
#pragma once

#include <filesystem>

#include "agent/worker/checkpoint/safetensors.h"

namespace itwin::worker {

// Throws ResourceError when the disk is full.
void WriteStateDict(const std::filesystem::path& path, const NamedTensors& tensors);

}  // namespace itwin::worker
