// Ranks with a GPU each, over NCCL. NCCL and the CUDA runtime are loaded when the first communicator
// is made, so that the same program runs on nodes that have neither. Buffers of the device go through
// NCCL, the others through the communicator over MPI that it is made with.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "agent/worker/dist/collective_log.h"
#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// The functions of both libraries that are used; one per process.
class NcclLibraries {
 public:
  struct Names {  // tried in turn, where the program has not loaded them already
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

// Collectives run on a stream of their own. One waits for what the compute stream has been given when
// it starts; its Wait() makes the compute stream wait for it, and blocks nobody.
class NcclCommunicator : public Communicator {
 public:
  struct Options {
    int device = 0;
    void* compute_stream = nullptr;  // cudaStream_t
    CollectiveLog* log = nullptr;    // of what is launched; may be null
  };
  // Every rank calls it. `control` (over MPI) carries the unique id, splits and the host's buffers; it
  // becomes this one's.
  NcclCommunicator(std::unique_ptr<Communicator> control, const Options& options);
  ~NcclCommunicator() override;

  int rank() const override { return control_->rank(); }
  int size() const override { return control_->size(); }
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override;
  std::unique_ptr<Work> Broadcast(Buffer buffer, int root) override;
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override;
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override;
  std::unique_ptr<Work> Barrier() override { return control_->Barrier(); }
  std::unique_ptr<Work> Send(Buffer buffer, int to) override;
  std::unique_ptr<Work> Recv(Buffer buffer, int from) override;
  std::unique_ptr<Communicator> Split(int color, int key) override;
  // Throws what NCCL reports of any rank; the communicator is then aborted, which lets the stream go.
  void CheckProgress() override;

 private:
  class Event;
  // Launches `call` after what the compute stream has been given.
  template <typename F>
  std::unique_ptr<Work> Launch(const char* name, F call);

  const std::unique_ptr<Communicator> control_;
  const Options options_;
  NcclLibraries& libraries_;
  void* communicator_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace itwin::worker
