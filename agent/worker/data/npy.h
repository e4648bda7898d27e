// NumPy's .npy, format versions 1 to 3: magic, header (a Python dictionary), raw elements.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>

#include "agent/worker/data/array.h"

namespace itwin::worker {

// Maps the file; elements stay in it when they are in native byte order. Element types: f2 f4 f8 i1
// i2 i4 i8 u1 bool. Throws UserError for anything else, for Fortran order and for a file that is
// shorter than its header says.
Array ReadNpy(const std::filesystem::path& path);

// The same from memory that `owner` keeps alive; `what` names the array in errors.
Array ParseNpy(const std::byte* data, size_t size, std::shared_ptr<const void> owner,
               const std::string& what);

}  // namespace itwin::worker
