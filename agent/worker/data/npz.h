// NumPy's .npz: a zip archive whose members are .npy files, stored or deflated, with zip64 where
// large.
#pragma once

#include <filesystem>

#include "agent/worker/data/array.h"

namespace itwin::worker {

// Every array by its name (without ".npy"). Stored members stay in the mapped file; deflated ones
// are unpacked into memory and checked by CRC-32. Throws UserError for damage: no member is
// unpacked to more than its own header can account for, whatever the archive's directory claims.
NamedArrays ReadNpz(const std::filesystem::path& path);

}  // namespace itwin::worker
