#include "agent/worker/spec/json_object.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <system_error>

#include "agent/worker/error.h"

namespace itwin::worker {

using Json = nlohmann::json;

JsonObject::JsonObject(const Json& json, std::string path) : json_(json), path_(std::move(path)) {
  if (!json.is_object()) Refuse("", "is " + TypeName(json) + "; it must be an object");
}

void JsonObject::Refuse(const std::string& key, const std::string& problem) const {
  throw UserError(PathOf(key) + " " + problem);
}

std::string JsonObject::PathOf(const std::string& key) const {
  if (key.empty()) return path_.empty() ? "the spec" : path_;
  return path_.empty() ? key : path_ + "." + key;
}

const Json* JsonObject::Find(const std::string& key) {
  known_.insert(key);
  auto it = json_.find(key);
  return it == json_.end() || it->is_null() ? nullptr : &*it;
}

void JsonObject::Get(const std::string& key, std::string& value) {
  const Json* json = Find(key);
  if (json == nullptr) return;
  if (!json->is_string()) RefuseType(key, *json, "a string");
  value = json->get<std::string>();
}

void JsonObject::Get(const std::string& key, bool& value) {
  const Json* json = Find(key);
  if (json == nullptr) return;
  if (!json->is_boolean()) RefuseType(key, *json, "true or false");
  value = json->get<bool>();
}

void JsonObject::Get(const std::string& key, double& value) {
  if (const Json* json = Find(key)) value = Number(key, *json);
}

void JsonObject::Get(const std::string& key, std::optional<double>& value) {
  if (const Json* json = Find(key)) value = Number(key, *json);
}

void JsonObject::Get(const std::string& key, int64_t& value) {
  if (const Json* json = Find(key)) value = Integer(key, *json);
}

void JsonObject::Get(const std::string& key, uint64_t& value) {
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

void JsonObject::Get(const std::string& key, int& value) {
  const Json* json = Find(key);
  if (json == nullptr) return;
  const int64_t wide = Integer(key, *json);
  if (wide < std::numeric_limits<int>::min() || wide > std::numeric_limits<int>::max()) {
    Refuse(key, "is " + json->dump() + "; it must fit into 32 bits");
  }
  value = static_cast<int>(wide);
}

void JsonObject::AtLeast(const std::string& key, double value, double least) const {
  const auto text = [](double number) {  // 3, not 3.0
    return number == std::floor(number) && std::abs(number) < 1e15 ? std::to_string(static_cast<int64_t>(number)) : Json(number).dump();
  };
  if (!(value >= least)) Refuse(key, "is " + text(value) + "; it must be at least " + text(least));
}

std::string JsonObject::OneOf(const std::vector<std::string>& choices) {
  std::string found;
  for (const std::string& choice : choices) {
    if (Find(choice) == nullptr) continue;
    if (!found.empty()) Refuse("", "has both `" + found + "` and `" + choice + "`; give one");
    found = choice;
  }
  return found;
}

void JsonObject::Done() const {
  for (const auto& [key, value] : json_.items()) {
    if (known_.contains(key)) continue;
    std::string names;
    for (const std::string& name : known_) names += (names.empty() ? "" : ", ") + name;
    Refuse(key, "is not a known field; known here: " + names);
  }
}

std::string JsonObject::TypeName(const Json& json) {
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

void JsonObject::RefuseType(const std::string& key, const Json& json, const std::string& wanted) const {
  Refuse(key, "is " + TypeName(json) + "; it must be " + wanted);
}

double JsonObject::Number(const std::string& key, const Json& json) const {
  if (json.is_number()) return json.get<double>();
  if (json.is_string()) {  // protobuf JSON also writes numbers as strings
    const std::string& text = json.get_ref<const std::string&>();
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (!text.empty() && end == text.c_str() + text.size() && std::isfinite(value)) return value;
  }
  RefuseType(key, json, "a number");
}

int64_t JsonObject::Integer(const std::string& key, const Json& json) const {
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

}  // namespace itwin::worker
