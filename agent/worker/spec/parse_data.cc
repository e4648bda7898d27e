#include "agent/worker/spec/parse.h"

#include <charconv>
#include <system_error>
#include <utility>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::json;

std::optional<IndexRange> ParseRange(JsonObject& in, const std::string& key, std::string& time) {
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
  JsonObject in(json, "train.data.split");
  SplitSpec s;
  s.train = ParseRange(in, "train", s.train_time);
  s.validation = ParseRange(in, "validation", s.validation_time);
  s.test = ParseRange(in, "test", s.test_time);
  in.Read("by_hash", s.by_hash, "validation_fraction", s.validation_fraction,
          "test_fraction", s.test_fraction);
  for (const auto& [key, value] : {std::pair{"validation_fraction", s.validation_fraction},
                                   std::pair{"test_fraction", s.test_fraction}}) {
    if (!(value >= 0 && value < 1)) in.Refuse(key, "must be at least 0 and below 1");
  }
  if (s.by_hash && s.validation_fraction == 0 && s.test_fraction == 0) {
    in.Refuse("by_hash", "says how fractions are drawn; give `validation_fraction` or `test_fraction`, too");
  }
  if (s.validation_fraction != 0 && (s.validation || !s.validation_time.empty()))
    in.Refuse("validation_fraction", "is given beside `validation`; keep one");
  if (s.test_fraction != 0 && (s.test || !s.test_time.empty()))
    in.Refuse("test_fraction", "is given beside `test`; keep one");
  return s;
}

Transform ParseTransform(const Json& json, const std::string& path) {
  JsonObject in(json, path);
  const std::vector<std::string> kinds = {"standardize", "scale",   "crop", "coarsen", "fill_missing",
                                          "window",      "reshape", "log",  "clip"};
  const std::string kind = in.OneOf(kinds);
  in.Done();
  if (kind.empty()) {
    in.Refuse("",
              "names no transform; known: standardize, scale, crop, coarsen, fill_missing, window, "
              "reshape, log, clip");
  }
  JsonObject body(*in.Find(kind), path + "." + kind);
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
    body.AllAtLeast(1, "length", t.length, "horizon", t.horizon);
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

RawArray ParseRawArray(JsonObject& parent, const std::string& key, const std::string& path) {
  const Json* json = parent.Find(key);
  if (json == nullptr) parent.Refuse(key, "is missing; give path, type and shape");
  JsonObject in(*json, path);
  RawArray a;
  in.Read("path", a.path, "type", a.type, "shape", a.shape);
  if (a.path.empty()) in.Refuse("path", "is missing");
  if (a.type.empty()) in.Refuse("type", "is missing; such as float32");
  for (int64_t size : a.shape) in.AtLeast("shape", static_cast<double>(size), 1);
  return a;
}

// A file or a store with an array each for input and target.
template <typename Source>
Source ParsePair(const Json& json, const std::string& path) {
  JsonObject in(json, path);
  Source s;
  std::string input, target;
  in.Read("path", s.path, "input", input, "target", target);
  if (s.path.empty()) in.Refuse("path", "is missing");
  if (!input.empty()) s.input = input;
  s.target_named = !target.empty();
  if (!target.empty()) s.target = target;
  return s;
}

}  // namespace

DataSpec ParseData(const Json& json) {
  JsonObject in(json, "train.data");
  DataSpec d;
  const std::string source = in.OneOf(
      {"netcdf", "idx", "npz", "npy", "csv", "synthetic", "hdf5", "safetensors", "raw", "zarr"});
  if (source.empty()) {
    in.Refuse("", "names no source; give one of netcdf, hdf5, zarr, idx, npz, npy, csv, safetensors, raw, "
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
    JsonObject body(*in.Find(source), at);
    IdxFiles s;
    body.Read("train_images", s.train_images, "train_labels", s.train_labels,
              "test_images", s.test_images, "test_labels", s.test_labels);
    if (s.train_images.empty()) body.Refuse("train_images", "is missing");
    if (s.train_labels.empty()) body.Refuse("train_labels", "is missing");
    if (s.test_images.empty() != s.test_labels.empty()) {
      body.Refuse("", "has only one of `test_images` and `test_labels`; give both or neither");
    }
    d.source = s;
  } else if (source == "npy") {
    JsonObject body(*in.Find(source), at);
    NpyFiles s;
    body.Read("input", s.input, "target", s.target);
    if (s.input.empty()) body.Refuse("input", "is missing");
    if (s.target.empty()) body.Refuse("target", "is missing");
    d.source = s;
  } else if (source == "csv") {
    JsonObject body(*in.Find(source), at);
    CsvFile s;
    body.Read("path", s.path, "inputs", s.inputs, "targets", s.targets,
              "target_is_class", s.target_is_class);
    if (s.path.empty()) body.Refuse("path", "is missing");
    if (s.inputs.empty()) body.Refuse("inputs", "is missing; name the input columns");
    if (s.targets.empty()) body.Refuse("targets", "is missing; name the target columns");
    if (s.target_is_class && s.targets.size() != 1) {
      body.Refuse("targets", "must name one column when `target_is_class` is true");
    }
    d.source = s;
  } else if (source == "hdf5") {
    d.source = ParsePair<Hdf5File>(*in.Find(source), at);
  } else if (source == "zarr") {
    d.source = ParsePair<ZarrStore>(*in.Find(source), at);
  } else if (source == "safetensors") {
    SafetensorsFile s;
    in.Get("safetensors", s.path);
    d.source = s;
  } else if (source == "raw") {
    JsonObject body(*in.Find(source), at);
    RawFiles s;
    s.input = ParseRawArray(body, "input", at + ".input");
    s.target = ParseRawArray(body, "target", at + ".target");
    body.Done();
    d.source = s;
  } else {
    JsonObject body(*in.Find(source), at);
    SyntheticData s;
    body.Read("samples", s.samples, "input_shape", s.input_shape, "target_shape", s.target_shape,
              "classes", s.classes);
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
  if (d.load == "stream" && source != "netcdf" && source != "hdf5" && source != "zarr") {
    in.Refuse("load", "is \"stream\", which is for netcdf, hdf5 and zarr data; other files are mapped into "
                      "memory and read as needed anyway");
  }
  std::string cache;
  in.Get("cache", cache);
  if (!cache.empty() && cache != "node") {
    in.Refuse("cache", "is \"" + cache + "\"; known: node");
  }
  d.cache_on_node = cache == "node";
  if (d.cache_on_node && source == "zarr")
    in.Refuse("cache", "is for files; a zarr store is read where it lies");
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

}  // namespace itwin::worker
