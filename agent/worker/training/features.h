// What is watched and kept over a run beside the optimiser: the schedule's plateau, early stopping, the
// best weights, the moving average, the loss scale. The loop asks; nothing here costs anything when it
// is off. All decisions follow from values that are the same on every rank.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "agent/worker/dist/communicator.h"
#include "agent/worker/model/model.h"
#include "agent/worker/training/loss_scaler.h"
#include "agent/worker/training/moving_average.h"
#include "agent/worker/training/schedule.h"
#include "agent/worker/training/selection.h"

namespace itwin::worker {

class Features {
 public:
  // Throws UserError for what cannot work with these data or this strategy.
  Features(const TrainSpec& spec, const RunLength& run, bool has_validation,
           const std::string& strategy, FlatParameters& parameters);
  ~Features();

  // Factor of the learning rate in a step, from 0.
  double RateFactor(int64_t step) const;

  LossScaler* scaler() { return scaler_ ? &*scaler_ : nullptr; }        // null: not fp16
  MovingAverage* average() { return average_ ? &*average_ : nullptr; }  // null: off

  // The metrics that evaluations will give, as "validation/<name>". Throws UserError for what is watched and is
  // not among them, naming the nearest.
  void RequireMetrics(const std::vector<std::string>& names) const;
  // Something is watched.
  bool watches() const { return plateau_ || stopping_ || watch_best_; }

  // After an evaluation on validation, with its metrics as "validation/<name>"; the model is whole and
  // has the weights that were evaluated. Every rank calls it. Returns lines for people.
  std::vector<std::string> Observe(const std::map<std::string, double>& metrics, int64_t step,
                                   Model& model, bool keep_weights);
  // Early stopping has ended the run.
  bool stopped() const { return stopped_; }

  // Best weights were wanted, but the metric was finite in no evaluation.
  bool found_no_best() const { return watch_best_ && watch_best_->state().best_step < 0; }
  // Puts the best weights into the model, which is whole, on every rank; rank 0 has them. Says at which
  // step they were, or -1: there are none, or the last are wanted as the model.
  int64_t ExportBest(Model& model, Communicator& communicator);
  // The best weights and buffers by name, where they are not the model; rank 0's.
  const NamedTensors& best() const { return best_; }

  // For a checkpoint: rank 0's is the state. Names are unlike those of an optimiser. What is watched may
  // differ from that of the checkpoint, and then begins anew; the plateau, which makes the rates, may not.
  NamedTensors State() const;
  void LoadState(const NamedTensors& state);

 private:
  const TrainSpec& spec_;
  const RunLength run_;
  std::optional<Plateau> plateau_;
  std::optional<MetricWatch> stopping_, watch_best_;
  std::optional<LossScaler> scaler_;
  std::optional<MovingAverage> average_;
  NamedTensors best_;
  bool stopped_ = false;
};

}  // namespace itwin::worker
