#include "agent/worker/training/evaluation.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include <ATen/ops/mse_loss.h>

#include "agent/worker/error.h"
#include "agent/worker/training/sampler.h"
#include "agent/worker/training/summed_metrics.h"

namespace itwin::worker {
namespace {

// Sums of metric * samples by name.
class WeightedSums {
 public:
  void Add(const std::string& name, double mean, int64_t samples) {
    sums_[name] += mean * static_cast<double>(samples);
  }
  void AddSamples(int64_t samples) { samples_ += samples; }

  // Means over all ranks. Names are rank 0's, which always has samples; a rank without any does not
  // know them.
  std::map<std::string, double> Means(Communicator& communicator) const {
    std::string names;
    for (const auto& [name, sum] : sums_) names += name + '\n';
    names = BroadcastText(communicator, names, 0);
    std::vector<std::string> order;
    std::vector<double> values = {static_cast<double>(samples_)};
    int64_t unknown = 0;
    for (size_t at = 0; at < names.size();) {
      const size_t end = names.find('\n', at);
      order.push_back(names.substr(at, end - at));
      at = end + 1;
      const auto found = sums_.find(order.back());
      if (found == sums_.end() && samples_ > 0) ++unknown;
      values.push_back(found == sums_.end() ? 0 : found->second);
    }
    if (samples_ > 0 && sums_.size() != order.size()) ++unknown;
    values.push_back(static_cast<double>(unknown));
    communicator.AllReduce(BufferOf(std::span(values)), Reduction::kSum)->Wait();
    if (values.back() > 0) throw AppError("the model reports different metrics on different ranks");
    std::map<std::string, double> means;
    for (size_t i = 0; i < order.size(); ++i) means[order[i]] = values[i + 1] / values[0];
    return means;
  }

 private:
  std::map<std::string, double> sums_;
  int64_t samples_ = 0;
};

// Vectors by name, added up over batches and ranks.
class VectorSums {
 public:
  void Add(const std::string& name, const at::Tensor& vector) {
    const at::Tensor values = vector.to(at::kCPU, at::kDouble).contiguous();
    std::vector<double>& sum = sums_[name];
    sum.resize(static_cast<size_t>(values.numel()));
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += values.data_ptr<double>()[i];
  }

  std::map<std::string, std::vector<double>> Total(Communicator& communicator) const {
    // Rank 0 always has samples, so it knows all names; lengths must not depend on the samples.
    std::string layout;
    for (const auto& [name, sum] : sums_) layout += name + '\n' + std::to_string(sum.size()) + '\n';
    layout = BroadcastText(communicator, layout, 0);
    std::map<std::string, std::vector<double>> total;
    for (size_t at = 0; at < layout.size();) {
      const size_t middle = layout.find('\n', at), end = layout.find('\n', middle + 1);
      const std::string name = layout.substr(at, middle - at);
      std::vector<double> sum(std::stoull(layout.substr(middle + 1, end - middle - 1)));
      if (const auto own = sums_.find(name); own != sums_.end()) {
        if (own->second.size() != sum.size())
          throw AppError("the model sums \"" + name + "\" with other lengths on other ranks");
        sum = own->second;
      }
      communicator.AllReduce(BufferOf(std::span(sum)), Reduction::kSum)->Wait();
      total[name] = std::move(sum);
      at = end + 1;
    }
    return total;
  }

 private:
  std::map<std::string, std::vector<double>> sums_;
};

// Calls f(batch, samples) for this rank's samples of the split, in their order.
template <typename F>
void ForEachBatch(const Dataset& dataset, Split split, int64_t batch,
                  const Communicator& communicator, F f) {
  const Slice mine = SliceOf(dataset.size(split), communicator.rank(), communicator.size());
  for (int64_t first = mine.first; first < mine.last; first += batch) {
    std::vector<int64_t> indices(static_cast<size_t>(std::min(batch, mine.last - first)));
    std::iota(indices.begin(), indices.end(), first);
    f(dataset.Gather(split, indices), static_cast<int64_t>(indices.size()));
  }
}

}  // namespace

std::string RootName(const std::string& metric) {
  if (metric == "mse") return "rmse";
  if (metric.ends_with("_mse")) return metric.substr(0, metric.size() - 3) + "rmse";
  return "";
}

Evaluation Evaluate(Model& model, const Dataset& dataset, Split split, int64_t batch,
                    Communicator& communicator, bool lockstep,
                    const std::function<void()>& each_batch) {
  WeightedSums sums;
  VectorSums vectors;
  ForEachBatch(dataset, split, batch, communicator, [&](const Batch& samples, int64_t count) {
    if (each_batch) each_batch();
    const StepOutput output = model.EvaluationStep(samples);
    sums.AddSamples(count);
    sums.Add("loss", output.loss.item<double>(), count);
    for (const auto& [name, value] : output.metrics) sums.Add(name, value.item<double>(), count);
    for (const auto& [name, vector] : output.sums) vectors.Add(name, vector);
  });
  if (lockstep) {
    const auto batches = [&](int rank) {
      const int64_t mine = SliceOf(dataset.size(split), rank, communicator.size()).size();
      return (mine + batch - 1) / batch;
    };
    for (int64_t n = batches(communicator.rank()); n < batches(0); ++n)
      model.EvaluationStep(dataset.Gather(split, {0}));
  }
  Evaluation evaluation{.metrics = sums.Means(communicator), .sums = vectors.Total(communicator)};
  std::map<std::string, double>& means = evaluation.metrics;
  for (const auto& [name, value] : std::map<std::string, double>(means)) {
    if (const std::string root = RootName(name); !root.empty()) means[root] = std::sqrt(value);
  }
  for (const auto& [name, value] : MetricsOfSums(evaluation.sums)) means[name] = value;
  return evaluation;
}

std::map<std::string, double> EvaluateBaselines(const Dataset& dataset, Split split, int64_t batch,
                                                Communicator& communicator) {
  if (dataset.baselines().empty()) return {};
  WeightedSums sums;
  ForEachBatch(dataset, split, batch, communicator, [&](const Batch& samples, int64_t count) {
    sums.AddSamples(count);
    for (const auto& [name, prediction] : dataset.BaselinePredictions(samples)) {
      sums.Add(name, at::mse_loss(prediction, samples.at("target")).item<double>(), count);
    }
  });
  std::map<std::string, double> roots;
  for (const auto& [name, mse] : sums.Means(communicator)) roots[name + "_rmse"] = std::sqrt(mse);
  return roots;
}

}  // namespace itwin::worker
