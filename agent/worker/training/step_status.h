// What the ranks of a step tell each other beside the gradients.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include <ATen/core/Tensor.h>

namespace itwin::worker {

// Figures that travel with the last bucket's gradients, so that agreeing on them costs no message.
// Sums over the ranks once that bucket is reduced.
struct StepStatus {
  static constexpr size_t kFigures = 4;

  double loss = 0;        // local mean loss times local samples / global samples
  double not_finite = 0;  // 1 when this rank's loss is not finite
  double stop = 0;        // 1 when this rank was asked to stop
  double trace = 0;       // steps to trace from the next one on, where somebody asked for that
  // Defined where the figures are still on their way: these four, in this order, as float64 on the
  // device. The numbers above then say nothing.
  at::Tensor on_device{};

  std::array<double, kFigures> figures() const { return {loss, not_finite, stop, trace}; }
  static StepStatus Of(const std::array<double, kFigures>& figures) {
    return {.loss = figures[0], .not_finite = figures[1], .stop = figures[2], .trace = figures[3]};
  }

  // The figures on their way instead; nothing else has been noted yet but stop and trace.
  void MoveTo(at::Device device);
  // The mean loss of some of this rank's samples, which counts `weight`.
  void NoteLoss(const at::Tensor& mean, double weight);
};

}  // namespace itwin::worker
