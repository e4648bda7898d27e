#include "agent/worker/training/parameter_groups.h"

#include <algorithm>
#include <string_view>

#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

bool Matches(std::string_view pattern, std::string_view name) {
  size_t p = 0, n = 0, star = std::string_view::npos, retry = 0;
  while (n < name.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n])) {
      ++p;
      ++n;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      retry = n;
    } else if (star != std::string_view::npos) {  // the star takes one more character
      p = star + 1;
      n = ++retry;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

}  // namespace

bool MatchesPattern(const std::string& pattern, const std::string& name) {
  if (Matches(pattern, name)) return true;
  return pattern.find_first_of("*?") == std::string::npos && name.size() > pattern.size() &&
         name.starts_with(pattern) && name[pattern.size()] == '.';
}

const ParameterGroupSpec* GroupOf(const std::vector<ParameterGroupSpec>& groups,
                                  const std::string& parameter) {
  for (const ParameterGroupSpec& group : groups) {
    for (const std::string& pattern : group.match) {
      if (MatchesPattern(pattern, parameter)) return &group;
    }
  }
  return nullptr;
}

void FreezeParameters(const std::vector<ParameterGroupSpec>& groups,
                      const std::vector<std::pair<std::string, at::Tensor>>& parameters) {
  if (groups.empty()) return;
  std::vector<std::string> names;
  for (const auto& [name, tensor] : parameters) names.push_back(name);
  for (size_t i = 0; i < groups.size(); ++i) {
    for (const std::string& pattern : groups[i].match) {
      if (std::any_of(names.begin(), names.end(),
                      [&](const std::string& name) { return MatchesPattern(pattern, name); })) {
        continue;
      }
      std::string some;
      for (size_t k = 0; k < names.size() && k < 8; ++k) some += (k ? ", " : "") + names[k];
      throw UserError("train.parameter_groups[" + std::to_string(i) + "].match: no parameter is named \"" +
                      pattern + "\"" + NearestHint(pattern, names) + " (the model has " + some +
                      (names.size() > 8 ? ", …" : "") + ")");
    }
  }
  bool trainable = false;
  for (const auto& [name, tensor] : parameters) {
    const ParameterGroupSpec* group = GroupOf(groups, name);
    if (group != nullptr && group->freeze) tensor.set_requires_grad(false);
    trainable = trainable || tensor.requires_grad();
  }
  if (!trainable) {
    throw UserError("train.parameter_groups: freeze every parameter of the model; nothing is left to train");
  }
}

}  // namespace itwin::worker
