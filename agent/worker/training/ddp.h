// Data-parallel gradients: every rank ends each backward pass with the sum over ranks in its
// buckets. Buckets are reduced in a fixed order, each as soon as its gradients are there, while
// backward goes on (with overlap). With one rank: nothing to exchange, the strategy "single".
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "agent/worker/dist/communicator.h"
#include "agent/worker/training/compression.h"
#include "agent/worker/training/flat_parameters.h"
#include "agent/worker/training/gradient_hooks.h"
#include "agent/worker/training/status_exchange.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

class Ddp : public Strategy {
 public:
  struct Options {
    std::string name = "ddp";
    bool overlap = true;
    Compression compression = Compression::kNone;  // of gradients, on the network
  };
  Ddp(FlatParameters& parameters, Communicator& communicator, Options options);

  std::string name() const override { return options_.name; }
  const std::vector<FlatRange>& ranges() const override { return ranges_; }
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
  void OnGradientReady(size_t parameter);
  void LaunchReady();
  std::unique_ptr<Work> Launch(size_t bucket);

  FlatParameters& parameters_;
  Communicator& communicator_;
  const Options options_;
  std::vector<FlatRange> ranges_;
  std::vector<int64_t> used_;
  bool last_ = true;              // of the micro-batches
  std::vector<int64_t> missing_;  // per bucket: gradients that are not there yet in this step
  size_t next_bucket_ = 0;        // to launch
  std::vector<std::unique_ptr<Work>> work_;
  std::vector<std::vector<uint16_t>> compressed_;  // per bucket
  std::vector<at::Tensor> compressed_on_device_;   // instead, of a device
  StatusExchange status_;                          // with compression it travels by itself
  double waited_seconds_ = 0;
  GradientHooks hooks_;  // last: its callback uses all of the above
};

}  // namespace itwin::worker
