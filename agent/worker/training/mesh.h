// Models split between ranks: a mesh data × tensor × pipeline. Ranks of a *tensor* group share every
// layer (agent/worker/model/tensor_parallel.h); those of a *pipeline* have the layers of one stage
// each, and a step's micro-batches pass through them; those of a *data* group hold the same part of
// the model and share the samples, as Ddp does.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "agent/worker/dist/collective_log.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/model/model.h"
#include "agent/worker/model/network.h"
#include "agent/worker/training/batch_source.h"
#include "agent/worker/training/ddp.h"
#include "agent/worker/training/strategy.h"

namespace itwin::worker {

// The communicators of a rank's groups. Rank = (stage * data + replica) * tensor + part: ranks that
// share layers are neighbours, as they talk most.
class MeshGroups {
 public:
  // Every rank calls it; throws UserError when the mesh is not made of as many ranks. `gradients` and
  // `layers` (activations; who starts something there waits for it at once) take the device's buffers, and
  // with `control` and the log of `layers`, which may be null, must outlive it.
  MeshGroups(const MeshSpec& shape, Communicator& gradients, Communicator& layers, Communicator& control,
             at::Device device = at::kCPU, const CollectiveLog* layers_log = nullptr);

  const MeshSpec& shape() const { return shape_; }
  at::Device device() const { return device_; }
  MeshPlace place();
  // Ranks that hold the same part of the model, for gradients and for everything else.
  Communicator& data_gradients() { return *data_gradients_; }
  Communicator& data() { return *data_; }
  Communicator& tensor() { return *tensor_; }
  // Activations go forward, their gradients backward; each has its own order.
  Communicator& pipeline() { return *forward_; }
  Communicator& backward() { return *backward_; }
  // In exchanges of activations and their gradients, in total.
  double waited_seconds() const { return layers_log_ == nullptr ? 0 : layers_log_->counts().seconds; }

 private:
  const MeshSpec shape_;
  const at::Device device_;
  const CollectiveLog* const layers_log_;
  std::unique_ptr<Communicator> data_gradients_, data_, tensor_, forward_, backward_;
};

// The part of the model that a rank of the mesh has: of a built-in model, or a stage of an exported
// graph, whose handshake all ranks do together. Every rank calls it.
std::unique_ptr<Model> MakeMeshModel(const TrainSpec& spec, const Dataset& dataset,
                                     const std::filesystem::path& work_dir, MeshGroups& groups);

class Mesh : public Strategy {
 public:
  // The gradients' communicator is groups.data_gradients(). All must outlive it.
  Mesh(std::string name, FlatParameters& parameters, MeshGroups& groups, Model& model,
       const DdpSpec& ddp);

  std::string name() const override { return name_; }
  const std::vector<FlatRange>& ranges() const override { return ddp_.ranges(); }
  void BeginBackward(const StepStatus& status, bool last) override;
  void EndBackward() override { ddp_.EndBackward(); }
  void WaitGradients(size_t range) override { ddp_.WaitGradients(range); }
  void Updated(size_t range) override { ddp_.Updated(range); }
  StepStatus EndStep(bool* agreed) override;
  double SquaresOfGradients() override;
  bool sharded() const override { return true; }
  bool RunsPasses() const override { return groups_.shape().pipeline > 1; }
  StepStatus RunPasses(const BatchSource::Item& item, StepStatus status, const Enter& enter) override;
  std::vector<StateSlice> InWhole(std::vector<StateSlice> held) const override;
  std::vector<StateSlice> Owned(std::vector<StateSlice> held) const override;
  std::vector<int> FindDifferingRanks(Communicator& control) override;
  std::vector<int64_t> Unused() const override { return ddp_.Unused(); }
  double waited_seconds() const override { return ddp_.waited_seconds() + groups_.waited_seconds(); }
  Memory memory() const override { return ddp_.memory(); }
  bool holds_model() const override { return false; }

 private:
  struct InFlight;
  StepStatus SumOnDevice(const StepStatus& status);
  int RankOf(int stage, int replica, int part) const {
    return (stage * groups_.shape().data + replica) * groups_.shape().tensor + part;
  }

  const std::string name_;
  FlatParameters& parameters_;
  MeshGroups& groups_;
  Model& model_;
  Ddp ddp_;
  const std::map<std::string, ParameterPart> parts_;
};

}  // namespace itwin::worker
