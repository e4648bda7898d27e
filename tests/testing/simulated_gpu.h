// A device for LibTorch that needs no GPU and behaves as one where the worker could go wrong:
// - its memory cannot be read by the host: addresses are made up, and reading one is a crash;
// - copies and collectives are done later, by a thread per stream, in the stream's order; an operator
//   first waits for what its own stream was given, and for nothing else;
// - memory goes when its stream gets there, as with LibTorch's caching allocator, and who uses it
//   afterwards ends the program;
// - backward runs in a thread of the device.
// Operators are the CPU's, so the numbers are the CPU's, too. It takes the place of LibTorch's XPU, which
// these builds do not have. The library has the functions of CUDA's runtime and of NCCL that
// NcclLibraries wants, over the same streams and memory; ranks are threads, each with a GPU.
#pragma once

#include <chrono>
#include <memory>

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

namespace itwin::worker::testing {

constexpr int kSimulatedGpus = 8;

inline at::Device SimulatedGpu(int index) {
  return at::Device(at::kXPU, static_cast<c10::DeviceIndex>(index));
}

// How long NCCL takes for a collective or a message, before it begins.
void SetNcclTakes(std::chrono::microseconds time);

// Whether collectives fail from now on as they do when another rank has ended.
void SetNcclFails(bool fails);

// As a cudaStream_t of this library.
void* NativeStream(const c10::Stream& stream);

// Makes a new stream of the device the current one of this thread, and of the thread in which the
// device's backward passes run, while it lives.
class ComputeStream {
 public:
  explicit ComputeStream(at::Device device);
  ~ComputeStream();

 private:
  const c10::Stream before_;
};

}  // namespace itwin::worker::testing
