// What every rank of data parallelism would hold alike is split instead, bucket by bucket, as in
// DeepSpeed's ZeRO and FSDP; rank r keeps part r of size():
//   stage 1  the optimiser's state
//   stage 2  and the gradients: a bucket's memory is there only while backward works on it
//   stage 3  and the parameters: a bucket is gathered when an operator is about to read it
// Gradients are reduce-scattered, so that each rank gets the sum for its part; it updates that part,
// and the parts of the parameters are gathered again (stage 3: when they are next needed).
//
// Stage 3 needs nothing of the model, neither units nor hooks: it watches the operators that the
// thread runs, in forward and in backward, and gathers what they touch just in time. All ranks must
// therefore run the same operators in the same order.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "agent/worker/training/gradient_hooks.h"
#include "agent/worker/training/status_exchange.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

class Zero : public Strategy {
 public:
  struct Options {
    int stage = 1;
    bool overlap = true;  // exchange while backward runs, and gather one bucket ahead
  };
  // Every bucket's length must be a multiple of the communicator's size. With stage 3, the model may
  // be used only by the thread that calls this.
  Zero(FlatParameters& parameters, Communicator& communicator, Options options);
  ~Zero() override;

  std::string name() const override { return "zero" + std::to_string(options_.stage); }
  const std::vector<FlatRange>& ranges() const override { return ranges_; }
  void BeginStep() override;
  void BeginBackward(const StepStatus& status, bool last) override;
  void EndBackward() override;
  void WaitGradients(size_t range) override;
  void Updated(size_t range) override;
  StepStatus EndStep(bool* agreed) override;
  void SumOverShards(std::span<double> figures) override;
  bool sharded() const override { return true; }
  bool lockstep() const override { return options_.stage == 3; }
  bool spread() const override { return options_.stage == 3; }
  void GatherParameters() override;
  void ReleaseParameters() override;
  std::vector<StateSlice> Owned(std::vector<StateSlice> held) const override { return held; }
  std::vector<int> FindDifferingRanks(Communicator& control) override;
  std::vector<int64_t> Unused() const override;
  double waited_seconds() const override { return waited_seconds_; }
  Memory memory() const override;

 private:
  class Watch;
  struct Unit {
    bool present = true;            // values
    bool gradients_present = true;  // the whole bucket's
    std::unique_ptr<Work> gather, reduce;
    at::Tensor received{};   // of a reduction that is to be added
    bool exchanged = false;  // gradients, in this step
    int64_t missing = 0;     // gradients in this backward pass
    int pinned = 0;          // operators under way that use it
    uint64_t touched = 0;
  };

  void Wait(std::unique_ptr<Work>& work);
  void NeedGradients(size_t bucket);
  void OnGradientReady(size_t parameter);
  void LaunchReady();
  void FinishReduce(size_t bucket);
  void StartGather(size_t bucket);
  void Need(size_t bucket);  // values, for an operator
  void Drop(size_t bucket);
  void DropOthers(size_t bucket, size_t most);
  void CountMemory();

  FlatParameters& parameters_;
  Communicator& communicator_;
  const Options options_;
  std::vector<FlatRange> ranges_;  // one per bucket, in the same order
  std::vector<Unit> units_;
  std::vector<int64_t> used_;
  bool last_ = true;
  size_t next_reduce_ = 0;
  StatusExchange status_;
  int full_ = 0;  // GatherParameters without ReleaseParameters
  uint64_t clock_ = 0;
  std::vector<size_t> trace_, last_trace_;  // buckets in the order of first use, of this step so far
  Memory memory_;                           // peaks
  double waited_seconds_ = 0;
  std::unique_ptr<Watch> watch_;
  GradientHooks hooks_;  // last: its callbacks use all of the above
};

}  // namespace itwin::worker
