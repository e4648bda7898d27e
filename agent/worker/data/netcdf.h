// NetCDF, classic and 4, and HDF5, through the netCDF library: the only user of netcdf.h.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agent/worker/data/array.h"
#include "agent/worker/data/cf_time.h"
#include "agent/worker/data/row_source.h"

namespace itwin::worker {

// Variables of one or more files, of which pieces are read when asked for. The library works for one
// thread at a time; the locks for that are in here.
class NetcdfRows : public RowSource {
 public:
  // The variables stacked as channels, in the order asked for: rows are [channels, …]. Scaled by
  // scale_factor and add_offset; cells that _FillValue, missing_value or the valid range mark are
  // NaN; signed bytes, shorts and ints with `_Unsigned` are read as unsigned. No variables named:
  // all that share the shape of the file's largest, at least two-dimensional, numeric variable. The
  // files follow each other along the first dimension. A name may have groups: "model/UWND".
  // Throws UserError for a file that is not NetCDF or is damaged, an unknown variable (naming the
  // nearest and all others), text variables, variables of different shapes (naming both), and
  // attributes of these kinds that are no such numbers.
  static std::shared_ptr<const NetcdfRows> Stack(const std::vector<std::filesystem::path>& paths,
                                                 const std::vector<std::string>& variables);
  // One variable as it is: rows are its own, without a channel dimension. Null when `name` is not in
  // the first file and `must_exist` is false.
  static std::shared_ptr<const NetcdfRows> One(const std::vector<std::filesystem::path>& paths,
                                               const std::string& name, bool must_exist);
  ~NetcdfRows() override;

  const std::vector<int64_t>& shape() const override { return shape_; }
  int64_t rows_per_chunk() const override { return rows_per_chunk_; }
  void Read(int64_t first, int64_t count, float* to) const override;
  std::optional<TimeAxis> ReadTimeAxis() const override;

  const std::vector<std::string>& variables() const { return names_; }
  int64_t missing_cells() const;  // met so far
  bool is_integer() const { return is_integer_; }  // and neither packed nor with missing values
  Array ReadIntegers() const;                      // all of it, int64

 private:
  struct Files;
  NetcdfRows();
  static std::shared_ptr<NetcdfRows> Open(const std::vector<std::filesystem::path>& paths,
                                          const std::vector<std::string>& variables, bool stack);

  std::unique_ptr<Files> files_;
  std::vector<int64_t> shape_;
  std::vector<std::string> names_;
  int64_t rows_per_chunk_ = 1;
  bool stack_ = true, is_integer_ = false;
};

struct NetcdfField {
  Array field;  // float32 [time, channels, …]
  std::vector<std::string> variables;
  int64_t missing_cells = 0;
};

// All of it at once.
NetcdfField ReadNetcdf(const std::filesystem::path& path,
                       const std::vector<std::string>& variables);
NetcdfField ReadAll(const NetcdfRows& rows);

}  // namespace itwin::worker
