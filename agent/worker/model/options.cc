#include "agent/worker/model/options.h"

#include <cmath>
#include <optional>
#include <utility>

#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

std::optional<int64_t> WholeNumber(const nlohmann::json& value) {
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const double number = value.get<double>();
    if (number == std::floor(number) && std::abs(number) < 1e15)
      return static_cast<int64_t>(number);
  }
  return std::nullopt;
}

std::string BoundsText(int64_t lowest, int64_t highest) {
  return std::to_string(lowest) + " to " + std::to_string(highest);
}

}  // namespace

OptionReader::OptionReader(std::string model, nlohmann::json options)
    : model_(std::move(model)), options_(std::move(options)) {
  if (!options_.is_null() && !options_.is_object()) {
    throw UserError("train.model.options: must be names with values, as in {hidden: [128]}");
  }
}

const nlohmann::json* OptionReader::Find(const std::string& name) {
  if (!options_.is_object()) return nullptr;
  const auto found = options_.find(name);
  return found == options_.end() || found->is_null() ? nullptr : &*found;
}

int64_t OptionReader::Int(const std::string& name, int64_t fallback, int64_t lowest,
                          int64_t highest) {
  int64_t value = fallback;
  if (const nlohmann::json* given = Find(name)) {
    const auto whole = WholeNumber(*given);
    if (!whole || *whole < lowest || *whole > highest) {
      throw UserError(Path(name) + ": " + given->dump() + " must be a whole number from " +
                      BoundsText(lowest, highest));
    }
    value = *whole;
  }
  resolved_[name] = value;
  return value;
}

double OptionReader::Number(const std::string& name, double fallback, double lowest,
                            double highest) {
  double value = fallback;
  if (const nlohmann::json* given = Find(name)) {
    if (!given->is_number() ||
        !(given->get<double>() >= lowest && given->get<double>() <= highest)) {
      throw UserError(Path(name) + ": " + given->dump() + " must be a number from " +
                      nlohmann::json(lowest).dump() + " to " + nlohmann::json(highest).dump());
    }
    value = given->get<double>();
  }
  resolved_[name] = value;
  return value;
}

bool OptionReader::Bool(const std::string& name, bool fallback) {
  bool value = fallback;
  if (const nlohmann::json* given = Find(name)) {
    if (!given->is_boolean())
      throw UserError(Path(name) + ": " + given->dump() + " must be true or false");
    value = given->get<bool>();
  }
  resolved_[name] = value;
  return value;
}

std::vector<int64_t> OptionReader::Ints(const std::string& name,
                                        const std::vector<int64_t>& fallback, size_t min_count,
                                        size_t max_count, int64_t lowest, int64_t highest) {
  std::vector<int64_t> values = fallback;
  if (const nlohmann::json* given = Find(name)) {
    const auto fail = [&] {
      return UserError(Path(name) + ": " + given->dump() + " must be a list of " +
                       std::to_string(min_count) + " to " + std::to_string(max_count) +
                       " whole numbers, each from " + BoundsText(lowest, highest));
    };
    if (!given->is_array() || given->size() < min_count || given->size() > max_count) throw fail();
    values.clear();
    for (const nlohmann::json& entry : *given) {
      const auto whole = WholeNumber(entry);
      if (!whole || *whole < lowest || *whole > highest) throw fail();
      values.push_back(*whole);
    }
  }
  resolved_[name] = values;
  return values;
}

void OptionReader::Finish() const {
  if (!options_.is_object()) return;
  std::vector<std::string> known;
  for (const auto& [name, value] : resolved_.items()) known.push_back(name);
  for (const auto& [name, value] : options_.items()) {
    if (resolved_.contains(name)) continue;
    throw UserError(Path(name) + ": the model \"" + model_ + "\" has no such option" +
                    NearestHint(name, known) + " (its options: " + JoinNames(known) + ")");
  }
}

}  // namespace itwin::worker
