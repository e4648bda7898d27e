#include "common/spec/yaml_tree.h"

#include <algorithm>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <map>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/spec/spec_document.h"

namespace itwin {
namespace {

class TreeBuilder : public YAML::EventHandler {
 public:
  explicit TreeBuilder(std::string where) : where_(std::move(where)) {}

  YamlNodePtr root() const { return root_; }
  const std::string& problem() const { return problem_; }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    if (YamlNodePtr node = New(mark, anchor)) Add(std::move(node));
  }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    if (!problem_.empty()) return;
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end()) {
      Fail(mark, "an alias without its anchor");
      return;
    }
    // Nodes that hold each other would never be freed.
    for (const Level& level : levels_) {
      if (level.node == found->second) return Fail(mark, "an alias of what it stands in, so the document would have no end");
    }
    Add(found->second);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    YamlNodePtr node = New(mark, anchor);
    if (!node) return;
    node->kind = YamlNode::Kind::kScalar;
    node->text = value;
    node->quoted = tag == "!" || tag == "tag:yaml.org,2002:str";
    Add(std::move(node));
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Open(mark, anchor, YamlNode::Kind::kList);
  }
  void OnSequenceEnd() override { Close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Open(mark, anchor, YamlNode::Kind::kMap);
  }
  void OnMapEnd() override { Close(); }

 private:
  struct Level {
    YamlNodePtr node;
    bool has_key = false;
    std::string key{};
  };

  void Fail(const YAML::Mark& mark, absl::string_view what) {
    if (problem_.empty()) problem_ = absl::StrCat(Where(mark), ": ", what);
  }
  std::string Where(const YAML::Mark& mark) const {
    return where_.empty() ? absl::StrCat("line ", mark.line + 1) : where_;
  }

  // Nothing once there is a problem: the rest of the text is parsed but not kept.
  YamlNodePtr New(const YAML::Mark& mark, YAML::anchor_t anchor) {
    if (!problem_.empty()) return nullptr;
    if (++nodes_ > kMaxDocumentNodes) {
      Fail(mark, absl::StrCat("the document has more than ", kMaxDocumentNodes, " values"));
      return nullptr;
    }
    auto node = std::make_shared<YamlNode>();
    node->where = Where(mark);
    if (anchor != YAML::NullAnchor) anchors_[anchor] = node;
    return node;
  }

  void Open(const YAML::Mark& mark, YAML::anchor_t anchor, YamlNode::Kind kind) {
    YamlNodePtr node = New(mark, anchor);
    if (!node) return;
    if (levels_.size() >= static_cast<size_t>(kMaxDocumentDepth)) {
      Fail(mark, absl::StrCat("the document is nested deeper than ", kMaxDocumentDepth, " levels"));
      return;
    }
    if (!levels_.empty() && levels_.back().node->kind == YamlNode::Kind::kMap && !levels_.back().has_key) {
      Fail(mark, "a key must be a name, not a list or a map");
      return;
    }
    node->kind = kind;
    Add(node);
    levels_.push_back({.node = std::move(node)});
  }
  void Close() {
    if (problem_.empty()) levels_.pop_back();
  }

  void Add(YamlNodePtr node) {
    if (levels_.empty()) {
      root_ = std::move(node);
      return;
    }
    Level& level = levels_.back();
    if (level.node->kind == YamlNode::Kind::kList) {
      level.node->items.push_back(std::move(node));
    } else if (!level.has_key) {
      if (node->kind != YamlNode::Kind::kScalar) {
        problem_ = absl::StrCat(node->where, ": a key must be a name, not ",
                                node->kind == YamlNode::Kind::kNull ? "empty" : "a list or a map");
        return;
      }
      level.key = node->text;
      level.has_key = true;
    } else {
      level.node->entries.push_back({std::move(level.key), std::move(node)});
      level.key.clear();
      level.has_key = false;
    }
  }

  const std::string where_;
  std::string problem_;
  int nodes_ = 0;
  YamlNodePtr root_;
  std::vector<Level> levels_;
  std::map<YAML::anchor_t, YamlNodePtr> anchors_;
};

bool ReadHex4(absl::string_view text, unsigned* code) {
  if (text.size() < 4) return false;
  *code = 0;
  for (char c : text.substr(0, 4)) {
    if (!absl::ascii_isxdigit(static_cast<unsigned char>(c))) return false;
    *code = *code * 16 + static_cast<unsigned>(absl::ascii_isdigit(static_cast<unsigned char>(c))
                                                   ? c - '0'
                                                   : absl::ascii_tolower(static_cast<unsigned char>(c)) - 'a' + 10);
  }
  return true;
}

// JSON writes characters beyond U+FFFF as two escapes, which YAML does not know: "\ud83d\ude00" -> "\U0001f600".
std::string JoinSurrogates(absl::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 >= text.size()) {
      out += text[i];
      continue;
    }
    unsigned high = 0, low = 0;
    if (text[i + 1] == 'u' && ReadHex4(text.substr(i + 2), &high) && high >= 0xd800 && high < 0xdc00 &&
        i + 12 <= text.size() && text.substr(i + 6, 2) == "\\u" && ReadHex4(text.substr(i + 8), &low) &&
        low >= 0xdc00 && low < 0xe000) {
      const unsigned code = 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
      absl::StrAppend(&out, "\\U", absl::Hex(code, absl::kZeroPad8));
      i += 11;
    } else {
      out += text[i];
      out += text[++i];
    }
  }
  return out;
}

absl::Status CheckText(absl::string_view text, absl::string_view prefix) {
  const auto wrong = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat(prefix, what));
  };
  if (text.size() > kMaxDocumentBytes) {
    return wrong(absl::StrCat("the document has ", text.size(), " bytes; the limit is ", kMaxDocumentBytes,
                              " (data belong in files that the document names)"));
  }
  if (!IsValidUtf8(text)) return wrong("the document is not valid UTF-8; save it as UTF-8");
  int line = 1;
  for (char c : text) {
    if (c == '\n') ++line;
    if (absl::ascii_iscntrl(static_cast<unsigned char>(c)) && c != '\n' && c != '\r' && c != '\t') {
      return wrong(absl::StrCat("line ", line, ": a control character (code ", static_cast<int>(c),
                                "); is this a text file?"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<YamlNodePtr> ParseYaml(absl::string_view text, absl::string_view where) {
  const std::string prefix = where.empty() ? "" : absl::StrCat(where, ": ");
  absl::Status good = CheckText(text, prefix);
  if (!good.ok()) return good;
  const absl::string_view start = absl::StripLeadingAsciiWhitespace(text);
  const bool json = !start.empty() && (start[0] == '{' || start[0] == '[' || start[0] == '"');
  // The end marker below is no line of the user's.
  const int lines = 1 + static_cast<int>(std::count(text.begin(), text.end(), '\n'));
  TreeBuilder builder{std::string(where)};
  // yaml-cpp reports by exceptions; this is their door.
  try {
    // With an end marker yaml-cpp sees a quote that is never closed; without it, it takes the rest of the text for a value.
    std::istringstream stream(absl::StrCat(json ? JoinSurrogates(text) : std::string(text), "\n...\n"));
    YAML::Parser parser(stream);
    const bool any = parser.HandleNextDocument(builder);
    if (!builder.problem().empty()) return absl::InvalidArgumentError(builder.problem());
    // An override may be empty (`x=~`), a file may not.
    if (!any || builder.root() == nullptr || (where.empty() && builder.root()->kind == YamlNode::Kind::kNull)) {
      return absl::InvalidArgumentError(absl::StrCat(prefix, "the document is empty"));
    }
    TreeBuilder rest{std::string(where)};
    if (parser.HandleNextDocument(rest)) {
      return absl::InvalidArgumentError(
          absl::StrCat(prefix, "there is a second document (after '---'); one file is one job"));
    }
  } catch (const YAML::Exception& error) {
    const std::string place = !where.empty()         ? prefix
                              : error.mark.is_null() ? ""
                                                     : absl::StrCat("line ", std::min(error.mark.line + 1, lines), ": ");
    const bool unclosed = error.msg == YAML::ErrorMsg::DOC_IN_SCALAR || error.msg == YAML::ErrorMsg::EOF_IN_SCALAR;
    return absl::InvalidArgumentError(
        absl::StrCat(place, "not valid YAML: ", unclosed ? "the text ends inside quotes that are never closed" : error.msg));
  } catch (const std::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(prefix, "not valid YAML: ", error.what()));
  }
  return builder.root();
}

}  // namespace itwin
