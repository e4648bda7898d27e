#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "itwin/v1/jobs.pb.h"
#include "itwin/v1/spec.pb.h"

// The files a spec names: strings with the option is_file, found by reflection. A reference is
//   "sha256:<64 hex>"  an artifact that the gateway holds,
//   "site:<path>"      an absolute path at the site, read in place,
//   anything else      in a document: a path relative to the document, which the client uploads;
//                      in a submitted spec: the path of one of `inputs`.
// Pure and thread-safe.
namespace itwin {

enum class FilePlace { kLocal, kArtifact, kSite };
FilePlace PlaceOf(absl::string_view reference);

// In the order of the fields; `field` is the path, such as "train.data.netcdf" or "command.files[1]".
std::vector<v1::FileReference> FileReferences(const v1::JobSpec& spec);

// Replaces the reference at `field` (a path that FileReferences gave). kNotFound when there is none.
absl::Status SetFileReference(v1::JobSpec* spec, absl::string_view field, absl::string_view value);

// Turns every "sha256:" reference into an input, named by its first 16 digits, and the reference into that path.
// Idempotent. kInvalidArgument for a hash that is none, or a name that another input has.
absl::Status PlaceArtifacts(v1::JobSpec* spec);

// What a gateway asks of a submitted spec, after PlaceArtifacts: every reference is at the site or one of `inputs`.
// kInvalidArgument naming the field and what to do.
absl::Status CheckFilesArePlaced(const v1::JobSpec& spec);

}  // namespace itwin
