#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <variant>

#include "agent/worker/data/csv.h"
#include "agent/worker/data/dataset.h"
#include "agent/worker/data/idx.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/data/netcdf.h"
#include "agent/worker/data/npy.h"
#include "agent/worker/data/npz.h"
#include "agent/worker/data/sample_store.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// What a source gives before it is split and transformed.
struct Loaded {
  SampleStore store;
  int64_t missing_cells = 0;  // that the file marks as such
};

std::vector<std::string> Names(const std::map<std::string, StoredArray>& part) {
  std::vector<std::string> names;
  for (const auto& [name, array] : part) names.push_back(name);
  return names;
}

void RequireSameSamples(const std::map<std::string, StoredArray>& part, const std::string& a,
                        const std::string& b) {
  const at::Tensor& first = part.at(a).values;
  const at::Tensor& second = part.at(b).values;
  if (first.size(0) != second.size(0)) {
    throw UserError("train.data: \"" + a + "\" has shape " + ShapeText(first.sizes().vec()) +
                    " and \"" + b + "\" has " + ShapeText(second.sizes().vec()) +
                    "; the first dimension counts the samples and must be the same");
  }
}

// Finds input and target by the spec's names or by "input" and "target"; drops arrays that are not
// per sample.
void ResolveNames(const DataSpec& spec, SampleStore* store) {
  for (auto& part : store->parts) {
    for (const auto& [wanted, fallback, chosen] : {std::tuple{&spec.input, "input", &store->input},
                                                   {&spec.target, "target", &store->target}}) {
      if (wanted->empty()) {
        if (part.count(fallback) > 0) *chosen = fallback;
        continue;
      }
      if (part.count(*wanted) == 0) {
        throw UserError(std::string("train.data.") + fallback + ": no array \"" + *wanted + "\"" +
                        NearestHint(*wanted, Names(part)) +
                        " (arrays here: " + JoinNames(Names(part)) + ")");
      }
      *chosen = *wanted;
    }
    const std::string source = store->SourceName("train.data");
    if (!store->target.empty()) RequireSameSamples(part, source, store->target);
    const int64_t samples = part.at(source).samples();
    std::erase_if(part, [samples](const auto& entry) { return entry.second.samples() != samples; });
  }
}

Loaded Load(const NetcdfFile& source, const DataSpec& spec, uint64_t,
            const std::filesystem::path& work_dir) {
  const NetcdfField read =
      ReadNetcdf(ResolveFile(source.path, work_dir, "train.data.netcdf"), spec.variables);
  Loaded loaded;
  loaded.missing_cells = read.missing_cells;
  auto& part = loaded.store.parts.emplace_back();
  const StoredArray field = StoreArray(read.field, false);
  // Input and target may be single variables of the file.
  for (const std::string& name : {spec.input, spec.target}) {
    const auto found = std::find(read.variables.begin(), read.variables.end(), name);
    if (name.empty() || found == read.variables.end()) continue;
    StoredArray one = field;
    one.values = field.values.narrow(1, found - read.variables.begin(), 1);
    part.emplace(name, one);
  }
  if (part.empty() || spec.input == "field" || spec.target == "field") part.emplace("field", field);
  return loaded;
}

StoredArray LoadImages(const std::filesystem::path& path, const char* field) {
  StoredArray images = StoreArray(ReadIdx(path), false);
  if (images.values.dim() < 2 || images.values.numel() == 0) {
    throw UserError(std::string(field) + ": " + path.string() + " has shape " +
                    ShapeText(images.values.sizes().vec()) +
                    "; images are [samples, rows, columns]");
  }
  if (images.values.dim() == 3) images.values = images.values.unsqueeze(1);  // one channel
  if (images.values.scalar_type() == at::kByte) {
    images.Apply(at::full({1}, 1.0 / 255, at::kFloat), at::zeros({1}, at::kFloat));
  } else if (!images.is_float) {
    images.values = images.values.to(at::kFloat);
    images.is_float = true;
  }
  return images;
}

Loaded Load(const IdxFiles& source, const DataSpec&, uint64_t,
            const std::filesystem::path& work_dir) {
  Loaded loaded;
  const auto add = [&](const std::string& images, const std::string& labels,
                       const char* images_field, const char* labels_field) {
    const auto images_path = ResolveFile(images, work_dir, images_field);
    const auto labels_path = ResolveFile(labels, work_dir, labels_field);
    auto& part = loaded.store.parts.emplace_back();
    part["input"] = LoadImages(images_path, images_field);
    part["target"] = StoreArray(ReadIdx(labels_path), true);
    RequireSameSamples(part, "input", "target");
  };
  add(source.train_images, source.train_labels, "train.data.idx.train_images",
      "train.data.idx.train_labels");
  if (!source.test_images.empty()) {
    add(source.test_images, source.test_labels, "train.data.idx.test_images",
        "train.data.idx.test_labels");
    const auto train_shape = loaded.store.parts[0]["input"].sample_shape();
    const auto test_shape = loaded.store.parts[1]["input"].sample_shape();
    if (train_shape != test_shape) {
      throw UserError("train.data.idx.test_images: images have shape " + ShapeText(test_shape) +
                      " but the training images " + ShapeText(train_shape));
    }
  }
  loaded.store.record.push_back(
      {{"scale", {{"arrays", {"input"}}, {"multiply", 1.0 / 255}, {"add", 0.0}}}});
  return loaded;
}

void AddArray(const std::string& name, const Array& array, bool as_classes,
              std::map<std::string, StoredArray>* part) {
  if (array.shape.empty()) return;  // a lone number is not per sample
  part->emplace(name, StoreArray(array, as_classes));
}

Loaded Load(const NpzFile& source, const DataSpec& spec, uint64_t,
            const std::filesystem::path& work_dir) {
  const std::string target = spec.target.empty() ? "target" : spec.target;
  Loaded loaded;
  auto& part = loaded.store.parts.emplace_back();
  for (const auto& [name, array] : ReadNpz(ResolveFile(source.path, work_dir, "train.data.npz"))) {
    AddArray(name, array, name == target, &part);
  }
  return loaded;
}

Loaded Load(const NpyFiles& source, const DataSpec&, uint64_t,
            const std::filesystem::path& work_dir) {
  Loaded loaded;
  auto& part = loaded.store.parts.emplace_back();
  AddArray("input", ReadNpy(ResolveFile(source.input, work_dir, "train.data.npy.input")), false,
           &part);
  if (!source.target.empty()) {
    AddArray("target", ReadNpy(ResolveFile(source.target, work_dir, "train.data.npy.target")), true,
             &part);
  }
  if (part.count("input") == 0)
    throw UserError("train.data.npy.input: is a single number, not samples");
  return loaded;
}

Loaded Load(const CsvFile& source, const DataSpec&, uint64_t,
            const std::filesystem::path& work_dir) {
  const CsvTable table = ReadCsv(ResolveFile(source.path, work_dir, "train.data.csv.path"),
                                 source.inputs, source.targets, source.target_is_class);
  Loaded loaded;
  auto& part = loaded.store.parts.emplace_back();
  AddArray("input", table.inputs, false, &part);
  AddArray("target", table.targets, true, &part);
  return loaded;
}

Loaded Load(const SyntheticData& source, const DataSpec&, uint64_t seed,
            const std::filesystem::path&) {
  const std::string field = "train.data.synthetic";
  if (source.samples < 1) {
    throw UserError(field + ".samples: " + std::to_string(source.samples) + " must be at least 1");
  }
  if (source.input_shape.empty())
    throw UserError(field + ".input_shape: name the shape of one sample");
  if (source.classes < 0)
    throw UserError(field + ".classes: " + std::to_string(source.classes) + " is negative");
  const std::vector<int64_t> target_shape =
      source.target_shape.empty() ? std::vector<int64_t>{1} : source.target_shape;
  double inputs = 1, outputs = source.classes > 0 ? static_cast<double>(source.classes) : 1;
  for (const auto& [name, shape] :
       {std::pair{"input_shape", &source.input_shape}, {"target_shape", &target_shape}}) {
    for (const int64_t size : *shape) {
      if (size < 1) {
        throw UserError(field + "." + name + ": " + ShapeText(*shape) + " has a dimension below 1");
      }
      if (name == std::string("input_shape")) inputs *= static_cast<double>(size);
      if (name == std::string("target_shape") && source.classes == 0)
        outputs *= static_cast<double>(size);
    }
  }
  const double bytes =
      4 * (static_cast<double>(source.samples) * (inputs + outputs) + inputs * outputs);
  const double memory =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  if (bytes > memory / 2) {
    throw UserError(
        field + ": needs " + std::to_string(static_cast<int64_t>(std::min(bytes / 1048576, 1e15))) +
        " MiB with its linear map, more than half of this machine's memory; make it smaller");
  }
  // The generator's stream does not depend on the number of threads.
  const at::Generator generator = at::detail::createCPUGenerator(seed ^ 0xda7aULL);
  const auto features = static_cast<int64_t>(inputs), results = static_cast<int64_t>(outputs);
  const at::Tensor map = at::randn({features, results}, generator, at::kFloat) / std::sqrt(inputs);
  const at::Tensor input = at::randn({source.samples, features}, generator, at::kFloat);
  const at::Tensor output = input.matmul(map);

  const auto with_samples = [&source](std::vector<int64_t> shape) {
    shape.insert(shape.begin(), source.samples);
    return shape;
  };
  StoredArray x, y;
  x.values = input.view(with_samples(source.input_shape));
  x.is_float = true;
  y.is_float = source.classes == 0;
  y.values = y.is_float ? output.view(with_samples(target_shape)) : output.argmax(1);
  Loaded loaded;
  loaded.store.parts.push_back({{"input", x}, {"target", y}});
  return loaded;
}

const char* TransformName(const Transform& transform) {
  constexpr const char* kNames[] = {"standardize",  "scale",  "crop",   "coarsen",
                                    "fill_missing", "window", "reshape"};
  static_assert(std::variant_size_v<Transform> == std::size(kNames));
  return kNames[transform.index()];
}

class ArrayDataset : public Dataset {
 public:
  ArrayDataset(SampleStore store, int64_t classes)
      : parts_(std::move(store.parts)), baselines_(std::move(store.baselines)), classes_(classes) {
    for (size_t s = 0; s < splits_.size(); ++s) splits_[s] = at::tensor(store.splits[s], at::kLong);
    preprocessing_ = {
        {"format", 1}, {"transforms", std::move(store.record)}, {"classes", classes_}};
    for (const auto& [name, shape] : sample_shapes()) preprocessing_["arrays"][name] = shape;
  }

  int64_t size(Split split) const override { return splits_[static_cast<size_t>(split)].numel(); }

  Batch Gather(Split split, const std::vector<int64_t>& indices) const override {
    const at::Tensor& members = splits_[static_cast<size_t>(split)];
    const int64_t* member = members.data_ptr<int64_t>();
    at::Tensor wanted = at::empty({static_cast<int64_t>(indices.size())}, at::kLong);
    for (size_t i = 0; i < indices.size(); ++i) {
      if (indices[i] < 0 || indices[i] >= members.numel()) {
        throw AppError("sample " + std::to_string(indices[i]) + " is not in the " +
                       SplitName(split) + " split of " + std::to_string(members.numel()));
      }
      wanted.data_ptr<int64_t>()[i] = member[indices[i]];
    }
    Batch batch;
    for (const auto& [name, array] : PartOf(split)) batch.emplace(name, array.Select(wanted));
    return batch;
  }

  std::vector<std::string> baselines() const override { return baselines_; }

  std::map<std::string, at::Tensor> BaselinePredictions(const Batch& batch) const override {
    std::map<std::string, at::Tensor> predictions;
    const at::NoGradGuard no_grad;
    for (const std::string& name : baselines_) {
      const at::Tensor& input = batch.at("input");
      const auto size = batch.at("target").sizes().slice(2);
      predictions[name] = name == "bicubic"
                              ? at::upsample_bicubic2d(input, size, /*align_corners=*/false)
                              : at::upsample_bilinear2d(input, size, /*align_corners=*/false);
    }
    return predictions;
  }

  std::map<std::string, std::vector<int64_t>> sample_shapes() const override {
    std::map<std::string, std::vector<int64_t>> shapes;
    for (const auto& [name, array] : parts_.front()) shapes[name] = array.sample_shape();
    return shapes;
  }

  int64_t classes() const override { return classes_; }
  nlohmann::json preprocessing() const override { return preprocessing_; }

 private:
  const std::map<std::string, StoredArray>& PartOf(Split split) const {
    return split == Split::kTest ? parts_.back() : parts_.front();
  }

  const std::vector<std::map<std::string, StoredArray>> parts_;
  const std::vector<std::string> baselines_;
  const int64_t classes_;
  std::array<at::Tensor, 3> splits_;  // sample indices, int64
  nlohmann::json preprocessing_;
};

// Renames input and target to what models see, and refuses what no model could use.
void Finish(const DataSpec& spec, int64_t missing_cells, SampleStore* store) {
  for (auto& part : store->parts) {
    for (const auto& [chosen, name] :
         {std::pair{&store->input, "input"}, {&store->target, "target"}}) {
      if (chosen->empty()) {
        throw UserError(std::string("train.data.") + name + ": say which array is the " + name +
                        " (arrays here: " + JoinNames(Names(part)) + ")" +
                        (std::holds_alternative<NetcdfFile>(spec.source)
                             ? ", or make one by the transform coarsen or window"
                             : ""));
      }
    }
    if (store->input != "input" || store->target != "target") {
      const StoredArray input = part.at(store->input), target = part.at(store->target);
      part.erase(store->input);
      part.erase(store->target);
      part["input"] = input;
      part["target"] = target;
    }
    for (auto& [name, array] : part) {
      if (array.values.numel() == 0) {
        throw UserError("train.data: array \"" + name + "\" is empty (shape " +
                        ShapeText(array.values.sizes().vec()) + ")");
      }
      if (missing_cells > 0 && array.is_float && array.values.isnan().any().item<bool>()) {
        throw UserError("train.data: the file marks " + std::to_string(missing_cells) +
                        " cells as missing and array \"" + name +
                        "\" still has some; add the transform fill_missing: {} (before "
                        "standardize), or crop them "
                        "away");
      }
    }
  }
  store->input = "input";
  store->target = "target";
}

int64_t CountClasses(const SampleStore& store) {
  int64_t classes = 0;
  for (const auto& part : store.parts) {
    const StoredArray& target = part.at("target");
    if (target.is_float) return 0;
    const int64_t lowest = target.values.min().item<int64_t>();
    if (lowest < 0) {
      throw UserError("train.data.target: class number " + std::to_string(lowest) +
                      " is negative; classes are numbered 0, 1, 2, …");
    }
    classes = std::max(classes, target.values.max().item<int64_t>() + 1);
  }
  return classes;
}

}  // namespace

std::unique_ptr<Dataset> OpenDataset(const DataSpec& spec, uint64_t seed,
                                     const std::filesystem::path& work_dir) {
  const at::NoGradGuard no_grad;
  Loaded loaded = std::visit([&](const auto& source) { return Load(source, spec, seed, work_dir); },
                             spec.source);
  SampleStore& store = loaded.store;
  for (const auto& part : store.parts) {
    if (part.empty()) throw UserError("train.data: has no arrays of samples");
  }
  ResolveNames(spec, &store);
  const int64_t samples = store.parts.front().at(store.SourceName("train.data")).samples();
  store.splits = DrawSplits(spec.split, samples, store.separate_test(), seed);
  if (store.separate_test()) {
    const int64_t test_samples = store.parts.back().at("input").samples();
    auto& test = store.splits[static_cast<size_t>(Split::kTest)];
    for (int64_t i = 0; i < test_samples; ++i) test.push_back(i);
  }
  for (size_t i = 0; i < spec.transforms.size(); ++i) {
    const Transform& transform = spec.transforms[i];
    ApplyTransform(transform,
                   "train.data.transforms[" + std::to_string(i) + "]." + TransformName(transform),
                   &store);
  }
  Finish(spec, loaded.missing_cells, &store);
  const int64_t classes = CountClasses(store);
  return std::make_unique<ArrayDataset>(std::move(store), classes);
}

}  // namespace itwin::worker
