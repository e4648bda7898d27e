// Plain little-endian numbers without any header.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "agent/worker/data/array.h"

namespace itwin::worker {

// The mapped file as an array [samples, shape…]; the number of samples follows from its size. Throws
// UserError for an unknown type ("float32", …) and a size that is no whole number of samples.
Array ReadRaw(const std::filesystem::path& path, const std::string& type,
              const std::vector<int64_t>& shape);

}  // namespace itwin::worker
