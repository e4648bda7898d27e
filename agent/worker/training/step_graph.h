// The forward and backward passes of a step, recorded once and replayed (RecordedWork): on a GPU the
// host then no longer launches each operator. Batches of another shape than the recorded one, such as
// an epoch's last, and steps of a model that cannot be recorded run as they are.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include <ATen/core/Tensor.h>

#include "agent/worker/data/dataset.h"
#include "agent/worker/device/recorded_work.h"

namespace itwin::worker {

class StepGraph {
 public:
  // Forward, loss and backward, which adds to the gradients where they lie; gives the loss.
  using Passes = std::function<at::Tensor(const Batch&)>;
  using Make = std::function<std::unique_ptr<RecordedWork>()>;
  // Gives what brings back what passes change.
  using Remember = std::function<std::function<void()>()>;

  // `quiet` returns when no other thread gives work to the device; `say` is told, once, why steps are
  // not replayed.
  StepGraph(Passes passes, Make make, Remember remember, std::function<void()> quiet,
            std::function<void(const std::string&)> say);

  // The loss, detached; the next Run() may overwrite it. Throws AppError when a recording broke although
  // its rehearsal had not.
  at::Tensor Run(const Batch& batch);
  bool recorded() const { return graph_ != nullptr; }

 private:
  bool Fits(const Batch& batch) const;
  at::Tensor Rehearse(const Batch& batch);
  void Record(const Batch& batch);

  const Passes passes_;
  const Make make_;
  const Remember remember_;
  const std::function<void()> quiet_;
  const std::function<void(const std::string&)> say_;
  int steps_ = 0;  // of one shape, in a row, before the recording
  bool off_ = false;
  Batch batch_;  // where the recorded step reads; before it: of the last step's shape
  at::Tensor loss_;
  std::unique_ptr<RecordedWork> graph_;
};

}  // namespace itwin::worker
