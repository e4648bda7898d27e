#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>
#include <variant>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/data/csv.h"
#include "agent/worker/data/dataset.h"
#include "agent/worker/data/idx.h"
#include "agent/worker/data/nearest_name.h"
#include "agent/worker/data/netcdf.h"
#include "agent/worker/data/npy.h"
#include "agent/worker/data/node_cache.h"
#include "agent/worker/data/npz.h"
#include "agent/worker/data/raw.h"
#include "agent/worker/data/sample_store.h"
#include "agent/worker/data/unusable_cells.h"
#include "agent/worker/data/zarr.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// What a source gives before it is split and transformed.
struct Loaded {
  SampleStore store;
  std::shared_ptr<const RowSource> time_axis_of;  // where a time axis may be found

  // Read once. Throws as RowSource::ReadTimeAxis.
  const std::optional<TimeAxis>& ReadTimeAxis() {
    if (!time_axis_is_read && time_axis_of) time_axis = time_axis_of->ReadTimeAxis();
    time_axis_is_read = true;
    return time_axis;
  }
  bool time_axis_is_read = false;
  std::optional<TimeAxis> time_axis;
};

constexpr size_t kRowCacheBytes = size_t{256} << 20;  // of each rank, for streamed data

// Where the files of the data lie: found, and copied to the node where that is wanted.
class Files {
 public:
  Files(const DataSpec& spec, const std::filesystem::path& work_dir)
      : spec_(spec), work_dir_(work_dir) {
    if (spec.cache_on_node) {
      cache_ = NodeCacheDirectory();
      if (cache_.empty()) {
        throw UserError(
            "train.data.cache: \"node\" needs SLURM_TMPDIR or TMPDIR in the job's environment; this "
            "site sets neither");
      }
    }
  }
  std::filesystem::path Find(const std::string& name, const std::string& field) const {
    const std::filesystem::path path = ResolveFile(name, work_dir_, field);
    return cache_.empty() ? path : CopyToNode(path, cache_);
  }
  // Read in place.
  std::filesystem::path FindDirectory(const std::string& name, const std::string& field) const {
    return ResolveDirectory(name, work_dir_, field);
  }
  // The source's file and `more_files`.
  std::vector<std::filesystem::path> FindAll(const std::string& name,
                                             const std::string& field) const {
    std::vector<std::filesystem::path> paths = {Find(name, field)};
    for (size_t i = 0; i < spec_.more_files.size(); ++i) {
      paths.push_back(
          Find(spec_.more_files[i], "train.data.more_files[" + std::to_string(i) + "]"));
    }
    return paths;
  }

 private:
  const DataSpec& spec_;
  const std::filesystem::path work_dir_;
  std::filesystem::path cache_;
};

// Whether rows are left in their files: as the spec says, else when all ranks of the node together
// would fill half of its memory with them.
bool ShallStream(const DataSpec& spec, const RowSource& rows, const RankShare& share) {
  if (spec.load != "auto") return spec.load == "stream";
  double bytes = sizeof(float);
  for (const int64_t size : rows.shape()) bytes *= static_cast<double>(size);
  return bytes * share.ranks_on_node > MachineMemoryBytes() / 2;
}

// The samples of one file after those of another, array by array.
void Append(std::map<std::string, StoredArray> more, const std::filesystem::path& path,
            std::map<std::string, StoredArray>* part) {
  for (auto& [name, array] : *part) {
    const auto found = more.find(name);
    if (found == more.end()) {
      throw UserError("train.data.more_files: " + path.string() + " has no array \"" + name + "\"");
    }
    if (found->second.sample_shape() != array.sample_shape() ||
        found->second.is_float != array.is_float) {
      throw UserError("train.data.more_files: array \"" + name + "\" of " + path.string() +
                      " has samples of shape " + ShapeText(found->second.sample_shape()) +
                      " instead of " + ShapeText(array.sample_shape()) + ", or another kind of number");
    }
    array.values = at::cat({array.values, found->second.values}, 0);
  }
}

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

Loaded Load(const NetcdfFile& source, const DataSpec& spec, uint64_t, const Files& files,
            const RankShare& share) {
  const auto rows =
      NetcdfRows::Stack(files.FindAll(source.path, "train.data.netcdf"), spec.variables);
  Loaded loaded;
  loaded.time_axis_of = rows;
  auto& part = loaded.store.parts.emplace_back();
  StoredArray field;
  if (ShallStream(spec, *rows, share)) {
    field = StreamArray(std::make_shared<RowCache>(rows, kRowCacheBytes));
  } else {
    field = StoreArray(ReadAll(*rows).field, false);
  }
  // Input and target may be single variables of the file.
  for (const std::string& name : {spec.input, spec.target}) {
    const auto found = std::find(rows->variables().begin(), rows->variables().end(), name);
    if (name.empty() || found == rows->variables().end()) continue;
    StoredArray one = field;
    const int64_t channel = found - rows->variables().begin();
    if (one.streamed()) {
      std::vector<int64_t> shape = one.sample_shape();
      shape[0] = 1;
      one.Then([channel](const at::Tensor& x) { return x.narrow(1, channel, 1); }, shape);
    } else {
      one.values = field.values.narrow(1, channel, 1);
    }
    part.emplace(name, one);
  }
  if (part.empty() || spec.input == "field" || spec.target == "field") part.emplace("field", field);
  return loaded;
}

// Input and target as arrays of their own. `open(name, must_exist)` gives their rows, or null.
template <typename Source, typename Open>
Loaded LoadPair(const Source& source, const DataSpec& spec, const RankShare& share, const std::string& field,
                const Open& open) {
  Loaded loaded;
  auto& part = loaded.store.parts.emplace_back();
  for (const auto& [array_name, name, must_exist] :
       {std::tuple{source.input, "input", true}, {source.target, "target", source.target_named}}) {
    const auto rows = open(array_name, must_exist);
    if (!rows) continue;
    if (!loaded.time_axis_of) loaded.time_axis_of = rows;
    StoredArray& array = part[name];
    if (name == std::string("target") && rows->is_integer()) {
      array = StoreArray(rows->ReadIntegers(), true);
    } else if (ShallStream(spec, *rows, share)) {
      array = StreamArray(std::make_shared<RowCache>(rows, kRowCacheBytes));
    } else {
      array = StoreArray(ReadAllRows(*rows, field + "." + name), false);
    }
  }
  return loaded;
}

Loaded Load(const Hdf5File& source, const DataSpec& spec, uint64_t, const Files& files,
            const RankShare& share) {
  const auto paths = files.FindAll(source.path, "train.data.hdf5.path");
  return LoadPair(source, spec, share, "train.data.hdf5", [&](const std::string& name, bool must_exist) {
    return NetcdfRows::One(paths, name, must_exist);
  });
}

Loaded Load(const ZarrStore& source, const DataSpec& spec, uint64_t, const Files& files,
            const RankShare& share) {
  const std::filesystem::path store = files.FindDirectory(source.path, "train.data.zarr.path");
  return LoadPair(source, spec, share, "train.data.zarr", [&](const std::string& name, bool must_exist) {
    return ZarrRows::Open(store, name, must_exist);
  });
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
            const Files& files, const RankShare&) {
  Loaded loaded;
  const auto add = [&](const std::string& images, const std::string& labels,
                       const char* images_field, const char* labels_field) {
    const auto images_path = files.Find(images, images_field);
    const auto labels_path = files.Find(labels, labels_field);
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

// Arrays of several files, each read by `read`, one after the other.
template <typename Read>
Loaded LoadInTurn(const std::vector<std::filesystem::path>& paths, Read read) {
  Loaded loaded;
  auto& part = loaded.store.parts.emplace_back();
  for (size_t i = 0; i < paths.size(); ++i) {
    std::map<std::string, StoredArray> arrays = read(paths[i]);
    if (i == 0) {
      part = std::move(arrays);
    } else {
      Append(std::move(arrays), paths[i], &part);
    }
  }
  return loaded;
}

Loaded Load(const NpzFile& source, const DataSpec& spec, uint64_t, const Files& files,
            const RankShare&) {
  const std::string input = spec.input.empty() ? "input" : spec.input;
  const std::string target = spec.target.empty() ? "target" : spec.target;
  return LoadInTurn(files.FindAll(source.path, "train.data.npz"),
                    [&](const std::filesystem::path& path) {
                      std::map<std::string, StoredArray> arrays;
                      for (const auto& [name, array] : ReadNpz(path, {input, target}))
                        AddArray(name, array, name == target, &arrays);
                      return arrays;
                    });
}

Loaded Load(const NpyFiles& source, const DataSpec&, uint64_t, const Files& files,
            const RankShare&) {
  Loaded loaded;
  auto& part = loaded.store.parts.emplace_back();
  AddArray("input", ReadNpy(files.Find(source.input, "train.data.npy.input")), false, &part);
  if (!source.target.empty()) {
    AddArray("target", ReadNpy(files.Find(source.target, "train.data.npy.target")), true, &part);
  }
  if (part.count("input") == 0)
    throw UserError("train.data.npy.input: is a single number, not samples");
  return loaded;
}

Loaded Load(const CsvFile& source, const DataSpec&, uint64_t, const Files& files,
            const RankShare&) {
  return LoadInTurn(files.FindAll(source.path, "train.data.csv.path"),
                    [&](const std::filesystem::path& path) {
                      const CsvTable table =
                          ReadCsv(path, source.inputs, source.targets, source.target_is_class);
                      std::map<std::string, StoredArray> arrays;
                      AddArray("input", table.inputs, false, &arrays);
                      AddArray("target", table.targets, true, &arrays);
                      return arrays;
                    });
}

Loaded Load(const SafetensorsFile& source, const DataSpec& spec, uint64_t, const Files& files,
            const RankShare&) {
  const std::string target = spec.target.empty() ? "target" : spec.target;
  return LoadInTurn(
      files.FindAll(source.path, "train.data.safetensors"),
      [&](const std::filesystem::path& path) {
        std::map<std::string, StoredArray> arrays;
        NamedTensors tensors;
        try {
          tensors = MapSafetensors(path);
        } catch (const WorkerError& e) {
          if (e.failure == FailureClass::kResource) throw;
          throw UserError("train.data.safetensors: " + std::string(e.what()));
        }
        for (auto& [name, tensor] : tensors) {
          if (tensor.dim() == 0) continue;  // a lone number is not per sample
          arrays[name] = StoreTensor(tensor, name == target);
        }
        return arrays;
      });
}

Loaded Load(const RawFiles& source, const DataSpec&, uint64_t, const Files& files,
            const RankShare&) {
  Loaded loaded;
  auto& part = loaded.store.parts.emplace_back();
  for (const auto& [name, array] : {std::pair{"input", &source.input}, {"target", &source.target}}) {
    const std::string field = std::string("train.data.raw.") + name;
    part[name] = StoreArray(ReadRaw(files.Find(array->path, field + ".path"), array->type, array->shape),
                            name == std::string("target"));
  }
  return loaded;
}

Loaded Load(const SyntheticData& source, const DataSpec&, uint64_t seed, const Files&,
            const RankShare&) {
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
  if (bytes > MachineMemoryBytes() / 2) {
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
                                    "fill_missing", "window", "reshape", "log",
                                    "clip"};
  static_assert(std::variant_size_v<Transform> == std::size(kNames));
  return kNames[transform.index()];
}

class ArrayDataset : public Dataset {
 public:
  ArrayDataset(SampleStore store, int64_t classes, bool check_target)
      : parts_(std::move(store.parts)),
        baselines_(std::move(store.baselines)),
        classes_(classes),
        check_target_(check_target) {
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
    for (const auto& [name, array] : PartOf(split)) {
      at::Tensor values = array.Select(wanted);
      // What is in memory was looked at when it was read.
      if (array.streamed() && (check_target_ || name != "target")) {
        UnusableCells cells;
        LookThrough(values, wanted.data_ptr<int64_t>(), &cells);
        RefuseUnusable(cells, name);
      }
      batch.emplace(name, std::move(values));
    }
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
  const bool check_target_;
  std::array<at::Tensor, 3> splits_;  // sample indices, int64
  nlohmann::json preprocessing_;
};

// Renames input and target to what models see.
void Finish(const DataSpec& spec, SampleStore* store) {
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
    }
  }
  store->input = "input";
  store->target = "target";
}

// Refuses missing and infinite cells of samples in a split. Streamed arrays are looked at batch by
// batch.
void CheckCells(const SampleStore& store, bool check_target, const RankShare& share) {
  for (size_t p = 0; p < store.parts.size(); ++p) {
    std::vector<int64_t> samples;
    for (const Split split : {Split::kTrain, Split::kValidation, Split::kTest}) {
      const bool here = (split == Split::kTest ? store.parts.size() - 1 : 0) == p;
      const auto& of_split = store.splits[static_cast<size_t>(split)];
      if (here) samples.insert(samples.end(), of_split.begin(), of_split.end());
    }
    std::sort(samples.begin(), samples.end());
    samples.erase(std::unique(samples.begin(), samples.end()), samples.end());
    for (const char* name : {"input", "target"}) {
      const StoredArray& array = store.parts[p].at(name);
      if (array.streamed() || !array.values.is_floating_point()) continue;
      if (!check_target && name == std::string("target")) continue;
      RefuseUnusable(FindUnusableCells(array, samples, share), name);
    }
  }
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

// Ranges of time become ranges of samples.
SplitSpec ResolveTimes(const SplitSpec& spec, Loaded* loaded) {
  SplitSpec resolved = spec;
  for (const auto& [name, text, range] :
       {std::tuple{"train", &spec.train_time, &resolved.train},
        {"validation", &spec.validation_time, &resolved.validation},
        {"test", &spec.test_time, &resolved.test}}) {
    if (text->empty()) continue;
    const std::string field = std::string("train.data.split.") + name;
    const std::optional<TimeAxis>& axis = loaded->ReadTimeAxis();
    if (!axis) {
      throw UserError(field + ": \"" + *text +
                      "\" is a range of time, but the data have no time axis; give sample numbers, "
                      "such as \"0..108\"");
    }
    const auto [first, last] = StepsWithin(*axis, *text, field);
    *range = IndexRange{first, last};
  }
  return resolved;
}

// What windows need to know of the steps, and what a user should know of them.
void PrepareWindows(const SplitSpec& split, int64_t samples, Loaded* loaded) {
  SampleStore& store = loaded->store;
  for (const auto& [key, fraction] : {std::pair{"validation_fraction", split.validation_fraction},
                                      {"test_fraction", split.test_fraction}}) {
    if (fraction == 0) continue;
    const auto end = std::to_string(samples), cut = std::to_string(samples - samples / 4);
    store.notes.push_back(std::string("train.data.split.") + key +
                          " draws single steps, so the inputs of training windows hold steps that are "
                          "targets of validation or test; for scores on unseen steps, split by ranges of "
                          "steps or time, such as train: \"0.." + cut + "\", validation: \"" + cut + ".." + end + "\"");
    break;
  }
  try {
    const std::optional<TimeAxis>& axis = loaded->ReadTimeAxis();
    if (axis && static_cast<int64_t>(axis->seconds.size()) == samples) store.jumps = FindJumps(*axis);
  } catch (const WorkerError& error) {
    if (error.failure != FailureClass::kUser) throw;
    store.notes.push_back("whether windows run across gaps in time is not known: " + std::string(error.what()));
  }
}

}  // namespace

void PrintNote(const std::string& note) {
  std::printf("note: %s\n", note.c_str());
  std::fflush(stdout);
}

std::unique_ptr<Dataset> OpenDataset(const DataSpec& spec, uint64_t seed,
                                     const std::filesystem::path& work_dir,
                                     const RankShare& share) {
  const at::NoGradGuard no_grad;
  const Files files(spec, work_dir);
  Loaded loaded =
      std::visit([&](const auto& source) { return Load(source, spec, seed, files, share); },
                 spec.source);
  SampleStore& store = loaded.store;
  for (const auto& part : store.parts) {
    if (part.empty()) throw UserError("train.data: has no arrays of samples");
  }
  ResolveNames(spec, &store);
  const int64_t samples = store.parts.front().at(store.SourceName("train.data")).samples();
  store.splits = DrawSplits(ResolveTimes(spec.split, &loaded), samples, store.separate_test(), seed);
  if (store.separate_test()) {
    const int64_t test_samples = store.parts.back().at("input").samples();
    auto& test = store.splits[static_cast<size_t>(Split::kTest)];
    for (int64_t i = 0; i < test_samples; ++i) test.push_back(i);
  }
  store.statistics = spec.statistics;
  if (std::any_of(spec.transforms.begin(), spec.transforms.end(),
                  [](const Transform& t) { return std::holds_alternative<Window>(t); })) {
    PrepareWindows(spec.split, samples, &loaded);
  }
  for (size_t i = 0; i < spec.transforms.size(); ++i) {
    const Transform& transform = spec.transforms[i];
    ApplyTransform(transform,
                   "train.data.transforms[" + std::to_string(i) + "]." + TransformName(transform),
                   share, &store);
  }
  Finish(spec, &store);
  if (spec.all_as_test) {
    if (store.separate_test()) {
      throw UserError(
          "train.predict.split: \"all\" does not fit data with test files of their own; predict "
          "train or test");
    }
    auto& test = store.splits[static_cast<size_t>(Split::kTest)];
    test.resize(static_cast<size_t>(store.parts.front().at("input").samples()));
    std::iota(test.begin(), test.end(), 0);
    std::erase_if(test, [&store](int64_t sample) {
      return std::binary_search(store.left_out.begin(), store.left_out.end(), sample);
    });
  }
  const bool predicts = spec.all_as_test || !spec.statistics.is_null();  // and has no use for targets
  CheckCells(store, !predicts, share);
  if (share.rank == 0 && share.note) {
    for (const std::string& note : store.notes) share.note(note);
  }
  const int64_t classes = CountClasses(store);
  return std::make_unique<ArrayDataset>(std::move(store), classes, !predicts);
}

}  // namespace itwin::worker
