#include "server/jobs/model_archive.h"

#include <algorithm>
#include <set>

#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/spec/nearest_name.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kNamedOperators = 12;

const std::set<std::string>& AllowedOperators() {
  static const auto* const kNames = new std::set<std::string>{
#include "allowed_operators.inc"  // the worker's own list, copied by CMake
  };
  return *kNames;
}

absl::Status NoArchive(absl::string_view why) {
  return absl::InvalidArgumentError(
      absl::StrCat("train.model.archive: is no model archive (", why, "); write one with itwin.export(model, ...)"));
}

nlohmann::json Parse(const std::string& text) {
  return nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
}

// A text of the header, as JSON; null when it is not there.
nlohmann::json TextOf(const nlohmann::json& metadata, const char* key) {
  if (!metadata.is_object() || !metadata.contains(key) || !metadata[key].is_string()) return nullptr;
  return Parse(metadata[key].get<std::string>());
}

std::string TextAt(const nlohmann::json& object, const char* key) {
  if (!object.is_object() || !object.contains(key) || !object[key].is_string()) return "";
  return object[key].get<std::string>();
}

}  // namespace

absl::StatusOr<std::vector<std::string>> OperatorsOfArchive(const BlobStore::Reader& reader) {
  ITWIN_ASSIGN_OR_RETURN(const std::string prefix, reader.Read(0, 8));
  if (prefix.size() < 8) return NoArchive("it is too short");
  uint64_t size = 0;
  for (int i = 7; i >= 0; --i) size = size << 8 | static_cast<unsigned char>(prefix[static_cast<size_t>(i)]);
  if (size > static_cast<uint64_t>(kMaxHeaderBytes) || static_cast<int64_t>(size) > reader.size() - 8) {
    return NoArchive("its header is impossible");
  }
  std::string header;
  while (header.size() < size) {
    const auto at = static_cast<int64_t>(header.size());
    ITWIN_ASSIGN_OR_RETURN(const std::string block, reader.Read(8 + at, static_cast<int64_t>(size) - at));
    if (block.empty()) return NoArchive("it is cut off");
    header += block;
  }
  const nlohmann::json json = Parse(header);
  if (!json.is_object() || !json.contains("__metadata__")) return NoArchive("it has no manifest");
  const nlohmann::json manifest = TextOf(json["__metadata__"], "itwin.manifest");
  if (!manifest.is_object()) return NoArchive("it has no manifest");
  std::set<std::string> names;
  const nlohmann::json graph = TextOf(json["__metadata__"], "itwin.graph");
  if (graph.is_object() && graph.contains("nodes") && graph["nodes"].is_array()) {
    for (const nlohmann::json& node : graph["nodes"]) {
      const std::string name = TextAt(node, "op"), overload = TextAt(node, "overload");
      if (absl::StrContains(name, "::")) names.insert(overload.empty() ? name : absl::StrCat(name, ".", overload));
    }
  } else if (manifest.contains("operators") && manifest["operators"].is_array()) {
    for (const nlohmann::json& name : manifest["operators"]) {
      if (name.is_string()) names.insert(name.get<std::string>());
    }
  }
  return std::vector<std::string>(names.begin(), names.end());
}

absl::Status CheckOperators(const std::vector<std::string>& operators) {
  std::vector<std::string> forbidden;
  for (const std::string& name : operators) {
    if (!absl::StartsWith(name, "aten::") && !absl::StartsWith(name, "prim::")) continue;
    const std::string base = name.substr(0, std::min(name.find('.', name.find("::")), name.size()));
    const bool tensors = absl::StartsWith(base, "aten::") && AllowedOperators().contains(base.substr(6));
    if (!tensors) forbidden.push_back(name);
  }
  if (forbidden.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "train.model.archive: uses ", ListNames(forbidden, kNamedOperators),
      ", which a model may not use at a site: models compute with tensors, they do not reach for files, threads or other "
      "processes (`itwin-worker --operators` lists what they may)"));
}

absl::StatusOr<std::vector<std::string>> OperatorsOfJob(const BlobStore& blobs, const v1::JobSpec& spec) {
  const std::string& archive = spec.train().model().archive();
  if (archive.empty()) return std::vector<std::string>();
  for (const v1::InputFile& input : spec.inputs()) {
    if (input.path() != archive) continue;
    ITWIN_ASSIGN_OR_RETURN(const BlobStore::Reader reader, blobs.OpenReader(input.sha256()));
    return OperatorsOfArchive(reader);
  }
  return std::vector<std::string>();
}

}  // namespace itwin::server
