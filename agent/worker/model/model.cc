#include "agent/worker/model/model.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "agent/worker/data/array.h"
#include "agent/worker/error.h"
#include "agent/worker/model/archive.h"
#include "agent/worker/model/builtin_model.h"
#include "agent/worker/model/graph_model.h"
#include "agent/worker/model/torch_reason.h"
#include "agent/worker/model/torchscript_model.h"

namespace itwin::worker {

// Two: with one, a sum over the batch cannot be told from a value per sample.
void TrySamples(Model& model, const Dataset& dataset) {
  const Batch batch = dataset.Gather(Split::kTrain, {0, dataset.size(Split::kTrain) - 1});
  model.Train(false);
  try {
    model.EvaluationStep(batch);
  } catch (const WorkerError&) {
    throw;
  } catch (const std::exception& error) {
    std::string shapes;
    for (const auto& [name, tensor] : batch) {
      shapes +=
          (shapes.empty() ? "" : ", ") + name + " " + ShapeText(tensor.sizes().slice(1).vec());
    }
    throw UserError("train.model: " + model.description() +
                    " does not run on a sample of the data (" + shapes + "): " + ReasonOf(error));
  }
  model.Train(true);
}

std::shared_ptr<torch::jit::Module> Model::Script(const Batch& /*samples*/) {
  throw AppError(description() + " is not a whole model");
}

void Model::MoveTo(at::Device device) {
  const at::NoGradGuard no_grad;
  for (const auto& tensors : {parameters(), buffers()}) {
    for (const auto& [name, tensor] : tensors) {
      if (tensor.device() != device) tensor.set_data(tensor.detach().to(device));
    }
  }
}

std::unique_ptr<Model> MakeModel(const TrainSpec& spec, const Dataset& dataset,
                                 const std::filesystem::path& work_dir) {
  std::unique_ptr<Model> model;
  if (!spec.model.archive.empty()) {
    const ModelArchive archive =
        ReadModelArchive(ResolveFile(spec.model.archive, work_dir, "train.model.archive"));
    model = archive.script.empty() ? MakeGraphModel(spec, dataset, archive)
                                   : MakeTorchScriptModel(spec, dataset, archive);
    ShakeHands(*model, archive);
  } else {
    model = spec.model.torchscript.empty() ? MakeBuiltinModel(spec, dataset)
                                           : MakeTorchScriptModel(spec, dataset, work_dir);
  }
  // So that what does not fit is told at once and as the user's matter.
  TrySamples(*model, dataset);
  return model;
}

}  // namespace itwin::worker
