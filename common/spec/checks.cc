#include "common/spec/checks.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_join.h"
#include "common/spec/nearest_name.h"
#include "common/spec/spec_document.h"

namespace itwin {
namespace {

constexpr int kMaxDimensions = 16;

}  // namespace

std::string Quoted(absl::string_view text) {
  return absl::StrCat("'", absl::Utf8SafeCEscape(text.substr(0, kMaxShown)), text.size() > kMaxShown ? "..." : "", "'");
}

std::string NumberText(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return absl::StrCat(static_cast<int64_t>(value));
  return absl::StrCat(value);
}

void Problems::Add(std::string line) {
  ++total_;
  if (lines_.size() < static_cast<size_t>(kMaxProblems)) lines_.push_back(std::move(line));
}

absl::Status Problems::status() const {
  if (lines_.empty()) return absl::OkStatus();
  const std::string more = total_ > lines_.size() ? absl::StrCat("\n... and ", total_ - lines_.size(), " more") : "";
  return absl::InvalidArgumentError(absl::StrCat(absl::StrJoin(lines_, "\n"), more));
}

void SpecChecks::Range(absl::string_view path, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return;
  Report(path, absl::StrCat(value, " is out of range; use a whole number from ", min, " to ", max));
}

void SpecChecks::Above(absl::string_view path, double value, double bound) {
  if (std::isfinite(value) && value > bound) return;
  Report(path, absl::StrCat(NumberText(value), " is out of range; use a number above ", NumberText(bound)));
}

void SpecChecks::AtLeast(absl::string_view path, double value, double bound) {
  if (std::isfinite(value) && value >= bound) return;
  Report(path, absl::StrCat(NumberText(value), " is out of range; use a number from ", NumberText(bound)));
}

void SpecChecks::Fraction(absl::string_view path, double value) {
  if (std::isfinite(value) && value >= 0 && value < 1) return;
  Report(path, absl::StrCat(NumberText(value), " is out of range; use a number from 0 to below 1"));
}

void SpecChecks::OneOf(absl::string_view path, const std::string& name, const std::vector<std::string>& known) {
  if (std::find(known.begin(), known.end(), name) != known.end()) return;
  Report(path, absl::StrCat(Quoted(name), " is unknown; ", UnknownNameHint(name, known)));
}

void SpecChecks::Required(absl::string_view path, const std::string& text) {
  if (text.empty()) Report(path, "is missing; name a file");
}

void SpecChecks::Names(const std::string& path, const google::protobuf::RepeatedPtrField<std::string>& names) {
  if (names.size() > kMaxListedNames) return Report(path, absl::StrCat("has more than ", kMaxListedNames, " names"));
  std::set<std::string> seen;
  for (int i = 0; i < names.size(); ++i) {
    const std::string at = absl::StrCat(path, "[", i, "]");
    if (names.Get(i).empty()) Report(at, "is empty; name it");
    if (!seen.insert(names.Get(i)).second) Report(at, absl::StrCat(Quoted(names.Get(i)), " is given twice"));
  }
}

void SpecChecks::Shape(const std::string& path, const google::protobuf::RepeatedField<int64_t>& shape) {
  if (shape.size() > kMaxDimensions) {
    return Report(path, absl::StrCat("has ", shape.size(), " dimensions; use at most ", kMaxDimensions));
  }
  double elements = 1;
  for (int i = 0; i < shape.size(); ++i) {
    Range(absl::StrCat(path, "[", i, "]"), shape.Get(i), 1, kMaxElements);
    elements *= static_cast<double>(shape.Get(i));
  }
  if (elements > static_cast<double>(kMaxElements)) Report(path, "has too many elements; check the sizes");
}

}  // namespace itwin
