#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// A document as a tree with line numbers, before any meaning is given to it: for job documents, and for configuration
// files that deserve the same messages.
namespace itwin {

struct YamlNode;
// Shared: an alias is the node of its anchor. Treated as immutable once the tree is built.
using YamlNodePtr = std::shared_ptr<YamlNode>;

struct YamlEntry {
  std::string key;
  YamlNodePtr value;
};

struct YamlNode {
  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  std::string where{};  // "line 7", or "override 'train.epochs=x'"
  std::string text{};   // kScalar
  bool quoted = false;  // kScalar: written in quotes or as a block
  std::vector<YamlNodePtr> items{};  // kList
  std::vector<YamlEntry> entries{};  // kMap; keys as written, duplicates included
};

// YAML or JSON. kInvalidArgument with the line for text that is neither, has several documents, is not UTF-8 or is
// beyond the limits of spec_document.h. Nodes may be shared (aliases), so a small text can stand for a
// huge tree: whoever walks it counts nodes. There are no cycles.
// `where` replaces the line number in every node when it is not empty.
absl::StatusOr<YamlNodePtr> ParseYaml(absl::string_view text, absl::string_view where = "");

}  // namespace itwin
