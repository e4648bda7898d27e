// The training of one job, from its start or from a checkpoint to its end or a request to stop.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "agent/worker/checkpoint/checkpoint.h"
#include "agent/worker/data/dataset.h"
#include "agent/worker/device/readback.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/model/model.h"
#include "agent/worker/profile/profiler.h"
#include "agent/worker/profile/trace_session.h"
#include "agent/worker/report/metric_sink.h"
#include "agent/worker/spec/train_spec.h"
#include "agent/worker/training/batch_source.h"
#include "agent/worker/training/evaluation.h"
#include "agent/worker/training/features.h"
#include "agent/worker/training/flat_parameters.h"
#include "agent/worker/training/mesh.h"
#include "agent/worker/training/optimizer.h"
#include "agent/worker/training/stop_request.h"
#include "agent/worker/training/step_graph.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

// What the loop works with; all of it must outlive the loop. Each rank has its own.
struct TrainingSetup {
  const TrainSpec& spec;
  const Dataset& dataset;
  Model& model;
  Communicator& gradients;  // busy during backward
  Communicator& control;    // everything else
  MetricSink& metrics;      // of rank 0; the other ranks' drops all
  CheckpointStore& checkpoints;
  StopRequest& stop;
  // A line for people; rank 0's prints, the others' drops it.
  std::function<void(const std::string&)> print;
  std::string spec_sha256;  // see CheckpointHead
  MeshGroups* mesh = nullptr;  // of a strategy that splits the model (IsMesh); the model is its part
  Profiler* profiler = nullptr;   // null: the loop has its own
  TraceSession* trace = nullptr;  // null: no traces
  // Told of every sign of life, with the steps done.
  std::function<void(int64_t)> beat = {};
  // Where the model and the dataset's batches are.
  at::Device device = at::kCPU;
  StepGraph::Make make_graph = {};  // empty: steps are not recorded
  // For tests: all is done on the host as it would be on a device.
  bool as_on_device = false;
  // See CheckpointHead; empty: not compared.
  std::string spec_document = {}, data_document = {};
};

struct TrainingOutcome {
  bool saved = false;  // true: stopped on request, go on from the checkpoint
  std::string message;
  int64_t steps = 0;  // done since the very start
  int64_t epochs = 0;
  int64_t samples = 0;  // trained in this attempt, over all ranks
  std::map<std::string, double> metrics;  // last value of each series that is no per-step series
  std::string weights_sha256;
  std::map<std::string, nlohmann::json> reports;  // files for the outputs, by name
  NamedTensors best;  // on rank 0, where they were kept and are not the model
  // Where no rank holds the whole model its weights are here on rank 0, on the host, and the ranks' models
  // are not to be used any more.
  bool in_pieces = false;
  NamedTensors weights;
};

// Hash of what must be the same for a checkpoint to be gone on from: the `train` part of the spec
// without epochs, steps, evaluation, checkpointing and strategy, and without what only watches the training (`best`,
// `early_stopping`). With a plateau, which is asked after evaluations, `validate_every` counts.
std::string HashSpec(const nlohmann::json& job);
// The same part as a document, for CheckpointHead: specs that mean the same have the same one.
std::string SpecDocument(const nlohmann::json& job);

// Used by one thread.
class TrainingLoop {
 public:
  explicit TrainingLoop(const TrainingSetup& setup);
  ~TrainingLoop();

  // Goes on from a checkpoint instead of the start. Throws UserError when it is of another spec or of
  // other data (saying what differs), AppError when it does not fit the model.
  void Resume(const CheckpointContents& checkpoint);

  // Every rank calls it. Errors that all ranks agree on (a loss that is not finite, weights that
  // differ) are thrown on all of them; any other error is one rank's alone, and the caller must end
  // the job.
  TrainingOutcome Run();

 private:
  struct Clock;

  void RequireSameRun(const CheckpointHead& checkpoint) const;
  bool RunEpoch();  // false: stopped on request
  bool Step();      // false: asked to stop; the step is done
  void MakePhases();
  void StartPhase(size_t phase);
  std::vector<at::Tensor> OptimizerState() const;
  void ForwardAndBackward(const BatchSource::Item& item);
  StepStatus RunMicroBatches(const BatchSource::Item& item, StepStatus status);
  at::Tensor Forward(const Batch& batch);
  std::function<void()> RememberPasses();
  void SetLossGradient(double weight, at::ScalarType type);
  void Backward(const at::Tensor& loss);
  StepStatus UpdateParameters();
  StepStatus Minimize(const BatchSource::Item& item);
  void ClipNormOnDevice(double scale);
  // What a step's figures lead to. On a device those of a step are looked at when the next one has been
  // launched; Settle() does so now. False: asked to stop.
  struct Settling {
    int64_t step = 0, samples = 0;
    bool agreed = true;
    at::Tensor local{};  // this rank's figures
  };
  bool Account(const Settling& step, const StepStatus& status);
  bool Settle();
  StepStatus TakeFigures();
  StepStatus ReadNow(const StepStatus& status);
  void CheckReplicas();
  void RequireNone(const std::vector<int>& differing) const;  // throws on all ranks, names the first
  void FinishEpoch();
  void FinishRun(TrainingOutcome& outcome);
  // Before the first step: what is watched must be among what evaluations give.
  void CheckWatchedMetrics();
  Evaluation EvaluateWith(const Dataset& dataset, Split split, int64_t batch);
  void Validate();  // and lets the features see it
  void EvaluateSplit(Split split);
  void Save();          // begins it; FinishSaving() waits for the disk
  void FinishSaving();
  void ReportStall();
  void HashNow();
  Activity Enter(Activity activity);  // see Profiler; waiting for other ranks is taken out of the one before
  void Beat() const {
    if (setup_.beat) setup_.beat(position_.step);
  }
  std::string HashAllWeights();
  void VisitWeights(const VisitTensor& visit);
  NamedTensors Untrained() const;
  void LoadInPieces(const NamedTensors& weights);
  [[noreturn]] void FailNotFinite(int64_t step);
  void ReportUnusedParameters();
  void ReportProgress(bool now);
  void AppendSpeed(MetricSink::Values* values) const;
  void AppendMemory(MetricSink::Values* values) const;
  void ReportSpeed();

  bool Done() const;
  int64_t TotalSteps() const;
  double ReserveSeconds() const;

  const TrainingSetup setup_;
  const TrainSpec& spec_;
  Model& model_;
  const int rank_, ranks_;
  Communicator& data_;  // the ranks that share the samples; all, unless the model is split

  const std::string strategy_name_;
  FlatParameters parameters_;
  const std::unique_ptr<Strategy> strategy_;
  // One optimiser with all parameters and no method, or the job's phases.
  struct Phase {
    std::string name, method;
    int repeats = 1;
    Optimizer optimizer;
  };
  std::vector<Phase> phases_;
  size_t phase_ = 0;  // under way
  Features features_;
  std::optional<EpochOrder> order_;  // of the epoch under way; outlives the batches' thread
  BatchSource batches_;

  Position position_;
  std::string weights_sha256_;
  int64_t saved_step_ = -1, hashed_step_ = -1;
  std::map<std::string, double> last_metrics_;
  std::map<std::string, double> epoch_metrics_;  // those of the epoch just done
  std::map<std::string, double> test_baselines_;
  std::map<std::string, nlohmann::json> reports_;
  MetricSink::Values step_values_;
  std::unique_ptr<Clock> clock_;
  Profiler own_profiler_;
  Profiler& profiler_;
  double waited_seen_ = 0;  // of the strategy's waits, by the profiler
  bool reported_unused_ = false;
  at::Tensor gradient_of_loss_;  // local samples / global samples, of the step before
  double gradient_weight_ = -1;
  // On a device figures are tensors, and read late.
  const bool late_;
  Readback readback_;
  std::optional<Settling> settling_;
  at::Tensor local_figures_;  // of the step under way
  std::optional<StepGraph> graph_;
  double trace_asked_ = 0;
  bool local_not_finite_ = false;  // in the step under way
  bool agreed_ = true;             // whether the ranks have spoken in the step just done
};

}  // namespace itwin::worker
