// Ranks with a GPU each, over NCCL. NCCL and the CUDA runtime are loaded when the first communicator
// is made, so that the same program runs on nodes that have neither. Buffers are device memory.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// The functions of both libraries that are used; one per process.
class NcclLibraries {
 public:
  struct Names {  // tried in turn
    std::vector<std::string> cuda = {"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0",
                                     "libcudart.so"};
    std::vector<std::string> nccl = {"libnccl.so.2", "libnccl.so"};
  };
  // Throws UserError that says which library or function is missing, and what to do.
  static std::unique_ptr<NcclLibraries> Load(const Names& names);
  // Those of the process, with the usual names; loaded at first use.
  static NcclLibraries& Get();
  ~NcclLibraries();

  // GPUs that this process may use; 0 when there is no driver.
  int CountDevices() const;

  struct Functions;
  const Functions& functions() const { return *functions_; }

 private:
  NcclLibraries();
  void* cuda_ = nullptr;
  void* nccl_ = nullptr;
  std::unique_ptr<Functions> functions_;
};

// Whether NCCL can be used here: both libraries and a GPU. A sentence says why not.
bool NcclAvailable(std::string* why_not);

class NcclCommunicator : public Communicator {
 public:
  struct Options {
    int device = 0;
    void* compute_stream = nullptr;  // cudaStream_t whose work a collective waits for
    double timeout_seconds = 600;    // without progress: the communicator is aborted
  };
  // Every rank calls it. `control` (over MPI) carries the unique id, and splits; it becomes this
  // one's.
  NcclCommunicator(std::unique_ptr<Communicator> control, const Options& options);
  ~NcclCommunicator() override;

  int rank() const override { return control_->rank(); }
  int size() const override { return control_->size(); }
  // Collectives run on a stream of their own. Wait() blocks until one is done, and throws when NCCL
  // reports an error of any rank or nothing has moved for the timeout; the communicator is then
  // aborted, which lets the stream go.
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override;
  std::unique_ptr<Work> Broadcast(Buffer buffer, int root) override;
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override;
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override;
  std::unique_ptr<Work> Barrier() override { return control_->Barrier(); }
  std::unique_ptr<Work> Send(Buffer buffer, int to) override;
  std::unique_ptr<Work> Recv(Buffer buffer, int from) override;
  std::unique_ptr<Communicator> Split(int color, int key) override;

 private:
  class Event;
  std::unique_ptr<Work> After(int result, const char* call);
  void WaitForCompute();
  void Abort();

  const std::unique_ptr<Communicator> control_;
  const Options options_;
  NcclLibraries& libraries_;
  void* communicator_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace itwin::worker
