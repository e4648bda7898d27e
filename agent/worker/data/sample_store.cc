#include "agent/worker/data/sample_store.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <variant>

#include "agent/worker/data/nearest_name.h"
#include "agent/worker/data/unusable_cells.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// Statistics are computed in blocks of so many samples, or fewer where these have more elements.
constexpr int64_t kStatisticsBlock = 4096;
constexpr int64_t kStatisticsElements = 16 << 20;

at::ScalarType ScalarTypeOf(ElementType type) {
  switch (type) {
    case ElementType::kBool:
      return at::kBool;
    case ElementType::kUint8:
      return at::kByte;
    case ElementType::kInt8:
      return at::kChar;
    case ElementType::kInt16:
      return at::kShort;
    case ElementType::kInt32:
      return at::kInt;
    case ElementType::kInt64:
      return at::kLong;
    case ElementType::kFloat16:
      return at::kHalf;
    case ElementType::kFloat32:
      return at::kFloat;
    case ElementType::kFloat64:
      return at::kDouble;
  }
  return at::kFloat;
}

std::vector<std::string> Names(const std::map<std::string, StoredArray>& part) {
  std::vector<std::string> names;
  for (const auto& [name, array] : part) names.push_back(name);
  return names;
}

// The named float arrays, or all of them.
std::vector<std::string> FloatArrays(const SampleStore& store,
                                     const std::vector<std::string>& wanted,
                                     const std::string& field) {
  const auto& part = store.parts.front();
  std::vector<std::string> names;
  for (const std::string& name : wanted) {
    const auto found = part.find(name);
    if (found == part.end()) {
      throw UserError(field + ".arrays: no array \"" + name + "\"" +
                      NearestHint(name, Names(part)) + " (arrays here: " + JoinNames(Names(part)) +
                      ")");
    }
    if (!found->second.is_float) {
      throw UserError(field + ".arrays: \"" + name +
                      "\" holds integers (class numbers); only float arrays fit");
    }
    names.push_back(name);
  }
  if (!wanted.empty()) return names;
  for (const auto& [name, array] : part) {
    if (array.is_float) names.push_back(name);
  }
  return names;
}

// Count, mean and sum of squared differences from it, per channel, in float64.
struct Moments {
  std::vector<double> count, mean, squares;

  // Of both sets of cells together (Chan et al.): no digits are lost to a large mean.
  void Merge(const double* other_count, const double* other_mean, const double* other_squares) {
    for (size_t c = 0; c < count.size(); ++c) {
      const double total = count[c] + other_count[c];
      if (other_count[c] == 0) continue;
      const double step = other_mean[c] - mean[c];
      mean[c] += step * other_count[c] / total;
      squares[c] += other_squares[c] + step * step * count[c] * other_count[c] / total;
      count[c] = total;
    }
  }
};

// Over the samples of `indices`, of which every rank reads a part. The samples are cut into blocks
// that do not depend on the number of ranks, and the blocks are merged in order on every rank.
Moments ComputeMoments(const StoredArray& array, const std::vector<int64_t>& indices,
                       const RankShare& share) {
  int64_t sample_elements = 1;
  for (const int64_t size : array.sample_shape()) sample_elements *= size;
  const auto block_samples = static_cast<size_t>(
      std::clamp<int64_t>(kStatisticsElements / std::max<int64_t>(1, sample_elements), 1,
                          kStatisticsBlock));
  const size_t blocks = (indices.size() + block_samples - 1) / block_samples;
  const auto channels = static_cast<size_t>(
      array.values.dim() > array.channel_dim ? array.values.size(array.channel_dim) : 1);
  std::vector<double> of_blocks(blocks * 3 * channels, 0.0);  // count, mean, squares of each
  for (size_t block = 0; block < blocks; ++block) {
    if (block % static_cast<size_t>(share.ranks) != static_cast<size_t>(share.rank)) continue;
    const size_t first = block * block_samples;
    const size_t last = std::min(indices.size(), first + block_samples);
    const at::Tensor chosen = at::tensor(at::IntArrayRef(indices.data() + first, last - first),
                                         at::TensorOptions().dtype(at::kLong));
    at::Tensor values = array.Select(chosen).to(at::kDouble);
    // [channels, everything else]; NaN cells do not count.
    values = values.dim() > array.channel_dim
                 ? values.movedim(array.channel_dim, 0).reshape({static_cast<int64_t>(channels), -1})
                 : values.reshape({1, -1});
    const at::Tensor count = values.isnan().logical_not().sum(1).to(at::kDouble);
    const at::Tensor mean = values.nansum(1) / count.clamp_min(1);
    const at::Tensor squares = (values - mean.unsqueeze(1)).square().nansum(1);
    double* to = of_blocks.data() + block * 3 * channels;
    for (const at::Tensor& part : {count, mean, squares}) {
      std::memcpy(to, part.contiguous().data_ptr<double>(), channels * sizeof(double));
      to += channels;
    }
  }
  // Each number is one rank's and zero on all others: the sum is exact.
  if (share.ranks > 1) share.sum(of_blocks);
  Moments moments{.count = std::vector<double>(channels, 0.0),
                  .mean = std::vector<double>(channels, 0.0),
                  .squares = std::vector<double>(channels, 0.0)};
  for (size_t block = 0; block < blocks; ++block) {
    const double* of = of_blocks.data() + block * 3 * channels;
    moments.Merge(of, of + channels, of + 2 * channels);
  }
  return moments;
}

// What the training before has recorded for this array at this place in the list of transforms.
void TakeStatistics(const SampleStore& store, const std::string& name, const std::string& field,
                    std::vector<double>* means, std::vector<double>* deviations) {
  const StoredArray& array = store.parts[0].at(name);
  const auto channels = static_cast<size_t>(
      array.values.dim() > array.channel_dim ? array.values.size(array.channel_dim) : 1);
  try {
    const nlohmann::json& of_array =
        store.statistics.at("transforms").at(store.record.size()).at("standardize").at(name);
    *means = of_array.at("mean").get<std::vector<double>>();
    *deviations = of_array.at("deviation").get<std::vector<double>>();
  } catch (const nlohmann::json::exception&) {
    throw UserError(field + ": the preprocessing file has no statistics of array \"" + name +
                    "\" here; the transforms must be those of the training");
  }
  if (means->size() != channels || deviations->size() != channels) {
    throw UserError(field + ": the preprocessing file has statistics of " +
                    std::to_string(means->size()) + " channels of array \"" + name +
                    "\", the data have " + std::to_string(channels));
  }
}

void ApplyOne(const Standardize& spec, const std::string& field, const RankShare& share,
              SampleStore* store) {
  const auto& train = store->splits[static_cast<size_t>(Split::kTrain)];
  nlohmann::json record = nlohmann::json::object();
  for (const std::string& name : FloatArrays(*store, spec.arrays, field)) {
    std::vector<double> means, deviations;
    if (!store->statistics.is_null()) {
      TakeStatistics(*store, name, field, &means, &deviations);
    } else {
      const Moments moments = ComputeMoments(store->parts[0].at(name), train, share);
      // An infinite cell would leave no finite number behind it.
      for (const double mean : moments.mean) {
        if (std::isfinite(mean)) continue;
        RefuseInfinite(FindUnusableCells(store->parts[0].at(name), train, share), name);
      }
      means = moments.mean;
      for (size_t c = 0; c < moments.count.size(); ++c) {
        const double deviation = std::sqrt(moments.squares[c] / std::max(1.0, moments.count[c]));
        deviations.push_back(deviation > 0 ? deviation : 1);  // a constant stays, minus its mean
      }
    }
    std::vector<float> multiply, add;
    for (size_t c = 0; c < means.size(); ++c) {
      multiply.push_back(static_cast<float>(1 / deviations[c]));
      add.push_back(static_cast<float>(-means[c] / deviations[c]));
    }
    for (auto& part : store->parts) part.at(name).Apply(at::tensor(multiply), at::tensor(add));
    record[name] = {{"mean", means}, {"deviation", deviations}};
  }
  store->record.push_back({{"standardize", record}});
}

void ApplyOne(const Scale& spec, const std::string& field, const RankShare&, SampleStore* store) {
  const std::vector<std::string> names = FloatArrays(*store, spec.arrays, field);
  for (const std::string& name : names) {
    for (auto& part : store->parts) {
      part.at(name).Apply(at::full({1}, spec.multiply, at::kFloat),
                          at::full({1}, spec.add, at::kFloat));
    }
  }
  store->record.push_back(
      {{"scale", {{"arrays", names}, {"multiply", spec.multiply}, {"add", spec.add}}}});
}

void ApplyOne(const Crop& spec, const std::string& field, const RankShare&, SampleStore* store) {
  if (spec.sizes.empty()) throw UserError(field + ".sizes: name at least one size");
  const auto rank = static_cast<int64_t>(spec.sizes.size());
  bool any = false;
  for (auto& part : store->parts) {
    for (auto& [name, array] : part) {
      const std::vector<int64_t> shape = array.sample_shape();
      if (static_cast<int64_t>(shape.size()) < rank) continue;  // such as labels
      any = true;
      for (int64_t i = 0; i < rank; ++i) {
        const int64_t size = spec.sizes[static_cast<size_t>(i)];
        const int64_t dim = array.values.dim() - rank + i;
        if (size < 1 || size > array.values.size(dim)) {
          throw UserError(field + ".sizes: " + ShapeText(spec.sizes) +
                          " cannot be cut from array \"" + name + "\", whose samples have shape " +
                          ShapeText(shape));
        }
        if (array.streamed()) {
          std::vector<int64_t> cut = array.sample_shape();
          cut[static_cast<size_t>(dim - 1)] = size;
          const int64_t from_end = dim - array.values.dim();
          array.Then([from_end, size](const at::Tensor& x) { return x.narrow(from_end, 0, size); },
                     cut);
          continue;
        }
        if (dim == array.channel_dim && array.multiply.defined() && array.multiply.numel() > 1) {
          array.multiply = array.multiply.narrow(0, 0, size);
          array.add = array.add.narrow(0, 0, size);
        }
        array.values = array.values.narrow(dim, 0, size);
      }
    }
  }
  if (!any) {
    throw UserError(field + ".sizes: no array has samples of " + std::to_string(rank) +
                    " or more dimensions");
  }
  store->record.push_back({{"crop", {{"sizes", spec.sizes}}}});
}

void ApplyOne(const Coarsen& spec, const std::string& field, const RankShare&, SampleStore* store) {
  const std::vector<std::string> known = {"bilinear", "bicubic"};
  for (const std::string& name : spec.baselines) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw UserError(field + ".baselines: unknown baseline \"" + name + "\"" +
                      NearestHint(name, known) + " (known: bilinear, bicubic)");
    }
  }
  if (spec.factor < 2) {
    throw UserError(field + ".factor: " + std::to_string(spec.factor) + " must be at least 2");
  }
  const std::string source = store->SourceName(field);
  for (auto& part : store->parts) {
    const StoredArray whole = part.at(source);
    const std::vector<int64_t> shape = whole.sample_shape();
    if (!whole.is_float || shape.size() != 3) {
      throw UserError(field + ": array \"" + source + "\" has samples of shape " +
                      ShapeText(shape) +
                      "; coarsening needs float samples [channels, rows, columns]");
    }
    const int64_t factor = spec.factor;
    if (shape[1] % factor != 0 || shape[2] % factor != 0) {
      const std::vector<int64_t> fits = {shape[1] - shape[1] % factor,
                                         shape[2] - shape[2] % factor};
      throw UserError(field + ".factor: " + std::to_string(factor) +
                      " does not divide samples of shape " + ShapeText(shape) +
                      "; put the transform crop: {sizes: " + ShapeText(fits) + "} before it");
    }
    StoredArray target, input;
    if (whole.streamed()) {
      target = input = whole;
      input.Then([factor](const at::Tensor& x) { return at::avg_pool2d(x, {factor, factor}); },
                 {shape[0], shape[1] / factor, shape[2] / factor});
    } else {
      target.values = whole.Materialize();
      target.is_float = true;
      input = target;
      input.values = at::avg_pool2d(target.values, {factor, factor});
    }
    part.erase(source);
    part["input"] = input;
    part["target"] = target;
  }
  store->input = "input";
  store->target = "target";
  store->baselines = spec.baselines;
  store->record.push_back({{"coarsen", {{"factor", spec.factor}}}});
}

// Cells that are NaN become the value, or the mean of the valid cells of their sample and channel.
at::Tensor FillCells(const at::Tensor& values, int64_t channel_dim, std::optional<double> value,
                     const std::string& field, const std::string& name) {
  const at::Tensor missing = values.isnan();
  if (!missing.any().item<bool>()) return values;
  at::Tensor filling;
  if (value) {
    filling = at::full({1}, *value, at::kFloat);
  } else {
    if (values.dim() <= channel_dim + 1) {
      throw UserError(field + ": array \"" + name +
                      "\" has one number per sample and channel, so a missing "
                      "one has no valid neighbours to take the mean of; give a value, as in "
                      "fill_missing: {value: 0}");
    }
    const at::Tensor flat = values.flatten(channel_dim + 1);
    const at::Tensor valid = missing.flatten(channel_dim + 1).logical_not().sum(-1);
    if (valid.eq(0).any().item<bool>()) {
      const int64_t cell = valid.eq(0).nonzero()[0][0].item<int64_t>();
      throw UserError(field + ": sample " + std::to_string(cell) + " of array \"" + name +
                      "\" has a channel without any valid cell; give a value, as in "
                      "fill_missing: {value: 0}");
    }
    filling = flat.to(at::kDouble).nansum(-1).div(valid).to(at::kFloat);
    while (filling.dim() < values.dim()) filling = filling.unsqueeze(-1);
  }
  return at::where(missing, filling, values);
}

void ApplyOne(const FillMissing& spec, const std::string& field, const RankShare&,
              SampleStore* store) {
  for (auto& part : store->parts) {
    for (auto& [name, array] : part) {
      if (!array.is_float || !array.values.is_floating_point()) continue;
      if (array.streamed()) {
        array.Then([channel_dim = array.channel_dim, value = spec.value, field,
                    name = name](const at::Tensor& x) {
                     return FillCells(x, channel_dim, value, field, name);
                   },
                   array.sample_shape());
        continue;
      }
      array.values = FillCells(array.Materialize(), array.channel_dim, spec.value, field, name);
      array.multiply = array.add = at::Tensor();
    }
  }
  store->record.push_back({{"fill_missing", spec.value ? nlohmann::json{{"value", *spec.value}}
                                                       : nlohmann::json::object()}});
}

// A function of each cell, written into the record as `record`.
void ApplyToCells(const std::vector<std::string>& names, const StoredArray::Step& step,
                  SampleStore* store) {
  for (const std::string& name : names) {
    for (auto& part : store->parts) {
      StoredArray& array = part.at(name);
      if (array.streamed()) {
        array.Then(step, array.sample_shape());
      } else {
        array.values = step(array.Materialize());
        array.multiply = array.add = at::Tensor();
      }
    }
  }
}

void ApplyOne(const Log& spec, const std::string& field, const RankShare&, SampleStore* store) {
  const std::vector<std::string> names = FloatArrays(*store, spec.arrays, field);
  ApplyToCells(
      names,
      [add = spec.add, field](const at::Tensor& x) {
        const at::Tensor shifted = x + add;
        if (shifted.le(0).any().item<bool>()) {
          throw UserError(field + ": " + std::to_string(x.min().item<double>()) + " + add (" +
                          std::to_string(add) +
                          ") is not above 0 and has no logarithm; a larger `add`, or clip before it");
        }
        return shifted.log();
      },
      store);
  store->record.push_back({{"log", {{"arrays", names}, {"add", spec.add}}}});
}

void ApplyOne(const Clip& spec, const std::string& field, const RankShare&, SampleStore* store) {
  const std::vector<std::string> names = FloatArrays(*store, spec.arrays, field);
  ApplyToCells(
      names,
      [min = spec.min, max = spec.max](const at::Tensor& x) {  // NaN stays NaN
        at::Tensor clipped = x;
        if (min) clipped = clipped.clamp_min(*min);
        if (max) clipped = clipped.clamp_max(*max);
        return clipped;
      },
      store);
  nlohmann::json record = {{"arrays", names}};
  if (spec.min) record["min"] = *spec.min;
  if (spec.max) record["max"] = *spec.max;
  store->record.push_back({{"clip", record}});
}

void ApplyOne(const Window& spec, const std::string& field, const RankShare&, SampleStore* store) {
  if (spec.length < 1)
    throw UserError(field + ".length: " + std::to_string(spec.length) + " must be at least 1");
  if (spec.horizon < 1) {
    throw UserError(field + ".horizon: " + std::to_string(spec.horizon) + " must be at least 1");
  }
  const std::string source = store->SourceName(field);
  const int64_t ahead = spec.length - 1 + spec.horizon;  // from a window's first step to its target
  for (auto& part : store->parts) {
    const StoredArray series = part.at(source);
    if (series.samples() <= ahead) {
      throw UserError(field + ": a window of " + std::to_string(spec.length) +
                      " steps with its target " + std::to_string(spec.horizon) +
                      " ahead does not fit into the " + std::to_string(series.samples()) +
                      " steps of array \"" + source + "\"");
    }
    const int64_t samples = series.samples() - ahead;
    StoredArray target = series;
    if (!store->target.empty() && part.count(store->target) > 0) {
      target = part.at(store->target);
      part.erase(store->target);
    }
    if (series.window > 0) throw UserError(field + ": the data are windows already");
    StoredArray input = series;
    // A view: a step that is in many windows is in memory once.
    input.values = series.values.unfold(0, spec.length, 1).movedim(-1, 1).narrow(0, 0, samples);
    input.channel_dim = 2;
    input.window = spec.length;
    target.values = target.values.narrow(0, ahead, samples);
    target.first_row += ahead;
    part.erase(source);
    for (auto& [name, other] : part) other.values = other.values.narrow(0, 0, samples);
    part["input"] = input;
    part["target"] = target;
  }
  store->input = "input";
  store->target = "target";
  const auto crosses = [&](int64_t sample) {
    const auto jump = std::upper_bound(store->jumps.begin(), store->jumps.end(), sample);
    return jump != store->jumps.end() && *jump <= sample + ahead;
  };
  const int64_t windows = store->parts.front().at("input").samples();
  for (int64_t sample = 0; sample < windows && !store->jumps.empty(); ++sample) {
    if (crosses(sample)) store->left_out.push_back(sample);
  }
  if (!store->left_out.empty()) {
    const int64_t jump = *std::upper_bound(store->jumps.begin(), store->jumps.end(), store->left_out.front());
    store->notes.push_back(field + ": " + std::to_string(store->left_out.size()) + " of " +
                           std::to_string(windows) +
                           " windows run across a gap in the time axis (the first between steps " +
                           std::to_string(jump - 1) + " and " + std::to_string(jump) +
                           ") and are left out");
  }
  // A sample belongs to the split in which its target step lies.
  for (const Split split : {Split::kTrain, Split::kValidation, Split::kTest}) {
    auto& indices = store->splits[static_cast<size_t>(split)];
    if (indices.empty()) continue;
    std::vector<int64_t> kept;
    for (const int64_t step : indices) {
      if (step >= ahead && !crosses(step - ahead)) kept.push_back(step - ahead);
    }
    if (kept.empty()) {
      throw UserError(field + ": no window of " + std::to_string(spec.length) +
                      " steps has its target in the " + SplitName(split) +
                      " split, which is too short" +
                      (store->left_out.empty() ? "" : " or has only such across a gap in the time axis"));
    }
    indices = std::move(kept);
  }
  store->record.push_back({{"window", {{"length", spec.length}, {"horizon", spec.horizon}}}});
}

void ApplyOne(const Reshape& spec, const std::string& field, const RankShare&, SampleStore* store) {
  const std::string name = !spec.array.empty() ? spec.array : store->SourceName(field);
  for (auto& part : store->parts) {
    const auto found = part.find(name);
    if (found == part.end()) {
      throw UserError(field + ".array: no array \"" + name + "\"" + NearestHint(name, Names(part)) +
                      " (arrays here: " + JoinNames(Names(part)) + ")");
    }
    StoredArray& array = found->second;
    const std::vector<int64_t> shape = array.sample_shape();
    std::vector<int64_t> wanted = spec.shape;
    int64_t elements = 1, known = 1;
    for (const int64_t size : shape) elements *= size;
    int64_t* open = nullptr;
    bool fits = true;
    for (int64_t& size : wanted) {
      if (size == -1 && open == nullptr) {
        open = &size;
      } else if (size < 1 || known > elements / std::max<int64_t>(size, 1)) {
        fits = false;
      } else {
        known *= size;
      }
    }
    if (open != nullptr && fits) {
      fits = elements % known == 0;
      *open = elements / known;
      known = elements;
    }
    if (!fits || known != elements) {
      throw UserError(field + ".shape: " + ShapeText(spec.shape) + " does not hold the " +
                      std::to_string(elements) + " elements of a sample of \"" + name +
                      "\", shape " + ShapeText(shape));
    }
    if (array.streamed()) {
      array.Then(
          [wanted](const at::Tensor& x) {
            std::vector<int64_t> batch = wanted;
            batch.insert(batch.begin(), x.size(0));
            return x.reshape(batch);
          },
          wanted);
      array.channel_dim = 1;
      continue;
    }
    if (array.multiply.defined() && array.multiply.numel() > 1) {  // its channels are about to move
      array.values = array.Materialize();
      array.multiply = array.add = at::Tensor();
    }
    wanted.insert(wanted.begin(), array.samples());
    array.values = array.values.reshape(wanted);
    array.channel_dim = 1;
  }
  store->record.push_back({{"reshape", {{"array", name}, {"shape", spec.shape}}}});
}

bool ChangesUnits(const Transform& transform) {
  return std::holds_alternative<Standardize>(transform) ||
         std::holds_alternative<Scale>(transform) || std::holds_alternative<Crop>(transform) ||
         std::holds_alternative<Reshape>(transform) || std::holds_alternative<Window>(transform) ||
         std::holds_alternative<Coarsen>(transform) || std::holds_alternative<Log>(transform) ||
         std::holds_alternative<Clip>(transform);
}

}  // namespace

std::vector<int64_t> StoredArray::sample_shape() const { return values.sizes().slice(1).vec(); }

at::Tensor StoredArray::AlongChannels(const at::Tensor& per_channel) const {
  if (per_channel.numel() == 1) return per_channel.reshape({});
  std::vector<int64_t> shape(static_cast<size_t>(values.dim()), 1);
  shape[static_cast<size_t>(channel_dim)] = per_channel.numel();
  return per_channel.view(shape);
}

void StoredArray::Then(Step step, const std::vector<int64_t>& sample_shape) {
  (window > 0 ? sample_steps : row_steps).push_back(std::move(step));
  std::vector<int64_t> shape = sample_shape;
  shape.insert(shape.begin(), samples());
  values = at::empty(shape, values.options());
}

at::Tensor StoredArray::Select(const at::Tensor& indices) const {
  if (streamed()) {
    const int64_t count = indices.numel(), length = std::max<int64_t>(1, window);
    const int64_t* index = indices.data_ptr<int64_t>();
    std::vector<int64_t> wanted;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t step = 0; step < length; ++step) wanted.push_back(first_row + index[i] + step);
    }
    std::vector<int64_t> shape = rows->shape();
    shape[0] = count * length;
    at::Tensor read = at::empty(shape, at::kFloat);
    rows->Gather(wanted, read.data_ptr<float>());
    for (const Step& step : row_steps) read = step(read);
    if (window > 0) {
      shape = read.sizes().vec();
      shape[0] = length;
      shape.insert(shape.begin(), count);
      read = read.reshape(shape);
    }
    for (const Step& step : sample_steps) read = step(read);
    return read.contiguous();
  }
  at::Tensor selected = values.index_select(0, indices).contiguous();
  if (!is_float) return selected;
  selected = selected.to(at::kFloat);  // index_select has made it ours, so in place from here
  if (multiply.defined()) selected.mul_(AlongChannels(multiply)).add_(AlongChannels(add));
  return selected;
}

at::Tensor StoredArray::Materialize() const {
  at::Tensor whole = values.to(at::kFloat);
  if (multiply.defined()) whole = whole.mul(AlongChannels(multiply)).add_(AlongChannels(add));
  return whole.contiguous();
}

void StoredArray::Apply(const at::Tensor& m, const at::Tensor& a) {
  if (streamed()) {
    // Shaped for as many dimensions as there are now.
    const at::Tensor by = AlongChannels(m), plus = AlongChannels(a);
    Then([by, plus](const at::Tensor& x) { return x.mul(by).add_(plus); }, sample_shape());
    return;
  }
  if (values.is_floating_point() && channel_dim == 1) {  // nothing to gain by waiting
    values = values.mul(AlongChannels(m)).add_(AlongChannels(a));
    return;
  }
  multiply = multiply.defined() ? multiply * m : m;
  add = add.defined() ? add * m + a : a.expand_as(multiply).contiguous();
}

StoredArray StoreArray(const Array& array, bool as_classes) {
  StoredArray stored;
  const at::ScalarType type = ScalarTypeOf(array.type);
  const at::TensorOptions options = at::TensorOptions().dtype(type);
  const bool aligned = reinterpret_cast<uintptr_t>(array.data) % ElementSize(array.type) == 0;
  if (array.size_bytes == 0) {
    stored.values = at::empty(array.shape, options);
  } else if (aligned) {
    stored.values = at::from_blob(
        const_cast<std::byte*>(array.data), array.shape,
        [owner = array.owner](void*) mutable { owner.reset(); }, options);
  } else {
    stored.values = at::empty(array.shape, options);
    std::memcpy(stored.values.data_ptr(), array.data, array.size_bytes);
  }
  return StoreTensor(stored.values, as_classes);
}

StoredArray StoreTensor(const at::Tensor& tensor, bool as_classes) {
  StoredArray stored;
  stored.values = tensor;
  const at::ScalarType type = tensor.scalar_type();
  const bool bytes = type == at::kByte || type == at::kBool;
  stored.is_float = at::isFloatingType(type) || (bytes && !as_classes);
  if (at::isFloatingType(type)) {
    stored.values = stored.values.to(at::kFloat);
  } else if (!stored.is_float) {
    stored.values = stored.values.to(at::kLong);
  }
  return stored;
}

StoredArray StreamArray(std::shared_ptr<const RowCache> rows) {
  StoredArray stored;
  stored.values = at::empty(rows->shape(), at::TensorOptions().dtype(at::kFloat).device(at::kMeta));
  stored.is_float = true;
  stored.rows = std::move(rows);
  return stored;
}

std::string SampleStore::SourceName(const std::string& field) const {
  const auto& part = parts.front();
  for (const std::string& name : {input, std::string("field"), std::string("input")}) {
    if (!name.empty() && part.count(name) > 0) return name;
  }
  if (part.size() == 1) return part.begin()->first;
  throw UserError(
      field + ": cannot tell which array is meant; name it with train.data.input (arrays here: " +
      JoinNames(Names(part)) + ")");
}

void ApplyTransform(const Transform& transform, const std::string& field, const RankShare& share,
                    SampleStore* store) {
  if (!store->baselines.empty() && ChangesUnits(transform)) {
    throw UserError(
        field +
        ": comes after coarsen with baselines, which would no longer be in the target's units; "
        "put it before coarsen");
  }
  std::visit([&](const auto& spec) { ApplyOne(spec, field, share, store); }, transform);
}

}  // namespace itwin::worker
