// NetCDF, classic and 4, through the netCDF library: the only user of netcdf.h.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "agent/worker/data/array.h"

namespace itwin::worker {

struct NetcdfField {
  // float32 [time, channels, …]: the variables stacked in the order asked for. Scaled by
  // scale_factor and add_offset; cells with the fill or missing value are NaN.
  Array field;
  std::vector<std::string> variables;
  int64_t missing_cells = 0;
};

// No variables named: all that share the shape of the file's largest, at least two-dimensional,
// numeric variable. Throws UserError for a file that is not NetCDF or is damaged, an unknown
// variable (naming the nearest and all others), text variables, and variables of different shapes
// (naming both).
NetcdfField ReadNetcdf(const std::filesystem::path& path,
                       const std::vector<std::string>& variables);

}  // namespace itwin::worker
