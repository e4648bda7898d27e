// The job spec as the worker needs it: plain structs with every default filled in. They mirror
// itwin.v1.TrainSpec (proto/itwin/v1/spec.proto says what each field means) without needing
// protobuf here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include <nlohmann/json.hpp>

namespace itwin::worker {

struct Resources {
  int nodes = 1;
  int ranks_per_node = 1;
  int cpus_per_rank = 0;  // 0: the node's share
  int gpus_per_node = 0;
  int64_t memory_mib_per_node = 0;
  double time_seconds = 3600;
};

struct ModelSpec {  // exactly one of the first two is not empty
  std::string torchscript;
  std::string builtin;
  nlohmann::json options = nlohmann::json::object();
};

struct NetcdfFile {
  std::string path;
};
struct IdxFiles {
  std::string train_images, train_labels;
  std::string test_images, test_labels;  // both or neither
};
struct NpzFile {
  std::string path;
};
struct NpyFiles {
  std::string input, target;
};
struct CsvFile {
  std::string path;
  std::vector<std::string> inputs, targets;
  bool target_is_class = false;
};
struct SyntheticData {
  int64_t samples = 0;
  std::vector<int64_t> input_shape, target_shape;
  int64_t classes = 0;
};

struct IndexRange {  // half-open
  int64_t first = 0;
  int64_t last = 0;
};
struct SplitSpec {
  std::optional<IndexRange> train = {}, validation = {}, test = {};
  double validation_fraction = 0;
  double test_fraction = 0;
};

struct Standardize {
  std::vector<std::string> arrays;
};  // empty: every float array
struct Scale {
  std::vector<std::string> arrays;
  double multiply = 1;  // a spec that leaves `multiply` out means 1
  double add = 0;
};
struct Crop {
  std::vector<int64_t> sizes;
};
struct Coarsen {
  int factor = 0;
  std::vector<std::string> baselines;
};
struct FillMissing {
  std::optional<double> value;
};
struct Window {
  int length = 0;
  int horizon = 0;
};
struct Reshape {
  std::string array;
  std::vector<int64_t> shape;
};
using Transform = std::variant<Standardize, Scale, Crop, Coarsen, FillMissing, Window, Reshape>;

struct DataSpec {
  std::variant<NetcdfFile, IdxFiles, NpzFile, NpyFiles, CsvFile, SyntheticData> source;
  std::vector<std::string> variables;
  std::string input;   // empty: "input" where present
  std::string target;  // empty: "target" where present
  SplitSpec split;
  std::vector<Transform> transforms;
};

struct Sgd {
  double lr = 1e-2;
  double momentum = 0, weight_decay = 0;
  bool nesterov = false;
  double dampening = 0;
};
struct Adam {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
};
struct AdamW {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 1e-2;
};
struct RmsProp {
  double lr = 1e-2, alpha = 0.99, eps = 1e-8, weight_decay = 0, momentum = 0;
};
using OptimizerSpec = std::variant<Sgd, Adam, AdamW, RmsProp>;

struct DdpSpec {
  double bucket_mb = 25;
  double first_bucket_mb = 1;
  bool overlap = true;
};

struct CheckpointSpec {
  int every_epochs = 0;  // 0: only at the end, on request and before the deadline
  int keep = 2;
};

struct TrainSpec {
  std::string name = "unnamed";  // of the job
  Resources resources;

  ModelSpec model;
  DataSpec data;
  std::string loss;                  // empty: the model brings its own
  std::vector<std::string> metrics;  // empty: what fits the loss
  OptimizerSpec optimizer = Adam{};
  int64_t batch = 32;  // samples per step over all ranks together
  int epochs = 1;
  int64_t steps = 0;     // 0: no limit beside the epochs
  std::string strategy;  // empty: ddp when there is more than one rank
  DdpSpec ddp;
  uint64_t seed = 0;
  int validate_every = 1;
  CheckpointSpec checkpoint;
  double clip_norm = 0;  // 0: off
  bool stop_on_nan = true;
  int accumulate = 1;     // micro-batches of a step
  int check_every = 200;  // steps between comparisons of the ranks' parameters; 0: off
};

// Reads a whole job spec, {"name": …, "resources": …, "train": {…}}, in protobuf JSON with the
// proto's field names (64-bit integers may be strings, durations are "1800s", an absent field has
// its default). Strict: an unknown key, a wrong type or a value out of range throws a UserError
// that names the path, such as "train.optimizer.adam.lr".
TrainSpec ParseSpec(const nlohmann::json& job);

// Where a file named in a spec lies: "site:<path>" is read in place, an absolute path is itself,
// and all else is relative to the working directory (the agent has put it there). Throws a
// UserError naming `field` when there is no such file, or when a relative path would leave the
// working directory.
std::filesystem::path ResolveFile(const std::string& name, const std::filesystem::path& work_dir,
                                  const std::string& field);

}  // namespace itwin::worker
