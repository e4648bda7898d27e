#include "agent/worker/training/status_exchange.h"

#include "agent/worker/training/gradient_hooks.h"

namespace itwin::worker {

void StatusExchange::Start(const StepStatus& status, Communicator& communicator) {
  on_device_.reset();
  if (status.on_device.defined()) {
    on_device_ = status.on_device.clone();
    work_ = communicator.AllReduce(BufferOfTensor(on_device_), Reduction::kSum);
    return;
  }
  figures_ = status.figures();
  work_ = communicator.AllReduce(BufferOf(std::span(figures_)), Reduction::kSum);
}

StepStatus StatusExchange::Finish() {
  work_->Wait();
  work_.reset();
  if (on_device_.defined()) return {.on_device = on_device_};
  return StepStatus::Of(figures_);
}

}  // namespace itwin::worker
