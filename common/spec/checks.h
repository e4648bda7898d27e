#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "itwin/v1/spec.pb.h"

// What the checks of a spec have in common (validate.cc; its parts check_data.cc, check_model.cc,
// check_train.cc). Internal to common/spec.
namespace itwin {

// Beyond any machine there is: a typing error.
inline constexpr int64_t kMaxNodes = 100'000;
inline constexpr int64_t kMaxPerNode = 4'096;
inline constexpr int64_t kMaxElements = int64_t{1} << 40;
inline constexpr int64_t kMaxWallSeconds = int64_t{30} * 24 * 3600;
inline constexpr int kMaxListedNames = 10'000;
inline constexpr size_t kMaxShown = 60;  // characters of a text in a message

// For messages: in quotes, escaped, cut short.
std::string Quoted(absl::string_view text);
std::string NumberText(double value);

// Problems so far, each as "train.batch: -1 is out of range; ...".
class Problems {
 public:
  void Report(absl::string_view path, absl::string_view what) { Add(absl::StrCat(path, ": ", what)); }
  void Add(std::string line);
  bool none() const { return total_ == 0; }
  // kInvalidArgument with a line for each of the first kMaxProblems, and how many more there are.
  absl::Status status() const;

 private:
  std::vector<std::string> lines_;
  size_t total_ = 0;
};

// Each names the field and what would be right.
class SpecChecks {
 protected:
  explicit SpecChecks(Problems* problems) : problems_(*problems) {}

  void Report(absl::string_view path, absl::string_view what) { problems_.Report(path, what); }
  void Range(absl::string_view path, int64_t value, int64_t min, int64_t max);
  void Above(absl::string_view path, double value, double bound);
  void AtLeast(absl::string_view path, double value, double bound);
  void Fraction(absl::string_view path, double value);  // 0 <= value < 1
  void OneOf(absl::string_view path, const std::string& name, const std::vector<std::string>& known);
  void Required(absl::string_view path, const std::string& text);  // a file
  void Shape(const std::string& path, const google::protobuf::RepeatedField<int64_t>& shape);
  // Not empty, none twice.
  void Names(const std::string& path, const google::protobuf::RepeatedPtrField<std::string>& names);

  Problems& problems_;
};

// The options of a built-in model, which is named.
void CheckModelOptions(const v1::Model& model, Problems* problems);
void CheckData(const v1::Data& data, Problems* problems);
void CheckTrain(const v1::TrainSpec& train, const v1::Resources& resources, Problems* problems);

}  // namespace itwin
