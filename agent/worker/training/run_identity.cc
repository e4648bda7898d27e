#include "agent/worker/training/run_identity.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include <ATen/ops/nan_to_num.h>

#include "agent/worker/error.h"
#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::json;

constexpr double kWholeNumbers = 9e15;      // up to here a double has every integer
constexpr double kSameFigures = 1e-4;       // of the sample's root mean square
constexpr size_t kMaxNamedDifferences = 6;  // in one message
constexpr size_t kMaxValueText = 60;        // characters of a value in a message

std::string TextOf(const Json& value) {
  std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  if (text.size() > kMaxValueText) text = text.substr(0, kMaxValueText) + "…";
  return text;
}

// A number for what may be another spelling of it, else the value itself. Integers from 0 are
// unsigned, as the parser of JSON has them.
Json AsNumber(const Json& value) {
  if (value.is_number_float()) {
    const double number = value.get<double>();
    if (number != std::floor(number) || std::abs(number) > kWholeNumbers) return value;
    if (number >= 0) return static_cast<uint64_t>(number);
    return static_cast<int64_t>(number);
  }
  if (!value.is_string()) return value;
  const std::string& text = value.get_ref<const std::string&>();
  const Json number = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  return number.is_number() ? AsNumber(number) : value;
}

Json WithNumbers(const Json& value) {
  if (!value.is_array()) return AsNumber(value);
  Json list = value;
  for (Json& element : list) {
    if (element.is_primitive()) element = AsNumber(element);
  }
  return list;
}

// Simplifies `node` within a document, as long as `same` says that the document means the same.
void Simplify(Json& node, const std::function<bool()>& same) {
  if (node.is_array()) {
    for (Json& element : node) {
      if (element.is_structured()) Simplify(element, same);
    }
    return;
  }
  std::vector<std::string> keys;
  for (const auto& [key, value] : node.items()) keys.push_back(key);
  for (const std::string& key : keys) {
    Json value = node[key];
    node.erase(key);
    if (same()) continue;  // a default
    node[key] = WithNumbers(value);
    if (node[key] != value && !same()) node[key] = std::move(value);
    if (node[key].is_structured()) Simplify(node[key], same);
  }
}

void Compare(const std::string& path, const Json& then, const Json& now,
             std::vector<std::string>* differences) {
  if (then == now) return;
  if (then.is_object() && now.is_object()) {
    Json all = then;
    all.update(now);
    for (const auto& [key, unused] : all.items()) {
      Compare(path + "." + key, then.value(key, Json()), now.value(key, Json()), differences);
    }
  } else if (then.is_array() && now.is_array() && then.size() == now.size()) {
    for (size_t i = 0; i < then.size(); ++i)
      Compare(path + "[" + std::to_string(i) + "]", then[i], now[i], differences);
  } else {
    differences->push_back(path + (now.is_null() ? " is not given" : " is " + TextOf(now)) +
                           (then.is_null() ? ", was not given" : ", was " + TextOf(then)));
  }
}

// Mean, root mean square, first and last element.
Json FiguresOf(const at::Tensor& sample) {
  if (sample.numel() == 0) return Json::array();
  const at::Tensor values = at::nan_to_num(sample.to(at::kCPU, at::kDouble).flatten(), 0);
  return {values.mean().item<double>(), values.square().mean().sqrt().item<double>(),
          values[0].item<double>(), values[-1].item<double>()};
}

bool SameFigures(const Json& then, const Json& now) {
  if (then.size() != now.size()) return false;
  for (size_t i = 0; i < then.size(); ++i) {
    if (then[i] == now[i]) continue;
    if (!then[i].is_number() || !now[i].is_number() || !then[1].is_number()) return false;
    const double scale = then[1].get<double>();
    if (!(std::abs(then[i].get<double>() - now[i].get<double>()) <= kSameFigures * scale))
      return false;
  }
  return true;
}

}  // namespace

Json CanonicalTrain(const Json& train) {
  Json canonical = train;
  try {
    const TrainSpec meaning = ParseSpec({{"train", train}});
    Simplify(canonical, [&] {
      try {
        return ParseSpec({{"train", canonical}}) == meaning;
      } catch (const WorkerError&) {
        return false;
      }
    });
  } catch (const WorkerError&) {
    return train;
  }
  return canonical;
}

Json DescribeTrainingData(const Dataset& dataset) {
  const int64_t samples = dataset.size(Split::kTrain);
  Json description = {{"samples", samples}, {"shapes", Json::object()}};
  for (const auto& [name, shape] : dataset.sample_shapes()) description["shapes"][name] = shape;
  std::vector<int64_t> ends = {0};
  if (samples > 1) ends.push_back(samples - 1);
  for (const auto& [name, values] : dataset.Gather(Split::kTrain, ends)) {
    description["first"][name] = FiguresOf(values[0]);
    description["last"][name] = FiguresOf(values[-1]);
  }
  return description;
}

std::string SpecDifference(const Json& then, const Json& now) {
  std::vector<std::string> differences;
  Compare("train", then, now, &differences);
  std::string text;
  for (size_t i = 0; i < std::min(differences.size(), kMaxNamedDifferences); ++i)
    text += (i == 0 ? "" : "; ") + differences[i];
  if (differences.size() > kMaxNamedDifferences)
    text += "; and " + std::to_string(differences.size() - kMaxNamedDifferences) + " more";
  return text;
}

std::string DataDifference(const Json& then, const Json& now) {
  if (then.at("samples") != now.at("samples")) {
    return "there are " + now["samples"].dump() + " training samples, the checkpoint's run had " +
           then["samples"].dump();
  }
  std::vector<std::string> differences;
  Compare("the shape of a sample's", then.at("shapes"), now.at("shapes"), &differences);
  if (!differences.empty()) return differences.front();
  for (const char* end : {"first", "last"}) {
    for (const auto& [name, figures] : now.at(end).items()) {
      const Json before = then.at(end).value(name, Json::array());
      if (SameFigures(before, figures)) continue;
      return "the " + std::string(end) + " training sample's " + name +
             " is another (mean, root mean square, first and last value " + TextOf(figures) +
             ", was " + TextOf(before) + ")";
    }
  }
  return "";
}

}  // namespace itwin::worker
