#include "agent/worker/data/netcdf.h"

#include <netcdf.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "agent/worker/data/nearest_name.h"
#include "agent/worker/data/netcdf_header.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr size_t kMaxListedNames = 40;  // in an error

struct Variable {
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

  std::vector<Variable> List() const {
    int count = 0;
    Check(nc_inq_nvars(id_, &count), "its list of variables");
    std::vector<Variable> variables;
    for (int v = 0; v < count; ++v) {
      Variable variable;
      variable.id = v;
      char name[NC_MAX_NAME + 1] = {};
      int dimension_count = 0;
      int dimension_ids[NC_MAX_VAR_DIMS] = {};
      Check(nc_inq_var(id_, v, name, &variable.type, &dimension_count, dimension_ids, nullptr),
            "a variable's header");
      variable.name = name;
      for (int d = 0; d < dimension_count; ++d) {
        size_t length = 0;
        Check(nc_inq_dim(id_, dimension_ids[d], name, &length), "a dimension's header");
        variable.dimensions.emplace_back(name);
        variable.shape.push_back(static_cast<int64_t>(length));
      }
      variables.push_back(std::move(variable));
    }
    return variables;
  }

  // A numeric attribute's first value, if the variable has one of that name.
  std::optional<double> Number(const Variable& variable, const char* name) const {
    nc_type type = NC_NAT;
    size_t length = 0;
    if (nc_inq_att(id_, variable.id, name, &type, &length) != NC_NOERR || length != 1 ||
        type == NC_CHAR || type == NC_STRING) {
      return std::nullopt;
    }
    double value = 0;
    Check(nc_get_att_double(id_, variable.id, name, &value), std::string("attribute ") + name);
    return value;
  }

  void Read(const Variable& variable, std::vector<float>* cells) const {
    // Values beyond float's range become infinite and are reported as NC_ERANGE; that is no reason
    // to stop.
    const int result = nc_get_var_float(id_, variable.id, cells->data());
    if (result != NC_ERANGE) Check(result, "variable " + variable.name);
  }

 private:
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

// A header may lie. For the classic format CheckClassicNetcdf has compared it with the file; for
// NetCDF-4, which may be compressed, the bound is the machine's memory.
void CheckFitsMemory(const std::filesystem::path& path, size_t bytes) {
  const double memory =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (static_cast<double>(bytes) > memory) {
    throw ResourceError("train.data.netcdf: " + path.string() + ": the variables need " +
                        std::to_string(bytes >> 20) +
                        " MiB, more than this machine has; name fewer in train.data.variables");
  }
}

}  // namespace

NetcdfField ReadNetcdf(const std::filesystem::path& path,
                       const std::vector<std::string>& variables) {
  CheckClassicNetcdf(path);
  const File file(path);
  const std::vector<Variable> selected = Select(file.List(), variables, path.string());
  const std::vector<int64_t>& shape = selected.front().shape;
  std::vector<int64_t> stacked = shape;
  stacked.insert(stacked.begin() + 1, static_cast<int64_t>(selected.size()));
  const size_t bytes =
      CheckedBytes(stacked, ElementType::kFloat32, "train.data.netcdf: " + path.string());
  CheckFitsMemory(path, bytes);

  NetcdfField result;
  std::vector<std::byte> field(bytes);
  const auto samples = static_cast<size_t>(shape[0]);
  const size_t total = bytes / sizeof(float) / selected.size();  // cells of one variable
  const size_t cells = samples == 0 ? 0 : total / samples;       // of one sample
  std::vector<float> values(total);
  for (size_t channel = 0; channel < selected.size(); ++channel) {
    const Variable& variable = selected[channel];
    file.Read(variable, &values);
    // Compared in float, as the cells are: -99.9 in a float file is not the double -99.9.
    std::vector<float> missing;
    for (const char* name : {"_FillValue", "missing_value"}) {
      if (const auto value = file.Number(variable, name))
        missing.push_back(static_cast<float>(*value));
    }
    if (variable.type == NC_FLOAT || variable.type == NC_DOUBLE) {
      missing.push_back(static_cast<float>(NC_FILL_FLOAT));  // never written
    }
    const double scale = file.Number(variable, "scale_factor").value_or(1.0);
    const double offset = file.Number(variable, "add_offset").value_or(0.0);
    const bool packed = scale != 1.0 || offset != 0.0;
    for (float& value : values) {
      if (std::isnan(value) || std::find(missing.begin(), missing.end(), value) != missing.end()) {
        value = std::numeric_limits<float>::quiet_NaN();
        ++result.missing_cells;
      } else if (packed) {
        value = static_cast<float>(value * scale + offset);
      }
    }
    for (size_t sample = 0; sample < samples; ++sample) {
      std::memcpy(field.data() + (sample * selected.size() + channel) * cells * sizeof(float),
                  values.data() + sample * cells, cells * sizeof(float));
    }
    result.variables.push_back(variable.name);
  }
  result.field = OwnedArray(ElementType::kFloat32, std::move(stacked), std::move(field));
  return result;
}

}  // namespace itwin::worker
