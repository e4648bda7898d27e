#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "itwin/v1/spec.pb.h"

// Job documents: YAML or JSON to itwin.v1.JobSpec and back, by reflection, so that the schema is the .proto alone.
// Pure and thread-safe.
//
// Keys are field names. A oneof is written as the one key it holds (`model: {builtin: resnet18}`); an alternative
// whose fields are all optional may stand alone (`optimizer: adam`, `- standardize`). Durations are "1h30m", "90s",
// "2d" or seconds as a number. What a scalar means is decided by its field, never guessed from its looks: `name: 12`
// is text.
namespace itwin {

inline constexpr size_t kMaxDocumentBytes = size_t{1} << 20;
inline constexpr int kMaxDocumentDepth = 64;
inline constexpr int kMaxDocumentNodes = 100'000;  // aliases counted as often as they are used
inline constexpr int kMaxProblems = 10;            // reported at once

// The spec that a document means, with `overrides` ("train.epochs=5", "train.data.transforms[0].crop.sizes=[8, 8]")
// applied first: values are read as in a document, and naming one alternative of a oneof drops the other.
// kInvalidArgument with one problem per line, each as "line 7: train.optimzer: unknown key; did you mean 'optimizer'?"
// (or "override 'train.epochs=x': ..."). Ranges and names are not checked here: see validate.h.
absl::StatusOr<v1::JobSpec> ParseSpecDocument(absl::string_view text,
                                              const std::vector<std::string>& overrides);

// Protobuf JSON with the proto's field names, in one line: what `spec.json` in a spool holds.
std::string SpecToJson(const v1::JobSpec& spec);
// A document that ParseSpecDocument reads back to the same message.
std::string SpecToYaml(const v1::JobSpec& spec);

}  // namespace itwin
