// Every rank trains by itself on its samples; every k steps the parameters become their mean over
// the ranks. Not the same numbers as training with the large batch.
#pragma once

#include <string>
#include <vector>

#include "agent/worker/training/gradient_hooks.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

class LocalSgd : public Strategy {
 public:
  LocalSgd(FlatParameters& parameters, Communicator& communicator, int every);

  std::string name() const override { return "local_sgd"; }
  const std::vector<FlatRange>& ranges() const override { return ranges_; }
  // The mean over this rank's own samples.
  double Weight(int64_t samples, int64_t local, int64_t) const override {
    return static_cast<double>(samples) / static_cast<double>(local);
  }
  double LossWeight(int64_t samples, int64_t local, int64_t global) const override {
    return Weight(samples, local, global);
  }
  void BeginBackward(const StepStatus& status, bool) override { status_ = status; }
  void EndBackward() override {}
  void WaitGradients(size_t) override {}
  void Updated(size_t) override {}
  // The ranks agree in the steps in which they average.
  StepStatus EndStep(bool* agreed) override;
  // Averages now, the optimiser's state too.
  void Consolidate(const std::vector<at::Tensor>& state) override;
  std::vector<StateSlice> Owned(std::vector<StateSlice> held) const override;
  std::vector<int> FindDifferingRanks(Communicator& control) override;
  std::vector<int64_t> Unused() const override;
  double waited_seconds() const override { return waited_seconds_; }
  Memory memory() const override;

 private:
  void Average(const at::Tensor& flat);
  StepStatus EndStepOnDevice(bool* agreed);

  FlatParameters& parameters_;
  Communicator& communicator_;
  const int every_;
  const std::vector<FlatRange> ranges_;
  std::vector<int64_t> used_;
  int64_t steps_ = 0;        // since the ranks were equal
  StepStatus status_;        // of the step under way
  double not_finite_ = 0, trace_ = 0;  // since the ranks spoke
  at::Tensor since_on_device_;         // instead, of a device: sums of the status
  double waited_seconds_ = 0;
  GradientHooks hooks_;
};

}  // namespace itwin::worker
