#include "agent/worker/data/idx.h"

#include <string>
#include <utility>
#include <vector>

#include "agent/worker/data/mapped_file.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

ElementType TypeOf(int code, const std::string& what) {
  switch (code) {
    case 0x08:
      return ElementType::kUint8;
    case 0x09:
      return ElementType::kInt8;
    case 0x0b:
      return ElementType::kInt16;
    case 0x0c:
      return ElementType::kInt32;
    case 0x0d:
      return ElementType::kFloat32;
    case 0x0e:
      return ElementType::kFloat64;
    default:
      throw UserError(what + ": IDX element type " + std::to_string(code) +
                      " is not known; the file is damaged");
  }
}

}  // namespace

Array ReadIdx(const std::filesystem::path& path) {
  const auto file = MappedFile::Open(path);
  const std::string what = path.string();
  const std::byte* data = file->data();
  const auto byte = [data](size_t i) { return std::to_integer<int64_t>(data[i]); };
  if (file->size() >= 2 && byte(0) == 0x1f && byte(1) == 0x8b) {
    throw UserError(what + ": is compressed; unpack it first (gunzip)");
  }
  if (file->size() < 4 || byte(0) != 0 || byte(1) != 0) {
    throw UserError(what + ": is not an IDX file (it does not begin with two zero bytes)");
  }
  const ElementType type = TypeOf(static_cast<int>(byte(2)), what);
  const auto dimensions = static_cast<size_t>(byte(3));
  const size_t header_bytes = 4 + 4 * dimensions;
  if (file->size() < header_bytes) throw UserError(what + ": ends inside its IDX header");
  std::vector<int64_t> shape(dimensions);
  for (size_t d = 0; d < dimensions; ++d) {
    const size_t at = 4 + 4 * d;
    shape[d] = byte(at) << 24 | byte(at + 1) << 16 | byte(at + 2) << 8 | byte(at + 3);
  }
  const size_t bytes = CheckedBytes(shape, type, what);
  const size_t available = file->size() - header_bytes;
  if (bytes > available) {
    throw UserError(what + ": shape " + ShapeText(shape) + " of " + ElementName(type) + " needs " +
                    std::to_string(bytes) + " bytes but the file has " + std::to_string(available) +
                    "; it is cut off");
  }
  const size_t width = ElementSize(type);
  if (width > 1) {
    std::vector<std::byte> native(bytes);
    for (size_t i = 0; i < bytes; i += width) {
      for (size_t j = 0; j < width; ++j) native[i + j] = data[header_bytes + i + width - 1 - j];
    }
    return OwnedArray(type, std::move(shape), std::move(native));
  }
  Array array;
  array.type = type;
  array.shape = std::move(shape);
  array.owner = file;
  array.data = data + header_bytes;
  array.size_bytes = bytes;
  return array;
}

}  // namespace itwin::worker
