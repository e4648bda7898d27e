#include "common/spec/strict_yaml.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "common/spec/nearest_name.h"

namespace itwin {
namespace {

constexpr size_t kMaxProblems = 10;

bool ParseMebibytes(absl::string_view text, int64_t* out) {
  struct Unit {
    const char* name;
    int64_t mebibytes;
  };
  int64_t factor = 1;
  for (const Unit& unit : {Unit{"MiB", 1}, Unit{"GiB", 1024}, Unit{"TiB", 1024 * 1024}, Unit{"M", 1}, Unit{"G", 1024},
                           Unit{"T", 1024 * 1024}}) {
    if (absl::ConsumeSuffix(&text, unit.name)) {
      factor = unit.mebibytes;
      break;
    }
  }
  int64_t value = 0;
  if (!absl::SimpleAtoi(absl::StripAsciiWhitespace(text), &value) || value < 0 || value > (int64_t{1} << 40) / factor) return false;
  *out = value * factor;
  return true;
}

}  // namespace

absl::Status ProblemsStatus(std::vector<std::string> problems) {
  if (problems.empty()) return absl::OkStatus();
  if (problems.size() > kMaxProblems) {
    const size_t more = problems.size() - kMaxProblems;
    problems.resize(kMaxProblems);
    problems.push_back(absl::StrCat("and ", more, " more"));
  }
  return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
}

absl::Status StrictYaml::Read(absl::string_view text, const Take& root) {
  // yaml-cpp reports by exceptions; they end here.
  try {
    root(YAML::Load(std::string(text)), "");
  } catch (const YAML::Exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(file_name_, ":", error.mark.line + 1, ": ", error.msg));
  }
  return status();
}

absl::Status StrictYaml::status() const { return ProblemsStatus(problems_); }

void StrictYaml::Mapping(const YAML::Node& node, const std::string& path, const Keys& keys) {
  if (node.IsNull()) return;  // a section without entries
  if (!node.IsMap()) return Problem(node, path, "must be a mapping of keys to values");
  std::set<std::string> seen;
  for (const auto& entry : node) {
    const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : "?";
    const std::string where = path.empty() ? key : absl::StrCat(path, ".", key);
    const auto known = std::find_if(keys.begin(), keys.end(), [&](const auto& k) { return k.first == key; });
    if (known == keys.end()) {
      std::vector<std::string> names;
      for (const auto& k : keys) names.push_back(k.first);
      Problem(entry.first, where, absl::StrCat("unknown key; ", UnknownNameHint(key, names)));
    } else if (!seen.insert(key).second) {
      Problem(entry.first, where, "is there twice");
    } else {
      known->second(entry.second, where);
    }
  }
}

void StrictYaml::List(const YAML::Node& node, const std::string& path, size_t most, const Take& element) {
  if (!node.IsSequence() || node.size() > most) {
    return Problem(node, path, absl::StrCat("must be a list of at most ", most, " entries"));
  }
  int number = 0;
  for (const YAML::Node& entry : node) element(entry, absl::StrCat(path, "[", number++, "]"));
}

void StrictYaml::Entries(const YAML::Node& node, const std::string& path, size_t most,
                         const std::function<void(const std::string&, const YAML::Node&, const std::string&)>& entry) {
  if (node.IsNull()) return;
  if (!node.IsMap() || node.size() > most) {
    return Problem(node, path, absl::StrCat("must be a mapping of at most ", most, " names to values"));
  }
  std::set<std::string> seen;
  for (const auto& one : node) {
    if (!one.first.IsScalar()) {
      Problem(one.first, path, "has a key that is no text");
      continue;
    }
    const std::string where = absl::StrCat(path, ".", one.first.Scalar());
    if (!seen.insert(one.first.Scalar()).second) {
      Problem(one.first, where, "is there twice");
      continue;
    }
    entry(one.first.Scalar(), one.second, where);
  }
}

StrictYaml::Take StrictYaml::Text(std::string* out) {
  return [this, out](const YAML::Node& node, const std::string& path) {
    if (!node.IsScalar()) return Problem(node, path, "must be text");
    *out = node.Scalar();
  };
}

StrictYaml::Take StrictYaml::Integer(int* out) {
  return [this, out](const YAML::Node& node, const std::string& path) {
    if (!node.IsScalar() || !absl::SimpleAtoi(node.Scalar(), out)) Problem(node, path, "must be a whole number");
  };
}

StrictYaml::Take StrictYaml::Boolean(bool* out) {
  return [this, out](const YAML::Node& node, const std::string& path) {
    if (!node.IsScalar() || !absl::SimpleAtob(node.Scalar(), out)) Problem(node, path, "must be true or false");
  };
}

StrictYaml::Take StrictYaml::Number(double* out) {
  return [this, out](const YAML::Node& node, const std::string& path) {
    if (!node.IsScalar() || !absl::SimpleAtod(node.Scalar(), out)) Problem(node, path, "must be a number");
  };
}

StrictYaml::Take StrictYaml::Time(absl::Duration* out) {
  return [this, out](const YAML::Node& node, const std::string& path) {
    if (!node.IsScalar() || !absl::ParseDuration(node.Scalar(), out) || *out < absl::ZeroDuration()) {
      Problem(node, path, "must be a duration such as 90s, 30m or 168h; 0 for never");
    }
  };
}

StrictYaml::Take StrictYaml::Words(std::vector<std::string>* out, absl::string_view example) {
  return [this, out, hint = std::string(example)](const YAML::Node& node, const std::string& path) {
    if (!node.IsSequence()) return Problem(node, path, absl::StrCat("must be a list of words: ", hint));
    for (const YAML::Node& word : node) {
      if (!word.IsScalar()) return Problem(word, path, "must be a list of words");
      out->push_back(word.Scalar());
    }
  };
}

StrictYaml::Take StrictYaml::Mebibytes(int64_t* out) {
  return [this, out](const YAML::Node& node, const std::string& path) {
    if (!node.IsScalar() || !ParseMebibytes(node.Scalar(), out)) Problem(node, path, "must be a size such as 512M or 64G");
  };
}

void StrictYaml::Problem(const YAML::Node& node, const std::string& path, absl::string_view what) {
  problems_.push_back(absl::StrCat(file_name_, ":", node.Mark().line + 1, ": ", path.empty() ? "" : path + ": ", what));
}

void StrictYaml::Problem(const std::string& path, absl::string_view what) {
  problems_.push_back(absl::StrCat(file_name_, ": ", path.empty() ? "" : path + ": ", what));
}

}  // namespace itwin
