#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/spec/checks.h"
#include "common/spec/file_references.h"
#include "common/spec/validate.h"

// `train.data`: where samples come from, how they are split and changed.
namespace itwin {
namespace {

constexpr int kMaxTransforms = 64;

// "1982", "1982-01", "1982-01-31", "1982-01-31T12:00".
bool LooksLikeDate(absl::string_view text) {
  return !text.empty() && absl::ascii_isdigit(static_cast<unsigned char>(text[0])) &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '-' || c == ':' || c == 'T';
         });
}

class DataChecks : SpecChecks {
 public:
  explicit DataChecks(Problems* problems) : SpecChecks(problems) {}

  void Check(const v1::Data& data) {
    switch (data.source_case()) {
      case v1::Data::kNetcdf:
        if (data.variables_size() == 0) {
          Report("train.data.variables", "is missing; list the variables of the NetCDF file to use, such as [UWND, VWND]");
        }
        break;
      case v1::Data::kIdx: {
        const v1::IdxFiles& idx = data.idx();
        Required("train.data.idx.train_images", idx.train_images());
        Required("train.data.idx.train_labels", idx.train_labels());
        if (idx.test_images().empty() != idx.test_labels().empty()) {
          Report(idx.test_images().empty() ? "train.data.idx.test_images" : "train.data.idx.test_labels",
                 "is missing; the test images and labels come as a pair");
        }
        break;
      }
      case v1::Data::kNpz: break;
      case v1::Data::kNpy:
        Required("train.data.npy.input", data.npy().input());
        Required("train.data.npy.target", data.npy().target());
        break;
      case v1::Data::kCsv: {
        const v1::CsvFile& csv = data.csv();
        Required("train.data.csv.path", csv.path());
        if (csv.inputs_size() == 0) Report("train.data.csv.inputs", "is missing; list the columns that go in");
        if (csv.targets_size() == 0) Report("train.data.csv.targets", "is missing; list the columns to predict");
        Names("train.data.csv.inputs", csv.inputs());
        Names("train.data.csv.targets", csv.targets());
        if (csv.target_is_class() && csv.targets_size() > 1) {
          Report("train.data.csv.targets", "has several columns; with target_is_class there is one");
        }
        break;
      }
      case v1::Data::kSynthetic: {
        const v1::SyntheticData& synthetic = data.synthetic();
        Range("train.data.synthetic.samples", synthetic.samples(), 1, kMaxElements);
        if (synthetic.input_shape_size() == 0) Report("train.data.synthetic.input_shape", "is missing; such as [32]");
        Shape("train.data.synthetic.input_shape", synthetic.input_shape());
        Shape("train.data.synthetic.target_shape", synthetic.target_shape());
        if (synthetic.classes() == 1) Report("train.data.synthetic.classes", "1 is out of range; use 0 or at least 2");
        Range("train.data.synthetic.classes", synthetic.classes(), 0, 1'000'000'000);
        break;
      }
      case v1::Data::kHdf5: Required("train.data.hdf5.path", data.hdf5().path()); break;
      case v1::Data::kZarr:
        Required("train.data.zarr.path", data.zarr().path());
        if (!data.zarr().path().empty() && PlaceOf(data.zarr().path()) != FilePlace::kSite) {
          Report("train.data.zarr.path", absl::StrCat(Quoted(data.zarr().path()),
                                                      " is not at the site; a store is a directory, which is read in place: "
                                                      "name it \"site:/<path>\", or convert it to NetCDF to upload it"));
        }
        break;
      case v1::Data::kSafetensors: break;
      case v1::Data::kRaw:
        CheckRaw("train.data.raw.input", data.raw().input());
        CheckRaw("train.data.raw.target", data.raw().target());
        break;
      case v1::Data::SOURCE_NOT_SET:
        Report("train.data", "is missing; give one of netcdf, hdf5, zarr, idx, npz, npy, csv, safetensors, raw, synthetic");
        break;
    }
    if (data.more_files_size() > 0) {
      const auto source = data.source_case();
      if (source != v1::Data::kNetcdf && source != v1::Data::kHdf5 && source != v1::Data::kNpz &&
          source != v1::Data::kCsv && source != v1::Data::kSafetensors) {
        Report("train.data.more_files", "belongs to netcdf, hdf5, npz, csv and safetensors data; remove it");
      }
    }
    if (!data.load().empty()) {
      OneOf("train.data.load", data.load(), {"memory", "stream", "auto"});
      if (data.load() == "stream" && data.source_case() != v1::Data::kNetcdf && data.source_case() != v1::Data::kHdf5 &&
          data.source_case() != v1::Data::kZarr) {
        Report("train.data.load", "'stream' is for netcdf, hdf5 and zarr data; other files are mapped into memory anyway");
      }
    }
    if (!data.cache().empty()) OneOf("train.data.cache", data.cache(), {"node"});
    if (!data.cache().empty() && data.has_zarr()) {
      Report("train.data.cache", "is for files; a zarr store is read where it lies; remove it");
    }
    if (data.variables_size() > 0 && data.source_case() != v1::Data::kNetcdf &&
        data.source_case() != v1::Data::SOURCE_NOT_SET) {
      Report("train.data.variables", "belongs to netcdf data; remove it");
    }
    Names("train.data.variables", data.variables());
    CheckSplit(data.split());
    CheckTransforms(data);
  }

 private:
  void CheckRaw(const std::string& at, const v1::RawArray& array) {
    Required(at + ".path", array.path());
    OneOf(at + ".type", array.type(),
          {"float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool"});
    Shape(at + ".shape", array.shape());
  }

  void CheckSplit(const v1::Split& split) {
    struct Part {
      const char* name;
      std::pair<int64_t, int64_t> range;
    };
    std::vector<Part> parts;
    const std::pair<const char*, const std::string*> texts[] = {
        {"train", &split.train()}, {"validation", &split.validation()}, {"test", &split.test()}};
    for (const auto& [name, text] : texts) {
      if (text->empty()) continue;
      const std::string at = absl::StrCat("train.data.split.", name);
      if (absl::StrContains(absl::StripPrefix(*text, "-"), "-") && absl::StrContains(*text, "..")) {  // dates: read by the worker, which knows the time axis
        const std::vector<absl::string_view> ends = absl::StrSplit(*text, "..");
        if (ends.size() != 2 || !LooksLikeDate(ends[0]) || !LooksLikeDate(ends[1])) {
          Report(at, absl::StrCat(Quoted(*text), " is no range of time; write dates, such as 1982-01..1990-12"));
        }
        continue;
      }
      absl::StatusOr<std::pair<int64_t, int64_t>> range = ParseIndexRange(*text);
      if (!range.ok()) {
        Report(at, range.status().message());
        continue;
      }
      for (const Part& other : parts) {
        if (range->first < other.range.second && other.range.first < range->second) {
          Report(at, absl::StrCat(*text, " overlaps ", other.name, " ", other.range.first, "..", other.range.second,
                                  "; a sample belongs to one of them"));
        }
      }
      parts.push_back({name, *range});
    }
    Fraction("train.data.split.validation_fraction", split.validation_fraction());
    Fraction("train.data.split.test_fraction", split.test_fraction());
    if (split.validation_fraction() + split.test_fraction() >= 1) {
      Report("train.data.split", "validation_fraction and test_fraction leave nothing to train on; their sum must be below 1");
    }
    if (!split.validation().empty() && split.validation_fraction() != 0) {
      Report("train.data.split.validation_fraction", "is given beside a validation range; keep one");
    }
    if (!split.test().empty() && split.test_fraction() != 0) {
      Report("train.data.split.test_fraction", "is given beside a test range; keep one");
    }
  }

  void CheckTransforms(const v1::Data& data) {
    if (data.transforms_size() > kMaxTransforms) {
      return Report("train.data.transforms", absl::StrCat("has ", data.transforms_size(), "; use at most ", kMaxTransforms));
    }
    for (int i = 0; i < data.transforms_size(); ++i) {
      const v1::Transform& transform = data.transforms(i);
      const std::string at = absl::StrCat("train.data.transforms[", i, "]");
      switch (transform.kind_case()) {
        case v1::Transform::kStandardize:
          Names(at + ".standardize.arrays", transform.standardize().arrays());
          break;
        case v1::Transform::kScale:
          Names(at + ".scale.arrays", transform.scale().arrays());
          if (!std::isfinite(transform.scale().multiply())) Report(at + ".scale.multiply", "is not a finite number");
          if (!std::isfinite(transform.scale().add())) Report(at + ".scale.add", "is not a finite number");
          if (transform.scale().multiply() == 0 && transform.scale().add() == 0) {
            Report(at + ".scale", "changes nothing; give multiply, add or both");
          }
          break;
        case v1::Transform::kCrop:
          if (transform.crop().sizes_size() == 0) Report(at + ".crop.sizes", "is missing; such as [72, 144]");
          Shape(at + ".crop.sizes", transform.crop().sizes());
          break;
        case v1::Transform::kCoarsen: {
          Range(at + ".coarsen.factor", transform.coarsen().factor(), 2, 4'096);
          for (int j = 0; j < transform.coarsen().baselines_size(); ++j) {
            OneOf(absl::StrCat(at, ".coarsen.baselines[", j, "]"), transform.coarsen().baselines(j),
                  {"bilinear", "bicubic"});
          }
          Names(at + ".coarsen.baselines", transform.coarsen().baselines());
          break;
        }
        case v1::Transform::kFillMissing:
          if (transform.fill_missing().has_value() && !std::isfinite(transform.fill_missing().value())) {
            Report(at + ".fill_missing.value", "is not a finite number");
          }
          break;
        case v1::Transform::kWindow:
          Range(at + ".window.length", transform.window().length(), 1, 1'000'000);
          Range(at + ".window.horizon", transform.window().horizon(), 1, 1'000'000);
          break;
        case v1::Transform::kReshape:
          if (transform.reshape().array().empty()) Report(at + ".reshape.array", "is missing; name the array");
          if (transform.reshape().shape_size() == 0) Report(at + ".reshape.shape", "is missing; such as [1, 28, 28]");
          Shape(at + ".reshape.shape", transform.reshape().shape());
          break;
        case v1::Transform::kLog:
          Names(at + ".log.arrays", transform.log().arrays());
          if (!std::isfinite(transform.log().add())) Report(at + ".log.add", "is not a finite number");
          break;
        case v1::Transform::kClip: {
          const v1::Clip& clip = transform.clip();
          Names(at + ".clip.arrays", clip.arrays());
          if (!clip.has_min() && !clip.has_max()) Report(at + ".clip", "has neither min nor max; give one or both");
          if (clip.has_min() && clip.has_max() && !(clip.min() <= clip.max())) Report(at + ".clip.min", "is above max");
          break;
        }
        case v1::Transform::KIND_NOT_SET:
          Report(at, "is empty; use one of standardize, scale, crop, coarsen, fill_missing, window, reshape, log, clip");
          break;
      }
    }
  }
};

}  // namespace

void CheckData(const v1::Data& data, Problems* problems) { DataChecks(problems).Check(data); }

}  // namespace itwin
