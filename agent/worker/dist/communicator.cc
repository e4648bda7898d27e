#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

int64_t SizeInBytes(const Buffer& buffer) {
  switch (buffer.type) {
    case ElementType::kByte:
      return buffer.count;
    case ElementType::kFloat32:
      return buffer.count * 4;
    case ElementType::kInt64:
    case ElementType::kFloat64:
      return buffer.count * 8;
  }
  return 0;
}

std::string BroadcastText(Communicator& communicator, std::string text, int root) {
  int64_t size = static_cast<int64_t>(text.size());
  communicator.Broadcast(BufferOf(std::span(&size, 1)), root)->Wait();
  text.resize(size);
  if (size > 0) communicator.Broadcast(BufferOf(std::span(text.data(), text.size())), root)->Wait();
  return text;
}

}  // namespace itwin::worker
