#include "agent/worker/training/training_loop.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <optional>
#include <set>
#include <utility>

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/device/gpu.h"
#include "agent/worker/error.h"
#include "agent/worker/training/evaluation.h"
#include "agent/worker/training/optimizer_kernels.h"
#include "agent/worker/training/parameter_groups.h"
#include "agent/worker/training/precision.h"
#include "agent/worker/training/run_identity.h"
#include "agent/worker/training/summed_metrics.h"
#include "agent/worker/training/weights.h"

namespace itwin::worker {
namespace {

std::set<std::string> NamesOf(const FlatParameters& parameters) {
  std::set<std::string> names;
  for (const auto& parameter : parameters.parameters()) names.insert(parameter.name);
  return names;
}

constexpr double kProgressSeconds = 0.25;  // between progress lines
constexpr double kPrintSeconds = 0.25;     // between lines for people
constexpr double kPerformanceSeconds = 30;  // between points of speed within an epoch
constexpr double kReserveSeconds = 5;      // kept before the deadline beside the measured save time
// A save's assumed time before one was measured: a slow shared disk, and the time to create the files.
constexpr double kFirstSaveBytesPerSecond = 50e6, kFirstSaveSeconds = 1;
constexpr char kBuffer[] = "buffer/";

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string Text(const char* format, auto... values) {
  char text[256];
  std::snprintf(text, sizeof(text), format, values...);
  return text;
}

std::string StrategyOf(const TrainSpec& spec, int ranks) {
  std::string note;
  return ChooseStrategy(spec, ranks, &note);
}

// Samples [part.first, part.last) of the item; where there are none, its stand-in.
Batch PartOfBatch(const BatchSource::Item& item, const Slice& part) {
  const int64_t samples = item.batch.begin()->second.size(0);
  const int64_t count = std::max<int64_t>(1, part.size());
  if (count == samples) return item.batch;
  Batch batch;
  for (const auto& [name, tensor] : item.batch)
    batch[name] = tensor.narrow(0, part.size() == 0 ? 0 : part.first, count);
  return batch;
}

void AppendParts(const std::vector<StateSlice>& slices, std::vector<TensorPart>* parts) {
  for (const StateSlice& s : slices) parts->push_back({s.name, s.shape, s.offset, s.view});
}
void AppendParts(std::vector<TensorPart> more, std::vector<TensorPart>* parts) {
  for (TensorPart& part : more) parts->push_back(std::move(part));
}

// What dropout draws from.
at::Generator Generator(at::Device device) {
  return at::globalContext().defaultGenerator(device.is_cuda() ? device : at::Device(at::kCPU));
}
std::string GeneratorName(at::Device device) {
  return device.is_cpu() ? "random_generator" : "random_generator/gpu";
}

// Tensors of a device as the host's; nothing for those that are the host's.
void BringToHost(std::vector<TensorPart>* parts) {
  for (TensorPart& part : *parts) part.values = part.values.cpu();
}

// The model's parameters, after those that the job freezes were frozen.
std::vector<std::pair<std::string, at::Tensor>> Unfrozen(const TrainingSetup& setup) {
  auto parameters = setup.model.parameters();
  FreezeParameters(setup.spec.parameter_groups, parameters);
  return parameters;
}

void ScaleAndClamp(const std::vector<FlatRange>& ranges, double scale, double limit) {
  for (const FlatRange& range : ranges) {
    if (!range.gradients.is_cpu()) {
      at::Tensor(range.gradients).mul_(scale).clamp_(-limit, limit);
      continue;
    }
    const int64_t n = range.gradients.numel();
    if (range.gradients.scalar_type() == at::kFloat) {
      kernels::ScaleAndClamp(range.gradients.data_ptr<float>(), n, scale, limit);
    } else {
      kernels::ScaleAndClamp(range.gradients.data_ptr<double>(), n, scale, limit);
    }
  }
}

// The first samples of each split alone.
class FewSamples : public Dataset {
 public:
  FewSamples(const Dataset& all, int64_t count) : all_(all), count_(count) {}

  int64_t size(Split split) const override { return std::min(count_, all_.size(split)); }
  Batch Gather(Split split, const std::vector<int64_t>& indices) const override {
    return all_.Gather(split, indices);
  }
  std::vector<std::string> baselines() const override { return all_.baselines(); }
  std::map<std::string, at::Tensor> BaselinePredictions(const Batch& batch) const override {
    return all_.BaselinePredictions(batch);
  }
  std::map<std::string, std::vector<int64_t>> sample_shapes() const override {
    return all_.sample_shapes();
  }
  int64_t classes() const override { return all_.classes(); }

 private:
  const Dataset& all_;
  const int64_t count_;
};

// Weights and moving average exchanged while it lives; nothing without an average.
class AveragedWeights {
 public:
  explicit AveragedWeights(MovingAverage* average) : average_(average) {
    if (average_ != nullptr) average_->Swap();
  }
  ~AveragedWeights() {
    if (average_ != nullptr) average_->Swap();
  }
  AveragedWeights(const AveragedWeights&) = delete;

 private:
  MovingAverage* const average_;
};

}  // namespace

// Times of this attempt, on this rank.
struct TrainingLoop::Clock {
  double start = Seconds();
  double training = 0;  // in steps
  int64_t samples = 0;  // trained
  double longest_step = 0;
  double save = -1;       // the longest save
  double check = 0;       // in comparing parameters between epochs' ends
  double evaluation = 0;  // the longest evaluation
  double total_evaluation = 0;
  // Since the epoch's start.
  double epoch_training = 0;
  int64_t epoch_samples = 0;
  double data_wait_before = 0, communication_wait_before = 0;  // at the epoch's start, in total
  double performance_at = Seconds();                           // the last points of speed
  // Since the last progress line.
  double progress_at = 0, progress_training = 0;
  int64_t progress_samples = 0;
  double rate = 0;
  double printed_at = 0;
};

namespace {

// What a checkpoint's run and the one that goes on from it must have alike.
nlohmann::json WhatMustStay(const nlohmann::json& job) {
  nlohmann::json train = job.value("train", nlohmann::json::object());
  const nlohmann::json every = train.value("validate_every", nlohmann::json());
  for (const char* key :
       {"epochs", "steps", "validate_every", "checkpoint", "metrics", "strategy", "ddp",
        "accumulate", "check_every", "local_sgd", "horovod", "zero", "mesh", "profile", "gpu",
        "best", "early_stopping"}) {
    train.erase(key);
  }
  const bool plateau = train.contains("schedule") && train["schedule"].is_object() &&
                       train["schedule"].contains("plateau");
  if (plateau && every.is_number() && every != 0 && every != 1) train["validate_every"] = every;
  if (train.contains("data") && train["data"].is_object()) {  // how they are read is no matter
    for (const char* key : {"load", "cache"}) train["data"].erase(key);
  }
  return train;
}

std::string DumpText(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace

std::string HashSpec(const nlohmann::json& job) { return Sha256Hex(DumpText(WhatMustStay(job))); }

std::string SpecDocument(const nlohmann::json& job) {
  return DumpText(CanonicalTrain(WhatMustStay(job)));
}

TrainingLoop::TrainingLoop(const TrainingSetup& setup)
    : setup_(setup),
      spec_(setup.spec),
      model_(setup.model),
      rank_(setup.control.rank()),
      ranks_(setup.control.size()),
      data_(setup.mesh == nullptr ? setup.control : setup.mesh->data()),
      strategy_name_(StrategyOf(spec_, ranks_)),
      parameters_(LayOut(spec_, strategy_name_, Unfrozen(setup), ranks_)),
      strategy_(setup.mesh == nullptr
                    ? MakeStrategy(spec_, strategy_name_, parameters_, setup.gradients)
                    : std::make_unique<Mesh>(strategy_name_, parameters_, *setup.mesh, setup.model,
                                             spec_.ddp)),
      features_(spec_,
                {.steps = TotalSteps(),
                 .steps_per_epoch =
                     (setup.dataset.size(Split::kTrain) + spec_.batch - 1) / spec_.batch},
                setup.dataset.size(Split::kValidation) > 0, strategy_name_, parameters_),
      batches_(setup.dataset, data_.rank(), data_.size(), /*stand_in=*/strategy_->lockstep()),
      clock_(std::make_unique<Clock>()),
      profiler_(setup.profiler != nullptr ? *setup.profiler : own_profiler_),
      late_(!setup.device.is_cpu() || setup.as_on_device),
      readback_(setup.device) {
  if (spec_.phases.empty()) {
    phases_.push_back({"", "", 1, Optimizer(spec_.optimizer, parameters_, strategy_->ranges(), spec_.parameter_groups)});
  } else {
    MakePhases();
  }
  // Dropout differs between ranks: each sees other samples.
  Generator(setup.device).set_current_seed(MixSeed(spec_.seed, static_cast<uint64_t>(rank_) + 1));
  if (setup.as_on_device) {
    for (Phase& phase : phases_) phase.optimizer.UseOperators();
  }
  if (!setup.device.is_cpu()) batches_.UseThread();  // the copy to the device is worth it in any case
  if (!setup.make_graph) return;
  graph_.emplace(
      [this](const Batch& batch) {
        at::Tensor loss = Forward(batch);
        Backward(loss);
        return loss;
      },
      setup.make_graph, [this] { return RememberPasses(); }, [this] { batches_.WaitIdle(); }, setup.print);
}

TrainingLoop::~TrainingLoop() = default;

void TrainingLoop::MakePhases() {
  const std::set<std::string> able = {"single", "ddp", "horovod", "zero1", "zero2"};
  if (!able.contains(strategy_name_)) {
    throw UserError("train.phases: work with the strategies single, ddp, horovod, zero1 and zero2, not with " + strategy_name_);
  }
  for (const PhaseSpec& phase : spec_.phases) {
    phases_.push_back({phase.name, phase.method, phase.repeats,
                       Optimizer(phase.optimizer, parameters_, strategy_->ranges(), spec_.parameter_groups, phase.match,
                                 phase.name)});
  }
  for (size_t i = 0; i < parameters_.parameters().size(); ++i) {
    const std::string& name = parameters_.parameters()[i].name;
    std::string owners;
    int count = 0;
    for (const Phase& phase : phases_) {
      if (!phase.optimizer.Has(i)) continue;
      owners += (count++ ? " and " : "") + phase.name;
    }
    if (count != 1) {
      throw UserError("train.phases: the parameter " + name +
                      (count == 0 ? " belongs to no phase; match it in one, or freeze it" : " belongs to " + owners + "; match it in one"));
    }
  }
  for (const Phase& phase : phases_) {
    bool any = false;
    for (size_t i = 0; i < parameters_.parameters().size(); ++i) any = any || phase.optimizer.Has(i);
    if (!any) throw UserError("train.phases: no parameter's name matches those of " + phase.name);
  }
}

// Only the phase's own parameters get gradients.
void TrainingLoop::StartPhase(size_t phase) {
  phase_ = phase;
  if (phases_.size() == 1) return;
  for (size_t i = 0; i < parameters_.parameters().size(); ++i)
    parameters_.parameters()[i].tensor.set_requires_grad(phases_[phase].optimizer.Has(i));
}

std::vector<at::Tensor> TrainingLoop::OptimizerState() const {
  std::vector<at::Tensor> flat;
  for (const Phase& phase : phases_) {
    const auto more = phase.optimizer.FlatState();
    flat.insert(flat.end(), more.begin(), more.end());
  }
  return flat;
}

void TrainingLoop::RequireSameRun(const CheckpointHead& checkpoint) const {
  const auto parse = [](const std::string& text) { return nlohmann::json::parse(text); };
  if (checkpoint.spec_sha256 != setup_.spec_sha256) {
    if (checkpoint.spec_document.empty() || setup_.spec_document.empty()) {
      throw UserError(
          "the checkpoint belongs to another job: model, data, optimizer, batch and seed must be "
          "the same to go on");
    }
    const std::string differs =
        SpecDifference(parse(checkpoint.spec_document), parse(setup_.spec_document));
    if (!differs.empty()) {
      throw UserError("the checkpoint belongs to another job: " + differs +
                      "; these must be the same to go on");
    }
  }
  if (setup_.data_document.empty()) return;
  if (checkpoint.data_document.empty()) {
    setup_.print(
        "note: the checkpoint is of an older worker and does not say which data it "
        "was trained on; they are not compared");
    return;
  }
  const std::string differs =
      DataDifference(parse(checkpoint.data_document), parse(setup_.data_document));
  if (!differs.empty()) {
    throw UserError("the data are not those that the checkpoint was trained on: " + differs +
                    "; give the same data to go on, or start anew");
  }
}

void TrainingLoop::Resume(const CheckpointContents& checkpoint) {
  RequireSameRun(checkpoint);
  if (strategy_->spread()) {
    LoadInPieces(checkpoint.weights);
  } else {
    LoadWeights(model_, checkpoint.weights);
  }
  for (Phase& phase : phases_) phase.optimizer.LoadState(checkpoint.optimizer, strategy_.get());
  features_.LoadState(checkpoint.optimizer);
  position_ = checkpoint.position;
  if (checkpoint.world_size == ranks_) {
    for (const auto& [name, tensor] : checkpoint.of_rank) {
      if (name == GeneratorName(setup_.device)) Generator(setup_.device).set_state(tensor);
    }
    for (const auto& [name, buffer] : model_.buffers()) {
      for (const auto& [saved, tensor] : checkpoint.of_rank) {
        if (saved == kBuffer + name) buffer.detach().copy_(tensor);
      }
    }
  } else {
    Generator(setup_.device)
        .set_current_seed(MixSeed(spec_.seed, MixSeed(static_cast<uint64_t>(position_.step),
                                                      static_cast<uint64_t>(rank_) + 1)));
  }
  saved_step_ = position_.step;
  if (HashAllWeights() != checkpoint.weights_sha256) {
    throw AppError(
        "the weights read from the checkpoint do not have the hash they were saved with");
  }
}

TrainingOutcome TrainingLoop::Run() {
  TrainingOutcome outcome;
  clock_->progress_at = Seconds();
  CheckWatchedMetrics();
  bool stopped = false;
  while (!stopped && !Done()) {
    stopped = !RunEpoch();
  }
  if (!stopped && position_.step == 0) {
    throw UserError("not one training step was done; the training split has " +
                    std::to_string(setup_.dataset.size(Split::kTrain)) + " samples, and the batch is " +
                    std::to_string(spec_.batch));
  }
  if (stopped) {
    if (clock_->epoch_training > 0) {
      ReportSpeed();
      setup_.metrics.Write(position_.step, profiler_.EpochValues(profiler_.TakeEpoch(), setup_.control));
    }
    Save();
    FinishSaving();
    outcome.saved = true;
    outcome.message =
        setup_.stop.reason().empty() ? "another rank was asked to stop" : setup_.stop.reason();
    outcome.message += Text("; saved at step %lld", static_cast<long long>(position_.step));
    setup_.print(outcome.message);
  } else {
    FinishRun(outcome);
  }
  if (setup_.trace != nullptr) setup_.trace->Finish(position_.step);
  profiler_.TakeEpoch();
  ReportProgress(/*now=*/true);
  outcome.steps = position_.step;
  outcome.epochs = position_.epoch;
  outcome.samples = clock_->samples;
  outcome.metrics = last_metrics_;
  outcome.weights_sha256 = weights_sha256_;
  return outcome;
}

bool TrainingLoop::RunEpoch() {
  order_.emplace(setup_.dataset.size(Split::kTrain), spec_.batch, spec_.seed, position_.epoch);
  batches_.Start(*order_, position_.next_batch);
  clock_->epoch_training = 0;
  clock_->epoch_samples = 0;
  clock_->data_wait_before = batches_.waited_seconds();
  clock_->communication_wait_before = strategy_->waited_seconds();
  model_.Train(true);
  while (position_.next_batch < order_->batches() &&
         !(spec_.steps > 0 && position_.step >= spec_.steps)) {
    if (!Step()) return false;
    if (features_.stopped()) break;
  }
  if (!Settle()) return false;
  FinishEpoch();
  return true;
}

Activity TrainingLoop::Enter(Activity activity) {
  const double waited = strategy_->waited_seconds();
  const Activity before = profiler_.Enter(activity);
  profiler_.Move(before, Activity::kCommunication, waited - waited_seen_);
  waited_seen_ = waited;
  return before;
}

bool TrainingLoop::Step() {
  const double start = Seconds();
  Beat();
  setup_.checkpoints.Poll();
  if (setup_.trace != nullptr) setup_.trace->BeforeStep();
  profiler_.BeginStep();
  const BatchSource::Item item = batches_.Next();
  StepStatus status;
  if (step_values_.empty()) step_values_ = {{"train/loss", 0.0}};
  for (size_t p = 0; p < phases_.size(); ++p) {
    StartPhase(p);
    for (int n = 0; n < phases_[p].repeats; ++n) {
      Enter(Activity::kForward);
      ForwardAndBackward(item);
      Enter(Activity::kOptimizer);
      if (!reported_unused_) parameters_.CheckGradientViews();
      StepStatus mine = phases_[p].optimizer.searches() ? Minimize(item) : UpdateParameters();
      if (phases_.size() == 1 && phases_[p].repeats == 1) {
        status = std::move(mine);
        continue;
      }
      if (mine.on_device.defined()) mine = ReadNow(mine);
      if (n == 0) status.loss += mine.loss;
      status.not_finite += mine.not_finite;
      status.stop += mine.stop;
      status.trace = std::max(status.trace, mine.trace);
      if (phases_.size() == 1) continue;
      if (step_values_.size() < 2 + p) step_values_.emplace_back("train/" + phases_[p].name + "_loss", 0.0);
      step_values_[1 + p].second = mine.loss;
    }
  }
  if (phases_.size() > 1) {
    for (const auto& parameter : parameters_.parameters()) parameter.tensor.set_requires_grad(true);
  }
  Enter(Activity::kOther);
  ++position_.step;
  ++position_.next_batch;
  const Settling step{position_.step, item.global_samples, agreed_, local_figures_};
  bool go_on = true;
  if (!status.on_device.defined()) {
    go_on = Account(step, status);
  } else {
    go_on = Settle();  // the step before
    readback_.Start(status.on_device);
    settling_ = step;
  }
  if (!reported_unused_ && agreed_) ReportUnusedParameters();
  if (spec_.check_every > 0 && position_.step % spec_.check_every == 0) CheckReplicas();
  const double seconds = Seconds() - start;
  clock_->training += seconds;
  clock_->epoch_training += seconds;
  clock_->longest_step = std::max(clock_->longest_step, seconds);
  clock_->samples += item.global_samples;
  clock_->epoch_samples += item.global_samples;
  profiler_.EndStep(item.global_samples);
  if (setup_.trace != nullptr) {
    if (trace_asked_ > 0) setup_.trace->Start(std::llround(std::exchange(trace_asked_, 0)));
    setup_.trace->AfterStep(position_.step);
  }
  ReportProgress(/*now=*/false);
  // (At an epoch's end they come with the rest.)
  const bool in_epoch = position_.next_batch < order_->batches() && !Done();
  if (go_on && in_epoch && Seconds() - clock_->performance_at >= kPerformanceSeconds) ReportSpeed();
  if (!go_on) {
    Settle();
    return false;
  }
  if (spec_.validate_every_steps > 0 && position_.step % spec_.validate_every_steps == 0 &&
      position_.next_batch < order_->batches()) {
    if (!Settle()) return false;
    strategy_->Consolidate(OptimizerState());
    AverageBuffers(model_, data_);
    Validate();
    model_.Train(true);
  }
  return true;
}

bool TrainingLoop::Settle() {
  if (!settling_) return true;
  const Settling step = *settling_;
  settling_.reset();
  return Account(step, TakeFigures());
}

StepStatus TrainingLoop::TakeFigures() {
  const std::vector<double> figures = readback_.Take([this] { setup_.gradients.CheckProgress(); });
  return {.loss = figures[0], .not_finite = figures[1], .stop = figures[2], .trace = figures[3]};
}

StepStatus TrainingLoop::ReadNow(const StepStatus& status) {
  readback_.Start(status.on_device);
  return TakeFigures();
}

bool TrainingLoop::Account(const Settling& step, const StepStatus& status) {
  position_.epoch_loss_sum += status.loss * static_cast<double>(step.samples);
  position_.epoch_samples += step.samples;
  // Where the ranks have not spoken, the loss is one rank's, which tells the others when they next do.
  const bool bad = status.not_finite > 0 || (step.agreed && !std::isfinite(status.loss));
  if (spec_.stop_on_nan && bad) {
    if (step.local.defined()) local_not_finite_ = step.local[1].item<double>() > 0;
    FailNotFinite(step.step);
  }
  step_values_[0].second = status.loss;
  setup_.metrics.Write(step.step, step_values_);
  trace_asked_ = std::max(trace_asked_, status.trace);
  return status.stop == 0;
}

void TrainingLoop::ForwardAndBackward(const BatchSource::Item& item) {
  StepStatus status;
  status.stop = setup_.stop.Poll(ReserveSeconds()) ? 1 : 0;
  if (setup_.trace != nullptr) status.trace = static_cast<double>(setup_.trace->Asked());
  if (late_) status.MoveTo(setup_.device);
  strategy_->BeginStep();
  status = strategy_->RunsPasses() ? strategy_->RunPasses(item, status, [this](Activity a) { Enter(a); })
                                   : RunMicroBatches(item, status);
  local_figures_ = status.on_device;
  local_not_finite_ = status.not_finite > 0;
}

StepStatus TrainingLoop::RunMicroBatches(const BatchSource::Item& item, StepStatus status) {
  for (int64_t m = 0; m < spec_.accumulate; ++m) {
    const Slice part = SliceOf(item.local_samples, static_cast<int>(m), spec_.accumulate);
    const bool last = m + 1 == spec_.accumulate;
    if (part.size() == 0 && !strategy_->lockstep()) {
      strategy_->BeginBackward(status, last);
      strategy_->EndBackward();
      continue;
    }
    // A sample that stands in for none counts nothing.
    const double weight =
        part.size() == 0
            ? 0
            : strategy_->Weight(part.size(), item.local_samples, item.global_samples);
    const double scaled = features_.scaler() == nullptr ? weight : weight * features_.scaler()->scale();
    const Batch batch = PartOfBatch(item, part);
    at::Tensor loss;
    if (graph_) {
      SetLossGradient(scaled, at::kDouble);  // the loss's type is not known yet
      loss = graph_->Run(batch);
    } else {
      loss = Forward(batch);
    }
    if (part.size() > 0) {
      status.NoteLoss(loss, strategy_->LossWeight(part.size(), item.local_samples, item.global_samples));
    }
    strategy_->BeginBackward(status, last);
    if (!graph_) {
      Enter(Activity::kBackward);
      SetLossGradient(scaled, loss.scalar_type());
      Backward(loss);
    }
    strategy_->EndBackward();
    Enter(Activity::kForward);
  }
  return status;
}

at::Tensor TrainingLoop::Forward(const Batch& batch) {
  const AutocastScope autocast(spec_.precision, setup_.device);
  const std::string& method = phases_[phase_].method;
  return (method.empty() ? model_.TrainingStep(batch) : model_.PhaseStep(method, batch)).loss;
}

// What the loss counts in the gradient. A recorded step reads it where it was.
void TrainingLoop::SetLossGradient(double weight, at::ScalarType type) {
  const bool there = gradient_of_loss_.defined() && gradient_of_loss_.scalar_type() == type;
  if (there && weight == gradient_weight_) return;
  gradient_weight_ = weight;
  if (there) {
    gradient_of_loss_.fill_(weight);
  } else {
    gradient_of_loss_ = at::scalar_tensor(weight, at::TensorOptions().dtype(type).device(setup_.device));
  }
}

void TrainingLoop::Backward(const at::Tensor& loss) {
  if (gradient_weight_ == 1 && !graph_) {
    loss.backward();
  } else {
    const bool fits = gradient_of_loss_.scalar_type() == loss.scalar_type();
    loss.backward(fits ? gradient_of_loss_ : gradient_of_loss_.to(loss.scalar_type()));
  }
}

// What forward and backward write: gradients and buffers.
std::function<void()> TrainingLoop::RememberPasses() {
  std::vector<std::pair<at::Tensor, at::Tensor>> copies;
  for (const auto& bucket : parameters_.buckets()) copies.emplace_back(bucket.gradients, bucket.gradients.clone());
  for (const auto& [name, buffer] : model_.buffers()) copies.emplace_back(buffer.detach(), buffer.detach().clone());
  return [copies] {
    const at::NoGradGuard no_grad;
    for (auto& [tensor, copy] : copies) at::Tensor(tensor).copy_(copy);
  };
}

StepStatus TrainingLoop::UpdateParameters() {
  const size_t ranges = strategy_->ranges().size();
  const double factor = features_.RateFactor(position_.step);
  LossScaler* const scaler = features_.scaler();
  double scale = scaler == nullptr ? 1 : 1 / scaler->scale();
  const auto wait_for_all = [&] {
    for (size_t r = 0; r < ranges; ++r) strategy_->WaitGradients(r);
  };
  const auto squares_of_all = [&] {
    wait_for_all();
    return strategy_->SquaresOfGradients();
  };
  if (scaler != nullptr && !scaler->Update(!std::isfinite(squares_of_all()))) {
    // The gradients are beyond fp16 and are dropped; the step counts, so all ranks and the order of
    // the samples stay together.
    for (const FlatRange& range : strategy_->ranges()) range.gradients.zero_();
    for (size_t r = 0; r < ranges; ++r) strategy_->Updated(r);
    return strategy_->EndStep(&agreed_);
  }
  if (spec_.clip_value > 0) {
    wait_for_all();
    ScaleAndClamp(strategy_->ranges(), scale, spec_.clip_value);
    scale = 1;
  }
  if (spec_.clip_norm > 0 && late_ && !strategy_->sharded()) {
    wait_for_all();
    ClipNormOnDevice(scale);
    scale = 1;
  } else if (spec_.clip_norm > 0) {
    const double norm = std::sqrt(squares_of_all()) * scale;
    scale *= std::min(1.0, spec_.clip_norm / (norm + 1e-6));
  }
  Optimizer& optimizer = phases_[phase_].optimizer;
  optimizer.BeginStep(factor);
  if (optimizer.needs_norms()) {
    wait_for_all();
    for (size_t r = 0; r < ranges; ++r) optimizer.MeasureRange(r, scale);
    strategy_->SumOverShards(std::span(optimizer.norms()));
  }
  // The first ranges are updated while the last are still on the network.
  for (size_t r = 0; r < ranges; ++r) {
    strategy_->WaitGradients(r);
    optimizer.StepRange(r, scale);
    strategy_->Updated(r);
  }
  const StepStatus status = strategy_->EndStep(&agreed_);
  if (features_.average() != nullptr && phase_ + 1 == phases_.size()) features_.average()->Update();
  return status;
}

// LBFGS: forward and backward have been run once; the search runs them again wherever it looks. The
// step's loss is the one that it begins with.
StepStatus TrainingLoop::Minimize(const BatchSource::Item& item) {
  StepStatus all;
  bool fresh = true;
  const auto evaluate = [&] {
    if (!fresh) {
      Enter(Activity::kForward);
      ForwardAndBackward(item);
      Enter(Activity::kOptimizer);
    }
    fresh = false;
    for (size_t r = 0; r < strategy_->ranges().size(); ++r) strategy_->WaitGradients(r);
    StepStatus status = strategy_->EndStep(&agreed_);
    if (status.on_device.defined()) status = ReadNow(status);  // what comes next depends on it
    all.stop += status.stop;
    all.trace = std::max(all.trace, status.trace);
    return status.loss;
  };
  Optimizer& optimizer = phases_[phase_].optimizer;
  optimizer.BeginStep(features_.RateFactor(position_.step));
  const LbfgsMinimizer::Result result = optimizer.Search(evaluate);
  all.loss = result.first_loss;
  // What was tried and left again may have had any loss.
  if (!std::isfinite(result.last_loss)) all.not_finite = 1;
  step_values_.resize(1);
  step_values_.emplace_back("train/evaluations", result.evaluations);
  for (size_t r = 0; r < strategy_->ranges().size(); ++r) strategy_->Updated(r);
  if (features_.average() != nullptr) features_.average()->Update();
  return all;
}

// As on the host, without waiting for the length.
void TrainingLoop::ClipNormOnDevice(double scale) {
  at::Tensor squares;
  for (const FlatRange& range : strategy_->ranges()) {
    const at::Tensor more = range.gradients.norm().to(at::kDouble).square();
    squares = squares.defined() ? squares.add(more) : more;
  }
  const at::Tensor norm = squares.sqrt().mul(scale);
  const at::Tensor factor = norm.add(1e-6).reciprocal().mul(spec_.clip_norm).clamp_max(1).mul(scale);
  for (const FlatRange& range : strategy_->ranges())
    at::Tensor(range.gradients).mul_(factor.to(range.gradients.scalar_type()));
}

void TrainingLoop::CheckReplicas() {
  if (!agreed_ || ranks_ == 1) return;
  const double start = Seconds();
  const std::vector<int> differing = strategy_->FindDifferingRanks(setup_.control);
  clock_->check += Seconds() - start;
  RequireNone(differing);
}

void TrainingLoop::RequireNone(const std::vector<int>& differing) const {
  if (differing.empty()) return;
  std::string names;
  for (const int rank : differing) names += (names.empty() ? "" : ", ") + std::to_string(rank);
  WorkerError error = AppError(
      Text("at step %lld the parameters of rank ", static_cast<long long>(position_.step)) + names +
          " are not those of the other ranks; results of this run cannot be trusted (faulty memory "
          "or network, or different libraries on the nodes)",
      position_.step);
  error.rank = differing.front();
  throw error;
}

void TrainingLoop::FailNotFinite(int64_t step) {
  std::vector<int64_t> bad(ranks_);
  // The local losses are gone; the ranks tell each other who had a bad one. A sum of finite losses
  // that overflows is rank 0's to report.
  int64_t mine = local_not_finite_ ? 1 : 0;
  setup_.control.AllGather(BufferOf(std::span(&mine, 1)), BufferOf(std::span(bad)))->Wait();
  const auto first = std::find(bad.begin(), bad.end(), 1);
  const int rank = first == bad.end() ? 0 : static_cast<int>(first - bad.begin());
  WorkerError error = AppError(Text("the loss is not finite at step %lld (epoch %lld) on rank %d; "
                                    "a smaller learning rate, `clip_norm` or "
                                    "clean data may help",
                                    static_cast<long long>(step),
                                    static_cast<long long>(position_.epoch + 1), rank),
                               step);
  error.rank = rank;
  throw error;
}

void TrainingLoop::ReportUnusedParameters() {
  reported_unused_ = true;
  std::vector<int64_t> unused = strategy_->Unused();
  for (int64_t& u : unused) u = 1 - u;
  data_.AllReduce(BufferOf(std::span(unused)), Reduction::kMax)->Wait();
  std::string names;
  int count = 0;
  for (size_t i = 0; i < unused.size(); ++i) {
    if (unused[i] != 0) continue;
    if (++count <= 20) names += (names.empty() ? "" : ", ") + parameters_.parameters()[i].name;
  }
  if (count > 0) {
    setup_.print(Text("note: %d parameter(s) got no gradient in the first step: ", count) + names +
                 (count > 20 ? ", …" : ""));
  }
}

void TrainingLoop::FinishEpoch() {
  const bool whole = position_.next_batch >= order_->batches();
  epoch_metrics_.clear();
  MetricSink::Values values;
  if (position_.epoch_samples > 0) {
    values.emplace_back("train/loss_epoch",
                        position_.epoch_loss_sum / static_cast<double>(position_.epoch_samples));
  }
  AppendSpeed(&values);
  for (const Phase& phase : phases_) {
    values.emplace_back(phase.name.empty() ? "train/learning_rate" : "train/" + phase.name + "_learning_rate",
                        phase.optimizer.learning_rate());
  }
  if (LossScaler* scaler = features_.scaler(); scaler != nullptr) {
    values.emplace_back("train/loss_scale", scaler->scale());
    values.emplace_back("train/skipped_steps", static_cast<double>(scaler->state().skipped));
  }
  for (auto& value : profiler_.EpochValues(profiler_.TakeEpoch(), setup_.control)) {
    values.push_back(std::move(value));
  }
  clock_->performance_at = Seconds();
  setup_.metrics.Write(position_.step, values);
  for (const auto& [name, value] : values) epoch_metrics_[name] = last_metrics_[name] = value;
  if (whole) {
    position_ = {.step = position_.step, .epoch = position_.epoch + 1};
  }
  strategy_->Consolidate(OptimizerState());
  AverageBuffers(model_, data_);
  HashNow();

  if (!Done()) {
    // What follows from the evaluation is saved with it.
    if (position_.epoch % spec_.validate_every == 0) Validate();
    const int every = spec_.checkpoint.every_epochs;
    if (every > 0 && position_.epoch % every == 0 && !Done()) Save();
  }
  ReportProgress(/*now=*/true);
  const double now = Seconds();
  if (Done() || now - clock_->printed_at >= kPrintSeconds) {
    clock_->printed_at = now;
    std::string line = Text("epoch %lld/%d", static_cast<long long>(position_.epoch), spec_.epochs);
    for (const char* name :
         {"train/loss_epoch", "validation/loss", "validation/rmse", "validation/accuracy",
          "test/rmse", "test/accuracy", "perf/samples_per_second"}) {
      const auto found = epoch_metrics_.find(name);
      if (found != epoch_metrics_.end()) line += Text("  %s %.5g", name, found->second);
    }
    setup_.print(line);
  }
}

// Of this rank, since the epoch's start.
void TrainingLoop::AppendSpeed(MetricSink::Values* values) const {
  if (clock_->epoch_training <= 0) return;
  values->emplace_back("perf/samples_per_second", static_cast<double>(clock_->epoch_samples) / clock_->epoch_training);
  values->emplace_back("perf/data_wait_s", batches_.waited_seconds() - clock_->data_wait_before);
  values->emplace_back("perf/comm_wait_s", strategy_->waited_seconds() - clock_->communication_wait_before);
  if (clock_->check > 0) values->emplace_back("perf/check_s", clock_->check);
  AppendMemory(values);
}

// In the midst of an epoch, which may last for hours.
void TrainingLoop::ReportSpeed() {
  clock_->performance_at = Seconds();
  MetricSink::Values values;
  AppendSpeed(&values);
  if (!values.empty()) setup_.metrics.Write(position_.step, values);
}

void TrainingLoop::AppendMemory(MetricSink::Values* values) const {
  const Strategy::Memory memory = strategy_->memory();
  int64_t state = 0;
  for (const at::Tensor& flat : OptimizerState()) state += static_cast<int64_t>(flat.nbytes());
  for (const auto& [name, bytes] : {std::pair{"parameters", memory.parameters},
                                    std::pair{"gradients", memory.gradients},
                                    std::pair{"optimizer", state},
                                    std::pair{"parameters_peak", memory.peak_parameters},
                                    std::pair{"gradients_peak", memory.peak_gradients}}) {
    values->emplace_back(std::string("perf/memory_") + name, static_cast<double>(bytes));
  }
  if (!setup_.device.is_cuda()) return;
  const gpu::Memory on_gpu = gpu::ReadMemory(setup_.device.index());
  values->emplace_back("perf/gpu_memory_bytes", static_cast<double>(on_gpu.allocated));
  values->emplace_back("perf/gpu_memory_peak_bytes", static_cast<double>(on_gpu.peak));
}

void TrainingLoop::CheckWatchedMetrics() {
  if (!features_.watches()) return;
  // Two of each rank: with one, a sum over the batch could not be told from a value per sample.
  constexpr int64_t kSamples = 2;
  const FewSamples few(setup_.dataset, kSamples * data_.size());
  at::Generator generator = Generator(setup_.device);
  const at::Tensor random = generator.get_state();  // a module may draw in its evaluation
  const Evaluation evaluation = EvaluateWith(few, Split::kValidation, kSamples);
  generator.set_state(random);
  std::vector<std::string> names;
  for (const auto& [name, value] : evaluation.metrics) names.push_back("validation/" + name);
  features_.RequireMetrics(names);
}

Evaluation TrainingLoop::EvaluateWith(const Dataset& dataset, Split split, int64_t batch) {
  model_.Train(false);
  const at::NoGradGuard no_grad;
  const AutocastScope autocast(spec_.precision, setup_.device);
  return Evaluate(model_, dataset, split, batch, data_, strategy_->lockstep(), [this] { Beat(); });
}

void TrainingLoop::Validate() {
  if (setup_.dataset.size(Split::kValidation) == 0) return EvaluateSplit(Split::kTest);
  const AveragedWeights averaged(features_.average());
  EvaluateSplit(Split::kValidation);
  std::optional<FullParameters> full;
  if (spec_.best) full.emplace(*strategy_);  // rank 0 may keep them
  for (const std::string& line :
       features_.Observe(epoch_metrics_, position_.step, model_, /*keep_weights=*/rank_ == 0)) {
    setup_.print(line);
  }
}

void TrainingLoop::EvaluateSplit(Split split) {
  if (setup_.dataset.size(split) == 0) return;
  const Activity before = Enter(Activity::kEvaluation);
  const double start = Seconds();
  const std::string prefix = split == Split::kValidation ? "validation/" : "test/";
  // Without gradients a batch needs less than half the memory of a training batch.
  const int64_t batch = std::max<int64_t>(1, 2 * ((spec_.batch + data_.size() - 1) / data_.size()));
  const Evaluation evaluation = EvaluateWith(setup_.dataset, split, batch);
  const at::NoGradGuard no_grad;
  std::map<std::string, double> metrics = evaluation.metrics;
  if (const auto confusion = evaluation.sums.find("confusion"); confusion != evaluation.sums.end()) {
    reports_[std::string("confusion-") + (split == Split::kValidation ? "validation" : "test") +
             ".json"] = ConfusionReport(confusion->second);
  }
  if (split == Split::kTest) {
    if (test_baselines_.empty()) {
      test_baselines_ = EvaluateBaselines(setup_.dataset, split, batch, data_);
    }
    for (const auto& [name, rmse] : test_baselines_) {
      metrics[name] = rmse;
      const std::string baseline = name.substr(0, name.size() - std::string("_rmse").size());
      if (metrics.contains("rmse") && rmse > 0)
        metrics["ratio_to_" + baseline] = metrics["rmse"] / rmse;
    }
  }
  MetricSink::Values values;
  for (const auto& [name, value] : metrics) {
    values.emplace_back(prefix + name, value);
    epoch_metrics_[prefix + name] = last_metrics_[prefix + name] = value;
  }
  setup_.metrics.Write(position_.step, values);
  const double seconds = Seconds() - start;
  clock_->evaluation = std::max(clock_->evaluation, seconds);
  clock_->total_evaluation += seconds;
  Enter(before);
}

void TrainingLoop::FinishRun(TrainingOutcome& outcome) {
  // Saved before the last evaluation: if that meets the wall limit, the next attempt only
  // evaluates.
  if (saved_step_ != position_.step) Save();
  if (weights_sha256_.empty()) HashNow();
  // What is given back is what is evaluated: the average of the weights, or the best ones.
  if (features_.average() != nullptr) features_.average()->Swap();
  EvaluateSplit(Split::kValidation);
  if (setup_.dataset.size(Split::kValidation) > 0) {
    std::optional<FullParameters> full;
    if (spec_.best) full.emplace(*strategy_);
    features_.Observe(epoch_metrics_, position_.step, model_, /*keep_weights=*/rank_ == 0);
    const int64_t best = features_.ExportBest(model_, setup_.control);
    if (best >= 0) {
      last_metrics_["train/best_step"] = static_cast<double>(best);
      setup_.print(Text("the model given back is that of step %lld, the best by ",
                        static_cast<long long>(best)) +
                   spec_.best->metric);
    }
    if (features_.found_no_best()) {
      setup_.print("note: " + spec_.best->metric + " was finite in no evaluation, so there are no best weights; the model given "
                   "back has the last");
    }
    outcome.best = features_.best();
  }
  if (spec_.best && spec_.best->export_best) EvaluateSplit(Split::kValidation);
  EvaluateSplit(Split::kTest);
  if (spec_.ema || spec_.best) {
    weights_sha256_ = HashAllWeights();
  }
  outcome.reports = reports_;
  for (const auto& [name, value] : last_metrics_) {
    if (name.starts_with("test/") || name.starts_with("validation/"))
      setup_.print(name + Text(" %.6g", value));
  }
  FinishSaving();
  outcome.message = "";
  if (!strategy_->spread()) return;
  outcome.in_pieces = true;
  VisitWeights([&outcome](const std::string& name, const at::Tensor& tensor) {
    outcome.weights.emplace_back(name, tensor.detach().to(at::kCPU));
  });
  if (rank_ != 0 || !strategy_->holds_model()) return;
  for (const auto& [name, buffer] : model_.buffers()) outcome.weights.emplace_back(name, buffer.detach().to(at::kCPU));
}

void TrainingLoop::Save() {
  const double start = Seconds();
  const Activity before = Enter(Activity::kCheckpoint);
  Beat();
  strategy_->Consolidate(OptimizerState());
  int64_t not_finite = AllFinite(strategy_->ranges()) ? 0 : 1;
  setup_.control.AllReduce(BufferOf(std::span(&not_finite, 1)), Reduction::kMax)->Wait();
  if (not_finite != 0) {
    throw AppError(Text("the weights are not finite at step %lld; they are not saved, the "
                        "checkpoint before stays",
                        static_cast<long long>(position_.step)),
                   position_.step);
  }
  CheckpointParts parts;
  parts.position = position_;
  parts.world_size = ranks_;
  parts.seed = spec_.seed;
  parts.spec_sha256 = setup_.spec_sha256;
  parts.spec_document = setup_.spec_document;
  parts.data_document = setup_.data_document;
  if (hashed_step_ != position_.step) HashNow();
  parts.weights_sha256 = weights_sha256_;
  parts.of_rank.emplace_back(GeneratorName(setup_.device), Generator(setup_.device).get_state());
  NamedTensors buffers;
  for (const auto& [name, tensor] : model_.buffers()) {
    buffers.emplace_back(name, tensor);
    parts.of_rank.emplace_back(kBuffer + name, tensor.cpu());
  }
  // Every tensor's place first, in the model's order (where a rank has the whole model); then what
  // this rank holds of them.
  NamedTensors whole;
  if (strategy_->holds_model()) whole = model_.parameters();
  for (const auto& [name, tensor] : whole) {
    parts.weights.push_back(
        {name, tensor.sizes().vec(), 0, at::empty({0}, tensor.options().requires_grad(false))});
  }
  AppendParts(strategy_->Owned(ParameterSlices(parameters_, strategy_->ranges())), &parts.weights);
  // What the strategy does not have is rank 0's to write: parameters that are not trained, buffers.
  if (rank_ == 0) {
    NamedTensors only_first = Untrained();
    only_first.insert(only_first.end(), buffers.begin(), buffers.end());
    AppendParts(WholeParts(only_first), &parts.weights);
    for (const Phase& phase : phases_) {
      AppendParts(WholeParts(phase.optimizer.WholeState()), &parts.optimizer);
    }
    AppendParts(WholeParts(features_.State()), &parts.optimizer);
  }
  for (const Phase& phase : phases_) {
    AppendParts(strategy_->Owned(phase.optimizer.Slices()), &parts.optimizer);
  }
  BringToHost(&parts.weights);
  BringToHost(&parts.optimizer);
  setup_.checkpoints.Save(parts);
  saved_step_ = position_.step;
  clock_->save = std::max(clock_->save, Seconds() - start);
  ReportStall();
  Enter(before);
}

void TrainingLoop::FinishSaving() {
  const Activity before = Enter(Activity::kCheckpoint);
  setup_.checkpoints.Finish();
  ReportStall();
  Enter(before);
}

void TrainingLoop::ReportStall() {
  setup_.metrics.Write(position_.step,
                       {{"perf/checkpoint_stall_s", setup_.checkpoints.last_stall_seconds()}});
  last_metrics_["perf/checkpoint_stall_s"] = setup_.checkpoints.stall_seconds();
}

void TrainingLoop::HashNow() {
  weights_sha256_ = HashAllWeights();
  hashed_step_ = position_.step;
}

// Compares on the way: throws where ranks that hold the same do not.
std::string TrainingLoop::HashAllWeights() {
  if (!strategy_->spread()) {
    const std::string hash = HashWeights(model_);
    RequireNone(FindDiffering(std::stoull(hash.substr(0, 16), nullptr, 16), setup_.control));
    return hash;
  }
  RequireNone(strategy_->FindDifferingRanks(setup_.control));
  WeightsHash hash;
  VisitWeights([&hash](const std::string& name, const at::Tensor& tensor) { hash.Add(name, tensor); });
  return BroadcastText(setup_.control, rank_ == 0 ? hash.Hex() : "", 0);
}

// Of a model that is spread over the ranks, one tensor after another on rank 0, by name.
void TrainingLoop::VisitWeights(const VisitTensor& visit) {
  std::map<std::string, at::Tensor> others;
  if (rank_ == 0) {
    const NamedTensors untrained = Untrained();
    others.insert(untrained.begin(), untrained.end());
  }
  const auto visit_others = [&](const std::string* before) {
    while (!others.empty() && (before == nullptr || others.begin()->first < *before)) {
      visit(others.begin()->first, others.begin()->second);
      others.erase(others.begin());
    }
  };
  VisitSlices(strategy_->Owned(ParameterSlices(parameters_, strategy_->ranges())), setup_.control,
              [&](const std::string& name, const at::Tensor& tensor) {
                visit_others(&name);
                visit(name, tensor);
              });
  visit_others(nullptr);
}

// Parameters of this rank's model that no optimizer has; none where a rank has not the whole model.
NamedTensors TrainingLoop::Untrained() const {
  if (!strategy_->holds_model()) return {};
  const std::set<std::string> trained = NamesOf(parameters_);
  NamedTensors untrained;
  for (const auto& [name, tensor] : model_.parameters()) {
    if (!trained.contains(name)) untrained.emplace_back(name, tensor);
  }
  return untrained;
}

void TrainingLoop::LoadInPieces(const NamedTensors& weights) {
  ScatterSlices(weights, strategy_->InWhole(ParameterSlices(parameters_, strategy_->ranges())), "the checkpoint");
  if (!strategy_->holds_model()) return;
  NamedTensors others = Untrained();
  for (auto& buffer : model_.buffers()) others.push_back(std::move(buffer));
  const std::set<std::string> trained = NamesOf(parameters_);
  NamedTensors rest = weights;
  std::erase_if(rest, [&](const auto& tensor) { return trained.contains(tensor.first); });
  LoadTensors(others, rest);
}

void TrainingLoop::ReportProgress(bool now) {
  const double time = Seconds();
  const double since = time - clock_->progress_at;
  if (!now && since < kProgressSeconds) return;
  const double training = clock_->training - clock_->progress_training;
  if (training > 0.05 || clock_->rate == 0) {  // too short a time tells nothing
    const double rate =
        training > 0 ? static_cast<double>(clock_->samples - clock_->progress_samples) / training
                     : 0;
    clock_->rate = clock_->rate == 0 ? rate : 0.5 * clock_->rate + 0.5 * rate;
    clock_->progress_training = clock_->training;
    clock_->progress_samples = clock_->samples;
  }
  clock_->progress_at = time;
  Progress progress;
  progress.step = position_.step;
  progress.steps = TotalSteps();
  progress.epoch = position_.epoch;
  progress.epochs = spec_.epochs;
  progress.samples_per_second = clock_->rate;
  if (clock_->samples > 0) {
    // All time so far (evaluations, saves) spread over the steps of this attempt.
    const double per_sample = (time - clock_->start) / static_cast<double>(clock_->samples);
    progress.seconds_left = per_sample * static_cast<double>(progress.steps - progress.step) *
                            static_cast<double>(spec_.batch);
  }
  setup_.metrics.Write(progress);
}

bool TrainingLoop::Done() const {
  return features_.stopped() || position_.epoch >= spec_.epochs || (spec_.steps > 0 && position_.step >= spec_.steps);
}

int64_t TrainingLoop::TotalSteps() const {
  const int64_t samples = setup_.dataset.size(Split::kTrain);
  const int64_t all = (samples / spec_.batch + (samples % spec_.batch != 0 ? 1 : 0)) * spec_.epochs;
  return spec_.steps > 0 ? std::min(spec_.steps, all) : all;
}

double TrainingLoop::ReserveSeconds() const {
  // A save in flight has to end before the last one begins.
  const double longest = std::max(clock_->save, setup_.checkpoints.longest_save_seconds());
  double save = longest;
  if (longest < 0) {
    double bytes = 0;
    for (const auto& bucket : parameters_.buckets()) bytes += static_cast<double>(bucket.values.nbytes());
    for (const at::Tensor& state : OptimizerState()) bytes += static_cast<double>(state.nbytes());
    save = kFirstSaveSeconds + bytes / kFirstSaveBytesPerSecond;
  }
  return 2 * save + kReserveSeconds + clock_->evaluation +
         ((late_ ? 2 : 1) + std::max(1, spec_.local_sgd.every)) * clock_->longest_step;
}

}  // namespace itwin::worker
