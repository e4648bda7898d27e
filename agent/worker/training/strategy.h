// How the ranks of a job share the work of a step. The loop runs forward and backward, the strategy
// sees to the gradients and says which flat ranges of the parameters this rank's optimiser updates:
// whole buckets where every rank holds everything (Ddp, Horovod, LocalSgd), a shard of each where
// they are split (Zero). docs/training.md says which to choose when.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/profile/profiler.h"
#include "agent/worker/spec/train_spec.h"
#include "agent/worker/training/batch_source.h"
#include "agent/worker/training/flat_parameters.h"

namespace itwin::worker {

// A run of elements of a bucket. `values` and `gradients` are flat and equally long; they may or may
// not be views of the bucket.
struct FlatRange {
  size_t bucket = 0;
  int64_t first = 0;  // elements from the bucket's start
  at::Tensor values{};
  at::Tensor gradients{};
};

// A run of elements of one tensor of the training's state, in the tensor's own (row-major) order:
// what a rank holds of it. `view` is flat and `count` long.
struct StateSlice {
  std::string name;            // of a parameter, or "<state>/<parameter>"
  std::vector<int64_t> shape;  // of the whole tensor
  int64_t offset = 0;
  int64_t count = 0;
  at::Tensor view{};
};

class Strategy {
 public:
  virtual ~Strategy() = default;

  virtual std::string name() const = 0;

  // What this rank's optimiser updates; fixed, and the tensors stay.
  virtual const std::vector<FlatRange>& ranges() const = 0;

  // ---- A step, on every rank: BeginStep; for each micro-batch forward, BeginBackward, backward,
  // EndBackward (a rank without samples leaves forward and backward out); for each range
  // WaitGradients, the optimiser, Updated; then EndStep.
  virtual void BeginStep() {}
  // What the mean loss of `samples` of this rank's `local` ones counts in the gradient: their share of
  // all ranks' `global` ones, so that the sum over ranks is the mean over all samples.
  virtual double Weight(int64_t samples, int64_t /*local*/, int64_t global) const {
    return static_cast<double>(samples) / static_cast<double>(global);
  }
  // What it counts in the loss of the step. Where the ranks speak, the sum over them is the mean over all
  // samples.
  virtual double LossWeight(int64_t samples, int64_t /*local*/, int64_t global) const {
    return static_cast<double>(samples) / static_cast<double>(global);
  }
  // `status` is that of the whole step; it is looked at with the last micro-batch, after which
  // gradients are exchanged.
  virtual void BeginBackward(const StepStatus& status, bool last) = 0;
  virtual void EndBackward() = 0;
  // Whether forward and backward of a step are this strategy's to run, in place of all of the above
  // but BeginStep. Takes and gives this rank's status, and says what it is at.
  using Enter = std::function<void(Activity)>;
  virtual bool RunsPasses() const { return false; }
  virtual StepStatus RunPasses(const BatchSource::Item& /*item*/, StepStatus status, const Enter& /*enter*/) {
    return status;
  }
  // Then range i's gradients are the sum over ranks.
  virtual void WaitGradients(size_t range) = 0;
  virtual void Updated(size_t range) = 0;
  // The status summed over ranks. Where `agreed` comes back false the ranks have not spoken in this
  // step: loss is this rank's, and the flags are zero.
  virtual StepStatus EndStep(bool* agreed) = 0;

  // Of all parameters, over all ranks, once their gradients are there. The same bits on every rank.
  virtual double SquaresOfGradients();

  // Adds each figure over the ranks that hold the other parts of what ranges() holds: for norms. The
  // identity where this rank holds all. The same bits on every rank.
  virtual void SumOverShards(std::span<double>) {}
  // Whether other ranks hold parts of the gradients that this one does not.
  virtual bool sharded() const { return false; }

  // ---- Between steps.
  // Whether every rank must run forward equally often, with a sample that does not count where it
  // has none: parameters are exchanged in forward.
  virtual bool lockstep() const { return false; }
  // Brings together what the ranks hold by themselves (parameters after local steps, and `state`,
  // the optimiser's). At the end of an epoch, before a save and before an evaluation.
  virtual void Consolidate(const std::vector<at::Tensor>& /*state*/) {}
  // While a FullParameters lives, the model's parameters can be read and written as a whole.
  virtual void GatherParameters() {}
  virtual void ReleaseParameters() {}
  // Whether the model of a rank is the whole model (if need be gathered).
  virtual bool holds_model() const { return true; }
  // Whether a rank has a part of the parameters alone while nothing is gathered: then nobody should ask
  // for all of them at once.
  virtual bool spread() const { return !holds_model(); }
  // Where `held`, slices of a rank's tensors, lie in those of the whole model.
  virtual std::vector<StateSlice> InWhole(std::vector<StateSlice> held) const { return held; }
  // The part of `held` (what this rank holds) that is this rank's to save. Over all ranks: each
  // element exactly once.
  virtual std::vector<StateSlice> Owned(std::vector<StateSlice> held) const = 0;
  // The ranks whose copy of the parameters is not that of most; empty where all are equal or there
  // are no copies. Every rank calls it and gets the same.
  virtual std::vector<int> FindDifferingRanks(Communicator& control) = 0;

  // Parameters that no step since the start has given a gradient, on this rank: 1 for such, else 0;
  // model order.
  virtual std::vector<int64_t> Unused() const = 0;
  // Waiting for other ranks, in total.
  virtual double waited_seconds() const = 0;
  // Held by this rank for parameters and for gradients: between steps, and at most since the start.
  struct Memory {
    int64_t parameters = 0, gradients = 0;
    int64_t peak_parameters = 0, peak_gradients = 0;
  };
  virtual Memory memory() const = 0;
};

// See Strategy::GatherParameters.
class FullParameters {
 public:
  explicit FullParameters(Strategy& strategy) : strategy_(strategy) { strategy.GatherParameters(); }
  ~FullParameters() { strategy_.ReleaseParameters(); }
  FullParameters(const FullParameters&) = delete;

 private:
  Strategy& strategy_;
};

// What runs: the job's strategy, its default, or "single" where there is one rank. `note` becomes a
// sentence when that is not what was asked for, else "".
std::string ChooseStrategy(const TrainSpec& spec, int ranks, std::string* note);

// How the parameters of a model are laid out for a strategy.
FlatParameters LayOut(const TrainSpec& spec, const std::string& strategy,
                      const std::vector<std::pair<std::string, at::Tensor>>& named, int ranks);

// Whether the strategy splits the model itself, so that it needs MeshGroups and MakeMeshModel.
bool IsMesh(const std::string& strategy);
// The mesh of such a strategy: as the spec says, sizes that are not given filled in.
MeshSpec MeshOf(const TrainSpec& spec, const std::string& strategy, int ranks);

// Every rank calls it; all start with rank 0's values. `parameters` and `communicator` must outlive
// it. Not for a mesh.
std::unique_ptr<Strategy> MakeStrategy(const TrainSpec& spec, const std::string& name,
                                       FlatParameters& parameters, Communicator& communicator);

// What a rank that holds everything holds.
Strategy::Memory MemoryOfWholeBuckets(const FlatParameters& parameters);

// Every bucket as a range.
std::vector<FlatRange> WholeBuckets(const FlatParameters& parameters);

// The slices of the parameters themselves.
std::vector<StateSlice> ParameterSlices(const FlatParameters& parameters,
                                        const std::vector<FlatRange>& ranges);
// The slices of `flat`, which is laid out like `range`; names are prefix + parameter.
void AppendSlices(const FlatParameters& parameters, const FlatRange& range, const at::Tensor& flat,
                  const std::string& prefix, std::vector<StateSlice>* slices);
// This rank's equal part of slices that every rank holds alike.
std::vector<StateSlice> PartOf(const std::vector<StateSlice>& slices, int rank, int ranks);
// Calls `visit` on rank 0 with the whole of each tensor of which the ranks own slices, on the host, in
// the order of the names, one at a time. Throws AppError when elements are missing.
using VisitTensor = std::function<void(const std::string& name, const at::Tensor& tensor)>;
void VisitSlices(std::vector<StateSlice> owned, Communicator& communicator, const VisitTensor& visit);
// All of them, on rank 0; empty on the others.
NamedTensors GatherSlices(const std::vector<StateSlice>& owned, Communicator& communicator);
// Copies into the slices their parts of the whole tensors of the same names. Throws AppError saying
// what is missing or does not fit; `whose` begins the sentence ("the checkpoint's optimiser state").
void ScatterSlices(const NamedTensors& whole, const std::vector<StateSlice>& slices,
                   const std::string& whose);

}  // namespace itwin::worker
