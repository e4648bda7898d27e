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

enum class ElementType { kByte, kInt64, kFloat32, kFloat64, kFloat16, kBfloat16 };
enum class Reduction { kSum, kMax };

// Memory of the caller; it must stay and be left alone until the collective is done.
struct Buffer {
  void* data = nullptr;
  int64_t count = 0;  // elements
  ElementType type = ElementType::kByte;
  bool on_device = false;  // memory of a GPU; only for communicators that say that they take it
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
int64_t SizeInBytes(ElementType type);
int64_t SizeInBytes(const Buffer& buffer);

// A collective that was started. Wait() may be called once, by any thread, and throws what the
// collective met. Of a GPU's buffer it may return earlier: then all that the compute stream is given
// afterwards comes after the collective.
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

  // In place. kByte cannot be reduced. Every rank gets the same bits. The 16-bit types are added in
  // float32 and rounded; how often (once, up to size() - 1 times) is the implementation's.
  virtual std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) = 0;
  virtual std::unique_ptr<Work> Broadcast(Buffer buffer, int root) = 0;
  // `mine` has the same size on every rank; `all` holds size() times as much, in rank order. `mine`
  // may be this rank's part of `all`.
  virtual std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) = 0;
  // `all` holds size() parts as long as `mine`, in rank order; `mine` becomes the reduction over all
  // ranks of this rank's part. The two do not overlap; `all` is left as it was.
  virtual std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) = 0;
  virtual std::unique_ptr<Work> Barrier() = 0;

  // Between two ranks; messages from one rank to another arrive in the order sent. A Send may be
  // waited for before its Recv was started only if the buffer is small, so start the Recvs first or
  // wait late.
  virtual std::unique_ptr<Work> Send(Buffer buffer, int to) = 0;
  virtual std::unique_ptr<Work> Recv(Buffer buffer, int from) = 0;

  // Ranks that give the same color become a communicator of their own, ordered by key and, where
  // keys are equal, by rank. Every rank calls it, at a time when nothing is under way. Destroy the
  // result before this one.
  virtual std::unique_ptr<Communicator> Split(int color, int key) = 0;

  // Throws what collectives met that go on after their Wait() has returned, on a GPU. For who waits
  // for the GPU.
  virtual void CheckProgress() {}
};

// Sends `text` of the root to every rank; returns it.
std::string BroadcastText(Communicator& communicator, std::string text, int root);

}  // namespace itwin::worker
