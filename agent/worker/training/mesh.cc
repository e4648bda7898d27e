#include "agent/worker/training/mesh.h"

#include <algorithm>
#include <deque>
#include <optional>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include "agent/worker/error.h"
#include "agent/worker/model/archive.h"
#include "agent/worker/model/builtin_model.h"
#include "agent/worker/model/graph_model.h"
#include "agent/worker/training/optimizer.h"
#include "agent/worker/training/sampler.h"

namespace itwin::worker {
namespace {

constexpr int64_t kHeader = 10;  // type, dimensions, sizes of a tensor on its way

Buffer BytesOf(const at::Tensor& tensor) {
  return {tensor.data_ptr(), static_cast<int64_t>(tensor.nbytes()), ElementType::kByte, !tensor.is_cpu()};
}

// Sends and forgets: what is on the network is kept until it has arrived.
class Outbox {
 public:
  // `stages` must outlive it.
  explicit Outbox(Communicator& stages) : stages_(stages) {}
  void Send(const at::Tensor& tensor, int to) {
    Letter& letter = letters_.emplace_back();
    letter.tensor = tensor.detach().contiguous();
    if (letter.tensor.dim() > kHeader - 2)
      throw AppError("activations with more than 8 dimensions cannot be sent between stages");
    letter.header[0] = static_cast<int64_t>(letter.tensor.scalar_type());
    letter.header[1] = letter.tensor.dim();
    for (int64_t d = 0; d < letter.tensor.dim(); ++d)
      letter.header[static_cast<size_t>(d) + 2] = letter.tensor.size(d);
    letter.work[0] = stages_.Send(BufferOf(std::span(letter.header)), to);
    letter.work[1] = stages_.Send(BytesOf(letter.tensor), to);
  }
  void WaitAll() {
    for (Letter& letter : letters_) {
      for (auto& work : letter.work) work->Wait();
    }
    letters_.clear();
  }

 private:
  struct Letter {
    std::array<int64_t, kHeader> header{};
    at::Tensor tensor;
    std::unique_ptr<Work> work[2];
  };
  Communicator& stages_;
  std::deque<Letter> letters_;  // a deque: headers must not move
};

at::Tensor Receive(Communicator& stages, int from, at::Device device) {
  std::array<int64_t, kHeader> header{};
  stages.Recv(BufferOf(std::span(header)), from)->Wait();
  const at::Tensor tensor =
      at::empty(at::IntArrayRef(header.data() + 2, static_cast<size_t>(header[1])),
                at::TensorOptions().dtype(static_cast<at::ScalarType>(header[0])).device(device));
  stages.Recv(BytesOf(tensor), from)->Wait();
  return tensor;
}

// One rank's part of a model, which answers like a whole one: an evaluation runs through all stages,
// and every rank gets the last one's figures.
class MeshModel : public Model {
 public:
  MeshModel(std::unique_ptr<Model> part, MeshGroups& groups)
      : part_(std::move(part)), groups_(groups) {}

  std::vector<std::pair<std::string, at::Tensor>> parameters() override {
    return part_->parameters();
  }
  std::vector<std::pair<std::string, at::Tensor>> buffers() override { return part_->buffers(); }
  // Of a pipeline the loop runs the passes (Mesh::RunPasses); this gives the loss alone.
  StepOutput TrainingStep(const Batch& batch) override {
    return groups_.shape().pipeline == 1 ? part_->TrainingStep(batch) : EvaluationStep(batch);
  }
  StepOutput EvaluationStep(const Batch& batch) override {
    if (groups_.shape().pipeline == 1) return part_->EvaluationStep(batch);
    const at::NoGradGuard no_grad;
    const at::Tensor output = RunStages(batch.at("input"));
    Communicator& stages = groups_.pipeline();
    const int last = stages.size() - 1;
    StepOutput result;
    // Each value on its way: a line with its name and, of a vector of sums, its length.
    std::string names;
    std::vector<double> values;
    if (stages.rank() == last) {
      result = part_->staged()->LossOf(output, batch.at("target"));
      values.push_back(result.loss.item<double>());
      for (const auto& [name, value] : result.metrics) {
        names += name + " -1\n";
        values.push_back(value.item<double>());
      }
      for (const auto& [name, sums] : result.sums) {
        const at::Tensor flat = sums.to(at::kCPU, at::kDouble).contiguous();
        names += name + ' ' + std::to_string(flat.numel()) + '\n';
        values.insert(values.end(), flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel());
      }
    }
    names = BroadcastText(stages, names, last);
    auto count = static_cast<int64_t>(values.size());
    stages.Broadcast(BufferOf(std::span(&count, 1)), last)->Wait();
    values.resize(static_cast<size_t>(count));
    stages.Broadcast(BufferOf(std::span(values)), last)->Wait();
    const auto doubles = at::TensorOptions().dtype(at::kDouble);
    result.loss = at::scalar_tensor(values[0], doubles);
    size_t next = 1;
    for (size_t at = 0; at < names.size();) {
      const size_t space = names.find(' ', at), end = names.find('\n', at);
      const std::string name = names.substr(at, space - at);
      const int64_t length = std::stoll(names.substr(space + 1, end - space - 1));
      if (length < 0) {
        result.metrics[name] = at::scalar_tensor(values[next++], doubles);
      } else {
        const at::Tensor sums = at::empty({length}, doubles);
        std::copy_n(values.data() + next, length, sums.data_ptr<double>());
        result.sums[name] = sums;
        next += static_cast<size_t>(length);
      }
      at = end + 1;
    }
    return result;
  }
  at::Tensor Predict(const at::Tensor& input) override {
    if (groups_.shape().pipeline == 1) return part_->Predict(input);
    throw AppError("a model that is split into stages does not predict; load the saved model");
  }
  void Train(bool training) override { part_->Train(training); }
  void MoveTo(at::Device device) override { part_->MoveTo(device); }
  void Save(const std::filesystem::path&) override {
    throw AppError("a part of a model is not saved as a model");
  }
  std::string description() override {
    const MeshSpec& shape = groups_.shape();
    return part_->description() + " on this rank (mesh " + std::to_string(shape.data) + " x " +
           std::to_string(shape.tensor) + " x " + std::to_string(shape.pipeline) +
           ", data x tensor x pipeline)";
  }
  std::map<std::string, ParameterPart> parts() override { return part_->parts(); }
  StagedModel* staged() override { return part_->staged(); }

 private:
  // The last stage's output; elsewhere what this stage handed on.
  at::Tensor RunStages(const at::Tensor& input) {
    Communicator& stages = groups_.pipeline();
    const int stage = stages.rank();
    const at::Tensor output =
        part_->staged()->ForwardStage(stage == 0 ? input : Receive(stages, stage - 1, groups_.device()), input.size(0));
    if (stage + 1 < stages.size()) {
      Outbox outbox(stages);
      outbox.Send(output, stage + 1);
      outbox.WaitAll();
    }
    return output;
  }

  const std::unique_ptr<Model> part_;
  MeshGroups& groups_;
};

}  // namespace

MeshGroups::MeshGroups(const MeshSpec& shape, Communicator& gradients, Communicator& layers,
                       Communicator& control, at::Device device, const CollectiveLog* layers_log)
    : shape_(shape), device_(device), layers_log_(layers_log) {
  const int ranks = control.size();
  if (shape.data * shape.tensor * shape.pipeline != ranks) {
    throw UserError("train.mesh: " + std::to_string(shape.data) + " x " +
                    std::to_string(shape.tensor) + " x " + std::to_string(shape.pipeline) +
                    " (data x tensor x pipeline) is " +
                    std::to_string(shape.data * shape.tensor * shape.pipeline) +
                    " ranks, but the job has " + std::to_string(ranks));
  }
  const int rank = control.rank();
  const int part = rank % shape.tensor, replica = rank / shape.tensor % shape.data,
            stage = rank / (shape.tensor * shape.data);
  data_gradients_ = gradients.Split(stage * shape.tensor + part, replica);
  data_ = control.Split(stage * shape.tensor + part, replica);
  tensor_ = layers.Split(stage * shape.data + replica, part);
  forward_ = layers.Split(replica * shape.tensor + part, stage);
  backward_ = layers.Split(replica * shape.tensor + part, stage);
}

MeshPlace MeshGroups::place() {
  return {.tensor = shape_.tensor > 1 ? tensor_.get() : nullptr,
          .part = tensor_->rank(),
          .parts = shape_.tensor,
          .stage = forward_->rank(),
          .stages = shape_.pipeline};
}

std::unique_ptr<Model> MakeMeshModel(const TrainSpec& spec, const Dataset& dataset,
                                     const std::filesystem::path& work_dir, MeshGroups& groups) {
  const auto refuse = [](bool given, const std::string& what) {
    if (given) throw UserError(what + " does not go with a strategy that splits the model");
  };
  refuse(spec.precision != Precision::kFloat32, "train.precision: other than fp32");
  refuse(std::holds_alternative<Lamb>(spec.optimizer), "train.optimizer: lamb");
  refuse(std::holds_alternative<Lars>(spec.optimizer), "train.optimizer: lars");
  refuse(spec.best.has_value(), "train.best");
  if (!spec.model.builtin.empty())
    return std::make_unique<MeshModel>(MakeBuiltinModel(spec, dataset, groups.place()), groups);
  std::optional<ModelArchive> archive;
  if (!spec.model.archive.empty())
    archive = ReadModelArchive(ResolveFile(spec.model.archive, work_dir, "train.model.archive"));
  if (!archive || !archive->script.empty() || groups.shape().tensor > 1 || groups.shape().pipeline == 1) {
    throw UserError(
        "train.strategy: only built-in models can be split between ranks (mlp and transformer), and exported graphs into "
        "the stages of a pipeline; use ddp or zero1, zero2, zero3");
  }
  const MeshPlace place = groups.place();
  auto model = std::make_unique<MeshModel>(MakeGraphStage(spec, *archive, place.stage, place.stages), groups);
  ShakeHands(*model, *archive);
  return model;
}

Mesh::Mesh(std::string name, FlatParameters& parameters, MeshGroups& groups, Model& model,
           const DdpSpec& ddp)
    : name_(std::move(name)),
      parameters_(parameters),
      groups_(groups),
      model_(model),
      ddp_(parameters, groups.data_gradients(), Ddp::Options{.overlap = ddp.overlap}),
      parts_(model.parts()) {}

void Mesh::BeginBackward(const StepStatus& status, bool last) {
  ddp_.BeginBackward(status, last);
}

StepStatus Mesh::EndStep(bool* agreed) {
  // Summed over the data group so far. The stages' losses: the last one's, others have none. The
  // ranks of a tensor group have the same loss, but only one of them may have been asked to stop.
  const StepStatus status = ddp_.EndStep(agreed);
  if (status.on_device.defined()) return SumOnDevice(status);
  auto figures = status.figures();
  if (groups_.shape().pipeline > 1)
    groups_.pipeline().AllReduce(BufferOf(std::span(figures)), Reduction::kSum)->Wait();
  if (groups_.shape().tensor > 1)
    groups_.tensor().AllReduce(BufferOf(std::span(figures).subspan(1)), Reduction::kMax)->Wait();
  return StepStatus::Of(figures);
}

StepStatus Mesh::SumOnDevice(const StepStatus& status) {
  const at::Tensor& figures = status.on_device;
  if (groups_.shape().pipeline > 1)
    groups_.pipeline().AllReduce(BufferOfTensor(figures), Reduction::kSum)->Wait();
  if (groups_.shape().tensor > 1)
    groups_.tensor().AllReduce(BufferOfTensor(figures.narrow(0, 1, figures.numel() - 1)), Reduction::kMax)->Wait();
  return status;
}

double Mesh::SquaresOfGradients() {
  // Parameters that a tensor group holds alike count once.
  std::vector<FlatRange> gradients;
  for (const FlatParameters::Parameter& p : parameters_.parameters()) {
    if (!parts_.contains(p.name) && groups_.tensor().rank() > 0) continue;
    gradients.push_back({.gradients = p.tensor.grad()});
  }
  double sum = SumOfSquares(gradients);
  for (Communicator* group : {&groups_.tensor(), &groups_.pipeline()})
    group->AllReduce(BufferOf(std::span(&sum, 1)), Reduction::kSum)->Wait();
  return sum;
}

// ---- the pipeline's schedule

// A micro-batch between its forward and its backward.
struct Mesh::InFlight {
  Slice samples;
  double weight = 0;
  at::Tensor input, output;  // the last stage's output is the loss
};

StepStatus Mesh::RunPasses(const BatchSource::Item& item, StepStatus status, const Enter& enter) {
  Communicator &forward_stages = groups_.pipeline(), &backward_stages = groups_.backward();
  const int stage = forward_stages.rank(), count = forward_stages.size();
  const bool last_stage = stage + 1 == count;
  const auto passes = static_cast<int>(
      std::min<int64_t>(groups_.shape().micro_batches, item.local_samples));
  if (passes == 0) {
    ddp_.BeginBackward(status, /*last=*/true);
    ddp_.EndBackward();
    return status;
  }
  std::vector<InFlight> in_flight(static_cast<size_t>(passes));
  for (int i = 0; i < passes; ++i) {
    InFlight& pass = in_flight[static_cast<size_t>(i)];
    pass.samples = SliceOf(item.local_samples, i, passes);
    pass.weight = Weight(pass.samples.size(), item.local_samples, item.global_samples);
  }
  Outbox activations(forward_stages), gradients(backward_stages);
  const auto forward = [&](int i) {
    enter(Activity::kForward);
    InFlight& pass = in_flight[static_cast<size_t>(i)];
    const auto part = [&](const char* name) {
      return item.batch.at(name).narrow(0, pass.samples.first, pass.samples.size());
    };
    if (stage == 0) {
      pass.input = part("input");
    } else {
      pass.input = Receive(forward_stages, stage - 1, groups_.device());
      pass.input.requires_grad_(true);
    }
    const at::Tensor output = model_.staged()->ForwardStage(pass.input, pass.samples.size());
    if (last_stage) {
      pass.output = model_.staged()->LossOf(output, part("target")).loss;
      status.NoteLoss(pass.output, pass.weight);
    } else {
      pass.output = output;
      activations.Send(output, stage + 1);
    }
  };
  const auto backward = [&](int i) {
    enter(Activity::kBackward);
    InFlight& pass = in_flight[static_cast<size_t>(i)];
    const at::Tensor gradient =
        last_stage
            ? at::scalar_tensor(pass.weight, pass.output.options().requires_grad(false))
            : Receive(backward_stages, stage + 1, groups_.device());
    ddp_.BeginBackward(status, i + 1 == passes);
    pass.output.backward(gradient);
    ddp_.EndBackward();
    if (stage > 0) gradients.Send(pass.input.grad(), stage - 1);
    pass = InFlight{};  // its activations go
  };
  // 1F1B: as many forwards ahead as there are stages behind, then one of each in turn, so that a
  // stage keeps at most `count - stage` micro-batches. GPipe: all forwards, then all backwards.
  const int ahead = groups_.shape().schedule == "gpipe" ? passes : std::min(count - stage - 1, passes);
  int next_forward = 0, next_backward = 0;
  while (next_forward < ahead) forward(next_forward++);
  while (next_backward < passes) {
    if (next_forward < passes) forward(next_forward++);
    backward(next_backward++);
  }
  activations.WaitAll();
  gradients.WaitAll();
  return status;
}

// ---- state

std::vector<StateSlice> Mesh::InWhole(std::vector<StateSlice> held) const {
  std::vector<StateSlice> whole;
  for (StateSlice& slice : held) {
    const std::string parameter = slice.name.substr(slice.name.rfind('/') + 1);
    const auto found = parts_.find(parameter);
    if (found == parts_.end()) {
      whole.push_back(std::move(slice));
      continue;
    }
    // Both are seen as rows of `outer` times `inner` elements; ours begin at `first` in the whole's.
    const ParameterPart& part = found->second;
    int64_t inner = 1;
    for (size_t d = static_cast<size_t>(part.dim) + 1; d < part.shape.size(); ++d)
      inner *= part.shape[d];
    const int64_t row_of_whole = part.shape[static_cast<size_t>(part.dim)] * inner;
    const int64_t row_of_part = slice.shape[static_cast<size_t>(part.dim)] * inner;
    for (int64_t at = slice.offset; at < slice.offset + slice.count;) {
      const int64_t row = at / row_of_part, column = at % row_of_part;
      const int64_t count = std::min(row_of_part - column, slice.offset + slice.count - at);
      whole.push_back({.name = slice.name,
                       .shape = part.shape,
                       .offset = row * row_of_whole + part.first * inner + column,
                       .count = count,
                       .view = slice.view.narrow(0, at - slice.offset, count)});
      at += count;
    }
  }
  return whole;
}

std::vector<StateSlice> Mesh::Owned(std::vector<StateSlice> held) const {
  if (groups_.tensor().rank() > 0) {
    std::erase_if(held, [&](const StateSlice& slice) {
      return !parts_.contains(slice.name.substr(slice.name.rfind('/') + 1));
    });
  }
  return PartOf(InWhole(std::move(held)), groups_.data().rank(), groups_.data().size());
}

std::vector<int> Mesh::FindDifferingRanks(Communicator& control) {
  // Of each data group by itself, and of each tensor group what its ranks hold alike; every rank learns
  // of all.
  std::vector<int64_t> differs(static_cast<size_t>(control.size()), 0);
  const int my_stage = groups_.pipeline().rank(), my_replica = groups_.data().rank(),
            my_part = groups_.tensor().rank();
  for (const int replica : FindDiffering(HashValues(parameters_), groups_.data()))
    differs[static_cast<size_t>(RankOf(my_stage, replica, my_part))] = 1;
  ValueHash alike;
  for (const FlatParameters::Parameter& p : parameters_.parameters()) {
    if (!parts_.contains(p.name)) alike.Add(p.tensor.detach());
  }
  for (const int part : FindDiffering(alike.Get(), groups_.tensor()))
    differs[static_cast<size_t>(RankOf(my_stage, my_replica, part))] = 1;
  control.AllReduce(BufferOf(std::span(differs)), Reduction::kMax)->Wait();
  std::vector<int> ranks;
  for (size_t r = 0; r < differs.size(); ++r) {
    if (differs[r] != 0) ranks.push_back(static_cast<int>(r));
  }
  return ranks;
}

}  // namespace itwin::worker
