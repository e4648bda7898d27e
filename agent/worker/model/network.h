// The built-in networks: prediction only, no loss. One file knows LibTorch's module classes.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "agent/worker/model/tensor_parallel.h"

namespace itwin::worker {

// Shapes of one sample.
struct SampleForm {
  std::vector<int64_t> input;
  std::vector<int64_t> target;
  int64_t classes = 0;  // > 0: the target holds class numbers, and the output has a score per class
};

// Where a rank stands among those that share a model.
struct MeshPlace {
  Communicator* tensor = nullptr;  // ranks that share every layer; null: layers are whole
  int part = 0, parts = 1;         // this rank among them, and their number
  int stage = 0, stages = 1;       // of a pipeline: this rank has the layers of one stage
};

// Used by one thread.
class Network {
 public:
  virtual ~Network() = default;
  // Of a stage: from the output of the stage before to its own.
  virtual at::Tensor Forward(const at::Tensor& input) = 0;
  virtual std::vector<std::pair<std::string, at::Tensor>>
  parameters() = 0;  // names as in a Python state_dict
  virtual std::vector<std::pair<std::string, at::Tensor>> buffers() = 0;
  virtual void Train(bool training) = 0;
  // Every option with the value that is used.
  virtual const nlohmann::json& options() const = 0;
  // Parameters of which there is a part here.
  virtual const std::map<std::string, ParameterPart>& parts() const = 0;
};

std::vector<std::string> NetworkNames();

// Initialised from `seed` alone (sets LibTorch's global generator), so that the parts of a mesh are
// those of the whole model. Throws UserError for an unknown name or option, for shapes that do not
// fit, and for a network that cannot be shared as `place` says, naming them.
std::unique_ptr<Network> MakeNetwork(const std::string& name, const nlohmann::json& options,
                                     const SampleForm& form, uint64_t seed,
                                     const MeshPlace& place = {});

}  // namespace itwin::worker
