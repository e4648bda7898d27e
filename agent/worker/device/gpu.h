// What needs CUDA's own headers, and nothing else: gpu_cuda.cc, which is built where CMake finds a
// LibTorch with CUDA, and gpu_none.cc elsewhere. All other code reaches devices through ATen and c10,
// so it is the same in both builds.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include <c10/core/Stream.h>

#include "agent/worker/device/recorded_work.h"

namespace itwin::worker::gpu {

bool Built();  // with CUDA
// GPUs that this process may use; 0 where there is no driver or none is assigned.
int Count();

struct Description {
  std::string name;  // "NVIDIA H100 80GB HBM3"
  std::string uuid;  // of the GPU, or of the part of it that this process has
};
Description Describe(int index);

// Bytes of tensors on the GPU, now and at most.
struct Memory {
  int64_t allocated = 0, peak = 0;
};
Memory ReadMemory(int index);

// The stream's cudaStream_t, for libraries beside LibTorch.
void* Native(const c10::Stream& stream);

// A CUDA graph. The calling thread's current stream must not be the device's default one.
std::unique_ptr<RecordedWork> MakeGraph();

}  // namespace itwin::worker::gpu
