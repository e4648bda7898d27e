// Data parallelism as Horovod does it: a background thread wakes every cycle, the ranks agree which
// gradients are there on all of them, and those are packed into fusion buffers and reduced. Nothing
// depends on the order in which a rank's gradients become ready, nor on buckets. A rank that has no
// samples joins in with zeros. The numbers are those of an all-reduce, or of Adasum.
#pragma once

#include <condition_variable>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "agent/worker/device/streams.h"
#include "agent/worker/training/gradient_hooks.h"
#include "agent/worker/training/status_exchange.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

class Horovod : public Strategy {
 public:
  struct Options {
    int64_t fusion_bytes = int64_t{64} << 20;
    double cycle_seconds = 1e-3;
    // Gradients of each tensor are combined pairwise so that what two ranks agree on counts once:
    // (1 - ab/2aa) a + (1 - ab/2bb) b. Needs every rank's gradients on every rank for a moment.
    bool adasum = false;
  };
  Horovod(FlatParameters& parameters, Communicator& communicator, Options options);
  // The step must be over.
  ~Horovod() override;

  std::string name() const override { return "horovod"; }
  const std::vector<FlatRange>& ranges() const override { return ranges_; }
  double Weight(int64_t samples, int64_t local, int64_t global) const override {
    return static_cast<double>(samples) / static_cast<double>(options_.adasum ? local : global);
  }
  void BeginBackward(const StepStatus& status, bool last) override;
  void EndBackward() override;
  void WaitGradients(size_t range) override;
  void Updated(size_t) override {}
  StepStatus EndStep(bool* agreed) override;
  std::vector<StateSlice> Owned(std::vector<StateSlice> held) const override;
  std::vector<int> FindDifferingRanks(Communicator& control) override;
  std::vector<int64_t> Unused() const override;
  double waited_seconds() const override { return waited_seconds_; }
  Memory memory() const override;

 private:
  void Run();
  void Cycle();
  void Reduce(const std::vector<size_t>& parameters);

  FlatParameters& parameters_;
  Communicator& communicator_;  // the thread's, once it runs
  const c10::Stream compute_;   // of a device: what this thread gives the device is in its order
  const Options options_;
  const std::vector<FlatRange> ranges_;
  std::vector<int64_t> used_;
  bool last_ = true;
  double waited_seconds_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  enum class State : uint8_t { kComing, kReady, kReduced };
  std::vector<State> states_;
  std::vector<int64_t> missing_;  // per bucket: not yet reduced
  bool active_ = false;           // between BeginBackward and the last reduction
  bool complete_ = false;         // this rank will get no more gradients
  bool stopping_ = false;
  StatusExchange exchange_;
  StepStatus status_;
  std::exception_ptr error_;

  at::Tensor fusion_, gathered_;  // the thread's
  GradientHooks hooks_;
  std::thread thread_;  // last: it uses all of the above
};

// One tensor of all ranks, flat, combined by Adasum into the first: pairs of neighbours first, then pairs
// of pairs. Exposed for its test.
void Adasum(const std::vector<at::Tensor>& ranks);

}  // namespace itwin::worker
