#include "agent/worker/dist/nccl_communicator.h"

#include <dlfcn.h>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// Of nccl.h and cuda_runtime_api.h, which need not be installed; both are fixed by those libraries'
// binary interface.
struct UniqueId {
  char bytes[128];
};
constexpr int kNcclSuccess = 0, kNcclInProgress = 7;
constexpr int kNcclInvalidArgument = 4, kNcclInvalidUsage = 5;
constexpr int kNcclSum = 0, kNcclMax = 2;
constexpr int kCudaSuccess = 0;
constexpr unsigned kStreamNonBlocking = 1, kEventDisableTiming = 2;

int TypeOf(ElementType type) {
  switch (type) {
    case ElementType::kByte:
      return 1;  // ncclUint8
    case ElementType::kInt64:
      return 4;
    case ElementType::kFloat16:
      return 6;
    case ElementType::kFloat32:
      return 7;
    case ElementType::kFloat64:
      return 8;
    case ElementType::kBfloat16:
      return 9;
  }
  return 1;
}
int OpOf(Reduction reduction) { return reduction == Reduction::kSum ? kNcclSum : kNcclMax; }

// The library of this name that the program has already, which is LibTorch's: with another one its
// streams would mean nothing. Else the first that there is.
void* Open(const char* function, const std::vector<std::string>& names, const std::string& what) {
  std::string reason;
  if (dlsym(RTLD_DEFAULT, function) != nullptr) return dlopen(nullptr, RTLD_NOW);
  for (const std::string& name : names) {
    if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    const char* text = dlerror();
    if (reason.empty() && text != nullptr) reason = text;
  }
  throw UserError("GPUs cannot be used: " + what + " is not there (" + reason +
                  "); load its module, or set LD_LIBRARY_PATH to where it lies");
}

template <typename F>
void Find(void* library, const char* name, F* function) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  if (*function == nullptr) {
    throw UserError(std::string("GPUs cannot be used: the library that was found has no function ") +
                    name + "; it is too old, or not what its name says");
  }
}

}  // namespace

struct NcclLibraries::Functions {
  int (*cudaGetDeviceCount)(int*);
  int (*cudaSetDevice)(int);
  int (*cudaStreamCreateWithFlags)(void**, unsigned);
  int (*cudaStreamDestroy)(void*);
  int (*cudaStreamWaitEvent)(void*, void*, unsigned);
  int (*cudaEventCreateWithFlags)(void**, unsigned);
  int (*cudaEventDestroy)(void*);
  int (*cudaEventRecord)(void*, void*);
  const char* (*cudaGetErrorString)(int);
  int (*ncclGetUniqueId)(UniqueId*);
  int (*ncclCommInitRank)(void**, int, UniqueId, int);
  int (*ncclCommDestroy)(void*);
  int (*ncclCommAbort)(void*);
  int (*ncclCommGetAsyncError)(void*, int*);
  const char* (*ncclGetErrorString)(int);
  int (*ncclAllReduce)(const void*, void*, size_t, int, int, void*, void*);
  int (*ncclBroadcast)(const void*, void*, size_t, int, int, void*, void*);
  int (*ncclAllGather)(const void*, void*, size_t, int, void*, void*);
  int (*ncclReduceScatter)(const void*, void*, size_t, int, int, void*, void*);
  int (*ncclSend)(const void*, size_t, int, int, void*, void*);
  int (*ncclRecv)(void*, size_t, int, int, void*, void*);

  void CheckCuda(int result, const char* call) const {
    if (result != kCudaSuccess)
      throw AppError(std::string(call) + ": " + cudaGetErrorString(result));
  }
  void CheckNccl(int result, const char* call) const {
    if (result == kNcclSuccess || result == kNcclInProgress) return;
    // A call that was wrong, or else what the driver, the network or another rank does: another attempt may help.
    const bool ours = result == kNcclInvalidArgument || result == kNcclInvalidUsage;
    throw WorkerError(ours ? FailureClass::kApp : FailureClass::kInfra,
                      std::string(call) + ": " + ncclGetErrorString(result) +
                          (ours ? "" : "; the GPUs, their driver or the network between them is at fault, or a rank has ended"));
  }
};

NcclLibraries::NcclLibraries() : functions_(std::make_unique<Functions>()) {}
NcclLibraries::~NcclLibraries() {
  if (nccl_ != nullptr) dlclose(nccl_);
  if (cuda_ != nullptr) dlclose(cuda_);
}

std::unique_ptr<NcclLibraries> NcclLibraries::Load(const Names& names) {
  std::unique_ptr<NcclLibraries> loaded(new NcclLibraries);
  loaded->cuda_ = Open("cudaGetDeviceCount", names.cuda, "the CUDA runtime (libcudart)");
  loaded->nccl_ = Open("ncclGetUniqueId", names.nccl, "NCCL (libnccl)");
  Functions& f = *loaded->functions_;
#define ITWIN_FIND(library, name) Find(loaded->library, #name, &f.name)
  ITWIN_FIND(cuda_, cudaGetDeviceCount);
  ITWIN_FIND(cuda_, cudaSetDevice);
  ITWIN_FIND(cuda_, cudaStreamCreateWithFlags);
  ITWIN_FIND(cuda_, cudaStreamDestroy);
  ITWIN_FIND(cuda_, cudaStreamWaitEvent);
  ITWIN_FIND(cuda_, cudaEventCreateWithFlags);
  ITWIN_FIND(cuda_, cudaEventDestroy);
  ITWIN_FIND(cuda_, cudaEventRecord);
  ITWIN_FIND(cuda_, cudaGetErrorString);
  ITWIN_FIND(nccl_, ncclGetUniqueId);
  ITWIN_FIND(nccl_, ncclCommInitRank);
  ITWIN_FIND(nccl_, ncclCommDestroy);
  ITWIN_FIND(nccl_, ncclCommAbort);
  ITWIN_FIND(nccl_, ncclCommGetAsyncError);
  ITWIN_FIND(nccl_, ncclGetErrorString);
  ITWIN_FIND(nccl_, ncclAllReduce);
  ITWIN_FIND(nccl_, ncclBroadcast);
  ITWIN_FIND(nccl_, ncclAllGather);
  ITWIN_FIND(nccl_, ncclReduceScatter);
  ITWIN_FIND(nccl_, ncclSend);
  ITWIN_FIND(nccl_, ncclRecv);
#undef ITWIN_FIND
  return loaded;
}

NcclLibraries& NcclLibraries::Get() {
  static const std::unique_ptr<NcclLibraries> loaded = Load({});
  return *loaded;
}

int NcclLibraries::CountDevices() const {
  int count = 0;
  return functions_->cudaGetDeviceCount(&count) == kCudaSuccess ? count : 0;
}

bool NcclAvailable(std::string* why_not) {
  try {
    if (NcclLibraries::Get().CountDevices() > 0) return true;
    *why_not = "GPUs cannot be used: this process sees none, or there is no driver";
  } catch (const WorkerError& error) {
    *why_not = error.what();
  }
  return false;
}

// The end of a collective on the stream.
class NcclCommunicator::Event : public Work {
 public:
  explicit Event(NcclCommunicator& owner) : owner_(owner), f_(owner.libraries_.functions()) {
    f_.CheckCuda(f_.cudaEventCreateWithFlags(&event_, kEventDisableTiming), "cudaEventCreate");
    f_.CheckCuda(f_.cudaEventRecord(event_, owner.stream_), "cudaEventRecord");
  }
  ~Event() override { f_.cudaEventDestroy(event_); }  // CUDA keeps it until it is done

  void Wait() override {
    f_.CheckCuda(f_.cudaStreamWaitEvent(owner_.options_.compute_stream, event_, 0),
                 "cudaStreamWaitEvent");
  }

 private:
  NcclCommunicator& owner_;
  const NcclLibraries::Functions& f_;
  void* event_ = nullptr;
};

NcclCommunicator::NcclCommunicator(std::unique_ptr<Communicator> control, const Options& options)
    : control_(std::move(control)), options_(options), libraries_(NcclLibraries::Get()) {
  const NcclLibraries::Functions& f = libraries_.functions();
  f.CheckCuda(f.cudaSetDevice(options.device), "cudaSetDevice");
  f.CheckCuda(f.cudaStreamCreateWithFlags(&stream_, kStreamNonBlocking), "cudaStreamCreate");
  UniqueId id{};
  if (control_->rank() == 0) f.CheckNccl(f.ncclGetUniqueId(&id), "ncclGetUniqueId");
  control_->Broadcast({id.bytes, sizeof(id.bytes)}, 0)->Wait();
  f.CheckNccl(f.ncclCommInitRank(&communicator_, size(), id, rank()), "ncclCommInitRank");
}

NcclCommunicator::~NcclCommunicator() {
  const NcclLibraries::Functions& f = libraries_.functions();
  if (communicator_ != nullptr) f.ncclCommDestroy(communicator_);
  f.cudaStreamDestroy(stream_);
}

void NcclCommunicator::CheckProgress() {
  if (communicator_ == nullptr) throw AppError("NCCL was aborted");
  const NcclLibraries::Functions& f = libraries_.functions();
  int error = kNcclSuccess;
  f.CheckNccl(f.ncclCommGetAsyncError(communicator_, &error), "ncclCommGetAsyncError");
  if (error == kNcclSuccess || error == kNcclInProgress) return;
  f.ncclCommAbort(communicator_);
  communicator_ = nullptr;
  f.CheckNccl(error, "NCCL, while a collective was under way");
}

template <typename F>
std::unique_ptr<Work> NcclCommunicator::Launch(const char* name, F call) {
  if (communicator_ == nullptr) throw AppError("NCCL was aborted");
  const NcclLibraries::Functions& f = libraries_.functions();
  void* given = nullptr;  // to the compute stream so far
  f.CheckCuda(f.cudaEventCreateWithFlags(&given, kEventDisableTiming), "cudaEventCreate");
  f.CheckCuda(f.cudaEventRecord(given, options_.compute_stream), "cudaEventRecord");
  f.CheckCuda(f.cudaStreamWaitEvent(stream_, given, 0), "cudaStreamWaitEvent");
  f.cudaEventDestroy(given);
  f.CheckNccl(call(f), name);
  if (options_.log != nullptr) options_.log->Launched();
  return std::make_unique<Event>(*this);
}

std::unique_ptr<Work> NcclCommunicator::AllReduce(Buffer b, Reduction reduction) {
  if (!b.on_device) return control_->AllReduce(b, reduction);
  return Launch("ncclAllReduce", [&](const NcclLibraries::Functions& f) {
    return f.ncclAllReduce(b.data, b.data, static_cast<size_t>(b.count), TypeOf(b.type),
                           OpOf(reduction), communicator_, stream_);
  });
}
std::unique_ptr<Work> NcclCommunicator::Broadcast(Buffer b, int root) {
  if (!b.on_device) return control_->Broadcast(b, root);
  return Launch("ncclBroadcast", [&](const NcclLibraries::Functions& f) {
    return f.ncclBroadcast(b.data, b.data, static_cast<size_t>(b.count), TypeOf(b.type), root,
                           communicator_, stream_);
  });
}
std::unique_ptr<Work> NcclCommunicator::AllGather(Buffer mine, Buffer all) {
  if (!mine.on_device) return control_->AllGather(mine, all);
  return Launch("ncclAllGather", [&](const NcclLibraries::Functions& f) {
    return f.ncclAllGather(mine.data, all.data, static_cast<size_t>(mine.count), TypeOf(mine.type),
                           communicator_, stream_);
  });
}
std::unique_ptr<Work> NcclCommunicator::ReduceScatter(Buffer all, Buffer mine,
                                                      Reduction reduction) {
  if (!mine.on_device) return control_->ReduceScatter(all, mine, reduction);
  return Launch("ncclReduceScatter", [&](const NcclLibraries::Functions& f) {
    return f.ncclReduceScatter(all.data, mine.data, static_cast<size_t>(mine.count),
                               TypeOf(mine.type), OpOf(reduction), communicator_, stream_);
  });
}
std::unique_ptr<Work> NcclCommunicator::Send(Buffer b, int to) {
  if (!b.on_device) return control_->Send(b, to);
  return Launch("ncclSend", [&](const NcclLibraries::Functions& f) {
    return f.ncclSend(b.data, static_cast<size_t>(b.count), TypeOf(b.type), to, communicator_,
                      stream_);
  });
}
std::unique_ptr<Work> NcclCommunicator::Recv(Buffer b, int from) {
  if (!b.on_device) return control_->Recv(b, from);
  return Launch("ncclRecv", [&](const NcclLibraries::Functions& f) {
    return f.ncclRecv(b.data, static_cast<size_t>(b.count), TypeOf(b.type), from, communicator_,
                      stream_);
  });
}

std::unique_ptr<Communicator> NcclCommunicator::Split(int color, int key) {
  return std::make_unique<NcclCommunicator>(control_->Split(color, key), options_);
}

}  // namespace itwin::worker
