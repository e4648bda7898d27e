// The IDX format (MNIST's): 0 0 type dimensions, sizes and elements in big-endian order.
#pragma once

#include <filesystem>

#include "agent/worker/data/array.h"

namespace itwin::worker {

// Byte elements stay in the mapped file. Throws UserError for another kind of file, or one that is
// cut off.
Array ReadIdx(const std::filesystem::path& path);

}  // namespace itwin::worker
