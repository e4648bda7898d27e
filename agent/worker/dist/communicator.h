// What ranks say to each other. A collective is started by every rank of a communicator in the same
// order; it is done when Wait() returns. Implementations: Mpi (processes), InProcess (threads, for
// tests), Self (one).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace itwin::worker {

enum class ElementType { kByte, kInt64, kFloat32, kFloat64 };
enum class Reduction { kSum, kMax };

// Memory of the caller; it must stay and be left alone until the collective is done.
struct Buffer {
  void* data = nullptr;
  int64_t count = 0;  // elements
  ElementType type = ElementType::kByte;
};
inline Buffer BufferOf(std::span<float> v) {
  return {v.data(), static_cast<int64_t>(v.size()), ElementType::kFloat32};
}
inline Buffer BufferOf(std::span<double> v) {
  return {v.data(), static_cast<int64_t>(v.size()), ElementType::kFloat64};
}
inline Buffer BufferOf(std::span<int64_t> v) {
  return {v.data(), static_cast<int64_t>(v.size()), ElementType::kInt64};
}
inline Buffer BufferOf(std::span<char> v) {
  return {v.data(), static_cast<int64_t>(v.size()), ElementType::kByte};
}
int64_t SizeInBytes(const Buffer& buffer);

// A collective that was started. Wait() may be called once, by any thread, and throws what the
// collective met.
class Work {
 public:
  virtual ~Work() = default;
  virtual void Wait() = 0;
};

// One thread at a time starts collectives.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;

  // In place. kByte cannot be reduced. Every rank gets the same bits.
  virtual std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) = 0;
  virtual std::unique_ptr<Work> Broadcast(Buffer buffer, int root) = 0;
  // `mine` has the same size on every rank; `all` holds size() times as much, in rank order.
  virtual std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) = 0;
  virtual std::unique_ptr<Work> Barrier() = 0;
};

// Sends `text` of the root to every rank; returns it.
std::string BroadcastText(Communicator& communicator, std::string text, int root);

}  // namespace itwin::worker
