#include "agent/worker/data/npy.h"

#include <bit>
#include <charconv>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "agent/worker/data/mapped_file.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

static_assert(std::endian::native == std::endian::little, "readers assume a little-endian machine");

constexpr size_t kMaxHeaderBytes = 1 << 20;
constexpr size_t kMaxDimensions = 32;

// A reader of the few forms that NumPy writes into a header: {'key': 'text' | True | False | (1,
// 2,), …}.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, const std::string& what) : text_(text), what_(what) {}

  void Parse() {
    Expect('{');
    while (!Accept('}')) {
      const std::string key = QuotedText();
      Expect(':');
      if (key == "descr") {
        SkipSpace();
        if (!text_.empty() && text_.front() == '[') {
          throw UnsupportedArray(
              what_ + ": is a structured array (records); save each field as an array of its own");
        }
        descr = QuotedText();
      } else if (key == "fortran_order") {
        fortran_order = Truth();
      } else if (key == "shape") {
        shape = Tuple();
        has_shape = true;
      } else {
        throw Damaged("unknown key \"" + key + "\"");
      }
      if (!Accept(',')) {
        Expect('}');
        break;
      }
    }
    if (descr.empty() || !has_shape) throw Damaged("descr or shape is absent");
  }

  std::string descr;
  bool fortran_order = false;
  bool has_shape = false;
  std::vector<int64_t> shape;

 private:
  WorkerError Damaged(const std::string& why) const {
    return UserError(what_ + ": bad .npy header (" + why + "); save it again with numpy.save");
  }
  void SkipSpace() {
    while (!text_.empty() && (text_.front() == ' ' || text_.front() == '\n'))
      text_.remove_prefix(1);
  }
  bool Accept(char c) {
    SkipSpace();
    if (text_.empty() || text_.front() != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  void Expect(char c) {
    if (!Accept(c)) throw Damaged(std::string("no '") + c + "' where one belongs");
  }
  std::string QuotedText() {
    SkipSpace();
    const char quote = !text_.empty() && text_.front() == '"' ? '"' : '\'';
    Expect(quote);
    const size_t end = text_.find(quote);
    if (end == std::string_view::npos) throw Damaged("a text does not end");
    std::string value(text_.substr(0, end));
    text_.remove_prefix(end + 1);
    return value;
  }
  bool Truth() {
    SkipSpace();
    for (const auto& [word, value] :
         {std::pair{std::string_view("True"), true}, {"False", false}}) {
      if (text_.substr(0, word.size()) == word) {
        text_.remove_prefix(word.size());
        return value;
      }
    }
    throw Damaged("fortran_order is neither True nor False");
  }
  std::vector<int64_t> Tuple() {
    std::vector<int64_t> values;
    Expect('(');
    while (!Accept(')')) {
      SkipSpace();
      int64_t value = 0;
      const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
      if (error != std::errc()) throw Damaged("shape is not a tuple of numbers");
      text_.remove_prefix(static_cast<size_t>(end - text_.data()));
      Accept('L');  // Python 2 wrote long numbers so
      values.push_back(value);
      if (values.size() > kMaxDimensions) throw Damaged("more than 32 dimensions");
      if (!Accept(',')) {
        Expect(')');
        break;
      }
    }
    return values;
  }

  std::string_view text_;
  const std::string& what_;
};

ElementType TypeOf(const std::string& descr, const std::string& what) {
  const std::string kind = descr.substr(descr.find_first_not_of("<>|=") == 0 ? 0 : 1);
  const std::vector<std::pair<std::string_view, ElementType>> known = {
      {"b1", ElementType::kBool},    {"u1", ElementType::kUint8},   {"i1", ElementType::kInt8},
      {"u2", ElementType::kInt16},   {"u4", ElementType::kInt32},  // see Widen
      {"i2", ElementType::kInt16},   {"i4", ElementType::kInt32},   {"i8", ElementType::kInt64},
      {"f2", ElementType::kFloat16}, {"f4", ElementType::kFloat32}, {"f8", ElementType::kFloat64}};
  for (const auto& [name, type] : known) {
    if (kind == name) return type;
  }
  throw UnsupportedArray(what + ": element type '" + descr +
                         "' is not supported; use f2, f4, f8, i1, i2, i4, i8, u1, u2, u4 or bool "
                         "(numpy: array.astype('f4'))");
}

// Unsigned numbers as the signed ones of twice the bytes.
template <typename From, typename To>
Array Widen(const std::byte* elements, ElementType type, std::vector<int64_t> shape, size_t count) {
  std::vector<std::byte> wide(count * sizeof(To));
  for (size_t i = 0; i < count; ++i) {
    From from;
    std::memcpy(&from, elements + i * sizeof(From), sizeof(From));
    const To to = from;
    std::memcpy(wide.data() + i * sizeof(To), &to, sizeof(To));
  }
  return OwnedArray(type, std::move(shape), std::move(wide));
}

}  // namespace

Array ParseNpy(const std::byte* data, size_t size, std::shared_ptr<const void> owner,
               const std::string& what) {
  constexpr size_t kMagicBytes = 8;  // with the version
  if (size < kMagicBytes + 2 || std::memcmp(data, "\x93NUMPY", 6) != 0) {
    throw UserError(what + ": is not a .npy array (its first bytes are not \\x93NUMPY)");
  }
  const int version = std::to_integer<int>(data[6]);
  if (version < 1 || version > 3) {
    throw UserError(what + ": .npy format version " + std::to_string(version) +
                    " is not known; 1, 2 and 3 are");
  }
  const size_t length_bytes = version == 1 ? 2 : 4;
  if (size < kMagicBytes + length_bytes) throw UserError(what + ": ends inside its .npy header");
  size_t header_bytes = 0;
  for (size_t i = 0; i < length_bytes; ++i) {
    header_bytes |= std::to_integer<size_t>(data[kMagicBytes + i]) << (8 * i);
  }
  const size_t start = kMagicBytes + length_bytes;
  if (header_bytes > size - start || header_bytes > kMaxHeaderBytes) {
    throw UserError(what + ": its .npy header claims " + std::to_string(header_bytes) +
                    " bytes, more than there are; the file is cut off or damaged");
  }
  HeaderParser header(std::string_view(reinterpret_cast<const char*>(data) + start, header_bytes),
                      what);
  header.Parse();
  const ElementType type = TypeOf(header.descr, what);
  const size_t bytes = CheckedBytes(header.shape, type, what);
  const size_t available = size - start - header_bytes;
  if (bytes > available) {
    throw UserError(what + ": shape " + ShapeText(header.shape) + " of " + ElementName(type) +
                    " needs " + std::to_string(bytes) + " bytes but the file has " +
                    std::to_string(available) + "; it is cut off");
  }
  // One dimension has the same layout either way.
  if (header.fortran_order && header.shape.size() > 1) {
    throw UnsupportedArray(what +
                           ": is stored in Fortran order (last sample first in memory); save it "
                           "with numpy.save(file, numpy.ascontiguousarray(array))");
  }
  const std::byte* elements = data + start + header_bytes;
  const bool is_unsigned = ElementSize(type) > 1 && header.descr.find('u') != std::string::npos;
  const auto widen = [&](const std::byte* from) {
    const size_t count = bytes / ElementSize(type);
    return type == ElementType::kInt16
               ? Widen<uint16_t, int32_t>(from, ElementType::kInt32, std::move(header.shape), count)
               : Widen<uint32_t, int64_t>(from, ElementType::kInt64, std::move(header.shape),
                                          count);
  };
  if (header.descr[0] == '>' && ElementSize(type) > 1) {
    std::vector<std::byte> swapped(bytes);
    const size_t width = ElementSize(type);
    for (size_t i = 0; i < bytes; i += width) {
      for (size_t j = 0; j < width; ++j) swapped[i + j] = elements[i + width - 1 - j];
    }
    if (is_unsigned) return widen(swapped.data());
    return OwnedArray(type, std::move(header.shape), std::move(swapped));
  }
  if (is_unsigned) return widen(elements);
  Array array;
  array.type = type;
  array.shape = std::move(header.shape);
  array.owner = std::move(owner);
  array.data = elements;
  array.size_bytes = bytes;
  return array;
}

Array ReadNpy(const std::filesystem::path& path) {
  const auto file = MappedFile::Open(path);
  return ParseNpy(file->data(), file->size(), file, path.string());
}

}  // namespace itwin::worker
