#include "agent/worker/data/zarr.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <system_error>
#include <utility>

#include <nlohmann/json.hpp>

#include "agent/worker/data/mapped_file.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/dist/half.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr size_t kMaxChunkBytes = size_t{1} << 31;  // blosc's limit, and more than a node wants in one piece
constexpr int kMaxGroupDepth = 8;
constexpr size_t kMaxListedArrays = 200;

// Python's json, and so zarr 3, writes NaN and the infinities as bare words, which are no JSON. As texts the format has them, too.
std::string WithQuotedWords(const std::string& text) {
  std::string out;
  bool in_text = false;
  for (size_t i = 0; i < text.size(); ++i) {
    std::string_view word;
    for (const std::string_view candidate : {"NaN", "-Infinity", "Infinity"}) {
      if (!in_text && text.compare(i, candidate.size(), candidate) == 0) word = candidate;
    }
    if (!word.empty()) {
      out.append("\"").append(word).append("\"");
      i += word.size() - 1;
      continue;
    }
    if (text[i] == '"') in_text = !in_text;
    out += text[i];
    if (in_text && text[i] == '\\' && i + 1 < text.size()) out += text[++i];  // what is escaped ends no text
  }
  return out;
}

Json ReadJson(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  Json json = Json::parse(WithQuotedWords(text), nullptr, /*allow_exceptions=*/false);
  if (!file || !json.is_object()) throw UserError(path.string() + " is no JSON object; the store is damaged");
  return json;
}

std::string TextOf(const Json& object, const char* key, const char* otherwise) {
  const Json value = object.value(key, Json());
  return value.is_string() ? value.get<std::string>() : otherwise;
}

// A number, or one of the words for those that JSON has not.
std::optional<double> NumberOf(const Json& json) {
  if (json.is_number()) return json.get<double>();
  if (json.is_boolean()) return json.get<bool>() ? 1 : 0;
  if (json == "NaN") return std::numeric_limits<double>::quiet_NaN();
  if (json == "Infinity") return INFINITY;
  if (json == "-Infinity") return -INFINITY;
  return std::nullopt;
}

void ListArrays(const fs::path& store, const fs::path& directory, int depth, std::vector<std::string>* names) {
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (!it->is_directory(error) || names->size() >= kMaxListedArrays) continue;
    if (fs::exists(it->path() / ".zarray", error)) {
      names->push_back(it->path().lexically_relative(store).generic_string());
    } else if (depth < kMaxGroupDepth) {
      ListArrays(store, it->path(), depth + 1, names);
    }
  }
}

bool LeavesTheStore(const fs::path& name) {
  return name.is_absolute() || std::any_of(name.begin(), name.end(), [](const fs::path& part) { return part == ".."; });
}

template <typename T>
T Bits(const std::byte* from, bool swap) {
  std::byte bytes[sizeof(T)];
  std::memcpy(bytes, from, sizeof(T));
  if (swap) std::reverse(std::begin(bytes), std::end(bytes));
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

// One step further through the cells of a box, the last dimension first. False at the end.
bool Advance(const std::vector<int64_t>& begin, const std::vector<int64_t>& end, size_t dimensions, std::vector<int64_t>* at) {
  for (size_t d = dimensions; d-- > 0;) {
    if (++(*at)[d] < end[d]) return true;
    (*at)[d] = begin[d];
  }
  return false;
}

}  // namespace

void ZarrRows::Refuse(const std::string& problem) const {
  throw UserError("train.data.zarr: " + directory_.string() + " " + problem);
}

std::shared_ptr<const ZarrRows> ZarrRows::Open(const fs::path& store, const std::string& name, bool must_exist) {
  std::error_code error;
  if (fs::exists(store / "zarr.json", error)) {
    throw UserError("train.data.zarr: " + store.string() + " is a store of Zarr version 3; write it with zarr_format=2");
  }
  std::shared_ptr<ZarrRows> rows(new ZarrRows(store, store / name));
  if (!name.empty() && !LeavesTheStore(name) && fs::exists(rows->directory_ / ".zarray", error)) {
    rows->ReadHeader();
    return rows;
  }
  if (!must_exist) return nullptr;
  std::vector<std::string> names;
  ListArrays(store, store, 0, &names);
  std::sort(names.begin(), names.end());
  if (names.empty()) {
    throw UserError("train.data.zarr: " + store.string() + " is no Zarr store of version 2 (no directory below it has a .zarray)");
  }
  throw UserError("train.data.zarr: " + store.string() + " has no array \"" + name + "\"" + NearestHint(name, names) +
                  " (arrays here: " + JoinNames(names) + ")");
}

void ZarrRows::ReadHeader() {
  const Json header = ReadJson(directory_ / ".zarray");
  const Json format = header.value("zarr_format", Json());
  if (format != 2) Refuse("has zarr_format " + format.dump() + "; stores of version 2 are read");
  ReadLayout(header);
  ReadType(TextOf(header, "dtype", ""));
  CheckedBytes(shape_, ElementType::kInt64, directory_.string());
  chunk_bytes_ = CheckedBytes(chunks_, ElementType::kInt8, directory_.string());
  if (chunk_bytes_ > kMaxChunkBytes / element_bytes_) Refuse("has chunks above 2 GiB; write it with smaller ones");
  chunk_bytes_ *= element_bytes_;
  if (const Json filters = header.value("filters", Json()); !filters.is_null() && !filters.empty())
    Refuse("has filters (" + filters.dump() + "), which are not read here; write it without");
  const Json compressor = header.value("compressor", Json());
  std::string why;
  unpack_ = FindUnpack(compressor.is_object() ? TextOf(compressor, "id", "?") : compressor.dump(), &why);
  if (unpack_ == nullptr) Refuse(why);
  ReadFill(header.value("fill_value", Json()));
  ReadAttributes();
}

void ZarrRows::ReadLayout(const Json& header) {
  const auto sizes = [&](const char* key, int64_t least) {
    const Json list = header.value(key, Json());
    std::vector<int64_t> values;
    if (!list.is_array()) Refuse(std::string("has no list `") + key + "` in its .zarray");
    for (const Json& item : list) {
      if (!item.is_number_integer() || item.get<int64_t>() < least)
        Refuse("has " + list.dump() + " as `" + key + "` in its .zarray");
      values.push_back(item.get<int64_t>());
    }
    return values;
  };
  shape_ = sizes("shape", 0);
  chunks_ = sizes("chunks", 1);
  if (shape_.size() != chunks_.size()) Refuse("has a shape and chunks of different lengths in its .zarray");
  if (shape_.empty()) Refuse("is a single number; the first dimension of data is the sample");
  if (TextOf(header, "order", "C") != "C") Refuse("has its chunks in order \"F\"; write it with order=\"C\"");
  const std::string separator = TextOf(header, "dimension_separator", ".");
  if (separator != "." && separator != "/") Refuse("has the dimension_separator \"" + separator + "\"; known: . and /");
  separator_ = separator[0];
}

// "<f4": order of bytes, kind, bytes.
void ZarrRows::ReadType(const std::string& type) {
  const std::pair<char, Kind> kinds[] = {{'f', Kind::kFloat}, {'i', Kind::kSigned}, {'u', Kind::kUnsigned}, {'b', Kind::kUnsigned}};
  const bool shaped = type.size() == 3 && (type[0] == '<' || type[0] == '>' || type[0] == '|');
  const auto* kind = std::find_if(std::begin(kinds), std::end(kinds), [&](const auto& k) { return shaped && type[1] == k.first; });
  const size_t bytes = shaped ? static_cast<size_t>(type[2] - '0') : 0;
  const bool known = kind != std::end(kinds) && (bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8) &&
                     !(kind->second == Kind::kFloat && bytes == 1) && !(type[1] == 'b' && bytes != 1);
  if (!known) Refuse("has elements of type \"" + type + "\"; known: floats of 2, 4 and 8 bytes, integers, bool");
  kind_ = kind->second;
  element_bytes_ = bytes;
  is_integer_ = kind_ != Kind::kFloat;
  swap_ = bytes > 1 && (type[0] == '>') == (std::endian::native == std::endian::little);
}

void ZarrRows::ReadFill(const Json& fill) {
  if (fill.is_null()) return;
  const std::optional<double> number = NumberOf(fill);
  if (!number) Refuse("has the fill_value " + fill.dump() + ", which is no number");
  has_fill_ = true;
  fill_ = *number;
}

double ZarrRows::AsStored(double value) const {
  if (kind_ != Kind::kFloat || element_bytes_ == 8) return value;
  if (element_bytes_ == 4) return static_cast<double>(static_cast<float>(value));
  constexpr double kLargestHalf = 65504;
  return std::abs(value) <= kLargestHalf ? FromFloat16(ToFloat16(static_cast<float>(value))) : value;
}

void ZarrRows::ReadAttributes() {
  std::error_code error;
  const Json attributes = fs::exists(directory_ / ".zattrs", error) ? ReadJson(directory_ / ".zattrs") : Json::object();
  // The numbers of one, a list or alone; `wanted`: how many there must be; 0: any.
  const auto numbers = [&](const char* key, size_t wanted) {
    std::vector<double> values;
    const auto found = attributes.find(key);
    if (found == attributes.end()) return values;
    for (const Json& item : found->is_array() ? *found : Json::array({*found})) {
      const std::optional<double> number = NumberOf(item);
      if (!number) Refuse("has " + found->dump() + " as " + key + " in its .zattrs; it must be a number");
      values.push_back(*number);
    }
    if (wanted != 0 && values.size() != wanted) {
      Refuse("has " + found->dump() + " as " + key + " in its .zattrs; it must have " + std::to_string(wanted) +
             (wanted == 1 ? " number" : " numbers"));
    }
    return values;
  };
  double wrap = 0;  // added to negative numbers
  std::string is_unsigned = TextOf(attributes, "_Unsigned", "");
  for (char& c : is_unsigned) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (kind_ == Kind::kSigned && element_bytes_ < 8 && is_unsigned == "true") {
    kind_ = Kind::kUnsigned;
    wrap = std::ldexp(1.0, static_cast<int>(8 * element_bytes_));
  }
  const auto as_cell = [&](double value) { return AsStored(value < 0 ? value + wrap : value); };
  for (const auto& [key, wanted] : {std::pair{"_FillValue", 1}, {"missing_value", 0}}) {
    for (const double value : numbers(key, static_cast<size_t>(wanted))) decoding_.missing.push_back(as_cell(value));
  }
  for (const double least : numbers("valid_min", 1)) decoding_.Narrow(as_cell(least), INFINITY);
  for (const double most : numbers("valid_max", 1)) decoding_.Narrow(-INFINITY, as_cell(most));
  const std::vector<double> range = numbers("valid_range", 2);
  if (!range.empty()) decoding_.Narrow(as_cell(range[0]), as_cell(range[1]));
  bool packed = false;
  for (const auto& [key, to] : {std::pair{"scale_factor", &decoding_.scale}, {"add_offset", &decoding_.offset}}) {
    for (const double value : numbers(key, 1)) {
      *to = value;
      packed = true;
    }
  }
  is_integer_ = is_integer_ && !packed && !decoding_.MarksMissing();
  fill_ = as_cell(fill_);
  if (has_fill_ && (packed || fill_ != 0)) decoding_.missing.push_back(fill_);
  const Json dimensions = attributes.value("_ARRAY_DIMENSIONS", Json());
  if (dimensions.is_array() && !dimensions.empty() && dimensions[0].is_string()) dimension_ = dimensions[0].get<std::string>();
  units_ = TextOf(attributes, "units", "");
  calendar_ = TextOf(attributes, "calendar", "");
}

std::optional<TimeAxis> ZarrRows::ReadTimeAxis() const {
  if (dimension_.empty()) return std::nullopt;
  // The coordinate lies beside the array or in a group above.
  std::shared_ptr<const ZarrRows> coordinate;
  fs::path group = directory_.lexically_relative(store_).parent_path();
  while (true) {
    coordinate = Open(store_, (group / dimension_).generic_string(), /*must_exist=*/false);
    if (coordinate || group.empty()) break;
    group = group.parent_path();
  }
  if (!coordinate || coordinate->shape_.size() != 1 || !AreTimeUnits(coordinate->units_)) return std::nullopt;
  const int64_t steps = coordinate->shape_[0];
  if (steps != shape_[0]) {
    coordinate->Refuse("has " + std::to_string(steps) + " steps, the data " + std::to_string(shape_[0]));
  }
  TimeAxis axis;
  axis.calendar = coordinate->calendar_;
  const std::string what = "train.data.zarr: " + coordinate->directory_.string();
  for (const double value : coordinate->ReadDoubles()) {
    axis.seconds.push_back(CfSeconds(value, coordinate->units_, axis.calendar, what));
  }
  return axis;
}

std::vector<double> ZarrRows::ReadDoubles() const {
  CheckFitsMemory("train.data.zarr: " + directory_.string(), CheckedBytes(shape_, ElementType::kFloat64, directory_.string()));
  int64_t elements = 1;
  for (const int64_t size : shape_) elements *= size;
  std::vector<double> values(static_cast<size_t>(elements), fill_);
  WithType([&](auto decode) {
    ForRuns(0, shape_[0], [&](const std::byte* from, int64_t at, int64_t count) {
      for (int64_t i = 0; from != nullptr && i < count; ++i)
        values[static_cast<size_t>(at + i)] = static_cast<double>(decode(from + static_cast<size_t>(i) * element_bytes_));
    });
  });
  for (double& value : values) value = value * decoding_.scale + decoding_.offset;
  return values;
}

fs::path ZarrRows::ChunkFile(const std::vector<int64_t>& index) const {
  std::string name;
  for (const int64_t i : index) name += (name.empty() ? "" : std::string(1, separator_)) + std::to_string(i);
  return directory_ / name;
}

std::vector<std::byte> ZarrRows::ReadChunk(const std::vector<int64_t>& index) const {
  const fs::path path = ChunkFile(index);
  std::error_code error;
  if (!fs::exists(path, error)) {
    if (error) Refuse("cannot be read: " + error.message());
    if (!has_fill_) Refuse("lacks the chunk " + path.filename().string() + " and has no fill_value; the store is not whole");
    return {};
  }
  const auto file = MappedFile::Open(path);
  std::vector<std::byte> bytes(chunk_bytes_);
  if (!unpack_(file->data(), file->size(), bytes.data(), bytes.size())) {
    throw UserError("train.data.zarr: the chunk " + path.string() + " is damaged: it does not unpack to the " +
                    std::to_string(chunk_bytes_) + " bytes that .zarray says");
  }
  return bytes;
}

void ZarrRows::ForRuns(int64_t first, int64_t count, const Run& f) const {
  if (count == 0 || std::find(shape_.begin(), shape_.end(), 0) != shape_.end()) return;
  std::vector<int64_t> begin(shape_.size(), 0), end(shape_.size());
  for (size_t d = 0; d < shape_.size(); ++d) {
    if (d == 0) begin[d] = first / chunks_[d];
    end[d] = ((d == 0 ? first + count : shape_[d]) - 1) / chunks_[d] + 1;
  }
  std::vector<int64_t> chunk = begin;
  do {
    CopyRuns(chunk, first, count, f);
  } while (Advance(begin, end, shape_.size(), &chunk));
}

void ZarrRows::CopyRuns(const std::vector<int64_t>& chunk, int64_t first, int64_t count, const Run& f) const {
  const std::vector<std::byte> bytes = ReadChunk(chunk);
  const size_t dimensions = shape_.size();
  std::vector<int64_t> begin(dimensions), end(dimensions);  // of the cells that are wanted
  for (size_t d = 0; d < dimensions; ++d) {
    begin[d] = std::max(d == 0 ? first : 0, chunk[d] * chunks_[d]);
    end[d] = std::min(d == 0 ? first + count : shape_[d], (chunk[d] + 1) * chunks_[d]);
  }
  std::vector<int64_t> cell = begin;
  do {
    int64_t from = 0, to = 0;
    for (size_t d = 0; d < dimensions; ++d) {
      from = from * chunks_[d] + cell[d] - chunk[d] * chunks_[d];
      to = d == 0 ? cell[d] - first : to * shape_[d] + cell[d];
    }
    f(bytes.empty() ? nullptr : bytes.data() + static_cast<size_t>(from) * element_bytes_, to, end.back() - begin.back());
  } while (Advance(begin, end, dimensions - 1, &cell));
}

template <typename F>
void ZarrRows::WithType(F f) const {
  const auto as = [&]<typename T>(T*) { f([swap = swap_](const std::byte* from) { return Bits<T>(from, swap); }); };
  const auto either = [&]<typename S, typename U>(S* of_signed, U* of_unsigned) {
    if (kind_ == Kind::kSigned) {
      as(of_signed);
    } else {
      as(of_unsigned);
    }
  };
  const bool is_float = kind_ == Kind::kFloat;
  switch (element_bytes_) {
    case 1:
      return either(static_cast<int8_t*>(nullptr), static_cast<uint8_t*>(nullptr));
    case 2:
      if (is_float) return f([swap = swap_](const std::byte* from) { return FromFloat16(Bits<uint16_t>(from, swap)); });
      return either(static_cast<int16_t*>(nullptr), static_cast<uint16_t*>(nullptr));
    case 4:
      if (is_float) return as(static_cast<float*>(nullptr));
      return either(static_cast<int32_t*>(nullptr), static_cast<uint32_t*>(nullptr));
    default:
      if (is_float) return as(static_cast<double*>(nullptr));
      return either(static_cast<int64_t*>(nullptr), static_cast<uint64_t*>(nullptr));
  }
}

void ZarrRows::Read(int64_t first, int64_t count, float* to) const {
  WithType([&](auto decode) {
    ForRuns(first, count, [&](const std::byte* from, int64_t at, int64_t elements) {
      if (from == nullptr) {
        std::fill_n(to + at, elements, decoding_(fill_));
        return;
      }
      for (int64_t i = 0; i < elements; ++i)
        to[at + i] = decoding_(static_cast<double>(decode(from + static_cast<size_t>(i) * element_bytes_)));
    });
  });
}

Array ZarrRows::ReadIntegers() const {
  const size_t bytes = CheckedBytes(shape_, ElementType::kInt64, directory_.string());
  CheckFitsMemory("train.data.zarr: " + directory_.string(), bytes);
  std::vector<std::byte> all(bytes);
  auto* to = reinterpret_cast<int64_t*>(all.data());
  WithType([&](auto decode) {
    ForRuns(0, shape_[0], [&](const std::byte* from, int64_t at, int64_t elements) {
      for (int64_t i = 0; i < elements; ++i) {
        to[at + i] = from == nullptr ? static_cast<int64_t>(fill_)
                                     : static_cast<int64_t>(decode(from + static_cast<size_t>(i) * element_bytes_));
      }
    });
  });
  return OwnedArray(ElementType::kInt64, shape_, std::move(all));
}

}  // namespace itwin::worker
