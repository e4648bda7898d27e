#include "agent/worker/model/tensor_parallel.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include "agent/worker/dist/communicator.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Communicator* Of(const AutogradContext* context) {
  return reinterpret_cast<Communicator*>(context->saved_data.at("ranks").toInt());
}
int64_t Handle(Communicator& ranks) { return reinterpret_cast<int64_t>(&ranks); }

Buffer Whole(const at::Tensor& tensor) {
  if (tensor.scalar_type() != at::kFloat && tensor.scalar_type() != at::kDouble)
    throw AppError("layers that ranks share need float32 or float64 activations");
  return {tensor.data_ptr(), tensor.numel(),
          tensor.scalar_type() == at::kFloat ? ElementType::kFloat32 : ElementType::kFloat64, !tensor.is_cpu()};
}

at::Tensor Sum(const at::Tensor& part, Communicator& ranks) {
  at::Tensor sum = part.contiguous().clone();
  ranks.AllReduce(Whole(sum), Reduction::kSum)->Wait();
  return sum;
}

struct IntoPartsFunction : torch::autograd::Function<IntoPartsFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, int64_t ranks) {
    context->saved_data["ranks"] = ranks;
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    return {Sum(gradients[0], *Of(context)), at::Tensor()};
  }
};

struct SumOfPartsFunction : torch::autograd::Function<SumOfPartsFunction> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& x, int64_t ranks) {
    return Sum(x, *reinterpret_cast<Communicator*>(ranks));
  }
  static variable_list backward(AutogradContext*, variable_list gradients) {
    return {gradients[0], at::Tensor()};
  }
};

struct JoinPartsFunction : torch::autograd::Function<JoinPartsFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, int64_t handle) {
    auto* ranks = reinterpret_cast<Communicator*>(handle);
    context->saved_data["ranks"] = handle;
    context->saved_data["size"] = x.size(-1);
    const at::Tensor mine = x.contiguous();
    std::vector<int64_t> shape = mine.sizes().vec();
    shape.insert(shape.begin(), ranks->size());
    const at::Tensor all = at::empty(shape, mine.options());
    ranks->AllGather(Whole(mine), Whole(all))->Wait();
    return at::cat(all.unbind(0), -1);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const int64_t size = context->saved_data.at("size").toInt();
    return {gradients[0].narrow(-1, Of(context)->rank() * size, size), at::Tensor()};
  }
};

}  // namespace

at::Tensor IntoParts(const at::Tensor& x, Communicator& ranks) {
  return IntoPartsFunction::apply(x, Handle(ranks));
}
at::Tensor SumOfParts(const at::Tensor& part, Communicator& ranks) {
  return SumOfPartsFunction::apply(part, Handle(ranks));
}
at::Tensor JoinParts(const at::Tensor& part, Communicator& ranks) {
  return JoinPartsFunction::apply(part, Handle(ranks));
}

}  // namespace itwin::worker
