// A model with its loss: what the training loop drives. Implementations hide whether it is a
// built-in network or the user's TorchScript module.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/data/dataset.h"
#include "agent/worker/error.h"
#include "agent/worker/model/tensor_parallel.h"
#include "agent/worker/spec/train_spec.h"

namespace torch::jit {
struct Module;
}

namespace itwin::worker {

struct StepOutput {
  at::Tensor loss;  // scalar; mean over the samples of the batch
  // Scalars by name, each a mean over the samples of the batch. A root mean square is given as its
  // square, "mse" or "<name>_mse": the loop averages over all samples and ranks first and takes the
  // root then ("rmse").
  std::map<std::string, at::Tensor> metrics;
  // Vectors of float64 by name that are added up over all samples and ranks, for values that are no
  // mean over samples: MetricsOfSums makes values of
  // them.
  std::map<std::string, at::Tensor> sums{};
};

// A model of which this rank has the layers of one stage of a pipeline.
class StagedModel {
 public:
  virtual ~StagedModel() = default;
  // From the output of the stage before (the first: from the batch's input) for so many samples, with
  // gradient recording where the mode of the thread says so.
  virtual at::Tensor ForwardStage(const at::Tensor& input, int64_t samples) = 0;
  // Of the last stage's output.
  virtual StepOutput LossOf(const at::Tensor& output, const at::Tensor& target) = 0;
};

// Used by one thread.
class Model {
 public:
  virtual ~Model() = default;

  // Name and tensor, in an order that is the same on every rank. Tensors share storage with the
  // model: the loop replaces the storage of each parameter once (set_data) and writes its gradient
  // itself.
  virtual std::vector<std::pair<std::string, at::Tensor>> parameters() = 0;
  virtual std::vector<std::pair<std::string, at::Tensor>> buffers() = 0;

  // Forward and loss, with gradient recording; metrics may be left out. The caller runs backward.
  virtual StepOutput TrainingStep(const Batch& batch) = 0;
  // Like TrainingStep, by a method of the user's module: a phase of several optimisers. Throws
  // UserError for a model without such methods.
  virtual StepOutput PhaseStep(const std::string& method, const Batch& /*batch*/) {
    throw UserError("train.phases: " + description() + " has no method " + method +
                    "; phases are for TorchScript modules");
  }
  // The same without gradient recording. Train(false) is the caller's to call.
  virtual StepOutput EvaluationStep(const Batch& batch) = 0;
  // The prediction alone, without gradient recording.
  virtual at::Tensor Predict(const at::Tensor& input) = 0;

  virtual void Train(bool training) = 0;

  // Writes weights.safetensors, and what else describes the model, into `dir`, which exists. Throws
  // ResourceError when the disk is full.
  virtual void Save(const std::filesystem::path& dir) = 0;

  // The prediction as TorchScript: a module in evaluation mode whose tensors are the model's, tried
  // out with `samples`, some more than two, and with two of them. Train(false) is the caller's to
  // call, and the model is on the host. Throws what says why there is none.
  virtual std::shared_ptr<torch::jit::Module> Script(const Batch& samples);

  // Moves the parameters, buffers and whatever else the model keeps; parameters stay the same tensors.
  virtual void MoveTo(at::Device device);

  // One line for people: name, number of parameters.
  virtual std::string description() = 0;

  // Of a model that is split between ranks: the parameters of which a part is here, and its stage.
  virtual std::map<std::string, ParameterPart> parts() { return {}; }
  virtual StagedModel* staged() { return nullptr; }
};

// Throws UserError for an unknown model, option or loss, a model that cannot be trained or that
// does not fit the data's shapes. Built-in models are initialised from spec.seed alone.
std::unique_ptr<Model> MakeModel(const TrainSpec& spec, const Dataset& dataset,
                                 const std::filesystem::path& work_dir);

// Two samples through the model; what does not fit throws a UserError that says what. MakeModel has
// done it on the host.
void TrySamples(Model& model, const Dataset& dataset);

}  // namespace itwin::worker
