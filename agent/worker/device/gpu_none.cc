// Of a build whose LibTorch has no CUDA: device.cc refuses GPUs before anything else here is called.
#include "agent/worker/device/gpu.h"
#include "agent/worker/error.h"

namespace itwin::worker::gpu {
namespace {
WorkerError NotBuilt() { return AppError("this worker is built without CUDA"); }
}  // namespace

bool Built() { return false; }
int Count() { return 0; }
Description Describe(int) { throw NotBuilt(); }
Memory ReadMemory(int) { throw NotBuilt(); }
void* Native(const c10::Stream&) { throw NotBuilt(); }
std::unique_ptr<RecordedWork> MakeGraph() { throw NotBuilt(); }

}  // namespace itwin::worker::gpu
