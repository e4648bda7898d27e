// Zarr stores, version 2, in a directory: an array is a directory with `.zarray` (JSON) and a file for
// each chunk. Free of LibTorch.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "agent/worker/data/array.h"
#include "agent/worker/data/cell_decoding.h"
#include "agent/worker/data/chunk_codec.h"
#include "agent/worker/data/row_source.h"

namespace itwin::worker {

// One array, of which the chunks that hold the wanted rows are read when asked for. Numbers are scaled
// by scale_factor and add_offset of `.zattrs`. Missing cells are NaN: those that _FillValue,
// missing_value or the valid range of `.zattrs` mark, and those equal to the array's fill value, where
// that is not 0 or the numbers are scaled. A chunk without a file is all fill value.
class ZarrRows : public RowSource {
 public:
  // `name` may have groups: "model/t2m". Null when there is no such array and `must_exist` is false.
  // Throws UserError for what is no version 2 store, for an unknown name (naming the nearest and all
  // others), and for arrays of a kind that is not read here (saying what to write instead).
  static std::shared_ptr<const ZarrRows> Open(const std::filesystem::path& store, const std::string& name,
                                              bool must_exist);

  const std::vector<int64_t>& shape() const override { return shape_; }
  int64_t rows_per_chunk() const override { return chunks_[0]; }
  void Read(int64_t first, int64_t count, float* to) const override;

  // By `_ARRAY_DIMENSIONS`, as xarray writes it: the array of the first dimension's name, beside this
  // one or in a group above.
  std::optional<TimeAxis> ReadTimeAxis() const override;

  bool is_integer() const { return is_integer_; }  // and neither packed nor marked by attributes
  Array ReadIntegers() const;  // all of it, int64, as it is stored

 private:
  enum class Kind { kUnsigned, kSigned, kFloat };

  ZarrRows(std::filesystem::path store, std::filesystem::path directory)
      : store_(std::move(store)), directory_(std::move(directory)) {}
  void ReadHeader();
  void ReadLayout(const nlohmann::json& header);
  void ReadType(const std::string& type);
  void ReadFill(const nlohmann::json& fill);
  void ReadAttributes();
  double AsStored(double value) const;  // as the array's own type has it
  std::vector<double> ReadDoubles() const;  // all of it, scaled
  [[noreturn]] void Refuse(const std::string& problem) const;

  // f(from, to, elements) for every run of elements of these rows that lie together in a chunk: their
  // bytes (null where the chunk has no file) and where they belong among the rows.
  using Run = std::function<void(const std::byte* from, int64_t to, int64_t elements)>;
  void ForRuns(int64_t first, int64_t count, const Run& f) const;
  void CopyRuns(const std::vector<int64_t>& chunk, int64_t first, int64_t count, const Run& f) const;
  // f(decode), where decode(bytes) is the number of the array's own type.
  template <typename F>
  void WithType(F f) const;
  std::filesystem::path ChunkFile(const std::vector<int64_t>& index) const;
  // The chunk's elements, unpacked; empty where there is no file.
  std::vector<std::byte> ReadChunk(const std::vector<int64_t>& index) const;

  const std::filesystem::path store_, directory_;
  std::vector<int64_t> shape_, chunks_;
  char separator_ = '.';
  Kind kind_ = Kind::kFloat;
  size_t element_bytes_ = 4, chunk_bytes_ = 0;
  bool swap_ = false, is_integer_ = false;
  Unpack unpack_ = nullptr;
  bool has_fill_ = false;
  double fill_ = 0;
  CellDecoding decoding_;
  std::string dimension_, units_, calendar_;  // the first dimension's name; empty where not given
};

}  // namespace itwin::worker
