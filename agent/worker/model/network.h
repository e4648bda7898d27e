// The built-in networks: prediction only, no loss. One file knows LibTorch's module classes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

namespace itwin::worker {

// Shapes of one sample.
struct SampleForm {
  std::vector<int64_t> input;
  std::vector<int64_t> target;
  int64_t classes = 0;  // > 0: the target holds class numbers, and the output has a score per class
};

// Used by one thread.
class Network {
 public:
  virtual ~Network() = default;
  virtual at::Tensor Forward(const at::Tensor& input) = 0;
  virtual std::vector<std::pair<std::string, at::Tensor>>
  parameters() = 0;  // names as in a Python state_dict
  virtual std::vector<std::pair<std::string, at::Tensor>> buffers() = 0;
  virtual void Train(bool training) = 0;
  // Every option with the value that is used.
  virtual const nlohmann::json& options() const = 0;
};

std::vector<std::string> NetworkNames();

// Initialised from `seed` alone (sets LibTorch's global generator). Throws UserError for an unknown
// name or option and for shapes that do not fit, naming them.
std::unique_ptr<Network> MakeNetwork(const std::string& name, const nlohmann::json& options,
                                     const SampleForm& form, uint64_t seed);

}  // namespace itwin::worker
