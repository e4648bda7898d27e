#include "agent/worker/spec/train_spec.h"

#include <charconv>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <system_error>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::json;

// One JSON object of the spec and where it stands in it. Every Get marks its key as known; Done()
// refuses the rest.
class Object {
 public:
  Object(const Json& json, std::string path) : json_(json), path_(std::move(path)) {
    if (!json.is_object()) Refuse("", "is " + TypeName(json) + "; it must be an object");
  }

  [[noreturn]] void Refuse(const std::string& key, const std::string& problem) const {
    throw UserError(PathOf(key) + " " + problem);
  }
  std::string PathOf(const std::string& key) const {
    if (key.empty()) return path_.empty() ? "the spec" : path_;
    return path_.empty() ? key : path_ + "." + key;
  }

  // The value, or nullptr when it is absent or null (protobuf JSON takes null for absent).
  const Json* Find(const std::string& key) {
    known_.insert(key);
    auto it = json_.find(key);
    return it == json_.end() || it->is_null() ? nullptr : &*it;
  }

  void Get(const std::string& key, std::string& value) {
    const Json* json = Find(key);
    if (json == nullptr) return;
    if (!json->is_string()) RefuseType(key, *json, "a string");
    value = json->get<std::string>();
  }
  void Get(const std::string& key, bool& value) {
    const Json* json = Find(key);
    if (json == nullptr) return;
    if (!json->is_boolean()) RefuseType(key, *json, "true or false");
    value = json->get<bool>();
  }
  void Get(const std::string& key, double& value) {
    if (const Json* json = Find(key)) value = Number(key, *json);
  }
  void Get(const std::string& key, std::optional<double>& value) {
    if (const Json* json = Find(key)) value = Number(key, *json);
  }
  void Get(const std::string& key, int64_t& value) {
    if (const Json* json = Find(key)) value = Integer(key, *json);
  }
  void Get(const std::string& key, uint64_t& value) {
    const Json* json = Find(key);
    if (json == nullptr) return;
    if (json->is_string()) {
      const std::string& text = json->get_ref<const std::string&>();
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
      if (error == std::errc() && end == text.data() + text.size()) return;
    } else if (json->is_number_unsigned()) {
      value = json->get<uint64_t>();
      return;
    }
    RefuseType(key, *json, "an integer of 0 or more");
  }
  void Get(const std::string& key, int& value) {
    const Json* json = Find(key);
    if (json == nullptr) return;
    const int64_t wide = Integer(key, *json);
    if (wide < std::numeric_limits<int>::min() || wide > std::numeric_limits<int>::max()) {
      Refuse(key, "is " + json->dump() + "; it must fit into 32 bits");
    }
    value = static_cast<int>(wide);
  }
  template <typename T>
  void Get(const std::string& key, std::vector<T>& values) {
    const Json* json = Find(key);
    if (json == nullptr) return;
    if (!json->is_array()) RefuseType(key, *json, "a list");
    for (size_t i = 0; i < json->size(); ++i) {
      const std::string name = key + "[" + std::to_string(i) + "]";
      T value{};
      if constexpr (std::is_same_v<T, std::string>) {
        if (!(*json)[i].is_string()) RefuseType(name, (*json)[i], "a string");
        value = (*json)[i].template get<std::string>();
      } else {
        value = Integer(name, (*json)[i]);
      }
      values.push_back(value);
    }
  }

  void AtLeast(const std::string& key, double value, double least) const {
    if (!(value >= least)) {
      Refuse(key, "is " + Json(value).dump() + "; it must be at least " + Json(least).dump());
    }
  }

  // The one key of `choices` that is set, or "" when none is. Two are an error.
  std::string OneOf(const std::vector<std::string>& choices) {
    std::string found;
    for (const std::string& choice : choices) {
      if (Find(choice) == nullptr) continue;
      if (!found.empty()) Refuse("", "has both `" + found + "` and `" + choice + "`; give one");
      found = choice;
    }
    return found;
  }

  void Done() const {
    for (const auto& [key, value] : json_.items()) {
      if (known_.contains(key)) continue;
      std::string names;
      for (const std::string& name : known_) names += (names.empty() ? "" : ", ") + name;
      Refuse(key, "is not a known field; known here: " + names);
    }
  }

 private:
  static std::string TypeName(const Json& json) {
    switch (json.type()) {
      case Json::value_t::null:
        return "null";
      case Json::value_t::object:
        return "an object";
      case Json::value_t::array:
        return "a list";
      case Json::value_t::string:
        return "the string " + json.dump(-1, ' ', false, Json::error_handler_t::replace);
      case Json::value_t::boolean:
      case Json::value_t::number_integer:
      case Json::value_t::number_unsigned:
      case Json::value_t::number_float:
        return json.dump();
      case Json::value_t::binary:
      case Json::value_t::discarded:
        break;
    }
    return "something else";
  }
  [[noreturn]] void RefuseType(const std::string& key, const Json& json,
                               const std::string& wanted) const {
    Refuse(key, "is " + TypeName(json) + "; it must be " + wanted);
  }
  double Number(const std::string& key, const Json& json) const {
    if (json.is_number()) return json.get<double>();
    if (json.is_string()) {  // protobuf JSON also writes numbers as strings
      const std::string& text = json.get_ref<const std::string&>();
      char* end = nullptr;
      const double value = std::strtod(text.c_str(), &end);
      if (!text.empty() && end == text.c_str() + text.size() && std::isfinite(value)) return value;
    }
    RefuseType(key, json, "a number");
  }
  int64_t Integer(const std::string& key, const Json& json) const {
    if (json.is_number_unsigned()) {
      if (json.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return json.get<int64_t>();
      }
    } else if (json.is_number_integer()) {
      return json.get<int64_t>();
    } else if (json.is_number_float()) {
      const double value = json.get<double>();
      if (value == std::floor(value) && std::abs(value) < 9e15) return static_cast<int64_t>(value);
    } else if (json.is_string()) {
      const std::string& text = json.get_ref<const std::string&>();
      int64_t value = 0;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
      if (error == std::errc() && end == text.data() + text.size() && !text.empty()) return value;
    }
    RefuseType(key, json, "an integer");
  }

  const Json& json_;
  const std::string path_;
  std::set<std::string> known_;
};

double ParseDuration(Object& in, const std::string& key, double fallback) {
  const Json* json = in.Find(key);
  if (json == nullptr) return fallback;
  if (json->is_string()) {
    const std::string& text = json->get_ref<const std::string&>();
    if (text.size() > 1 && text.back() == 's') {
      char* end = nullptr;
      const double seconds = std::strtod(text.c_str(), &end);
      if (end == text.c_str() + text.size() - 1 && seconds > 0 && std::isfinite(seconds))
        return seconds;
    }
  }
  in.Refuse(key, "is " + json->dump() + R"(; it must be a duration in seconds such as "1800s")");
}

Resources ParseResources(const Json& json) {
  Object in(json, "resources");
  Resources r;
  in.Get("nodes", r.nodes);
  in.Get("ranks_per_node", r.ranks_per_node);
  in.Get("cpus_per_rank", r.cpus_per_rank);
  in.Get("gpus_per_node", r.gpus_per_node);
  in.Get("memory_mib_per_node", r.memory_mib_per_node);
  r.time_seconds = ParseDuration(in, "time", r.time_seconds);
  in.Done();
  if (r.nodes == 0) r.nodes = 1;
  if (r.ranks_per_node == 0) r.ranks_per_node = 1;
  in.AtLeast("nodes", r.nodes, 1);
  in.AtLeast("ranks_per_node", r.ranks_per_node, 1);
  in.AtLeast("cpus_per_rank", r.cpus_per_rank, 0);
  return r;
}

ModelSpec ParseModel(const Json& json) {
  Object in(json, "train.model");
  ModelSpec m;
  const std::string source = in.OneOf({"torchscript", "builtin"});
  in.Get("torchscript", m.torchscript);
  in.Get("builtin", m.builtin);
  if (const Json* options = in.Find("options")) {
    if (!options->is_object()) in.Refuse("options", "must be an object");
    m.options = *options;
  }
  in.Done();
  if (source.empty() || (m.torchscript.empty() && m.builtin.empty())) {
    in.Refuse("", "names no model; give `builtin: <name>` or `torchscript: <file>`");
  }
  return m;
}

std::optional<IndexRange> ParseRange(Object& in, const std::string& key) {
  std::string text;
  in.Get(key, text);
  if (text.empty()) return std::nullopt;
  IndexRange range;
  const char* end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, range.first);
  const bool dots =
      first.ec == std::errc() && end - first.ptr > 2 && first.ptr[0] == '.' && first.ptr[1] == '.';
  const auto last = dots ? std::from_chars(first.ptr + 2, end, range.last)
                         : std::from_chars_result{end, std::errc::invalid_argument};
  if (last.ec != std::errc() || last.ptr != end || range.first < 0 || range.last < range.first) {
    in.Refuse(key, "is \"" + text +
                       "\"; it must be a half-open range of sample numbers such as \"0..108\"");
  }
  return range;
}

SplitSpec ParseSplit(const Json& json) {
  Object in(json, "train.data.split");
  SplitSpec s;
  s.train = ParseRange(in, "train");
  s.validation = ParseRange(in, "validation");
  s.test = ParseRange(in, "test");
  in.Get("validation_fraction", s.validation_fraction);
  in.Get("test_fraction", s.test_fraction);
  in.Done();
  for (const auto& [key, value] : {std::pair{"validation_fraction", s.validation_fraction},
                                   std::pair{"test_fraction", s.test_fraction}}) {
    if (!(value >= 0 && value < 1)) in.Refuse(key, "must be at least 0 and below 1");
  }
  return s;
}

Transform ParseTransform(const Json& json, const std::string& path) {
  Object in(json, path);
  const std::vector<std::string> kinds = {"standardize",  "scale",  "crop",   "coarsen",
                                          "fill_missing", "window", "reshape"};
  const std::string kind = in.OneOf(kinds);
  in.Done();
  if (kind.empty()) {
    in.Refuse("",
              "names no transform; known: standardize, scale, crop, coarsen, fill_missing, window, "
              "reshape");
  }
  Object body(*in.Find(kind), path + "." + kind);
  Transform result;
  if (kind == "standardize") {
    Standardize t;
    body.Get("arrays", t.arrays);
    result = t;
  } else if (kind == "scale") {
    Scale t;
    body.Get("arrays", t.arrays);
    body.Get("multiply", t.multiply);
    body.Get("add", t.add);
    result = t;
  } else if (kind == "crop") {
    Crop t;
    body.Get("sizes", t.sizes);
    if (t.sizes.empty()) body.Refuse("sizes", "is missing; give the sizes of the last dimensions");
    for (int64_t size : t.sizes) body.AtLeast("sizes", static_cast<double>(size), 1);
    result = t;
  } else if (kind == "coarsen") {
    Coarsen t;
    body.Get("factor", t.factor);
    body.Get("baselines", t.baselines);
    body.AtLeast("factor", t.factor, 2);
    for (const std::string& name : t.baselines) {
      if (name != "bilinear" && name != "bicubic") {
        body.Refuse("baselines", "names `" + name + "`; known: bilinear, bicubic");
      }
    }
    result = t;
  } else if (kind == "fill_missing") {
    FillMissing t;
    body.Get("value", t.value);
    result = t;
  } else if (kind == "window") {
    Window t;
    body.Get("length", t.length);
    body.Get("horizon", t.horizon);
    body.AtLeast("length", t.length, 1);
    body.AtLeast("horizon", t.horizon, 1);
    result = t;
  } else {
    Reshape t;
    body.Get("array", t.array);
    body.Get("shape", t.shape);
    if (t.array.empty()) body.Refuse("array", "is missing; name the array to reshape");
    if (t.shape.empty()) body.Refuse("shape", "is missing; give the shape of one sample");
    result = t;
  }
  body.Done();
  return result;
}

DataSpec ParseData(const Json& json) {
  Object in(json, "train.data");
  DataSpec d;
  const std::string source = in.OneOf({"netcdf", "idx", "npz", "npy", "csv", "synthetic"});
  if (source.empty())
    in.Refuse("", "names no source; give one of netcdf, idx, npz, npy, csv, synthetic");
  const std::string at = "train.data." + source;
  if (source == "netcdf") {
    NetcdfFile s;
    in.Get("netcdf", s.path);
    d.source = s;
  } else if (source == "npz") {
    NpzFile s;
    in.Get("npz", s.path);
    d.source = s;
  } else if (source == "idx") {
    Object body(*in.Find(source), at);
    IdxFiles s;
    body.Get("train_images", s.train_images);
    body.Get("train_labels", s.train_labels);
    body.Get("test_images", s.test_images);
    body.Get("test_labels", s.test_labels);
    body.Done();
    if (s.train_images.empty()) body.Refuse("train_images", "is missing");
    if (s.train_labels.empty()) body.Refuse("train_labels", "is missing");
    if (s.test_images.empty() != s.test_labels.empty()) {
      body.Refuse("", "has only one of `test_images` and `test_labels`; give both or neither");
    }
    d.source = s;
  } else if (source == "npy") {
    Object body(*in.Find(source), at);
    NpyFiles s;
    body.Get("input", s.input);
    body.Get("target", s.target);
    body.Done();
    if (s.input.empty()) body.Refuse("input", "is missing");
    if (s.target.empty()) body.Refuse("target", "is missing");
    d.source = s;
  } else if (source == "csv") {
    Object body(*in.Find(source), at);
    CsvFile s;
    body.Get("path", s.path);
    body.Get("inputs", s.inputs);
    body.Get("targets", s.targets);
    body.Get("target_is_class", s.target_is_class);
    body.Done();
    if (s.path.empty()) body.Refuse("path", "is missing");
    if (s.inputs.empty()) body.Refuse("inputs", "is missing; name the input columns");
    if (s.targets.empty()) body.Refuse("targets", "is missing; name the target columns");
    if (s.target_is_class && s.targets.size() != 1) {
      body.Refuse("targets", "must name one column when `target_is_class` is true");
    }
    d.source = s;
  } else {
    Object body(*in.Find(source), at);
    SyntheticData s;
    body.Get("samples", s.samples);
    body.Get("input_shape", s.input_shape);
    body.Get("target_shape", s.target_shape);
    body.Get("classes", s.classes);
    body.Done();
    body.AtLeast("samples", static_cast<double>(s.samples), 1);
    if (s.input_shape.empty())
      body.Refuse("input_shape", "is missing; give the shape of one sample");
    for (int64_t size : s.input_shape) body.AtLeast("input_shape", static_cast<double>(size), 1);
    for (int64_t size : s.target_shape) body.AtLeast("target_shape", static_cast<double>(size), 1);
    body.AtLeast("classes", static_cast<double>(s.classes), 0);
    d.source = s;
  }
  in.Get("variables", d.variables);
  in.Get("input", d.input);
  in.Get("target", d.target);
  if (const Json* split = in.Find("split")) d.split = ParseSplit(*split);
  if (const Json* transforms = in.Find("transforms")) {
    if (!transforms->is_array()) in.Refuse("transforms", "must be a list");
    for (size_t i = 0; i < transforms->size(); ++i) {
      d.transforms.push_back(
          ParseTransform((*transforms)[i], "train.data.transforms[" + std::to_string(i) + "]"));
    }
  }
  in.Done();
  return d;
}

void CheckRate(const Object& in, double lr) {
  if (!(lr > 0)) in.Refuse("lr", "is " + Json(lr).dump() + "; the learning rate must be above 0");
}
void CheckUnit(const Object& in, const std::string& key, double value) {
  if (!(value >= 0 && value < 1)) {
    in.Refuse(key, "is " + Json(value).dump() + "; it must be at least 0 and below 1");
  }
}

template <typename AdamLike>
AdamLike ParseAdam(Object& in) {
  AdamLike o;
  in.Get("lr", o.lr);
  in.Get("beta1", o.beta1);
  in.Get("beta2", o.beta2);
  in.Get("eps", o.eps);
  in.Get("weight_decay", o.weight_decay);
  in.Done();
  CheckRate(in, o.lr);
  CheckUnit(in, "beta1", o.beta1);
  CheckUnit(in, "beta2", o.beta2);
  in.AtLeast("eps", o.eps, 0);
  in.AtLeast("weight_decay", o.weight_decay, 0);
  return o;
}

OptimizerSpec ParseOptimizer(const Json& json) {
  Object in(json, "train.optimizer");
  const std::string kind = in.OneOf({"sgd", "adam", "adamw", "rmsprop"});
  in.Done();
  if (kind.empty()) return Adam{};
  Object body(*in.Find(kind), "train.optimizer." + kind);
  if (kind == "adam") return ParseAdam<Adam>(body);
  if (kind == "adamw") return ParseAdam<AdamW>(body);
  if (kind == "sgd") {
    Sgd o;
    body.Get("lr", o.lr);
    body.Get("momentum", o.momentum);
    body.Get("weight_decay", o.weight_decay);
    body.Get("nesterov", o.nesterov);
    body.Get("dampening", o.dampening);
    body.Done();
    CheckRate(body, o.lr);
    body.AtLeast("momentum", o.momentum, 0);
    body.AtLeast("weight_decay", o.weight_decay, 0);
    if (o.nesterov && (o.momentum <= 0 || o.dampening != 0)) {
      body.Refuse("nesterov", "needs a momentum above 0 and no dampening");
    }
    return o;
  }
  RmsProp o;
  body.Get("lr", o.lr);
  body.Get("alpha", o.alpha);
  body.Get("eps", o.eps);
  body.Get("weight_decay", o.weight_decay);
  body.Get("momentum", o.momentum);
  body.Done();
  CheckRate(body, o.lr);
  CheckUnit(body, "alpha", o.alpha);
  body.AtLeast("eps", o.eps, 0);
  body.AtLeast("weight_decay", o.weight_decay, 0);
  body.AtLeast("momentum", o.momentum, 0);
  return o;
}

DdpSpec ParseDdp(const Json& json) {
  Object in(json, "train.ddp");
  DdpSpec d;
  in.Get("bucket_mb", d.bucket_mb);
  in.Get("first_bucket_mb", d.first_bucket_mb);
  in.Get("overlap", d.overlap);
  in.Done();
  if (d.bucket_mb == 0) d.bucket_mb = DdpSpec{}.bucket_mb;
  if (d.first_bucket_mb == 0) d.first_bucket_mb = DdpSpec{}.first_bucket_mb;
  in.AtLeast("bucket_mb", d.bucket_mb, 0);
  in.AtLeast("first_bucket_mb", d.first_bucket_mb, 0);
  return d;
}

CheckpointSpec ParseCheckpoint(const Json& json) {
  Object in(json, "train.checkpoint");
  CheckpointSpec c;
  in.Get("every_epochs", c.every_epochs);
  in.Get("keep", c.keep);
  in.Done();
  if (c.keep == 0) c.keep = CheckpointSpec{}.keep;
  in.AtLeast("every_epochs", c.every_epochs, 0);
  in.AtLeast("keep", c.keep, 1);
  return c;
}

void ParseTrain(const Json& json, TrainSpec& t) {
  Object in(json, "train");
  const Json* model = in.Find("model");
  if (model == nullptr)
    in.Refuse("model", "is missing; give `builtin: <name>` or `torchscript: <file>`");
  t.model = ParseModel(*model);
  const Json* data = in.Find("data");
  if (data == nullptr)
    in.Refuse("data", "is missing; give one of netcdf, idx, npz, npy, csv, synthetic");
  t.data = ParseData(*data);
  in.Get("loss", t.loss);
  in.Get("metrics", t.metrics);
  if (const Json* optimizer = in.Find("optimizer")) t.optimizer = ParseOptimizer(*optimizer);
  in.Get("batch", t.batch);
  in.Get("epochs", t.epochs);
  in.Get("steps", t.steps);
  in.Get("strategy", t.strategy);
  if (const Json* ddp = in.Find("ddp")) t.ddp = ParseDdp(*ddp);
  in.Get("seed", t.seed);
  in.Get("validate_every", t.validate_every);
  if (const Json* checkpoint = in.Find("checkpoint")) t.checkpoint = ParseCheckpoint(*checkpoint);
  in.Get("clip_norm", t.clip_norm);
  in.Get("stop_on_nan", t.stop_on_nan);
  in.Get("accumulate", t.accumulate);
  in.Get("check_every", t.check_every);
  in.Done();
  // Zero is how protobuf spells "not given" for these.
  if (t.batch == 0) t.batch = 32;
  if (t.epochs == 0) t.epochs = 1;
  if (t.validate_every == 0) t.validate_every = 1;
  if (t.accumulate == 0) t.accumulate = 1;
  in.AtLeast("batch", static_cast<double>(t.batch), 1);
  in.AtLeast("epochs", t.epochs, 1);
  in.AtLeast("steps", static_cast<double>(t.steps), 0);
  in.AtLeast("validate_every", t.validate_every, 1);
  in.AtLeast("clip_norm", t.clip_norm, 0);
  in.AtLeast("accumulate", t.accumulate, 1);
  in.AtLeast("check_every", t.check_every, 0);
  if (!t.strategy.empty() && t.strategy != "single" && t.strategy != "ddp") {
    in.Refuse("strategy", "is \"" + t.strategy + "\"; known: single, ddp");
  }
}

}  // namespace

TrainSpec ParseSpec(const Json& job) {
  Object in(job, "");
  TrainSpec spec;
  in.Get("name", spec.name);
  if (const Json* resources = in.Find("resources")) spec.resources = ParseResources(*resources);
  // These are the gateway's and the agent's; the worker only knows that they may stand here.
  for (const char* key : {"site", "env", "inputs", "retry", "labels"}) in.Find(key);
  if (in.Find("command") != nullptr)
    in.Refuse("command", "is not for itwin-worker; it runs `train` jobs");
  const Json* train = in.Find("train");
  if (train == nullptr) in.Refuse("train", "is missing; itwin-worker needs to know what to train");
  ParseTrain(*train, spec);
  in.Done();
  return spec;
}

std::filesystem::path ResolveFile(const std::string& name, const std::filesystem::path& work_dir,
                                  const std::string& field) {
  namespace fs = std::filesystem;
  constexpr std::string_view kSite = "site:";
  fs::path path = name.starts_with(kSite) ? fs::path(name.substr(kSite.size())) : fs::path(name);
  if (name.empty()) throw UserError(field + " is empty; it must name a file");
  if (name.starts_with(kSite) && !path.is_absolute()) {
    throw UserError(field + " is \"" + name + "\"; a file of the site needs an absolute path");
  }
  if (path.is_relative()) {
    for (const fs::path& part : path) {
      if (part == "..")
        throw UserError(field + " is \"" + name + "\"; a path must not contain \"..\"");
    }
    path = work_dir / path;
  }
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) {
    throw UserError(field + ": there is no file \"" + name + "\" (looked for " + path.string() +
                    ")");
  }
  if (fs::is_directory(status)) {
    throw UserError(field + ": \"" + name + "\" is a directory; it must be a file");
  }
  return path;
}

}  // namespace itwin::worker
