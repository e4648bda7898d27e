// A check of a classic NetCDF file before the NetCDF library sees it: the library believes the
// header's counts (it allocates for them at once) and reads cells that are cut off as zeros.
#pragma once

#include <filesystem>

namespace itwin::worker {

// Walks the header of a classic file (formats 1, 2 and 5) and throws UserError when a count, a name
// or a variable's cells lie beyond the end of the file. Files of another format are left to the
// library.
void CheckClassicNetcdf(const std::filesystem::path& path);

}  // namespace itwin::worker
