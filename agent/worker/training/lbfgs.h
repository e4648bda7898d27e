// L-BFGS on flat ranges, as PyTorch's torch.optim.LBFGS: plain steps, or the strong Wolfe line search.
//
// For strategies where every rank holds all parameters. Loss and gradients are sums over the ranks
// with the same bits on each, and sums here have a fixed order, whatever the threads and the
// processor: so all ranks take the same decisions without a word.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/spec/train_spec.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

class LbfgsMinimizer {
 public:
  using Flat = std::vector<at::Tensor>;  // a tensor for each range

  // The loss at the present parameters over all ranks; its gradient is added to the ranges' gradients.
  using Evaluate = std::function<double()>;

  // `state` holds for each range the tensors of StateNames; what is remembered is kept in them.
  LbfgsMinimizer(const Lbfgs& options, const std::vector<FlatRange>& ranges,
                 const std::vector<std::vector<at::Tensor>>& state);
  static std::vector<std::string> StateNames(const Lbfgs& options);

  struct Result {
    double first_loss = 0;  // before the step
    double last_loss = 0;   // where the last evaluation that was accepted had it
    int evaluations = 0;
  };
  // One step: up to `max_iter` inner iterations, of length `rate` without a line search. The gradients
  // are zero afterwards. Where the loss is not finite at the start, nothing else is done.
  Result Step(double rate, const Evaluate& evaluate);

  // What is remembered beside `state`.
  at::Tensor figures() const;
  // Throws AppError when they are not those of a minimizer with these options.
  void SetFigures(const at::Tensor& figures);

 private:
  struct Point;  // on the line that is searched
  class WolfeSearch;

  size_t Slot(size_t pair) const { return (oldest_ + pair) % rho_.size(); }
  Flat TakeGradients();
  void Remember(const Flat& gradient);
  void FindDirection(const Flat& gradient);
  Point SearchLine(const Point& origin, double largest, const Evaluate& evaluate, int* evaluations);

  const Lbfgs options_;
  Flat values_, gradients_;  // of the ranges
  Flat direction_, previous_gradient_;
  // The pairs of the quasi-Newton matrix, a ring: differences of gradients, steps, 1 / (y s).
  std::vector<Flat> y_, s_;
  std::vector<double> rho_;
  size_t oldest_ = 0, pairs_ = 0;
  int64_t iterations_ = 0;
  double length_ = 0;  // of the last step, in directions
  double scale_ = 1;   // of the first approximation of the inverse Hessian
};

}  // namespace itwin::worker
