// NumPy's .npz: a zip archive whose members are .npy files, stored or deflated, with zip64 where
// large.
#pragma once

#include <filesystem>
#include <set>
#include <string>

#include "agent/worker/data/array.h"

namespace itwin::worker {

// Every array by its name (without ".npy"). Stored members stay in the mapped file; deflated ones
// are unpacked into memory. All are compared with their CRC-32. Arrays of a kind that is not read
// here are left out, unless they are among `needed` or there are no others. Throws UserError for
// damage: no member is unpacked to more than its own header can account for, whatever the archive's
// directory claims.
NamedArrays ReadNpz(const std::filesystem::path& path, const std::set<std::string>& needed = {});

}  // namespace itwin::worker
