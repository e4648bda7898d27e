#include "agent/worker/spec/train_spec.h"

#include <algorithm>
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
      } else if constexpr (std::is_same_v<T, double>) {
        value = Number(name, (*json)[i]);
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
  in.AtLeast("gpus_per_node", r.gpus_per_node, 0);
  return r;
}

ModelSpec ParseModel(const Json& json) {
  Object in(json, "train.model");
  ModelSpec m;
  const std::string source = in.OneOf({"torchscript", "archive", "builtin"});
  in.Get("torchscript", m.torchscript);
  in.Get("archive", m.archive);
  in.Get("builtin", m.builtin);
  if (const Json* options = in.Find("options")) {
    if (!options->is_object()) in.Refuse("options", "must be an object");
    m.options = *options;
  }
  in.Done();
  if (source == "archive" && !m.options.empty())
    in.Refuse("options", "are for built-in models; an archive is complete as it is");
  if (source.empty() || (m.torchscript.empty() && m.archive.empty() && m.builtin.empty())) {
    in.Refuse("", "names no model; give `builtin: <name>`, `archive: <file>` or `torchscript: <file>`");
  }
  return m;
}

std::optional<IndexRange> ParseRange(Object& in, const std::string& key, std::string& time) {
  std::string text;
  in.Get(key, text);
  if (text.empty()) return std::nullopt;
  const bool dates = text.find('-') != std::string::npos && text.find("..") != std::string::npos;
  if (dates) {  // read where the time axis is known
    time = text;
    return std::nullopt;
  }
  IndexRange range;
  const char* end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, range.first);
  const bool dots =
      first.ec == std::errc() && end - first.ptr > 2 && first.ptr[0] == '.' && first.ptr[1] == '.';
  const auto last = dots ? std::from_chars(first.ptr + 2, end, range.last)
                         : std::from_chars_result{end, std::errc::invalid_argument};
  if (last.ec != std::errc() || last.ptr != end || range.first < 0 || range.last < range.first) {
    in.Refuse(key, "is \"" + text +
                       "\"; it must be a half-open range of sample numbers such as \"0..108\", or of time "
                       "such as \"1982-01..1990-12\"");
  }
  return range;
}

SplitSpec ParseSplit(const Json& json) {
  Object in(json, "train.data.split");
  SplitSpec s;
  s.train = ParseRange(in, "train", s.train_time);
  s.validation = ParseRange(in, "validation", s.validation_time);
  s.test = ParseRange(in, "test", s.test_time);
  in.Get("by_hash", s.by_hash);
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
  const std::vector<std::string> kinds = {"standardize", "scale",   "crop", "coarsen", "fill_missing",
                                          "window",      "reshape", "log",  "clip"};
  const std::string kind = in.OneOf(kinds);
  in.Done();
  if (kind.empty()) {
    in.Refuse("",
              "names no transform; known: standardize, scale, crop, coarsen, fill_missing, window, "
              "reshape, log, clip");
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
  } else if (kind == "log") {
    Log t;
    body.Get("arrays", t.arrays);
    body.Get("add", t.add);
    result = t;
  } else if (kind == "clip") {
    Clip t;
    body.Get("arrays", t.arrays);
    body.Get("min", t.min);
    body.Get("max", t.max);
    if (!t.min && !t.max) body.Refuse("", "has neither `min` nor `max`; give one or both");
    if (t.min && t.max && !(*t.min <= *t.max)) body.Refuse("min", "is above `max`");
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

RawArray ParseRawArray(Object& parent, const std::string& key, const std::string& path) {
  const Json* json = parent.Find(key);
  if (json == nullptr) parent.Refuse(key, "is missing; give path, type and shape");
  Object in(*json, path);
  RawArray a;
  in.Get("path", a.path);
  in.Get("type", a.type);
  in.Get("shape", a.shape);
  in.Done();
  if (a.path.empty()) in.Refuse("path", "is missing");
  if (a.type.empty()) in.Refuse("type", "is missing; such as float32");
  for (int64_t size : a.shape) in.AtLeast("shape", static_cast<double>(size), 1);
  return a;
}

DataSpec ParseData(const Json& json) {
  Object in(json, "train.data");
  DataSpec d;
  const std::string source = in.OneOf(
      {"netcdf", "idx", "npz", "npy", "csv", "synthetic", "hdf5", "safetensors", "raw"});
  if (source.empty()) {
    in.Refuse("", "names no source; give one of netcdf, hdf5, idx, npz, npy, csv, safetensors, raw, "
                  "synthetic");
  }
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
  } else if (source == "hdf5") {
    Object body(*in.Find(source), at);
    Hdf5File s;
    std::string input, target;
    body.Get("path", s.path);
    body.Get("input", input);
    body.Get("target", target);
    body.Done();
    if (s.path.empty()) body.Refuse("path", "is missing");
    if (!input.empty()) s.input = input;
    s.target_named = !target.empty();
    if (!target.empty()) s.target = target;
    d.source = s;
  } else if (source == "safetensors") {
    SafetensorsFile s;
    in.Get("safetensors", s.path);
    d.source = s;
  } else if (source == "raw") {
    Object body(*in.Find(source), at);
    RawFiles s;
    s.input = ParseRawArray(body, "input", at + ".input");
    s.target = ParseRawArray(body, "target", at + ".target");
    body.Done();
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
  in.Get("more_files", d.more_files);
  if (!d.more_files.empty() && source != "netcdf" && source != "hdf5" && source != "npz" &&
      source != "csv" && source != "safetensors") {
    in.Refuse("more_files", "belongs to netcdf, hdf5, npz, csv and safetensors data");
  }
  in.Get("load", d.load);
  if (d.load.empty()) d.load = "auto";
  if (d.load != "auto" && d.load != "memory" && d.load != "stream") {
    in.Refuse("load", "is \"" + d.load + "\"; known: memory, stream, auto");
  }
  if (d.load == "stream" && source != "netcdf" && source != "hdf5") {
    in.Refuse("load", "is \"stream\", which is for netcdf and hdf5 data; other files are mapped into "
                      "memory and read as needed anyway");
  }
  std::string cache;
  in.Get("cache", cache);
  if (!cache.empty() && cache != "node") {
    in.Refuse("cache", "is \"" + cache + "\"; known: node");
  }
  d.cache_on_node = cache == "node";
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

OptimizerSpec ParseOptimizer(const Json& json, const std::string& path = "train.optimizer") {
  Object in(json, path);
  const std::string kind =
      in.OneOf({"sgd", "adam", "adamw", "rmsprop", "adagrad", "lamb", "lars"});
  in.Done();
  if (kind.empty()) return Adam{};
  Object body(*in.Find(kind), path + "." + kind);
  if (kind == "adam") return ParseAdam<Adam>(body);
  if (kind == "adamw") return ParseAdam<AdamW>(body);
  if (kind == "lamb") return ParseAdam<Lamb>(body);
  if (kind == "lars") {
    Lars o;
    body.Get("lr", o.lr);
    body.Get("momentum", o.momentum);
    body.Get("weight_decay", o.weight_decay);
    body.Get("trust", o.trust);
    body.Get("nesterov", o.nesterov);
    body.Done();
    CheckRate(body, o.lr);
    body.AtLeast("momentum", o.momentum, 0);
    body.AtLeast("weight_decay", o.weight_decay, 0);
    if (!(o.trust > 0)) body.Refuse("trust", "must be above 0");
    if (o.nesterov && o.momentum <= 0) body.Refuse("nesterov", "needs a momentum above 0");
    return o;
  }
  if (kind == "adagrad") {
    Adagrad o;
    body.Get("lr", o.lr);
    body.Get("lr_decay", o.lr_decay);
    body.Get("weight_decay", o.weight_decay);
    body.Get("initial_accumulator", o.initial_accumulator);
    body.Get("eps", o.eps);
    body.Done();
    CheckRate(body, o.lr);
    for (const auto& [key, value] :
         {std::pair{"lr_decay", o.lr_decay}, std::pair{"weight_decay", o.weight_decay},
          std::pair{"initial_accumulator", o.initial_accumulator}, std::pair{"eps", o.eps}}) {
      body.AtLeast(key, value, 0);
    }
    return o;
  }
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
  in.Get("compression", d.compression);
  in.Done();
  if (d.compression.empty()) d.compression = "none";
  if (d.compression != "none" && d.compression != "fp16" && d.compression != "bf16")
    in.Refuse("compression", "is \"" + d.compression + "\"; known: none, fp16, bf16");
  if (d.bucket_mb == 0) d.bucket_mb = DdpSpec{}.bucket_mb;
  if (d.first_bucket_mb == 0) d.first_bucket_mb = DdpSpec{}.first_bucket_mb;
  in.AtLeast("bucket_mb", d.bucket_mb, 0);
  in.AtLeast("first_bucket_mb", d.first_bucket_mb, 0);
  return d;
}

LocalSgdSpec ParseLocalSgd(const Json& json) {
  Object in(json, "train.local_sgd");
  LocalSgdSpec l;
  in.Get("every", l.every);
  in.Done();
  in.AtLeast("every", l.every, 1);
  return l;
}

HorovodSpec ParseHorovod(const Json& json) {
  Object in(json, "train.horovod");
  HorovodSpec h;
  in.Get("fusion_mb", h.fusion_mb);
  in.Get("cycle_ms", h.cycle_ms);
  in.Get("adasum", h.adasum);
  in.Done();
  if (h.fusion_mb == 0) h.fusion_mb = HorovodSpec{}.fusion_mb;
  if (h.cycle_ms == 0) h.cycle_ms = HorovodSpec{}.cycle_ms;
  in.AtLeast("fusion_mb", h.fusion_mb, 0);
  in.AtLeast("cycle_ms", h.cycle_ms, 0);
  return h;
}

ZeroSpec ParseZero(const Json& json) {
  Object in(json, "train.zero");
  ZeroSpec z;
  in.Get("bucket_mb", z.bucket_mb);
  in.Get("overlap", z.overlap);
  in.Done();
  if (z.bucket_mb == 0) z.bucket_mb = ZeroSpec{}.bucket_mb;
  in.AtLeast("bucket_mb", z.bucket_mb, 0);
  return z;
}

MeshSpec ParseMesh(const Json& json) {
  Object in(json, "train.mesh");
  MeshSpec m;
  in.Get("data", m.data);
  in.Get("tensor", m.tensor);
  in.Get("pipeline", m.pipeline);
  in.Get("schedule", m.schedule);
  in.Get("micro_batches", m.micro_batches);
  in.Done();
  if (m.schedule.empty()) m.schedule = MeshSpec{}.schedule;
  if (m.micro_batches == 0) m.micro_batches = MeshSpec{}.micro_batches;
  for (const auto& [key, value] : {std::pair{"data", m.data}, {"tensor", m.tensor},
                                   {"pipeline", m.pipeline}, {"micro_batches", m.micro_batches}}) {
    in.AtLeast(key, value, 0);
  }
  if (m.schedule != "1f1b" && m.schedule != "gpipe")
    in.Refuse("schedule", "is \"" + m.schedule + "\"; known: 1f1b, gpipe");
  return m;
}

CheckpointSpec ParseCheckpoint(const Json& json) {
  Object in(json, "train.checkpoint");
  CheckpointSpec c;
  in.Get("every_epochs", c.every_epochs);
  in.Get("keep", c.keep);
  in.Get("background", c.background);
  in.Done();
  if (c.keep == 0) c.keep = CheckpointSpec{}.keep;
  in.AtLeast("every_epochs", c.every_epochs, 0);
  in.AtLeast("keep", c.keep, 1);
  return c;
}

bool ParseDirection(Object& in) {  // true: the larger the better
  std::string direction;
  in.Get("direction", direction);
  if (!direction.empty() && direction != "min" && direction != "max") {
    in.Refuse("direction", "is \"" + direction + "\"; known: min, max");
  }
  return direction == "max";
}

// metric and direction, of what watches evaluations.
template <typename Spec>
void ParseWatched(Object& in, Spec& spec) {
  in.Get("metric", spec.metric);
  spec.maximize = ParseDirection(in);
  if (spec.metric.empty()) spec.metric = Spec{}.metric;
  if (!spec.metric.starts_with("validation/")) {
    in.Refuse("metric", "is \"" + spec.metric + "\"; it must be of an evaluation: validation/<name>");
  }
}

ScheduleSpec ParseSchedule(const Json& json) {
  Object in(json, "train.schedule");
  ScheduleSpec s;
  const std::string kind = in.OneOf({"constant", "linear", "step", "multi_step", "exponential",
                                     "cosine", "one_cycle", "polynomial", "plateau"});
  std::string unit;
  in.Get("unit", unit);
  in.Get("warmup_steps", s.warmup_steps);
  in.Get("warmup_start", s.warmup_start);
  in.Done();
  if (!unit.empty() && unit != "step" && unit != "epoch") {
    in.Refuse("unit", "is \"" + unit + "\"; known: step, epoch");
  }
  s.epochs = unit == "epoch";
  in.AtLeast("warmup_steps", static_cast<double>(s.warmup_steps), 0);
  in.AtLeast("warmup_start", s.warmup_start, 0);
  if (kind.empty()) return s;
  Object body(*in.Find(kind), "train.schedule." + kind);
  const auto length = [&](int64_t& value) {
    body.Get("length", value);
    body.AtLeast("length", static_cast<double>(value), 0);
  };
  const auto above = [&](const char* key, double value) {
    if (!(value > 0)) body.Refuse(key, "is " + Json(value).dump() + "; it must be above 0");
  };
  if (kind == "linear") {
    LinearSchedule o;
    body.Get("start", o.start);
    body.Get("end", o.end);
    length(o.length);
    body.AtLeast("start", o.start, 0);
    body.AtLeast("end", o.end, 0);
    s.kind = o;
  } else if (kind == "step") {
    StepSchedule o;
    body.Get("every", o.every);
    body.Get("gamma", o.gamma);
    body.AtLeast("every", static_cast<double>(o.every), 1);
    above("gamma", o.gamma);
    s.kind = o;
  } else if (kind == "multi_step") {
    MultiStepSchedule o;
    body.Get("milestones", o.milestones);
    body.Get("gamma", o.gamma);
    above("gamma", o.gamma);
    if (o.milestones.empty()) body.Refuse("milestones", "is missing; such as [30, 60]");
    for (size_t i = 0; i < o.milestones.size(); ++i) {
      if (o.milestones[i] < (i == 0 ? 1 : o.milestones[i - 1] + 1))
        body.Refuse("milestones", "must rise, from 1");
    }
    s.kind = o;
  } else if (kind == "exponential") {
    ExponentialSchedule o;
    body.Get("gamma", o.gamma);
    above("gamma", o.gamma);
    s.kind = o;
  } else if (kind == "cosine") {
    CosineSchedule o;
    length(o.length);
    body.Get("min_factor", o.min_factor);
    body.AtLeast("min_factor", o.min_factor, 0);
    s.kind = o;
  } else if (kind == "one_cycle") {
    OneCycleSchedule o;
    length(o.length);
    body.Get("rise", o.rise);
    body.Get("initial_divisor", o.initial_divisor);
    body.Get("final_divisor", o.final_divisor);
    body.Get("linear", o.linear);
    if (!(o.rise > 0 && o.rise < 1)) body.Refuse("rise", "must be above 0 and below 1");
    above("initial_divisor", o.initial_divisor);
    above("final_divisor", o.final_divisor);
    if (s.warmup_steps > 0) in.Refuse("warmup_steps", "does not go with one_cycle, which has its own");
    s.kind = o;
  } else if (kind == "polynomial") {
    PolynomialSchedule o;
    length(o.length);
    body.Get("power", o.power);
    body.Get("min_factor", o.min_factor);
    above("power", o.power);
    body.AtLeast("min_factor", o.min_factor, 0);
    s.kind = o;
  } else if (kind == "plateau") {
    PlateauSchedule o;
    body.Get("factor", o.factor);
    body.Get("patience", o.patience);
    body.Get("threshold", o.threshold);
    body.Get("cooldown", o.cooldown);
    body.Get("min_factor", o.min_factor);
    ParseWatched(body, o);
    if (!(o.factor > 0 && o.factor < 1)) body.Refuse("factor", "must be above 0 and below 1");
    body.AtLeast("patience", o.patience, 0);
    body.AtLeast("threshold", o.threshold, 0);
    body.AtLeast("cooldown", o.cooldown, 0);
    body.AtLeast("min_factor", o.min_factor, 0);
    s.kind = o;
  }
  body.Done();
  return s;
}

std::vector<PhaseSpec> ParsePhases(const Json& json) {
  if (!json.is_array()) throw UserError("train.phases must be a list");
  std::vector<PhaseSpec> phases;
  for (size_t i = 0; i < json.size(); ++i) {
    const std::string path = "train.phases[" + std::to_string(i) + "]";
    Object in(json[i], path);
    PhaseSpec p;
    in.Get("name", p.name);
    in.Get("match", p.match);
    in.Get("method", p.method);
    if (const Json* optimizer = in.Find("optimizer"))
      p.optimizer = ParseOptimizer(*optimizer, path + ".optimizer");
    in.Get("repeats", p.repeats);
    in.Done();
    if (p.name.empty()) in.Refuse("name", "is missing");
    for (const PhaseSpec& other : phases) {
      if (other.name == p.name) in.Refuse("name", "is \"" + p.name + "\", as another phase's");
    }
    if (p.match.empty()) in.Refuse("match", R"(is missing; name its parameters, such as ["generator"])");
    if (p.method.empty()) p.method = p.name + "_step";
    if (p.repeats == 0) p.repeats = 1;
    in.AtLeast("repeats", p.repeats, 1);
    phases.push_back(std::move(p));
  }
  return phases;
}

Precision ParsePrecision(Object& in) {
  std::string precision;
  in.Get("precision", precision);
  if (precision.empty() || precision == "fp32") return Precision::kFloat32;
  if (precision == "bf16") return Precision::kBfloat16;
  if (precision == "fp16") return Precision::kFloat16;
  in.Refuse("precision", "is \"" + precision + "\"; known: fp32, bf16, fp16");
}

LossScaleSpec ParseLossScale(const Json& json) {
  Object in(json, "train.loss_scale");
  LossScaleSpec s;
  in.Get("initial", s.initial);
  in.Get("window", s.window);
  in.Get("hysteresis", s.hysteresis);
  in.Get("smallest", s.smallest);
  in.Done();
  if (!(s.smallest > 0)) in.Refuse("smallest", "must be above 0");
  in.AtLeast("initial", s.initial, s.smallest);
  in.AtLeast("window", static_cast<double>(s.window), 1);
  in.AtLeast("hysteresis", static_cast<double>(s.hysteresis), 1);
  return s;
}

double ParseEma(const Json& json) {
  Object in(json, "train.ema");
  double decay = 0.999;
  in.Get("decay", decay);
  in.Done();
  if (!(decay > 0 && decay < 1)) in.Refuse("decay", "must be above 0 and below 1");
  return decay;
}

EarlyStoppingSpec ParseEarlyStopping(const Json& json) {
  Object in(json, "train.early_stopping");
  EarlyStoppingSpec s;
  ParseWatched(in, s);
  in.Get("patience", s.patience);
  in.Get("min_delta", s.min_delta);
  in.Done();
  if (s.patience == 0) s.patience = EarlyStoppingSpec{}.patience;
  in.AtLeast("patience", s.patience, 1);
  in.AtLeast("min_delta", s.min_delta, 0);
  return s;
}

BestSpec ParseBest(const Json& json) {
  Object in(json, "train.best");
  BestSpec s;
  ParseWatched(in, s);
  in.Get("export", s.export_best);
  in.Done();
  return s;
}

std::vector<ParameterGroupSpec> ParseParameterGroups(const Json& json) {
  if (!json.is_array()) throw UserError("train.parameter_groups must be a list");
  std::vector<ParameterGroupSpec> groups;
  for (size_t i = 0; i < json.size(); ++i) {
    Object in(json[i], "train.parameter_groups[" + std::to_string(i) + "]");
    ParameterGroupSpec g;
    in.Get("match", g.match);
    in.Get("lr", g.lr);
    in.Get("weight_decay", g.weight_decay);
    in.Get("freeze", g.freeze);
    in.Done();
    if (g.match.empty()) in.Refuse("match", R"(is missing; name parameters, such as ["encoder.*"])");
    if (g.lr && !(*g.lr >= 0)) in.Refuse("lr", "must be at least 0");
    if (g.weight_decay && !(*g.weight_decay >= 0)) in.Refuse("weight_decay", "must be at least 0");
    if (g.freeze && (g.lr || g.weight_decay)) {
      in.Refuse("freeze", "leaves nothing to train, so lr and weight_decay have no meaning");
    }
    groups.push_back(std::move(g));
  }
  return groups;
}

LossOptions ParseLossOptions(const Json& json, const std::string& loss) {
  Object in(json, "train.loss_options");
  LossOptions o;
  in.Get("label_smoothing", o.label_smoothing);
  in.Get("class_weights", o.class_weights);
  in.Get("delta", o.delta);
  in.Get("beta", o.beta);
  in.Get("gamma", o.gamma);
  in.Get("quantiles", o.quantiles);
  in.Get("smooth", o.smooth);
  in.Get("members", o.members);
  in.Done();
  const auto belongs = [&](const char* key, const std::set<std::string>& losses) {
    const auto given = json.find(key);
    if (given == json.end() || given->is_null() || losses.contains(loss)) return;
    const bool zero = given->is_number() && given->get<double>() == 0;
    if (given->is_array() ? given->empty() : zero && !std::set<std::string>{"gamma", "smooth"}.contains(key))
      return;  // as protobuf spells "not given"
    std::string names;
    for (const std::string& name : losses) names += (names.empty() ? "" : ", ") + name;
    in.Refuse(key, "belongs to the loss " + names +
                       (loss.empty() ? "" : "; this job's is " + loss));
  };
  belongs("label_smoothing", {"cross_entropy"});
  belongs("class_weights", {"cross_entropy", "nll", "focal"});
  belongs("delta", {"huber"});
  belongs("beta", {"smooth_l1"});
  belongs("gamma", {"focal"});
  belongs("quantiles", {"quantile"});
  belongs("smooth", {"dice"});
  belongs("members", {"crps_ensemble"});
  if (o.members != 0) in.AtLeast("members", o.members, 2);
  if (!(o.label_smoothing >= 0 && o.label_smoothing < 1))
    in.Refuse("label_smoothing", "must be at least 0 and below 1");
  for (double weight : o.class_weights) {
    if (!(weight >= 0 && std::isfinite(weight))) in.Refuse("class_weights", "must be at least 0");
  }
  if (!(o.delta > 0)) in.Refuse("delta", "must be above 0");
  if (!(o.beta > 0)) in.Refuse("beta", "must be above 0");
  in.AtLeast("gamma", o.gamma, 0);
  in.AtLeast("smooth", o.smooth, 0);
  for (size_t i = 0; i < o.quantiles.size(); ++i) {
    if (!(o.quantiles[i] > (i == 0 ? 0 : o.quantiles[i - 1]) && o.quantiles[i] < 1))
      in.Refuse("quantiles", "must rise, between 0 and 1");
  }
  return o;
}

PredictSpec ParsePredict(const Json& json) {
  Object in(json, "train.predict");
  PredictSpec p;
  std::string split, format;
  in.Get("weights", p.weights);
  in.Get("preprocessing", p.preprocessing);
  in.Get("split", split);
  in.Get("format", format);
  in.Done();
  if (!split.empty()) p.split = split;
  if (!format.empty()) p.format = format;
  if (p.split != "train" && p.split != "validation" && p.split != "test" && p.split != "all") {
    in.Refuse("split", "is \"" + p.split + "\"; known: train, validation, test, all");
  }
  if (p.format != "npy" && p.format != "netcdf") {
    in.Refuse("format", "is \"" + p.format + "\"; known: npy, netcdf");
  }
  return p;
}

GpuSpec ParseGpu(const Json& json) {
  Object in(json, "train.gpu");
  GpuSpec g{.given = true};
  in.Get("tf32", g.tf32);
  in.Get("channels_last", g.channels_last);
  in.Get("graphs", g.graphs);
  in.Done();
  return g;
}

ProfileSpec ParseProfile(const Json& json) {
  Object in(json, "train.profile");
  ProfileSpec p;
  in.Get("trace_steps", p.trace_steps);
  in.Get("at_step", p.at_step);
  p.hang_timeout_seconds = ParseDuration(in, "hang_timeout", p.hang_timeout_seconds);
  in.Done();
  if (p.at_step == 0) p.at_step = ProfileSpec{}.at_step;
  in.AtLeast("trace_steps", p.trace_steps, 0);
  in.AtLeast("at_step", static_cast<double>(p.at_step), 1);
  in.AtLeast("hang_timeout", p.hang_timeout_seconds, 1);
  return p;
}

void ParseTrain(const Json& json, TrainSpec& t) {
  Object in(json, "train");
  const Json* model = in.Find("model");
  if (model == nullptr)
    in.Refuse("model", "is missing; give `builtin: <name>`, `archive: <file>` or `torchscript: <file>`");
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
  if (const Json* local = in.Find("local_sgd")) t.local_sgd = ParseLocalSgd(*local);
  if (const Json* horovod = in.Find("horovod")) t.horovod = ParseHorovod(*horovod);
  if (const Json* zero = in.Find("zero")) t.zero = ParseZero(*zero);
  if (const Json* mesh = in.Find("mesh")) t.mesh = ParseMesh(*mesh);
  in.Get("check_every", t.check_every);
  if (const Json* schedule = in.Find("schedule")) t.schedule = ParseSchedule(*schedule);
  if (const Json* groups = in.Find("parameter_groups"))
    t.parameter_groups = ParseParameterGroups(*groups);
  if (const Json* phases = in.Find("phases")) t.phases = ParsePhases(*phases);
  if (!t.phases.empty()) {
    if (in.Find("optimizer") != nullptr)
      in.Refuse("phases", "have an optimizer each; leave `optimizer` out");
    if (!t.model.builtin.empty())
      in.Refuse("phases", "are for TorchScript modules with a method each, not for built-in models");
    if (!t.loss.empty()) in.Refuse("phases", "have methods that bring their own loss; leave `loss` out");
  }
  in.Get("clip_value", t.clip_value);
  if (const Json* options = in.Find("loss_options"))
    t.loss_options = ParseLossOptions(*options, t.loss);
  t.precision = ParsePrecision(in);
  if (const Json* scale = in.Find("loss_scale")) {
    if (t.precision != Precision::kFloat16) in.Refuse("loss_scale", "belongs to precision fp16");
    t.loss_scale = ParseLossScale(*scale);
  }
  if (const Json* ema = in.Find("ema")) t.ema = ParseEma(*ema);
  if (const Json* stopping = in.Find("early_stopping"))
    t.early_stopping = ParseEarlyStopping(*stopping);
  if (const Json* best = in.Find("best")) t.best = ParseBest(*best);
  in.Get("validate_every_steps", t.validate_every_steps);
  in.AtLeast("validate_every_steps", static_cast<double>(t.validate_every_steps), 0);
  in.Get("deterministic", t.deterministic);
  in.Get("top_k", t.top_k);
  if (t.top_k == 0) t.top_k = TrainSpec{}.top_k;
  in.AtLeast("clip_value", t.clip_value, 0);
  in.AtLeast("top_k", t.top_k, 1);
  if (t.loss == "quantile" && t.loss_options.quantiles.empty())
    in.Refuse("loss_options.quantiles", "is missing; the loss quantile needs them, as in [0.1, 0.5, 0.9]");
  if (const Json* gpu = in.Find("gpu")) t.gpu = ParseGpu(*gpu);
  if (const Json* predict = in.Find("predict")) t.predict = ParsePredict(*predict);
  if (const Json* profile = in.Find("profile")) t.profile = ParseProfile(*profile);
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
  const std::vector<std::string> strategies = {"single", "ddp",    "horovod",  "zero1", "zero2",
                                               "zero3",  "tensor", "pipeline", "mesh"};
  if (!t.strategy.empty() &&
      std::find(strategies.begin(), strategies.end(), t.strategy) == strategies.end()) {
    std::string known;
    for (const std::string& name : strategies) known += (known.empty() ? "" : ", ") + name;
    in.Refuse("strategy", "is \"" + t.strategy + "\"; known: " + known);
  }
  const bool all_reduce = t.strategy.empty() || t.strategy == "single" || t.strategy == "ddp";
  if (t.local_sgd.every > 1 && !all_reduce)
    in.Refuse("local_sgd", "belongs to strategy ddp, not " + t.strategy);
  const bool mesh = t.strategy == "tensor" || t.strategy == "pipeline" || t.strategy == "mesh";
  if (mesh && t.accumulate > 1)
    in.Refuse("accumulate", "is train.mesh.micro_batches with strategy " + t.strategy);
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
