// A NetCDF file of predictions. Implemented in netcdf.cc, the only user of netcdf.h.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace itwin::worker {

// Writes one float variable "prediction" [sample, …] in NetCDF-4, row by row.
class NetcdfWriter {
 public:
  // Throws ResourceError or AppError when the file cannot be written.
  NetcdfWriter(const std::filesystem::path& path, const std::vector<int64_t>& shape);
  ~NetcdfWriter();
  void Write(int64_t first, int64_t count, const float* values);
  void Close();

 private:
  void Check(int result) const;
  const std::string path_;
  std::vector<int64_t> shape_;
  int file_ = -1, variable_ = -1;
};

}  // namespace itwin::worker
