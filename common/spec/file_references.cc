#include "common/spec/file_references.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <functional>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/sha256.h"
#include "common/status_macros.h"

namespace itwin {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

constexpr absl::string_view kArtifactPrefix = "sha256:";
constexpr absl::string_view kSitePrefix = "site:";
constexpr size_t kArtifactNameDigits = 16;

// Calls `visit(path, message, field, index)` for every file reference; index is -1 for a single field. False ends
// the walk.
using Visitor = std::function<bool(const std::string&, Message*, const FieldDescriptor*, int)>;

bool Walk(Message* message, const std::string& prefix, const Visitor& visit) {
  if (message->GetDescriptor()->file()->package() == "google.protobuf") return true;
  const Reflection* reflection = message->GetReflection();
  // In the order of the .proto, not of the wire.
  for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message->GetDescriptor()->field(i);
    if (field->is_map()) continue;
    const std::string path = prefix.empty() ? field->name() : absl::StrCat(prefix, ".", field->name());
    const bool repeated = field->is_repeated();
    const int count = repeated ? reflection->FieldSize(*message, field)
                               : (reflection->HasField(*message, field) ? 1 : 0);
    for (int j = 0; j < count; ++j) {
      const std::string at = repeated ? absl::StrCat(path, "[", j, "]") : path;
      if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
        Message* child = repeated ? reflection->MutableRepeatedMessage(message, field, j)
                                  : reflection->MutableMessage(message, field);
        if (!Walk(child, at, visit)) return false;
      } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING &&
                 field->options().GetExtension(v1::is_file)) {
        if (!visit(at, message, field, repeated ? j : -1)) return false;
      }
    }
  }
  return true;
}

std::string Value(const Message& message, const FieldDescriptor* field, int index) {
  const Reflection* reflection = message.GetReflection();
  return index < 0 ? reflection->GetString(message, field)
                   : reflection->GetRepeatedString(message, field, index);
}

void SetValue(Message* message, const FieldDescriptor* field, int index, std::string value) {
  const Reflection* reflection = message->GetReflection();
  if (index < 0) {
    reflection->SetString(message, field, std::move(value));
  } else {
    reflection->SetRepeatedString(message, field, index, std::move(value));
  }
}

}  // namespace

FilePlace PlaceOf(absl::string_view reference) {
  if (absl::StartsWith(reference, kArtifactPrefix)) return FilePlace::kArtifact;
  if (absl::StartsWith(reference, kSitePrefix)) return FilePlace::kSite;
  return FilePlace::kLocal;
}

std::vector<v1::FileReference> FileReferences(const v1::JobSpec& spec) {
  std::vector<v1::FileReference> out;
  v1::JobSpec copy = spec;  // the walk is shared with the writers and needs a mutable message
  Walk(&copy, "", [&](const std::string& path, Message* message, const FieldDescriptor* field, int index) {
    v1::FileReference reference;
    reference.set_field(path);
    reference.set_value(Value(*message, field, index));
    out.push_back(std::move(reference));
    return true;
  });
  return out;
}

absl::Status SetFileReference(v1::JobSpec* spec, absl::string_view field_path, absl::string_view value) {
  bool found = false;
  Walk(spec, "", [&](const std::string& path, Message* message, const FieldDescriptor* field, int index) {
    if (path != field_path) return true;
    SetValue(message, field, index, std::string(value));
    found = true;
    return false;
  });
  if (!found) return absl::NotFoundError(absl::StrCat(field_path, ": the spec names no file there"));
  return absl::OkStatus();
}

absl::Status PlaceArtifacts(v1::JobSpec* spec) {
  absl::Status status = absl::OkStatus();
  Walk(spec, "", [&](const std::string& path, Message* message, const FieldDescriptor* field, int index) {
    const std::string reference = Value(*message, field, index);
    if (PlaceOf(reference) != FilePlace::kArtifact) return true;
    const absl::string_view hash = absl::StripPrefix(reference, kArtifactPrefix);
    if (!IsSha256Hex(hash)) {
      status = absl::InvalidArgumentError(
          absl::StrCat(path, ": '", reference.substr(0, 100), "' needs 64 lower-case hex digits after 'sha256:'"));
      return false;
    }
    const std::string name(hash.substr(0, kArtifactNameDigits));
    bool placed = false;
    for (const v1::InputFile& input : spec->inputs()) {
      if (input.path() != name) continue;
      if (input.sha256() != hash) {
        status = absl::InvalidArgumentError(
            absl::StrCat(path, ": the artifact would be placed at '", name, "', where another input lies; rename it"));
        return false;
      }
      placed = true;
    }
    if (!placed) {
      v1::InputFile* input = spec->add_inputs();
      input->set_path(name);
      input->set_sha256(std::string(hash));
    }
    SetValue(message, field, index, name);
    return true;
  });
  return status;
}

absl::Status CheckFilesArePlaced(const v1::JobSpec& spec) {
  std::set<std::string> inputs;
  for (const v1::InputFile& input : spec.inputs()) inputs.insert(input.path());
  for (const v1::FileReference& reference : FileReferences(spec)) {
    if (PlaceOf(reference.value()) == FilePlace::kSite || inputs.count(reference.value()) > 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(reference.field(), ": '", reference.value().substr(0, 200),
                     "' is not among `inputs`; upload the file and list it there, or name it \"sha256:<hex>\" or "
                     "\"site:<path>\""));
  }
  return absl::OkStatus();
}

}  // namespace itwin
