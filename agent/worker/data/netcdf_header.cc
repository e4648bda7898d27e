#include "agent/worker/data/netcdf_header.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "agent/worker/data/mapped_file.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr uint32_t kDimensionTag = 10;
constexpr uint32_t kVariableTag = 11;
constexpr uint32_t kAttributeTag = 12;

class HeaderWalker {
 public:
  HeaderWalker(const MappedFile& file, std::string what)
      : file_(file), what_(std::move(what)), version_(std::to_integer<int>(file.data()[3])) {}

  void Walk() {
    at_ = 4;
    const uint64_t records = Count();
    // A file that was still being written says "as many as there are"; the library counts them
    // itself.
    const bool streaming = records == (version_ == 5 ? std::numeric_limits<uint64_t>::max()
                                                     : std::numeric_limits<uint32_t>::max());
    std::vector<uint64_t> dimensions;
    for (uint64_t n = ListLength(kDimensionTag); n > 0; --n) {
      SkipName();
      dimensions.push_back(Count());
    }
    SkipAttributes();
    struct Variable {
      uint64_t begin, bytes;  // bytes of one record, if it has records
      bool has_records;
    };
    std::vector<Variable> variables;
    uint64_t record_bytes = 0, record_variables = 0;
    for (uint64_t n = ListLength(kVariableTag); n > 0; --n) {
      SkipName();
      Variable variable{0, 1, false};
      std::vector<uint64_t> shape;
      const uint64_t rank = Count();
      for (uint64_t d = 0; d < rank; ++d) {
        const uint64_t id = Count();
        if (id >= dimensions.size())
          throw Damaged("a variable names a dimension that is not there");
        if (d == 0 && dimensions[id] == 0) {
          variable.has_records = true;
        } else {
          shape.push_back(dimensions[id]);
        }
      }
      SkipAttributes();
      variable.bytes = TypeBytes(Number(4));
      for (const uint64_t length : shape) variable.bytes = Product(variable.bytes, length);
      Count();  // vsize is redundant, and known to be wrong for large variables
      variable.begin = Number(version_ == 1 ? 4 : 8);
      if (variable.has_records) {
        record_bytes = Sum(record_bytes, Padded(variable.bytes));
        ++record_variables;
      }
      variables.push_back(variable);
    }
    for (const Variable& variable : variables) {
      uint64_t end = Sum(variable.begin, variable.bytes);
      if (variable.has_records) {
        if (streaming || records == 0) continue;
        // The records of a lone variable are not padded.
        const uint64_t stride = record_variables == 1 ? variable.bytes : record_bytes;
        end = Sum(end, Product(records - 1, stride));
      }
      if (end > file_.size()) {
        throw Damaged("its variables need " + std::to_string(end) + " bytes but the file has " +
                      std::to_string(file_.size()));
      }
    }
  }

 private:
  WorkerError Damaged(const std::string& why) const {
    return UserError("train.data.netcdf: " + what_ + " is cut off or damaged: " + why);
  }
  uint64_t Sum(uint64_t a, uint64_t b) const {
    if (a > std::numeric_limits<uint64_t>::max() - b) throw Damaged("a size does not fit 64 bits");
    return a + b;
  }
  uint64_t Product(uint64_t a, uint64_t b) const {
    if (b != 0 && a > std::numeric_limits<uint64_t>::max() / b)
      throw Damaged("a size does not fit 64 bits");
    return a * b;
  }
  uint64_t Padded(uint64_t bytes) const { return Sum(bytes, (4 - bytes % 4) % 4); }

  void Need(uint64_t bytes) const {
    if (bytes > file_.size() - at_) throw Damaged("its header refers to bytes beyond its end");
  }
  void Skip(uint64_t bytes) {
    Need(bytes);
    at_ += bytes;
  }
  uint64_t Number(size_t bytes) {  // big-endian
    Need(bytes);
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; ++i)
      value = value << 8 | std::to_integer<uint64_t>(file_.data()[at_ + i]);
    at_ += bytes;
    return value;
  }
  uint64_t Count() { return Number(version_ == 5 ? 8 : 4); }

  uint64_t ListLength(uint32_t tag) {
    const uint64_t found = Number(4);
    const uint64_t length = Count();
    if (found != tag && (found != 0 || length != 0))
      throw Damaged("its header has a list of an unknown kind");
    Need(length);  // an element has at least one byte
    return length;
  }
  void SkipName() { Skip(Padded(Count())); }
  void SkipAttributes() {
    for (uint64_t n = ListLength(kAttributeTag); n > 0; --n) {
      SkipName();
      const uint64_t bytes = TypeBytes(Number(4));
      Skip(Padded(Product(bytes, Count())));
    }
  }
  uint64_t TypeBytes(uint64_t type) const {
    constexpr uint64_t kBytes[] = {0, 1, 1, 2, 4, 4, 8, 1, 2, 4, 8, 8};
    if (type < 1 || type >= std::size(kBytes))
      throw Damaged("element type " + std::to_string(type) + " is not known");
    return kBytes[type];
  }

  const MappedFile& file_;
  const std::string what_;
  const int version_;
  uint64_t at_ = 0;
};

}  // namespace

void CheckClassicNetcdf(const std::filesystem::path& path) {
  const auto file = MappedFile::Open(path);
  if (file->size() < 4 || std::memcmp(file->data(), "CDF", 3) != 0) return;
  const int version = std::to_integer<int>(file->data()[3]);
  if (version != 1 && version != 2 && version != 5) return;
  HeaderWalker(*file, path.string()).Walk();
}

}  // namespace itwin::worker
