#include "agent/worker/training/gradient_hooks.h"

#include <algorithm>
#include <cstring>

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace autograd = torch::autograd;

struct GradientHooks::Shared {
  std::function<void(size_t)> ready, before;
  bool alive = true;
  // A tensor holds its accumulator weakly; the hook lives on the accumulator.
  std::vector<std::shared_ptr<autograd::Node>> accumulators;
};

namespace {

template <typename Shared>
struct After : autograd::FunctionPostHook {
  After(std::weak_ptr<Shared> s, size_t i) : shared(std::move(s)), parameter(i) {}
  autograd::variable_list operator()(const autograd::variable_list& outputs,
                                     const autograd::variable_list&) override {
    const std::shared_ptr<Shared> hooks = shared.lock();
    if (hooks && hooks->alive) hooks->ready(parameter);
    return outputs;
  }
  std::weak_ptr<Shared> shared;
  size_t parameter;
};

template <typename Shared>
struct Before : autograd::FunctionPreHook {
  Before(std::weak_ptr<Shared> s, size_t i) : shared(std::move(s)), parameter(i) {}
  autograd::variable_list operator()(const autograd::variable_list& gradients) override {
    const std::shared_ptr<Shared> hooks = shared.lock();
    if (hooks && hooks->alive) hooks->before(parameter);
    return gradients;
  }
  std::weak_ptr<Shared> shared;
  size_t parameter;
};

}  // namespace

GradientHooks::GradientHooks(const FlatParameters& parameters, std::function<void(size_t)> ready,
                             std::function<void(size_t)> before)
    : shared_(std::make_shared<Shared>()) {
  shared_->ready = std::move(ready);
  shared_->before = std::move(before);
  for (size_t i = 0; i < parameters.parameters().size(); ++i) {
    auto accumulator = autograd::impl::grad_accumulator(parameters.parameters()[i].tensor);
    accumulator->add_post_hook(std::make_unique<After<Shared>>(shared_, i));
    if (shared_->before) accumulator->add_pre_hook(std::make_unique<Before<Shared>>(shared_, i));
    shared_->accumulators.push_back(std::move(accumulator));
  }
}

GradientHooks::~GradientHooks() { shared_->alive = false; }

Buffer BufferOfTensor(const at::Tensor& flat) {
  const at::ScalarType type = flat.scalar_type();
  return {flat.data_ptr(), flat.numel(),
          type == at::kFloat      ? ElementType::kFloat32
          : type == at::kHalf     ? ElementType::kFloat16
          : type == at::kBFloat16 ? ElementType::kBfloat16
                                  : ElementType::kFloat64,
          !flat.is_cpu()};
}

// Four lanes, so that the multiplications overlap; every bit of the input reaches the result.
void ValueHash::Add(const at::Tensor& of) {
  const at::Tensor values = of.cpu();  // itself, but of a device
  const auto* bytes = static_cast<const char*>(values.data_ptr());
  const size_t size = values.nbytes();
  size_t at = 0;
  for (; at + 32 <= size; at += 32) {
    uint64_t words[4];
    std::memcpy(words, bytes + at, 32);
    for (int k = 0; k < 4; ++k) {
      lanes_[k] = (lanes_[k] ^ words[k]) * 0x9fb21c651e98df25u;
      lanes_[k] ^= lanes_[k] >> 32;
    }
  }
  for (; at + 4 <= size; at += 4) {
    uint32_t word;
    std::memcpy(&word, bytes + at, 4);
    lanes_[0] = (lanes_[0] ^ word) * 0x9fb21c651e98df25u;
    lanes_[0] ^= lanes_[0] >> 32;
  }
}

uint64_t ValueHash::Get() const {
  uint64_t hash = 0;
  for (const uint64_t lane : lanes_) {
    hash = (hash ^ lane) * 0x9fb21c651e98df25u;
    hash ^= hash >> 29;
  }
  return hash;
}

uint64_t HashValues(const FlatParameters& parameters) {
  ValueHash hash;
  for (const FlatParameters::Bucket& bucket : parameters.buckets()) hash.Add(bucket.values);
  return hash.Get();
}

std::vector<int> FindDiffering(uint64_t hash, Communicator& control) {
  auto mine = static_cast<int64_t>(hash);
  std::vector<int64_t> all(static_cast<size_t>(control.size()));
  control.AllGather(BufferOf(std::span(&mine, 1)), BufferOf(std::span(all)))->Wait();
  int64_t usual = all[0];
  for (const int64_t candidate : all) {
    if (std::count(all.begin(), all.end(), candidate) > std::count(all.begin(), all.end(), usual))
      usual = candidate;
  }
  std::vector<int> differing;
  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r] != usual) differing.push_back(static_cast<int>(r));
  }
  return differing;
}

}  // namespace itwin::worker
