#include "agent/worker/training/ddp.h"

#include <chrono>

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace autograd = torch::autograd;

// What the hooks of one Ddp share; they outlive it when the parameters do.
struct Ddp::Hooks {
  Ddp* owner = nullptr;
  // A tensor holds its accumulator weakly; the hook lives on the accumulator.
  std::vector<std::shared_ptr<autograd::Node>> accumulators;

  // Runs after AccumulateGrad has added into the parameter's gradient, once per backward pass.
  struct Hook : autograd::FunctionPostHook {
    Hook(std::weak_ptr<Hooks> shared_hooks, size_t index)
        : hooks(std::move(shared_hooks)), parameter(index) {}
    autograd::variable_list operator()(const autograd::variable_list& outputs,
                                       const autograd::variable_list&) override {
      const std::shared_ptr<Hooks> alive = hooks.lock();
      if (alive && alive->owner != nullptr) alive->owner->OnGradientReady(parameter);
      return outputs;
    }
    std::weak_ptr<Hooks> hooks;
    size_t parameter;
  };
};

namespace {
Buffer BufferOfTensor(const at::Tensor& flat) {
  return {flat.data_ptr(), flat.numel(),
          flat.scalar_type() == at::kFloat ? ElementType::kFloat32 : ElementType::kFloat64};
}
}  // namespace

Ddp::Ddp(FlatParameters& parameters, Communicator& communicator, bool overlap)
    : parameters_(parameters),
      communicator_(communicator),
      overlap_(overlap),
      used_(parameters.parameters().size(), 0),
      missing_(parameters.buckets().size(), 0),
      work_(parameters.buckets().size()),
      hooks_(std::make_shared<Hooks>()) {
  hooks_->owner = this;
  for (size_t i = 0; i < parameters.parameters().size(); ++i) {
    auto accumulator = autograd::impl::grad_accumulator(parameters.parameters()[i].tensor);
    accumulator->add_post_hook(std::make_unique<Hooks::Hook>(hooks_, i));
    hooks_->accumulators.push_back(std::move(accumulator));
  }
  for (FlatParameters::Bucket& bucket : parameters_.buckets()) {
    communicator_.Broadcast(BufferOfTensor(bucket.values), 0)->Wait();
  }
}

Ddp::~Ddp() { hooks_->owner = nullptr; }

void Ddp::BeginStep(const StepStatus& status) {
  parameters_.WriteStatus(status);
  for (size_t b = 0; b < missing_.size(); ++b) {
    missing_[b] = static_cast<int64_t>(parameters_.buckets()[b].parameters.size());
    work_[b].reset();
  }
  next_bucket_ = 0;
}

void Ddp::OnGradientReady(size_t parameter) {
  used_[parameter] = 1;
  --missing_[parameters_.parameters()[parameter].bucket];
  if (overlap_) LaunchReady();
}

void Ddp::LaunchReady() {
  // In order: all ranks must start the same collectives in the same order, whatever becomes ready
  // first.
  if (communicator_.size() == 1) return;
  while (next_bucket_ < missing_.size() && missing_[next_bucket_] <= 0) {
    work_[next_bucket_] = communicator_.AllReduce(
        BufferOfTensor(parameters_.buckets()[next_bucket_].gradients), Reduction::kSum);
    ++next_bucket_;
  }
}

void Ddp::EndBackward() {
  // What backward did not reach has a zero gradient here; other ranks may have more.
  for (int64_t& missing : missing_) missing = 0;
  LaunchReady();
}

void Ddp::WaitBucket(size_t bucket) {
  if (!work_[bucket]) return;
  const auto start = std::chrono::steady_clock::now();
  work_[bucket]->Wait();
  work_[bucket].reset();
  waited_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::vector<int64_t> Ddp::Unused() const {
  std::vector<int64_t> unused;
  for (int64_t used : used_) unused.push_back(used ? 0 : 1);
  return unused;
}

}  // namespace itwin::worker
