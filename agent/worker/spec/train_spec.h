// The job spec as the worker needs it: plain structs with every default filled in. They mirror
// itwin.v1.TrainSpec (proto/itwin/v1/spec.proto says what each field means) without needing
// protobuf here. Two are equal when they mean the same; run_identity.h builds on that.
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
  bool operator==(const Resources&) const = default;
  int nodes = 1;
  int ranks_per_node = 1;
  int cpus_per_rank = 0;  // 0: the node's share
  int gpus_per_node = 0;
  int64_t memory_mib_per_node = 0;
  double time_seconds = 3600;
};

struct ModelSpec {  // exactly one of the first three is not empty
  bool operator==(const ModelSpec&) const = default;
  std::string torchscript;
  std::string archive;
  std::string builtin;
  nlohmann::json options = nlohmann::json::object();
};

struct NetcdfFile {
  bool operator==(const NetcdfFile&) const = default;
  std::string path;
};
struct IdxFiles {
  bool operator==(const IdxFiles&) const = default;
  std::string train_images, train_labels;
  std::string test_images, test_labels;  // both or neither
};
struct NpzFile {
  bool operator==(const NpzFile&) const = default;
  std::string path;
};
struct NpyFiles {
  bool operator==(const NpyFiles&) const = default;
  std::string input, target;
};
struct CsvFile {
  bool operator==(const CsvFile&) const = default;
  std::string path;
  std::vector<std::string> inputs, targets;
  bool target_is_class = false;
};
struct SyntheticData {
  bool operator==(const SyntheticData&) const = default;
  int64_t samples = 0;
  std::vector<int64_t> input_shape, target_shape;
  int64_t classes = 0;
};

struct Hdf5File {
  bool operator==(const Hdf5File&) const = default;
  std::string path;
  std::string input = "input", target = "target";
  bool target_named = false;  // it must be there
};
struct ZarrStore {
  bool operator==(const ZarrStore&) const = default;
  std::string path;  // a directory
  std::string input = "input", target = "target";
  bool target_named = false;  // it must be there
};
struct SafetensorsFile {
  bool operator==(const SafetensorsFile&) const = default;
  std::string path;
};
struct RawArray {
  bool operator==(const RawArray&) const = default;
  std::string path, type;
  std::vector<int64_t> shape;  // of one sample
};
struct RawFiles {
  bool operator==(const RawFiles&) const = default;
  RawArray input, target;
};

struct IndexRange {  // half-open
  bool operator==(const IndexRange&) const = default;
  int64_t first = 0;
  int64_t last = 0;
};
struct SplitSpec {
  bool operator==(const SplitSpec&) const = default;
  std::optional<IndexRange> train = {}, validation = {}, test = {};
  double validation_fraction = 0;
  double test_fraction = 0;
  bool by_hash = false;
  // "1982-01..1990-12" where that was written instead of sample numbers; becomes the range above
  // once the data's time axis is known.
  std::string train_time = {}, validation_time = {}, test_time = {};
};

struct Standardize {
  bool operator==(const Standardize&) const = default;
  std::vector<std::string> arrays;
};  // empty: every float array
struct Scale {
  bool operator==(const Scale&) const = default;
  std::vector<std::string> arrays;
  double multiply = 1;  // a spec that leaves `multiply` out means 1
  double add = 0;
};
struct Crop {
  bool operator==(const Crop&) const = default;
  std::vector<int64_t> sizes;
};
struct Coarsen {
  bool operator==(const Coarsen&) const = default;
  int factor = 0;
  std::vector<std::string> baselines;
};
struct FillMissing {
  bool operator==(const FillMissing&) const = default;
  std::optional<double> value;
};
struct Window {
  bool operator==(const Window&) const = default;
  int length = 0;
  int horizon = 0;
};
struct Reshape {
  bool operator==(const Reshape&) const = default;
  std::string array;
  std::vector<int64_t> shape;
};
struct Log {
  bool operator==(const Log&) const = default;
  std::vector<std::string> arrays;
  double add = 0;
};
struct Clip {
  bool operator==(const Clip&) const = default;
  std::vector<std::string> arrays;
  std::optional<double> min, max;
};
using Transform = std::variant<Standardize, Scale, Crop, Coarsen, FillMissing, Window, Reshape, Log,
                               Clip>;

struct DataSpec {
  bool operator==(const DataSpec&) const = default;
  std::variant<NetcdfFile, IdxFiles, NpzFile, NpyFiles, CsvFile, SyntheticData, Hdf5File,
               SafetensorsFile, RawFiles, ZarrStore>
      source;
  std::vector<std::string> variables;
  std::string input;   // empty: "input" where present
  std::string target;  // empty: "target" where present
  SplitSpec split;
  std::vector<Transform> transforms;
  std::vector<std::string> more_files;
  std::string load = "auto";  // memory, stream, auto
  bool cache_on_node = false;
  // Not of the spec's data: what a prediction sets.
  nlohmann::json statistics = nullptr;  // preprocessing.json of the training
  bool all_as_test = false;             // the test split holds every sample, in order
};

struct Sgd {
  bool operator==(const Sgd&) const = default;
  double lr = 1e-2;
  double momentum = 0, weight_decay = 0;
  bool nesterov = false;
  double dampening = 0;
};
struct Adam {
  bool operator==(const Adam&) const = default;
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
};
struct AdamW {
  bool operator==(const AdamW&) const = default;
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 1e-2;
};
struct RmsProp {
  bool operator==(const RmsProp&) const = default;
  double lr = 1e-2, alpha = 0.99, eps = 1e-8, weight_decay = 0, momentum = 0;
};
struct Adagrad {
  bool operator==(const Adagrad&) const = default;
  double lr = 1e-2, lr_decay = 0, weight_decay = 0, initial_accumulator = 0, eps = 1e-10;
};
struct Lamb {
  bool operator==(const Lamb&) const = default;
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-6, weight_decay = 1e-2;
};
struct Lars {
  bool operator==(const Lars&) const = default;
  double lr = 0.1, momentum = 0.9, weight_decay = 1e-4, trust = 1e-3;
  bool nesterov = false;
};
struct Lbfgs {
  bool operator==(const Lbfgs&) const = default;
  double lr = 1;
  int max_iter = 20, max_eval = 25;
  double tolerance_grad = 1e-7, tolerance_change = 1e-9;
  int history = 10;
  bool strong_wolfe = false;
};
using OptimizerSpec = std::variant<Sgd, Adam, AdamW, RmsProp, Adagrad, Lamb, Lars, Lbfgs>;

// What differs for the parameters whose names match; see ParameterGroup in spec.proto.
struct ParameterGroupSpec {
  bool operator==(const ParameterGroupSpec&) const = default;
  std::vector<std::string> match;
  std::optional<double> lr = {}, weight_decay = {};
  bool freeze = false;
};

struct ConstantSchedule {
  bool operator==(const ConstantSchedule&) const = default;
};
struct LinearSchedule {
  bool operator==(const LinearSchedule&) const = default;
  double start = 1.0 / 3, end = 1;
  int64_t length = 0;  // here and below: 0 is the whole run
};
struct StepSchedule {
  bool operator==(const StepSchedule&) const = default;
  int64_t every = 1;
  double gamma = 0.1;
};
struct MultiStepSchedule {
  bool operator==(const MultiStepSchedule&) const = default;
  std::vector<int64_t> milestones;
  double gamma = 0.1;
};
struct ExponentialSchedule {
  bool operator==(const ExponentialSchedule&) const = default;
  double gamma = 1;
};
struct CosineSchedule {
  bool operator==(const CosineSchedule&) const = default;
  int64_t length = 0;
  double min_factor = 0;
};
struct OneCycleSchedule {
  bool operator==(const OneCycleSchedule&) const = default;
  int64_t length = 0;
  double rise = 0.3, initial_divisor = 25, final_divisor = 1e4;
  bool linear = false;
};
struct PolynomialSchedule {
  bool operator==(const PolynomialSchedule&) const = default;
  int64_t length = 0;
  double power = 1, min_factor = 0;
};
struct PlateauSchedule {
  bool operator==(const PlateauSchedule&) const = default;
  double factor = 0.1;
  int patience = 10;
  double threshold = 1e-4;
  int cooldown = 0;
  double min_factor = 0;
  std::string metric = "validation/loss";
  bool maximize = false;
};
struct ScheduleSpec {
  bool operator==(const ScheduleSpec&) const = default;
  std::variant<ConstantSchedule, LinearSchedule, StepSchedule, MultiStepSchedule,
               ExponentialSchedule, CosineSchedule, OneCycleSchedule, PolynomialSchedule,
               PlateauSchedule>
      kind = ConstantSchedule{};
  bool epochs = false;  // lengths count epochs
  int64_t warmup_steps = 0;
  double warmup_start = 0.01;
};

// One of several optimisers; see Phase in spec.proto.
struct PhaseSpec {
  bool operator==(const PhaseSpec&) const = default;
  std::string name;
  std::vector<std::string> match;
  std::string method;
  OptimizerSpec optimizer = Adam{};
  int repeats = 1;
};

enum class Precision { kFloat32, kBfloat16, kFloat16 };

// DeepSpeed's constants.
struct LossScaleSpec {
  bool operator==(const LossScaleSpec&) const = default;
  double initial = 65536;
  int64_t window = 1000;
  int64_t hysteresis = 2;
  double smallest = 1;
};

struct EarlyStoppingSpec {
  bool operator==(const EarlyStoppingSpec&) const = default;
  std::string metric = "validation/loss";
  bool maximize = false;
  int patience = 10;
  double min_delta = 0;
};
struct BestSpec {
  bool operator==(const BestSpec&) const = default;
  std::string metric = "validation/loss";
  bool maximize = false;
  bool export_best = true;
};

struct GpuSpec {
  bool operator==(const GpuSpec&) const = default;
  bool given = false;
  bool tf32 = true;
  bool channels_last = false;
  bool graphs = false;
};

struct LossOptions {
  bool operator==(const LossOptions&) const = default;
  double label_smoothing = 0;
  std::vector<double> class_weights{};
  double delta = 1;                // huber
  double beta = 1;                 // smooth_l1
  double gamma = 2;                // focal
  std::vector<double> quantiles{};  // quantile
  double smooth = 1;               // dice
  int members = 0;                 // crps_ensemble; 0: as many as the model puts out
};

struct DdpSpec {
  bool operator==(const DdpSpec&) const = default;
  double bucket_mb = 25;
  double first_bucket_mb = 1;
  bool overlap = true;
  std::string compression = "none";  // none, fp16, bf16
};
struct LocalSgdSpec {
  bool operator==(const LocalSgdSpec&) const = default;
  int every = 0;  // steps between averages; 0: off
};
struct HorovodSpec {
  bool operator==(const HorovodSpec&) const = default;
  double fusion_mb = 64, cycle_ms = 1;
  bool adasum = false;
};
struct ZeroSpec {
  bool operator==(const ZeroSpec&) const = default;
  double bucket_mb = 16;
  bool overlap = true;
};

struct MeshSpec {
  bool operator==(const MeshSpec&) const = default;
  int data = 0, tensor = 0, pipeline = 0;  // 0: what is left
  std::string schedule = "1f1b";           // or "gpipe"
  int micro_batches = 4;                   // a rank's samples of a step pass the stages in so many parts
};

struct CheckpointSpec {
  bool operator==(const CheckpointSpec&) const = default;
  int every_epochs = 0;  // 0: only at the end, on request and before the deadline
  int keep = 2;
  bool background = true;  // training goes on while the bytes reach the disk
  bool export_optimizer = false;
};

struct PredictSpec {
  bool operator==(const PredictSpec&) const = default;
  std::string weights;         // empty: the model's own
  std::string preprocessing;   // empty: statistics are this data's own
  std::string split = "all";   // train, validation, test, all
  std::string format = "npy";  // npy, netcdf
};

struct ProfileSpec {
  bool operator==(const ProfileSpec&) const = default;
  int trace_steps = 0;  // 0: only when asked for while it runs
  int64_t at_step = 10;
  double hang_timeout_seconds = 1800;
};

struct TrainSpec {
  bool operator==(const TrainSpec&) const = default;
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
  LocalSgdSpec local_sgd;
  HorovodSpec horovod;
  ZeroSpec zero;
  MeshSpec mesh;
  int check_every = 200;  // steps between comparisons of the ranks' parameters; 0: off
  ScheduleSpec schedule;
  std::vector<ParameterGroupSpec> parameter_groups;
  std::vector<PhaseSpec> phases;  // empty: one optimiser for all
  double clip_value = 0;          // 0: off
  LossOptions loss_options;
  int top_k = 5;
  Precision precision = Precision::kFloat32;
  LossScaleSpec loss_scale;
  std::optional<double> ema;  // decay
  std::optional<EarlyStoppingSpec> early_stopping;
  std::optional<BestSpec> best;
  int64_t validate_every_steps = 0;  // 0: at the ends of epochs alone
  bool deterministic = false;
  GpuSpec gpu;
  std::optional<PredictSpec> predict;
  ProfileSpec profile;
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
// The same for a directory.
std::filesystem::path ResolveDirectory(const std::string& name, const std::filesystem::path& work_dir,
                                       const std::string& field);

}  // namespace itwin::worker
