// The figures of a step (StepStatus) summed over the ranks by a message of their own, where they do not
// travel with gradients.
#pragma once

#include <array>
#include <memory>

#include "agent/worker/dist/communicator.h"
#include "agent/worker/training/step_status.h"

namespace itwin::worker {

class StatusExchange {
 public:
  void Start(const StepStatus& status, Communicator& communicator);
  bool under_way() const { return work_ != nullptr; }
  StepStatus Finish();

 private:
  std::array<double, StepStatus::kFigures> figures_{};
  at::Tensor on_device_;
  std::unique_ptr<Work> work_;
};

}  // namespace itwin::worker
