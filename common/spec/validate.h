#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "itwin/v1/spec.pb.h"

namespace itwin {

// Every limit that proto/itwin/v1/spec.proto states, in one place for gateway and client. Nothing is looked up: no
// site, no file, no shape. kInvalidArgument with up to ten problems, one per line, each as
// "train.optimizer.adam.lr: -1 is out of range; use a number above 0". Pure and thread-safe.
absl::Status ValidateSpec(const v1::JobSpec& spec);

// Whether it may be the name of a container image: 1 to 1024 of letters, digits and / . _ - : @ + =, not beginning with '-'. It
// becomes a word of a site's command line, so it must be one, and no option.
bool IsImageName(absl::string_view name);
// What is allowed, for a message.
inline constexpr char kImageNameRule[] = "use at most 1024 letters, digits and / . _ - : @ + =, and do not begin with '-'";

// "0..108": half-open, first < last, digits only.
absl::StatusOr<std::pair<int64_t, int64_t>> ParseIndexRange(absl::string_view text);

// The names that fields of a train spec may hold; for prompts and completion.
const std::vector<std::string>& BuiltinModels();
const std::vector<std::string>& LossNames();
const std::vector<std::string>& MetricNames();
const std::vector<std::string>& StrategyNames();

}  // namespace itwin
