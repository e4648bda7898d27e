#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

int64_t SizeInBytes(ElementType type) {
  switch (type) {
    case ElementType::kByte:
      return 1;
    case ElementType::kFloat16:
    case ElementType::kBfloat16:
      return 2;
    case ElementType::kFloat32:
      return 4;
    case ElementType::kInt64:
    case ElementType::kFloat64:
      return 8;
  }
  return 0;
}

int64_t SizeInBytes(const Buffer& buffer) { return buffer.count * SizeInBytes(buffer.type); }

std::string BroadcastText(Communicator& communicator, std::string text, int root) {
  int64_t size = static_cast<int64_t>(text.size());
  communicator.Broadcast(BufferOf(std::span(&size, 1)), root)->Wait();
  text.resize(size);
  if (size > 0) communicator.Broadcast(BufferOf(std::span(text.data(), text.size())), root)->Wait();
  return text;
}

}  // namespace itwin::worker
