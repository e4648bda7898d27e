#include <cmath>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/spec/checks.h"
#include "common/spec/nearest_name.h"
#include "common/spec/validate.h"

// `train.model.options` of built-in models: names, kinds and ranges as in
// agent/worker/model/network.cc; the test tests/worker/spec/spec_agreement_test.cc holds the two
// together. What depends on the data's shapes the worker checks.
namespace itwin {
namespace {

using google::protobuf::Value;

constexpr int64_t kMaxWidth = 16'384;  // channels or features of a layer
constexpr int64_t kMaxClasses = 1'000'000;
constexpr double kMaxDropout = 0.95;

struct Option {
  enum class Kind { kWhole, kNumber, kTruth, kList };
  const char* name;
  Kind kind;
  double lowest = 0, highest = 0;  // of a list: of each entry
  int fewest = 0, most = 0;        // entries of a list
};

Option Whole(const char* name, int64_t lowest, int64_t highest) {
  return {name, Option::Kind::kWhole, static_cast<double>(lowest), static_cast<double>(highest)};
}
Option List(const char* name, int fewest, int most, int64_t highest) {
  return {name, Option::Kind::kList, 1, static_cast<double>(highest), fewest, most};
}
Option Truth(const char* name) { return {name, Option::Kind::kTruth}; }

const std::vector<Option>& OptionsOf(const std::string& model) {
  static const auto* const kOptions = [] {
    const Option classes = Whole("classes", 0, kMaxClasses),
                 channels = Whole("channels", 1, kMaxWidth);
    const Option dropout{"dropout", Option::Kind::kNumber, 0, kMaxDropout};
    return new std::map<std::string, std::vector<Option>>{
        {"mlp", {classes, List("hidden", 0, 32, kMaxWidth), dropout}},
        {"cnn",
         {classes, List("channels", 1, 8, kMaxWidth), Whole("hidden", 1, kMaxWidth), dropout}},
        {"resnet18", {channels, classes, Truth("small_images"), Whole("width", 1, kMaxWidth / 8)}},
        {"unet", {channels, classes, Whole("base", 1, 1024), Whole("depth", 1, 8)}},
        {"lstm", {classes, Whole("hidden", 1, kMaxWidth), Whole("layers", 1, 16), dropout}},
        {"downscale",
         {Whole("factor", 1, 1024), List("hidden", 1, 16, 1024), List("kernels", 2, 17, 31),
          Whole("position_channels", 0, 256), Truth("conserve")}},
        {"transformer",
         {Whole("context", 1, 1 << 20), Whole("vocabulary", 2, kMaxClasses),
          Whole("layers", 1, 1000), Whole("width", 1, kMaxWidth), Whole("heads", 1, kMaxWidth),
          dropout, Truth("tied")}},
    };
  }();
  static const auto* const kNone = new std::vector<Option>;
  const auto found = kOptions->find(model);
  return found == kOptions->end() ? *kNone : found->second;
}

class ModelChecks : SpecChecks {
 public:
  ModelChecks(const v1::Model& model, Problems* problems) : SpecChecks(problems), model_(model) {}

  void Check() {
    const std::vector<Option>& known = OptionsOf(model_.builtin());
    if (known.empty()) return;  // of an unknown model, which is reported
    std::vector<std::string> names;
    for (const Option& option : known) names.emplace_back(option.name);
    for (const auto& [name, value] : std::map<std::string, Value>(
             model_.options().fields().begin(), model_.options().fields().end())) {
      bool is_known = false;
      for (const Option& option : known) {
        if (name != option.name) continue;
        is_known = true;
        if (value.kind_case() != Value::kNullValue) CheckOne(option, value);
      }
      if (!is_known)
        Report(PathOf(name),
               absl::StrCat(Quoted(name), " is unknown; ", UnknownNameHint(name, names)));
    }
    CheckTogether();
  }

 private:
  static std::string PathOf(const std::string& name) {
    return absl::StrCat("train.model.options.", name);
  }

  static std::optional<int64_t> WholeNumber(const Value& value) {
    const double number = value.number_value();
    if (value.kind_case() != Value::kNumberValue || number != std::floor(number) ||
        std::abs(number) > 9e15)
      return std::nullopt;
    return static_cast<int64_t>(number);
  }

  void CheckOne(const Option& option, const Value& value) {
    const std::string at = PathOf(option.name);
    const auto lowest = static_cast<int64_t>(option.lowest),
               highest = static_cast<int64_t>(option.highest);
    switch (option.kind) {
      case Option::Kind::kTruth:
        if (value.kind_case() != Value::kBoolValue) Report(at, "must be true or false");
        return;
      case Option::Kind::kNumber: {
        const std::string range = absl::StrCat("a number from ", NumberText(option.lowest), " to ",
                                               NumberText(option.highest));
        const double number = value.number_value();
        if (value.kind_case() != Value::kNumberValue) {
          Report(at, absl::StrCat("must be ", range));
        } else if (!(number >= option.lowest && number <= option.highest)) {
          Report(at, absl::StrCat(NumberText(number), " is out of range; use ", range));
        }
        return;
      }
      case Option::Kind::kWhole:
        if (const auto number = WholeNumber(value)) return Range(at, *number, lowest, highest);
        return Report(at, absl::StrCat("must be a whole number from ", lowest, " to ", highest));
      case Option::Kind::kList: {
        const auto& entries = value.list_value().values();
        bool fits = value.kind_case() == Value::kListValue && entries.size() >= option.fewest &&
                    entries.size() <= option.most;
        for (int i = 0; fits && i < entries.size(); ++i) {
          const auto number = WholeNumber(entries.Get(i));
          fits = number && *number >= lowest && *number <= highest;
        }
        if (fits) return;
        return Report(at, absl::StrCat("must be a list of ", option.fewest, " to ", option.most,
                                       " whole numbers, each from ", lowest, " to ", highest));
      }
    }
  }

  // The number given, or what the model takes when there is none.
  double Number(const std::string& name, double otherwise) const {
    const auto found = model_.options().fields().find(name);
    return found == model_.options().fields().end() ||
                   found->second.kind_case() != Value::kNumberValue
               ? otherwise
               : found->second.number_value();
  }

  void CheckTogether() {
    const std::string& model = model_.builtin();
    if (model == "lstm" && Number("dropout", 0) > 0 && Number("layers", 1) == 1) {
      Report(PathOf("dropout"), absl::StrCat("works between layers; set ", PathOf("layers"),
                                             " to 2 or more, or leave dropout out"));
    }
    if (model == "transformer") {
      const double width = Number("width", 64), heads = Number("heads", 4);
      if (heads >= 1 && std::fmod(width, heads) != 0) {
        Report(PathOf("heads"),
               absl::StrCat(NumberText(heads), " does not divide the width ", NumberText(width)));
      }
    }
    if (model != "downscale") return;
    const auto& options = model_.options().fields();
    const auto kernels = options.find("kernels");
    if (kernels == options.end() || kernels->second.kind_case() != Value::kListValue) return;
    const auto hidden = options.find("hidden");
    const int layers =
        1 + (hidden == options.end() || hidden->second.kind_case() != Value::kListValue
                 ? 2
                 : hidden->second.list_value().values_size());
    const auto& sizes = kernels->second.list_value().values();
    if (sizes.size() != layers) {
      return Report(
          PathOf("kernels"),
          absl::StrCat("must be a list of ", layers,
                       " whole numbers, one for each layer of `hidden` and one for the last"));
    }
    for (const Value& size : sizes) {
      const auto number = WholeNumber(size);
      if (number && *number % 2 == 0)
        Report(PathOf("kernels"), absl::StrCat(*number, " is even; sizes must be odd"));
    }
  }

  const v1::Model& model_;
};

}  // namespace

void CheckModelOptions(const v1::Model& model, Problems* problems) {
  ModelChecks(model, problems).Check();
}

}  // namespace itwin
