#include "agent/worker/training/strategy.h"

#include <algorithm>
#include <cstring>
#include <map>

#include <ATen/ops/empty.h>

#include "agent/worker/error.h"
#include "agent/worker/training/ddp.h"
#include "agent/worker/training/horovod.h"
#include "agent/worker/training/local_sgd.h"
#include "agent/worker/training/optimizer.h"
#include "agent/worker/training/sampler.h"
#include "agent/worker/training/zero.h"

namespace itwin::worker {
namespace {

constexpr double kMegabyte = 1 << 20;

}  // namespace

std::string ChooseStrategy(const TrainSpec& spec, int ranks, std::string* note) {
  note->clear();
  if (ranks == 1) {
    std::string asked = spec.strategy == "single" ? "" : spec.strategy;
    if (spec.local_sgd.every > 1) asked += asked.empty() ? "local_sgd" : " with local_sgd";
    if (!asked.empty()) *note = "ran single because the job has one rank (asked for: " + asked + ")";
    return "single";
  }
  if (spec.strategy == "single") {
    throw UserError("train.strategy is \"single\", but the job has " + std::to_string(ranks) +
                    " ranks; ask for one rank, or use strategy \"ddp\"");
  }
  if (spec.local_sgd.every > 1) return "local_sgd";
  return spec.strategy.empty() ? "ddp" : spec.strategy;
}

bool IsMesh(const std::string& strategy) {
  return strategy == "tensor" || strategy == "pipeline" || strategy == "mesh";
}

MeshSpec MeshOf(const TrainSpec& spec, const std::string& strategy, int ranks) {
  MeshSpec mesh = spec.mesh;
  const auto rest = [&](int others) { return others > 0 && ranks % others == 0 ? ranks / others : 1; };
  if (mesh.tensor == 0)
    mesh.tensor = strategy == "tensor" ? rest(std::max(1, mesh.data) * std::max(1, mesh.pipeline)) : 1;
  if (mesh.pipeline == 0)
    mesh.pipeline = strategy == "pipeline" ? rest(std::max(1, mesh.data) * mesh.tensor) : 1;
  if (mesh.data == 0) mesh.data = rest(mesh.tensor * mesh.pipeline);
  return mesh;
}

double Strategy::SquaresOfGradients() {
  double squares = SumOfSquares(ranges());
  SumOverShards(std::span(&squares, 1));
  return squares;
}

FlatParameters LayOut(const TrainSpec& spec, const std::string& strategy,
                      const std::vector<std::pair<std::string, at::Tensor>>& named, int ranks) {
  const auto bytes = [](double mb) { return static_cast<int64_t>(mb * kMegabyte); };
  if (strategy.starts_with("zero"))
    return FlatParameters(named, bytes(spec.zero.bucket_mb), bytes(spec.zero.bucket_mb), ranks);
  return FlatParameters(named, bytes(spec.ddp.first_bucket_mb), bytes(spec.ddp.bucket_mb));
}

std::unique_ptr<Strategy> MakeStrategy(const TrainSpec& spec, const std::string& name,
                                       FlatParameters& parameters, Communicator& communicator) {
  if (name == "single" || name == "ddp") {
    const Compression compression = spec.ddp.compression == "fp16"   ? Compression::kFloat16
                                    : spec.ddp.compression == "bf16" ? Compression::kBfloat16
                                                                     : Compression::kNone;
    return std::make_unique<Ddp>(
        parameters, communicator,
        Ddp::Options{.name = name,
                     .overlap = spec.ddp.overlap,
                     .compression = communicator.size() > 1 ? compression : Compression::kNone});
  }
  if (name == "local_sgd")
    return std::make_unique<LocalSgd>(parameters, communicator, spec.local_sgd.every);
  if (name == "horovod") {
    return std::make_unique<Horovod>(
        parameters, communicator,
        Horovod::Options{.fusion_bytes = static_cast<int64_t>(spec.horovod.fusion_mb * kMegabyte),
                         .cycle_seconds = spec.horovod.cycle_ms * 1e-3,
                         .adasum = spec.horovod.adasum});
  }
  if (name == "zero1" || name == "zero2" || name == "zero3") {
    return std::make_unique<Zero>(
        parameters, communicator,
        Zero::Options{.stage = name.back() - '0', .overlap = spec.zero.overlap});
  }
  throw UserError("train.strategy is \"" + name + "\", which this worker does not have");
}

Strategy::Memory MemoryOfWholeBuckets(const FlatParameters& parameters) {
  Strategy::Memory memory;
  for (const FlatParameters::Bucket& bucket : parameters.buckets()) {
    memory.parameters += static_cast<int64_t>(bucket.values.nbytes());
    memory.gradients += static_cast<int64_t>(bucket.gradients.nbytes());
  }
  memory.peak_parameters = memory.parameters;
  memory.peak_gradients = memory.gradients;
  return memory;
}

std::vector<FlatRange> WholeBuckets(const FlatParameters& parameters) {
  std::vector<FlatRange> ranges;
  for (size_t b = 0; b < parameters.buckets().size(); ++b) {
    const FlatParameters::Bucket& bucket = parameters.buckets()[b];
    ranges.push_back({.bucket = b,
                      .first = 0,
                      .values = bucket.values,
                      // without the status
                      .gradients = bucket.gradients.narrow(0, 0, bucket.values.numel())});
  }
  return ranges;
}

void AppendSlices(const FlatParameters& parameters, const FlatRange& range, const at::Tensor& flat,
                  const std::string& prefix, std::vector<StateSlice>* slices) {
  const int64_t last = range.first + flat.numel();
  for (const size_t i : parameters.buckets()[range.bucket].parameters) {
    const FlatParameters::Parameter& p = parameters.parameters()[i];
    const int64_t from = std::max(range.first, p.offset);
    const int64_t to = std::min(last, p.offset + p.tensor.numel());
    if (from >= to) continue;
    slices->push_back({.name = prefix + p.name,
                       .shape = p.tensor.sizes().vec(),
                       .offset = from - p.offset,
                       .count = to - from,
                       .view = flat.narrow(0, from - range.first, to - from)});
  }
}

std::vector<StateSlice> ParameterSlices(const FlatParameters& parameters,
                                        const std::vector<FlatRange>& ranges) {
  std::vector<StateSlice> slices;
  for (const FlatRange& range : ranges) AppendSlices(parameters, range, range.values, "", &slices);
  return slices;
}

std::vector<StateSlice> PartOf(const std::vector<StateSlice>& slices, int rank, int ranks) {
  int64_t total = 0;
  for (const StateSlice& s : slices) total += s.count;
  const Slice mine = SliceOf(total, rank, ranks);
  std::vector<StateSlice> part;
  int64_t at = 0;
  for (const StateSlice& s : slices) {
    const int64_t from = std::max(mine.first, at), to = std::min(mine.last, at + s.count);
    if (from < to) {
      StateSlice piece = s;
      piece.offset = s.offset + from - at;
      piece.count = to - from;
      piece.view = s.view.narrow(0, from - at, piece.count);
      part.push_back(std::move(piece));
    }
    at += s.count;
  }
  return part;
}

void VisitSlices(std::vector<StateSlice> owned, Communicator& communicator, const VisitTensor& visit) {
  // Everybody goes through its slices by name, so that rank 0 needs no more than one tensor at a time.
  std::stable_sort(owned.begin(), owned.end(),
                   [](const StateSlice& a, const StateSlice& b) { return a.name < b.name; });
  if (communicator.rank() != 0) {
    // What it will send, as lines: name, type, offset, count, shape.
    std::string text;
    for (const StateSlice& s : owned) {
      text += s.name + '\t' + std::to_string(static_cast<int>(s.view.scalar_type())) + '\t' +
              std::to_string(s.offset) + '\t' + std::to_string(s.count);
      for (const int64_t size : s.shape) text += '\t' + std::to_string(size);
      text += '\n';
    }
    auto size = static_cast<int64_t>(text.size());
    communicator.Send(BufferOf(std::span(&size, 1)), 0)->Wait();
    communicator.Send(BufferOf(std::span(text.data(), text.size())), 0)->Wait();
    for (const StateSlice& s : owned) {
      const at::Tensor bytes = s.view.cpu().contiguous();
      communicator.Send({bytes.data_ptr(), static_cast<int64_t>(bytes.nbytes())}, 0)->Wait();
    }
    return;
  }
  struct Piece {
    int rank = 0;
    StateSlice slice{};  // of rank 0: with its view
  };
  std::map<std::string, std::vector<Piece>> pieces;
  for (const StateSlice& s : owned) pieces[s.name].push_back({0, s});
  for (int r = 1; r < communicator.size(); ++r) {
    int64_t size = 0;
    communicator.Recv(BufferOf(std::span(&size, 1)), r)->Wait();
    std::string text(static_cast<size_t>(size), '\0');
    communicator.Recv(BufferOf(std::span(text.data(), text.size())), r)->Wait();
    for (size_t at = 0; at < text.size();) {
      const size_t end = text.find('\n', at);
      std::vector<std::string> fields;
      for (size_t from = at; from <= end;) {
        const size_t tab = std::min(text.find('\t', from), end);
        fields.push_back(text.substr(from, tab - from));
        from = tab + 1;
      }
      at = end + 1;
      StateSlice s{.name = fields[0],
                   .shape = {},
                   .offset = std::stoll(fields[2]),
                   .count = std::stoll(fields[3])};
      for (size_t f = 4; f < fields.size(); ++f) s.shape.push_back(std::stoll(fields[f]));
      s.view = at::empty({0}, at::TensorOptions().dtype(static_cast<at::ScalarType>(std::stoi(fields[1]))));
      pieces[s.name].push_back({r, std::move(s)});
    }
  }
  for (const auto& [name, of_name] : pieces) {
    const StateSlice& first = of_name.front().slice;
    const at::Tensor whole = at::empty(first.shape, first.view.options().device(at::kCPU));
    int64_t missing = whole.numel();
    for (const Piece& piece : of_name) {
      const at::Tensor there = whole.view({-1}).narrow(0, piece.slice.offset, piece.slice.count);
      if (piece.rank == 0) {
        there.copy_(piece.slice.view);
      } else {
        communicator.Recv({there.data_ptr(), static_cast<int64_t>(there.nbytes())}, piece.rank)->Wait();
      }
      missing -= piece.slice.count;
    }
    if (missing != 0) {
      throw AppError("no rank holds " + std::to_string(missing) + " elements of " + name);
    }
    visit(name, whole);
  }
}

NamedTensors GatherSlices(const std::vector<StateSlice>& owned, Communicator& communicator) {
  NamedTensors named;
  VisitSlices(owned, communicator,
              [&named](const std::string& name, const at::Tensor& tensor) { named.emplace_back(name, tensor); });
  return named;
}

void ScatterSlices(const NamedTensors& whole, const std::vector<StateSlice>& slices,
                   const std::string& whose) {
  const std::map<std::string, at::Tensor> by_name(whole.begin(), whole.end());
  for (const StateSlice& s : slices) {
    const auto found = by_name.find(s.name);
    if (found == by_name.end() || found->second.sizes() != s.shape ||
        found->second.scalar_type() != s.view.scalar_type()) {
      throw AppError(whose + " does not fit: " + s.name +
                     (found == by_name.end() ? " is missing" : " has another shape or type"));
    }
    s.view.copy_(found->second.detach().reshape({-1}).narrow(0, s.offset, s.count));
  }
}

}  // namespace itwin::worker
