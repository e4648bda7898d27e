// Data-parallel gradients: every rank ends each backward pass with the sum over ranks in its
// buckets. Buckets are reduced in a fixed order, each as soon as its gradients are there, while
// backward goes on (with overlap).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "agent/worker/dist/communicator.h"
#include "agent/worker/training/flat_parameters.h"

namespace itwin::worker {

class Ddp {
 public:
  // Broadcasts rank 0's values. `parameters` and `communicator` must outlive it. Hooks stay on the
  // parameters for their life and do nothing once this is gone.
  Ddp(FlatParameters& parameters, Communicator& communicator, bool overlap);
  ~Ddp();

  // Each step, on every rank: BeginStep, then backward (or not, on a rank without samples), then
  // EndBackward, then WaitBucket for each bucket. The status travels with the last bucket.
  void BeginStep(const StepStatus& status);
  void EndBackward();
  void WaitBucket(size_t bucket);

  // Parameters that no step since the start has given a gradient, on this rank: 1 for such, else 0;
  // model order.
  std::vector<int64_t> Unused() const;

  double waited_seconds() const { return waited_seconds_; }

 private:
  struct Hooks;
  void OnGradientReady(size_t parameter);
  void LaunchReady();

  FlatParameters& parameters_;
  Communicator& communicator_;
  const bool overlap_;
  std::vector<int64_t> used_;
  std::vector<int64_t> missing_;  // per bucket: gradients that are not there yet in this step
  size_t next_bucket_ = 0;        // to launch
  std::vector<std::unique_ptr<Work>> work_;
  double waited_seconds_ = 0;
  std::shared_ptr<Hooks> hooks_;
};

}  // namespace itwin::worker
