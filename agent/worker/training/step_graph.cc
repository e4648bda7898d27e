#include "agent/worker/training/step_graph.h"

#include <exception>
#include <utility>

#include "agent/worker/error.h"
#include "agent/worker/model/torch_reason.h"

namespace itwin::worker {

namespace {
// Steps before the recording: libraries choose their algorithms and allocate in the first ones, and the
// last is watched.
constexpr int kWarmUp = 3;

}  // namespace

StepGraph::StepGraph(Passes passes, Make make, Remember remember, std::function<void()> quiet,
                     std::function<void(const std::string&)> say)
    : passes_(std::move(passes)),
      make_(std::move(make)),
      remember_(std::move(remember)),
      quiet_(std::move(quiet)),
      say_(std::move(say)) {}

bool StepGraph::Fits(const Batch& batch) const {
  if (batch.size() != batch_.size()) return false;
  for (const auto& [name, tensor] : batch) {
    const auto found = batch_.find(name);
    if (found == batch_.end() || found->second.sizes() != tensor.sizes() ||
        found->second.strides() != tensor.strides() ||
        found->second.scalar_type() != tensor.scalar_type()) {
      return false;
    }
  }
  return true;
}

at::Tensor StepGraph::Run(const Batch& batch) {
  if (off_) return passes_(batch).detach();
  if (graph_ == nullptr) {
    steps_ = Fits(batch) ? steps_ + 1 : 1;
    batch_ = batch;
    if (steps_ < kWarmUp) return passes_(batch).detach();
    if (steps_ == kWarmUp) return Rehearse(batch);
    Record(batch);
  } else {
    if (!Fits(batch)) return passes_(batch).detach();
    for (auto& [name, tensor] : batch_) tensor.copy_(batch.at(name), /*non_blocking=*/true);
  }
  graph_->Replay();
  return loss_;
}

at::Tensor StepGraph::Rehearse(const Batch& batch) {
  const std::function<void()> undo = remember_();
  try {
    at::Tensor loss;
    make_()->Rehearse([&] { loss = passes_(batch).detach(); });
    return loss;
  } catch (const WorkerError&) {
    throw;
  } catch (const std::exception& error) {
    off_ = true;
    batch_.clear();
    say_("note: this model's step cannot be recorded as a CUDA graph (" + FirstLineOf(error) +
         "); its operators are launched one by one");
  }
  undo();
  return passes_(batch).detach();
}

void StepGraph::Record(const Batch& batch) {
  for (auto& [name, tensor] : batch_) tensor = batch.at(name).clone();
  try {
    quiet_();
    auto graph = make_();
    graph->Record([this] { loss_ = passes_(batch_).detach(); });
    graph_ = std::move(graph);
  } catch (const WorkerError&) {
    throw;
  } catch (const std::exception& error) {
    throw AppError("train.gpu.graphs: the step broke while it was recorded (" + FirstLineOf(error) +
                   "); set train.gpu.graphs: false");
  }
}

}  // namespace itwin::worker
