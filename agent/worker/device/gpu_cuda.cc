// The only code that includes CUDA's headers, and LibTorch's that need them. LibTorch 1.13 to 2.x.
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "agent/worker/device/gpu.h"

namespace itwin::worker::gpu {
namespace {

constexpr size_t kAllPools = 0;  // StatType::AGGREGATE, whose namespace differs between versions

// Whoever waits for the device gets an error instead, while it lives.
class NobodyWaits {
 public:
  NobodyWaits() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR); }
  ~NobodyWaits() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED); }
};

class CudaGraph : public RecordedWork {
 public:
  void Rehearse(const std::function<void()>& work) override {
    const NobodyWaits nobody;
    work();
  }
  void Record(const std::function<void()>& work) override {
    graph_.capture_begin();
    work();
    graph_.capture_end();
  }
  void Replay() override { graph_.replay(); }

 private:
  at::cuda::CUDAGraph graph_;
};

}  // namespace

bool Built() { return true; }
int Count() { return c10::cuda::device_count(); }

Description Describe(int index) {
  cudaDeviceProp properties{};
  C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  constexpr char kDigits[] = "0123456789abcdef";
  Description description{.name = properties.name, .uuid = ""};
  for (const char byte : properties.uuid.bytes) {
    description.uuid += kDigits[(static_cast<unsigned char>(byte) >> 4) & 15];
    description.uuid += kDigits[static_cast<unsigned char>(byte) & 15];
  }
  return description;
}

Memory ReadMemory(int index) {
  const auto stats =
      c10::cuda::CUDACachingAllocator::getDeviceStats(static_cast<c10::DeviceIndex>(index));
  return {.allocated = stats.allocated_bytes[kAllPools].current,
          .peak = stats.allocated_bytes[kAllPools].peak};
}

void* Native(const c10::Stream& stream) { return c10::cuda::CUDAStream(stream).stream(); }

std::unique_ptr<RecordedWork> MakeGraph() { return std::make_unique<CudaGraph>(); }

}  // namespace itwin::worker::gpu
