// What a reader returns: a typed block of memory with a shape. Free of LibTorch, so that readers
// compile fast and can run under sanitizers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace itwin::worker {

enum class ElementType {
  kBool,
  kUint8,
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kFloat16,
  kFloat32,
  kFloat64
};

size_t ElementSize(ElementType type);
const char* ElementName(ElementType type);  // "float32"

// Immutable. Row-major, native byte order. `owner` keeps `data` alive: a heap block or a mapped
// file; the data need not be aligned to the element.
struct Array {
  ElementType type = ElementType::kFloat32;
  std::vector<int64_t> shape;  // empty: a scalar
  std::shared_ptr<const void> owner;
  const std::byte* data = nullptr;
  size_t size_bytes = 0;

  int64_t elements() const { return static_cast<int64_t>(size_bytes / ElementSize(type)); }
};

using NamedArrays = std::map<std::string, Array>;

// Bytes of an array of this shape. Throws UserError, naming `what` (a file, or an array in it), for
// a negative dimension or a product that does not fit 63 bits: headers of files are not to be
// believed.
size_t CheckedBytes(const std::vector<int64_t>& shape, ElementType type, const std::string& what);

double MachineMemoryBytes();
// Throws ResourceError, naming `what`, for more bytes than this machine has.
void CheckFitsMemory(const std::string& what, size_t bytes);

// An array over bytes the caller gives away.
Array OwnedArray(ElementType type, std::vector<int64_t> shape, std::vector<std::byte> bytes);

// "[132, 2, 73, 144]"
std::string ShapeText(const std::vector<int64_t>& shape);

}  // namespace itwin::worker
