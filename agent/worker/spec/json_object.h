// Reading JSON objects of the spec, strictly.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

namespace itwin::worker {

// One object and where it stands in the spec. Every Get marks its key as known, and changes the value
// only where the key is given; Done refuses the rest. Everything wrong is a UserError that names the path.
class JsonObject {
 public:
  JsonObject(const nlohmann::json& json, std::string path);  // both are kept, `json` by reference

  [[noreturn]] void Refuse(const std::string& key, const std::string& problem) const;
  std::string PathOf(const std::string& key) const;

  // The value, or nullptr when it is absent or null (protobuf JSON takes null for absent).
  const nlohmann::json* Find(const std::string& key);

  // Get of every pair of key and value, then Done.
  template <typename T, typename... More>
  void Read(const std::string& key, T& value, More&&... more) {
    Get(key, value);
    if constexpr (sizeof...(more) > 0) {
      Read(std::forward<More>(more)...);
    } else {
      Done();
    }
  }

  void Get(const std::string& key, std::string& value);
  void Get(const std::string& key, bool& value);
  void Get(const std::string& key, double& value);
  void Get(const std::string& key, std::optional<double>& value);
  void Get(const std::string& key, int64_t& value);
  void Get(const std::string& key, uint64_t& value);
  void Get(const std::string& key, int& value);
  template <typename T>
  void Get(const std::string& key, std::vector<T>& values) {
    const nlohmann::json* json = Find(key);
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

  void AtLeast(const std::string& key, double value, double least) const;
  // AtLeast of every pair of key and value.
  template <typename T, typename... More>
  void AllAtLeast(double least, const std::string& key, T value, More... more) const {
    AtLeast(key, static_cast<double>(value), least);
    if constexpr (sizeof...(more) > 0) AllAtLeast(least, more...);
  }

  // The one key of `choices` that is set, or "" when none is. Two are an error.
  std::string OneOf(const std::vector<std::string>& choices);

  // Refuses keys that nobody asked for.
  void Done() const;

 private:
  static std::string TypeName(const nlohmann::json& json);
  [[noreturn]] void RefuseType(const std::string& key, const nlohmann::json& json,
                               const std::string& wanted) const;
  double Number(const std::string& key, const nlohmann::json& json) const;
  int64_t Integer(const std::string& key, const nlohmann::json& json) const;

  const nlohmann::json& json_;
  const std::string path_;
  std::set<std::string> known_;
};

}  // namespace itwin::worker
