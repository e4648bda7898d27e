#include "agent/worker/data/array.h"

#include <unistd.h>

#include <limits>
#include <utility>

#include "agent/worker/error.h"

namespace itwin::worker {

size_t ElementSize(ElementType type) {
  switch (type) {
    case ElementType::kBool:
    case ElementType::kUint8:
    case ElementType::kInt8:
      return 1;
    case ElementType::kInt16:
    case ElementType::kFloat16:
      return 2;
    case ElementType::kInt32:
    case ElementType::kFloat32:
      return 4;
    case ElementType::kInt64:
    case ElementType::kFloat64:
      return 8;
  }
  return 1;
}

const char* ElementName(ElementType type) {
  switch (type) {
    case ElementType::kBool:
      return "bool";
    case ElementType::kUint8:
      return "uint8";
    case ElementType::kInt8:
      return "int8";
    case ElementType::kInt16:
      return "int16";
    case ElementType::kInt32:
      return "int32";
    case ElementType::kInt64:
      return "int64";
    case ElementType::kFloat16:
      return "float16";
    case ElementType::kFloat32:
      return "float32";
    case ElementType::kFloat64:
      return "float64";
  }
  return "?";
}

size_t CheckedBytes(const std::vector<int64_t>& shape, ElementType type, const std::string& what) {
  bool empty = false;
  for (const int64_t dimension : shape) {
    if (dimension < 0) {
      throw UserError(what + ": shape " + ShapeText(shape) +
                      " has a negative dimension; the file is damaged");
    }
    if (dimension == 0) empty = true;
  }
  if (empty) return 0;
  auto product = static_cast<int64_t>(ElementSize(type));
  for (const int64_t dimension : shape) {
    if (dimension > std::numeric_limits<int64_t>::max() / product) {
      throw UserError(what + ": shape " + ShapeText(shape) +
                      " is larger than any memory; the file is damaged");
    }
    product *= dimension;
  }
  return static_cast<size_t>(product);
}

double MachineMemoryBytes() {
  return static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
}

void CheckFitsMemory(const std::string& what, size_t bytes) {
  if (static_cast<double>(bytes) <= MachineMemoryBytes()) return;
  throw ResourceError(what + ": needs " + std::to_string(bytes >> 20) +
                      " MiB, more than this machine has; name less of it, or set train.data.load to stream");
}

Array OwnedArray(ElementType type, std::vector<int64_t> shape, std::vector<std::byte> bytes) {
  auto block = std::make_shared<const std::vector<std::byte>>(std::move(bytes));
  Array array;
  array.type = type;
  array.shape = std::move(shape);
  array.data = block->data();
  array.size_bytes = block->size();
  array.owner = std::move(block);
  return array;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

}  // namespace itwin::worker
