#include "agent/worker/data/sample_store.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <variant>

#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr int64_t kStatisticsBlock = 4096;  // samples read at once

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

std::vector<double> ToVector(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.to(at::kDouble).contiguous();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

// Sums f(block) over blocks of samples, without ever holding the whole as float64.
template <typename Function>
void ForBlocks(const StoredArray& array, const std::vector<int64_t>& indices, Function f) {
  for (size_t first = 0; first < indices.size(); first += kStatisticsBlock) {
    const size_t last = std::min(indices.size(), first + kStatisticsBlock);
    const at::Tensor block = at::tensor(at::IntArrayRef(indices.data() + first, last - first),
                                        at::TensorOptions().dtype(at::kLong));
    at::Tensor values = array.Select(block).to(at::kDouble);
    // [channels, everything else]
    values =
        values.dim() > array.channel_dim
            ? values.movedim(array.channel_dim, 0).reshape({values.size(array.channel_dim), -1})
            : values.reshape({1, -1});
    f(values);
  }
}

void ApplyOne(const Standardize& spec, const std::string& field, SampleStore* store) {
  const auto& train = store->splits[static_cast<size_t>(Split::kTrain)];
  nlohmann::json record = nlohmann::json::object();
  for (const std::string& name : FloatArrays(*store, spec.arrays, field)) {
    const StoredArray& array = store->parts[0].at(name);
    at::Tensor sum, count, squares;
    // Two passes: a mean that is large against the deviation costs no digits. NaN cells do not
    // count.
    ForBlocks(array, train, [&](const at::Tensor& values) {
      const at::Tensor block_sum = values.nansum(1);
      const at::Tensor block_count = values.isnan().logical_not().sum(1).to(at::kDouble);
      sum = sum.defined() ? sum + block_sum : block_sum;
      count = count.defined() ? count + block_count : block_count;
    });
    count = count.clamp_min(1);
    const at::Tensor mean = sum / count;
    ForBlocks(array, train, [&](const at::Tensor& values) {
      const at::Tensor block = (values - mean.unsqueeze(1)).square().nansum(1);
      squares = squares.defined() ? squares + block : block;
    });
    at::Tensor deviation = (squares / count).sqrt();
    deviation = at::where(deviation > 0, deviation,
                          at::ones_like(deviation));  // a constant stays, minus its mean
    for (auto& part : store->parts) {
      part.at(name).Apply((1 / deviation).to(at::kFloat), (-mean / deviation).to(at::kFloat));
    }
    record[name] = {{"mean", ToVector(mean)}, {"deviation", ToVector(deviation)}};
  }
  store->record.push_back({{"standardize", record}});
}

void ApplyOne(const Scale& spec, const std::string& field, SampleStore* store) {
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

void ApplyOne(const Crop& spec, const std::string& field, SampleStore* store) {
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

void ApplyOne(const Coarsen& spec, const std::string& field, SampleStore* store) {
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
    StoredArray target;
    target.values = whole.Materialize();
    target.is_float = true;
    StoredArray input = target;
    input.values = at::avg_pool2d(target.values, {factor, factor});
    part.erase(source);
    part["input"] = input;
    part["target"] = target;
  }
  store->input = "input";
  store->target = "target";
  store->baselines = spec.baselines;
  store->record.push_back({{"coarsen", {{"factor", spec.factor}}}});
}

void ApplyOne(const FillMissing& spec, const std::string& field, SampleStore* store) {
  for (auto& part : store->parts) {
    for (auto& [name, array] : part) {
      if (!array.is_float || !array.values.is_floating_point()) continue;
      at::Tensor values = array.Materialize();
      const at::Tensor missing = values.isnan();
      if (missing.any().item<bool>()) {
        at::Tensor filling;
        if (spec.value) {
          filling = at::full({1}, *spec.value, at::kFloat);
        } else {
          if (values.dim() <= array.channel_dim + 1) {
            throw UserError(field + ": array \"" + name +
                            "\" has one number per sample and channel, so a missing "
                            "one has no valid neighbours to take the mean of; give a value, as in "
                            "fill_missing: {value: 0}");
          }
          const at::Tensor flat = values.flatten(array.channel_dim + 1);
          const at::Tensor valid = missing.flatten(array.channel_dim + 1).logical_not().sum(-1);
          if (valid.eq(0).any().item<bool>()) {
            const int64_t cell = valid.eq(0).nonzero()[0][0].item<int64_t>();
            throw UserError(field + ": sample " + std::to_string(cell) + " of array \"" + name +
                            "\" has a channel without any valid cell; give a value, as in "
                            "fill_missing: {value: 0}");
          }
          filling = flat.to(at::kDouble).nansum(-1).div(valid).to(at::kFloat);
          while (filling.dim() < values.dim()) filling = filling.unsqueeze(-1);
        }
        values = at::where(missing, filling, values);
      }
      array.values = values;
      array.multiply = array.add = at::Tensor();
    }
  }
  store->record.push_back({{"fill_missing", spec.value ? nlohmann::json{{"value", *spec.value}}
                                                       : nlohmann::json::object()}});
}

void ApplyOne(const Window& spec, const std::string& field, SampleStore* store) {
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
    StoredArray input = series;
    // A view: a step that is in many windows is in memory once.
    input.values = series.values.unfold(0, spec.length, 1).movedim(-1, 1).narrow(0, 0, samples);
    input.channel_dim = 2;
    target.values = target.values.narrow(0, ahead, samples);
    part.erase(source);
    for (auto& [name, other] : part) other.values = other.values.narrow(0, 0, samples);
    part["input"] = input;
    part["target"] = target;
  }
  store->input = "input";
  store->target = "target";
  // A sample belongs to the split in which its target step lies.
  for (const Split split : {Split::kTrain, Split::kValidation, Split::kTest}) {
    auto& indices = store->splits[static_cast<size_t>(split)];
    if (indices.empty()) continue;
    std::vector<int64_t> kept;
    for (const int64_t step : indices) {
      if (step >= ahead) kept.push_back(step - ahead);
    }
    if (kept.empty()) {
      throw UserError(field + ": no window of " + std::to_string(spec.length) +
                      " steps has its target in the " + SplitName(split) +
                      " split, which is too short");
    }
    indices = std::move(kept);
  }
  store->record.push_back({{"window", {{"length", spec.length}, {"horizon", spec.horizon}}}});
}

void ApplyOne(const Reshape& spec, const std::string& field, SampleStore* store) {
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
         std::holds_alternative<Coarsen>(transform);
}

}  // namespace

std::vector<int64_t> StoredArray::sample_shape() const { return values.sizes().slice(1).vec(); }

at::Tensor StoredArray::AlongChannels(const at::Tensor& per_channel) const {
  if (per_channel.numel() == 1) return per_channel.reshape({});
  std::vector<int64_t> shape(static_cast<size_t>(values.dim()), 1);
  shape[static_cast<size_t>(channel_dim)] = per_channel.numel();
  return per_channel.view(shape);
}

at::Tensor StoredArray::Select(const at::Tensor& indices) const {
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
  const bool bytes = type == at::kByte || type == at::kBool;
  stored.is_float = at::isFloatingType(type) || (bytes && !as_classes);
  if (at::isFloatingType(type)) {
    stored.values = stored.values.to(at::kFloat);
  } else if (!stored.is_float) {
    stored.values = stored.values.to(at::kLong);
  }
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

void ApplyTransform(const Transform& transform, const std::string& field, SampleStore* store) {
  if (!store->baselines.empty() && ChangesUnits(transform)) {
    throw UserError(
        field +
        ": comes after coarsen with baselines, which would no longer be in the target's units; "
        "put it before coarsen");
  }
  std::visit([&](const auto& spec) { ApplyOne(spec, field, store); }, transform);
}

}  // namespace itwin::worker
