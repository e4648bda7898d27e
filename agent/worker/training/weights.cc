#include "agent/worker/training/weights.h"

#include <map>
#include <vector>

#include "agent/worker/error.h"

namespace itwin::worker {

std::string HashWeights(Model& model) { return HashTensors(model.parameters()); }

std::string HashTensors(const NamedTensors& tensors) {
  // By name: the parts of a split model are gathered in another order than the model's.
  WeightsHash hash;
  for (const auto& [name, tensor] : std::map<std::string, at::Tensor>(tensors.begin(), tensors.end()))
    hash.Add(name, tensor);
  return hash.Hex();
}

void WeightsHash::Add(const std::string& name, const at::Tensor& tensor) {
  const at::Tensor bytes = tensor.detach().cpu().contiguous();
  hash_.Update(name.data(), name.size() + 1);
  for (int64_t size : bytes.sizes()) hash_.Update(&size, sizeof(size));
  hash_.Update(bytes.data_ptr(), static_cast<size_t>(bytes.numel()) * bytes.element_size());
}

void LoadWeights(Model& model, const NamedTensors& tensors) {
  NamedTensors targets = model.parameters();
  for (auto& buffer : model.buffers()) targets.push_back(std::move(buffer));
  LoadTensors(targets, tensors);
}

void LoadTensors(const NamedTensors& targets, const NamedTensors& tensors) {
  std::map<std::string, at::Tensor> by_name(tensors.begin(), tensors.end());
  for (const auto& [name, target] : targets) {
    const auto found = by_name.find(name);
    if (found == by_name.end())
      throw AppError("the checkpoint does not fit the model: " + name + " is missing");
    if (found->second.sizes() != target.sizes() ||
        found->second.scalar_type() != target.scalar_type()) {
      throw AppError("the checkpoint does not fit the model: " + name +
                     " has another shape or type");
    }
    target.detach().copy_(found->second);
    by_name.erase(found);
  }
  if (!by_name.empty()) {
    throw AppError("the checkpoint does not fit the model: the model has no " +
                   by_name.begin()->first);
  }
}

void AverageBuffers(Model& model, Communicator& communicator) {
  if (communicator.size() == 1) return;
  for (const auto& [name, buffer] : model.buffers()) {
    if (buffer.numel() == 0) continue;
    if (buffer.is_floating_point()) {
      at::Tensor mean = buffer.detach().to(at::kCPU, at::kDouble).contiguous();
      communicator
          .AllReduce({mean.data_ptr(), mean.numel(), ElementType::kFloat64}, Reduction::kSum)
          ->Wait();
      buffer.detach().copy_(mean.div_(communicator.size()));
    } else {
      at::Tensor copy = buffer.detach().cpu().contiguous();
      communicator
          .Broadcast({copy.data_ptr(), copy.numel() * static_cast<int64_t>(copy.element_size()),
                      ElementType::kByte},
                     0)
          ->Wait();
      buffer.detach().copy_(copy);
    }
  }
}

}  // namespace itwin::worker
