#include "agent/worker/data/netcdf.h"

#include <netcdf.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "agent/worker/data/cell_decoding.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/data/netcdf_header.h"
#include "agent/worker/data/netcdf_writer.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr size_t kMaxListedNames = 40;  // in an error

// For every call into the library: it keeps state of its own.
std::mutex library_mutex;

struct Variable {
  int group = 0;  // the library's id of the group it lies in
  int id = 0;
  std::string name;
  nc_type type = NC_NAT;
  std::vector<std::string> dimensions;
  std::vector<int64_t> shape;
};

class File {
 public:
  explicit File(const std::filesystem::path& path) : path_(path.string()) {
    const int result = nc_open(path.c_str(), NC_NOWRITE, &id_);
    if (result != NC_NOERR) {
      throw UserError("train.data.netcdf: cannot read " + path_ +
                      " as NetCDF: " + nc_strerror(result));
    }
  }
  ~File() { nc_close(id_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void Check(int result, const std::string& doing) const {
    if (result != NC_NOERR) {
      throw UserError("train.data.netcdf: " + path_ + ", " + doing + ": " + nc_strerror(result) +
                      "; the file may be cut off or damaged");
    }
  }

  // Variables of the root and of all groups below; those of groups as "group/name".
  std::vector<Variable> List() const {
    std::vector<Variable> variables;
    ListGroup(id_, "", &variables);
    return variables;
  }

  // An attribute's numbers, none where the variable has no such attribute. `wanted`: how many there
  // must be; 0: any.
  std::vector<double> Numbers(const Variable& variable, const char* name, size_t wanted) const {
    nc_type type = NC_NAT;
    size_t length = 0;
    if (nc_inq_att(variable.group, variable.id, name, &type, &length) != NC_NOERR) return {};
    if (type == NC_CHAR || type == NC_STRING) {
      Refuse(variable, name, " is \"" + Text(variable, name) + "\", a text; it must be a number");
    }
    if (type > NC_UINT64) Refuse(variable, name, " is of a type that is no number");
    if (wanted != 0 && length != wanted) {
      Refuse(variable, name,
             " has " + std::to_string(length) + " numbers; it must have " + std::to_string(wanted));
    }
    std::vector<double> values(length);
    if (length > 0) {
      Check(nc_get_att_double(variable.group, variable.id, name, values.data()),
            std::string("attribute ") + name);
    }
    return values;
  }

  [[noreturn]] void Refuse(const Variable& variable, const char* attribute,
                           const std::string& problem) const {
    throw UserError("train.data.netcdf: " + path_ + ", variable " + variable.name + ", attribute " +
                    attribute + problem);
  }

  std::string Text(const Variable& variable, const char* name) const {
    nc_type type = NC_NAT;
    size_t length = 0;
    if (nc_inq_att(variable.group, variable.id, name, &type, &length) != NC_NOERR) return "";
    if (type == NC_STRING && length == 1) {
      char* value = nullptr;
      Check(nc_get_att_string(variable.group, variable.id, name, &value),
            std::string("attribute ") + name);
      std::string text = value == nullptr ? "" : value;
      nc_free_string(1, &value);
      return text;
    }
    if (type != NC_CHAR) return "";
    std::string text(length, '\0');
    Check(nc_get_att_text(variable.group, variable.id, name, text.data()),
          std::string("attribute ") + name);
    while (!text.empty() && text.back() == '\0') text.pop_back();
    return text;
  }

  // Rows of the first dimension that are stored (and compressed) together; 1 where rows lie alone.
  int64_t RowsPerChunk(const Variable& variable) const {
    int storage = NC_CONTIGUOUS;
    std::vector<size_t> chunks(std::max<size_t>(1, variable.shape.size()), 1);
    if (nc_inq_var_chunking(variable.group, variable.id, &storage, chunks.data()) != NC_NOERR)
      return 1;
    return storage == NC_CHUNKED ? static_cast<int64_t>(chunks.front()) : 1;
  }

  template <typename T>
  void Read(const Variable& variable, int64_t first, int64_t count, T* cells) const {
    std::vector<size_t> start(variable.shape.size(), 0), counts;
    for (const int64_t length : variable.shape) counts.push_back(static_cast<size_t>(length));
    if (!start.empty()) {
      start.front() = static_cast<size_t>(first);
      counts.front() = static_cast<size_t>(count);
    }
    int result = NC_NOERR;
    if constexpr (std::is_same_v<T, float>) {
      result = nc_get_vara_float(variable.group, variable.id, start.data(), counts.data(), cells);
    } else if constexpr (std::is_same_v<T, double>) {
      result = nc_get_vara_double(variable.group, variable.id, start.data(), counts.data(), cells);
    } else {
      result = nc_get_vara_longlong(variable.group, variable.id, start.data(), counts.data(),
                                    reinterpret_cast<long long*>(cells));
    }
    // Values beyond float's range become infinite and are reported as NC_ERANGE; that is no reason
    // to stop.
    if (result != NC_ERANGE) Check(result, "variable " + variable.name);
  }

  const std::string& path() const { return path_; }

 private:
  void ListGroup(int group, const std::string& prefix, std::vector<Variable>* variables) const {
    int count = 0;
    Check(nc_inq_nvars(group, &count), "its list of variables");
    for (int v = 0; v < count; ++v) {
      Variable variable;
      variable.group = group;
      variable.id = v;
      char name[NC_MAX_NAME + 1] = {};
      int dimension_count = 0;
      int dimension_ids[NC_MAX_VAR_DIMS] = {};
      Check(nc_inq_var(group, v, name, &variable.type, &dimension_count, dimension_ids, nullptr),
            "a variable's header");
      variable.name = prefix + name;
      for (int d = 0; d < dimension_count; ++d) {
        size_t length = 0;
        Check(nc_inq_dim(group, dimension_ids[d], name, &length), "a dimension's header");
        variable.dimensions.emplace_back(name);
        variable.shape.push_back(static_cast<int64_t>(length));
      }
      variables->push_back(std::move(variable));
    }
    int groups = 0;
    if (nc_inq_grps(group, &groups, nullptr) != NC_NOERR || groups == 0) return;
    std::vector<int> ids(static_cast<size_t>(groups));
    Check(nc_inq_grps(group, &groups, ids.data()), "its groups");
    for (const int id : ids) {
      char name[NC_MAX_NAME + 1] = {};
      Check(nc_inq_grpname(id, name), "a group's name");
      ListGroup(id, prefix + name + "/", variables);
    }
  }

  int id_ = -1;
  const std::string path_;
};

std::string NamesText(const std::vector<Variable>& variables) {
  std::string text;
  size_t shown = 0;
  for (const Variable& variable : variables) {
    if (shown == kMaxListedNames) return text + ", …";
    text += (shown++ == 0 ? "" : ", ") + variable.name + ShapeText(variable.shape);
  }
  return text;
}

std::string DimensionsText(const Variable& variable) {
  std::string text = variable.name + " (";
  for (size_t d = 0; d < variable.shape.size(); ++d) {
    text += (d == 0 ? "" : ", ") + variable.dimensions[d] + " " + std::to_string(variable.shape[d]);
  }
  return text + ")";
}

bool IsNumeric(const Variable& variable) {
  return variable.type != NC_CHAR && variable.type != NC_STRING && variable.type <= NC_UINT64;
}

std::vector<Variable> Select(const std::vector<Variable>& all,
                             const std::vector<std::string>& names, const std::string& path) {
  std::vector<Variable> selected;
  if (names.empty()) {
    const Variable* largest = nullptr;
    int64_t largest_cells = 0;
    for (const Variable& variable : all) {
      if (!IsNumeric(variable) || variable.shape.size() < 2) continue;
      int64_t cells = 1;
      for (const int64_t length : variable.shape) {
        cells = length > 0 && cells > std::numeric_limits<int64_t>::max() / length
                    ? std::numeric_limits<int64_t>::max()
                    : cells * length;
      }
      if (cells > largest_cells) {
        largest = &variable;
        largest_cells = cells;
      }
    }
    if (largest == nullptr) {
      throw UserError("train.data.netcdf: " + path +
                      " has no numeric variable of two or more dimensions");
    }
    for (const Variable& variable : all) {
      if (IsNumeric(variable) && variable.shape == largest->shape) selected.push_back(variable);
    }
    return selected;
  }
  std::vector<std::string> known;
  for (const Variable& variable : all) known.push_back(variable.name);
  for (const std::string& name : names) {
    const auto found = std::find(known.begin(), known.end(), name);
    if (found == known.end()) {
      throw UserError("train.data.variables: no variable \"" + name + "\" in " + path +
                      NearestHint(name, known) + "; it has " + NamesText(all));
    }
    const Variable& variable = all[static_cast<size_t>(found - known.begin())];
    if (!IsNumeric(variable)) {
      throw UserError("train.data.variables: \"" + name + "\" in " + path + " is not numeric");
    }
    if (variable.shape.empty()) {
      throw UserError("train.data.variables: \"" + name + "\" in " + path +
                      " is a single number; its first dimension must be the samples");
    }
    if (!selected.empty() && variable.shape != selected.front().shape) {
      throw UserError("train.data.variables: " + DimensionsText(selected.front()) + " and " +
                      DimensionsText(variable) + " have different shapes and cannot be stacked");
    }
    selected.push_back(variable);
  }
  return selected;
}

// How the cells of a variable become numbers.
struct Decoding {
  CellDecoding cells;
  int64_t wrap = 0;  // `_Unsigned`: added to negative numbers

  // Compared in float, as the cells are.
  int64_t Apply(float* cells_read, size_t count) const {
    int64_t missed = 0;
    for (float* value = cells_read; value != cells_read + count; ++value) {
      if (wrap != 0 && *value < 0) *value += static_cast<float>(wrap);
      *value = cells(*value);
      missed += std::isnan(*value) ? 1 : 0;
    }
    return missed;
  }
};

struct IntegerType {
  nc_type type;
  const char* name;
  double least, most;
  int64_t wrap;  // what `_Unsigned` adds to negative numbers; 0: the type has no other reading
};
constexpr IntegerType kIntegerTypes[] = {{NC_BYTE, "byte", -128, 127, 256},
                                         {NC_UBYTE, "ubyte", 0, 255, 0},
                                         {NC_SHORT, "short", -32768, 32767, 65536},
                                         {NC_USHORT, "ushort", 0, 65535, 0},
                                         {NC_INT, "int", -0x1p31, 0x1p31 - 1, int64_t{1} << 32},
                                         {NC_UINT, "uint", 0, 0x1p32 - 1, 0},
                                         {NC_INT64, "int64", -0x1p63, 0x1p63, 0},
                                         {NC_UINT64, "uint64", 0, 0x1p64, 0}};

Decoding DecodingOf(const File& file, const Variable& variable) {
  Decoding decoding;
  const auto* integer =
      std::find_if(std::begin(kIntegerTypes), std::end(kIntegerTypes),
                   [&](const IntegerType& known) { return known.type == variable.type; });
  const bool is_integer = integer != std::end(kIntegerTypes);
  std::string is_unsigned = file.Text(variable, "_Unsigned");
  for (char& c : is_unsigned) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (is_integer && is_unsigned == "true") decoding.wrap = integer->wrap;
  const auto as_cell = [&](double value) {
    const double wrapped = value < 0 ? value + static_cast<double>(decoding.wrap) : value;
    return static_cast<double>(static_cast<float>(wrapped));
  };
  for (const auto& [name, wanted] : {std::pair{"_FillValue", 1}, {"missing_value", 0}}) {
    for (const double value : file.Numbers(variable, name, static_cast<size_t>(wanted))) {
      // Its type should be the variable's. Another one is no matter where a cell can hold the
      // number.
      const bool fits =
          !is_integer || (value == std::floor(value) && value >= integer->least &&
                          value <= std::max(integer->most, static_cast<double>(decoding.wrap - 1)));
      if (!fits) {
        char number[40];
        std::snprintf(number, sizeof(number), "%.9g", value);
        file.Refuse(variable, name,
                    std::string(": ") + number + " is no number of the variable's type, " +
                        integer->name + ", so no cell can have it");
      }
      decoding.cells.missing.push_back(as_cell(value));
    }
  }
  if (!is_integer) {
    decoding.cells.missing.push_back(
        static_cast<double>(static_cast<float>(NC_FILL_FLOAT)));  // never written
  }
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double least : file.Numbers(variable, "valid_min", 1))
    decoding.cells.Narrow(as_cell(least), infinity);
  for (const double most : file.Numbers(variable, "valid_max", 1))
    decoding.cells.Narrow(-infinity, as_cell(most));
  const std::vector<double> range = file.Numbers(variable, "valid_range", 2);
  if (!range.empty()) decoding.cells.Narrow(as_cell(range[0]), as_cell(range[1]));
  for (const auto& [name, to] :
       {std::pair{"scale_factor", &decoding.cells.scale}, {"add_offset", &decoding.cells.offset}}) {
    for (const double value : file.Numbers(variable, name, 1)) *to = value;
  }
  return decoding;
}

constexpr size_t kMaxOpenFiles = 64;

}  // namespace

struct NetcdfRows::Files {
  struct Part {
    std::filesystem::path path;
    int64_t first = 0, rows = 0;
  };
  struct Opened {
    std::unique_ptr<File> file;
    std::vector<Variable> variables;
    std::vector<Decoding> decodings;
  };
  std::vector<Part> parts;
  std::vector<std::string> wanted;
  std::map<size_t, Opened> open;  // by part
  int64_t missing_cells = 0;

  // With library_mutex held.
  const Opened& Get(size_t part) {
    const auto found = open.find(part);
    if (found != open.end()) return found->second;
    if (open.size() >= kMaxOpenFiles) open.erase(open.begin());
    Opened opened;
    opened.file = std::make_unique<File>(parts[part].path);
    opened.variables = Select(opened.file->List(), wanted, parts[part].path.string());
    for (const Variable& variable : opened.variables)
      opened.decodings.push_back(DecodingOf(*opened.file, variable));
    return open.emplace(part, std::move(opened)).first->second;
  }
};

NetcdfRows::NetcdfRows() : files_(std::make_unique<Files>()) {}

NetcdfRows::~NetcdfRows() {
  std::lock_guard lock(library_mutex);
  files_.reset();
}

std::shared_ptr<NetcdfRows> NetcdfRows::Open(const std::vector<std::filesystem::path>& paths,
                                             const std::vector<std::string>& variables,
                                             bool stack) {
  std::shared_ptr<NetcdfRows> rows(new NetcdfRows);
  rows->stack_ = stack;
  Files& files = *rows->files_;
  files.wanted = variables;
  for (size_t p = 0; p < paths.size(); ++p) {
    CheckClassicNetcdf(paths[p]);
    const std::string what = "train.data.netcdf: " + paths[p].string();
    std::lock_guard lock(library_mutex);
    files.parts.push_back({.path = paths[p], .first = p == 0 ? 0 : rows->shape_[0]});
    const Files::Opened& opened = files.Get(p);
    const Variable& first = opened.variables.front();
    std::vector<int64_t> shape = first.shape;
    if (stack) shape.insert(shape.begin() + 1, static_cast<int64_t>(opened.variables.size()));
    CheckedBytes(shape, ElementType::kFloat32, what);
    files.parts.back().rows = shape[0];
    if (p == 0) {
      for (const Variable& variable : opened.variables) rows->names_.push_back(variable.name);
      files.wanted = rows->names_;  // of all files the same
      rows->shape_ = shape;
      rows->rows_per_chunk_ = opened.file->RowsPerChunk(first);
      rows->is_integer_ = first.type != NC_FLOAT && first.type != NC_DOUBLE &&
                          !opened.decodings.front().cells.MarksMissing() &&
                          !opened.decodings.front().cells.IsPacked();
      continue;
    }
    if (!std::equal(shape.begin() + 1, shape.end(), rows->shape_.begin() + 1, rows->shape_.end())) {
      throw UserError("train.data.more_files: " + paths[p].string() + " has " +
                      DimensionsText(first) + ", which cannot follow the first file's " +
                      ShapeText(rows->shape_) + "; only the first dimension may differ");
    }
    rows->shape_[0] += shape[0];
  }
  // Chunks that lie across two files are read from both; rows of a chunk count from each file's
  // start.
  if (paths.size() > 1 && rows->rows_per_chunk_ > 1) {
    for (const auto& part : files.parts) {
      if (part.first % rows->rows_per_chunk_ != 0) rows->rows_per_chunk_ = 1;
    }
  }
  return rows;
}

std::shared_ptr<const NetcdfRows> NetcdfRows::Stack(const std::vector<std::filesystem::path>& paths,
                                                    const std::vector<std::string>& variables) {
  return Open(paths, variables, /*stack=*/true);
}

std::shared_ptr<const NetcdfRows> NetcdfRows::One(const std::vector<std::filesystem::path>& paths,
                                                  const std::string& name, bool must_exist) {
  if (!must_exist) {
    CheckClassicNetcdf(paths.front());
    std::lock_guard lock(library_mutex);
    const File file(paths.front());
    bool found = false;
    for (const Variable& variable : file.List()) found = found || variable.name == name;
    if (!found) return nullptr;
  }
  return Open(paths, {name}, /*stack=*/false);
}

void NetcdfRows::Read(int64_t first, int64_t count, float* to) const {
  Files& files = *files_;
  int64_t row_cells = 1;
  for (size_t d = stack_ ? 2 : 1; d < shape_.size(); ++d) row_cells *= shape_[d];
  const auto cells = static_cast<size_t>(row_cells);
  std::vector<float> values;
  for (size_t p = 0; p < files.parts.size() && count > 0; ++p) {
    const Files::Part& part = files.parts[p];
    if (first >= part.first + part.rows) continue;
    const int64_t take = std::min(count, part.first + part.rows - first);
    const auto taken = static_cast<size_t>(take);
    std::lock_guard lock(library_mutex);
    const Files::Opened& opened = files.Get(p);
    const size_t channels = opened.variables.size();
    for (size_t channel = 0; channel < channels; ++channel) {
      float* straight = to;
      if (channels > 1) {
        values.resize(taken * cells);
        straight = values.data();
      }
      opened.file->Read(opened.variables[channel], first - part.first, take, straight);
      files.missing_cells += opened.decodings[channel].Apply(straight, taken * cells);
      for (size_t row = 0; channels > 1 && row < taken; ++row) {
        std::memcpy(to + (row * channels + channel) * cells, straight + row * cells,
                    cells * sizeof(float));
      }
    }
    to += taken * channels * cells;
    first += take;
    count -= take;
  }
}

int64_t NetcdfRows::missing_cells() const {
  std::lock_guard lock(library_mutex);
  return files_->missing_cells;
}

Array NetcdfRows::ReadIntegers() const {
  const size_t bytes = CheckedBytes(shape_, ElementType::kInt64, "train.data.hdf5");
  CheckFitsMemory("train.data.hdf5: " + files_->parts.front().path.string(), bytes);
  std::vector<std::byte> all(bytes);
  auto* to = reinterpret_cast<int64_t*>(all.data());
  std::lock_guard lock(library_mutex);
  for (size_t p = 0; p < files_->parts.size(); ++p) {
    const Files::Opened& opened = files_->Get(p);
    const int64_t rows = files_->parts[p].rows;
    opened.file->Read(opened.variables.front(), 0, rows, to);
    int64_t elements = rows;
    for (size_t d = 1; d < shape_.size(); ++d) elements *= shape_[d];
    const int64_t wrap = opened.decodings.front().wrap;
    for (int64_t* cell = to; wrap != 0 && cell != to + elements; ++cell)
      *cell += *cell < 0 ? wrap : 0;
    to += elements;
  }
  return OwnedArray(ElementType::kInt64, shape_, std::move(all));
}

std::optional<TimeAxis> NetcdfRows::ReadTimeAxis() const {
  TimeAxis axis;
  std::lock_guard lock(library_mutex);
  for (size_t p = 0; p < files_->parts.size(); ++p) {
    const Files::Opened& opened = files_->Get(p);
    const std::string& dimension = opened.variables.front().dimensions.front();
    const std::string what =
        "train.data.netcdf: " + opened.file->path() + ", variable " + dimension;
    const Variable* coordinate = nullptr;
    const std::vector<Variable> all = opened.file->List();
    for (const Variable& variable : all) {
      if (variable.name == dimension && variable.dimensions.size() == 1) coordinate = &variable;
    }
    if (coordinate == nullptr) return std::nullopt;
    const std::string units = opened.file->Text(*coordinate, "units");
    if (!AreTimeUnits(units)) return std::nullopt;
    if (p == 0) axis.calendar = opened.file->Text(*coordinate, "calendar");
    std::vector<double> values(static_cast<size_t>(coordinate->shape.front()));
    opened.file->Read(*coordinate, 0, coordinate->shape.front(), values.data());
    for (const double value : values) {
      axis.seconds.push_back(CfSeconds(value, units, axis.calendar, what));
    }
  }
  return axis;
}

// A header may lie. For the classic format CheckClassicNetcdf has compared it with the file; for
// NetCDF-4, which may be compressed, the bound is the machine's memory.
NetcdfField ReadAll(const NetcdfRows& rows) {
  Array field = ReadAllRows(rows, "train.data.netcdf");
  return {.field = std::move(field),
          .variables = rows.variables(),
          .missing_cells = rows.missing_cells()};
}

NetcdfField ReadNetcdf(const std::filesystem::path& path,
                       const std::vector<std::string>& variables) {
  return ReadAll(*NetcdfRows::Stack({path}, variables));
}

NetcdfWriter::NetcdfWriter(const std::filesystem::path& path, const std::vector<int64_t>& shape)
    : path_(path.string()), shape_(shape) {
  std::lock_guard lock(library_mutex);
  Check(nc_create(path.c_str(), NC_NETCDF4 | NC_CLOBBER, &file_));
  std::vector<int> dimensions(shape.size());
  for (size_t d = 0; d < shape.size(); ++d) {
    const std::string name = d == 0 ? "sample" : "dim_" + std::to_string(d);
    Check(nc_def_dim(file_, name.c_str(), static_cast<size_t>(shape[d]), &dimensions[d]));
  }
  Check(nc_def_var(file_, "prediction", NC_FLOAT, static_cast<int>(shape.size()), dimensions.data(),
                   &variable_));
  Check(nc_enddef(file_));
}

NetcdfWriter::~NetcdfWriter() {
  std::lock_guard lock(library_mutex);
  if (file_ >= 0) nc_close(file_);
}

void NetcdfWriter::Check(int result) const {
  if (result == NC_NOERR) return;
  const std::string message = "cannot write " + path_ + ": " + nc_strerror(result);
  if (result == ENOSPC || result == EDQUOT) throw ResourceError(message);
  throw AppError(message);
}

void NetcdfWriter::Write(int64_t first, int64_t count, const float* values) {
  std::vector<size_t> start(shape_.size(), 0), counts;
  for (const int64_t size : shape_) counts.push_back(static_cast<size_t>(size));
  start[0] = static_cast<size_t>(first);
  counts[0] = static_cast<size_t>(count);
  std::lock_guard lock(library_mutex);
  Check(nc_put_vara_float(file_, variable_, start.data(), counts.data(), values));
}

void NetcdfWriter::Close() {
  std::lock_guard lock(library_mutex);
  Check(nc_close(std::exchange(file_, -1)));
}

}  // namespace itwin::worker
