#include "common/spec/spec_document.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/duration.pb.h>
#include <google/protobuf/message.h>
#include <google/protobuf/struct.pb.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/time.h"
#include "common/spec/checks.h"
#include "common/spec/nearest_name.h"
#include "common/spec/yaml_tree.h"
#include "common/status_macros.h"

namespace itwin {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::OneofDescriptor;
using google::protobuf::Reflection;

constexpr size_t kMaxShownText = 60;
constexpr size_t kMaxPathSegments = 32;

bool IsDuration(const Descriptor* type) { return type->full_name() == "google.protobuf.Duration"; }
bool IsStruct(const Descriptor* type) { return type->full_name() == "google.protobuf.Struct"; }

std::string Shown(absl::string_view text) {
  const std::string cut = absl::Utf8SafeCEscape(text.substr(0, kMaxShownText));
  return absl::StrCat("'", cut, text.size() > kMaxShownText ? "..." : "", "'");
}

std::string Describe(const YamlNode& node) {
  switch (node.kind) {
    case YamlNode::Kind::kNull: return "nothing";
    case YamlNode::Kind::kList: return "a list";
    case YamlNode::Kind::kMap: return "a map";
    case YamlNode::Kind::kScalar: return absl::StrCat(node.quoted ? "the text " : "", Shown(node.text));
  }
  return "";
}

std::string Join(const std::string& path, absl::string_view name) {
  return path.empty() ? std::string(name) : absl::StrCat(path, ".", name);
}

std::vector<std::string> FieldNames(const Descriptor* type) {
  std::vector<std::string> out;
  for (int i = 0; i < type->field_count(); ++i) out.push_back(type->field(i)->name());
  return out;
}

std::vector<std::string> Alternatives(const OneofDescriptor* oneof) {
  std::vector<std::string> out;
  for (int i = 0; i < oneof->field_count(); ++i) out.push_back(oneof->field(i)->name());
  return out;
}

// Every field of a job by name, with the group it lies in: for keys at the wrong level.
void CollectFields(const Descriptor* type, const std::string& prefix,
                   std::multimap<std::string, std::string>* out) {
  for (int i = 0; i < type->field_count(); ++i) {
    const FieldDescriptor* field = type->field(i);
    const std::string path = Join(prefix, field->name());
    out->emplace(field->name(), path);
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field->is_map() &&
        field->message_type()->file()->package() != "google.protobuf") {
      CollectFields(field->message_type(), path, out);
    }
  }
}

const std::multimap<std::string, std::string>& FieldsByName() {
  static const auto* const kFields = [] {
    auto* fields = new std::multimap<std::string, std::string>;
    CollectFields(v1::JobSpec::descriptor(), "", fields);
    return fields;
  }();
  return *kFields;
}

// "1h30m", "90s", "2d", "1.5h", or seconds as a number.
std::optional<absl::Duration> ParseDurationText(absl::string_view text) {
  double seconds = 0;
  if (absl::SimpleAtod(text, &seconds)) return absl::Seconds(seconds);
  absl::Duration days = absl::ZeroDuration();
  const size_t d = text.find('d');
  if (d != absl::string_view::npos) {
    double count = 0;
    if (!absl::SimpleAtod(text.substr(0, d), &count)) return std::nullopt;
    days = absl::Hours(24) * count;
    text = text.substr(d + 1);
    if (text.empty()) return days;
  }
  absl::Duration rest;
  if (!absl::ParseDuration(std::string(text), &rest)) return std::nullopt;
  return days + rest;
}

bool IsInteger(absl::string_view text) {
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.remove_prefix(1);
  return !text.empty() && std::all_of(text.begin(), text.end(),
                                      [](char c) { return absl::ascii_isdigit(static_cast<unsigned char>(c)); });
}

std::optional<double> ParseReal(absl::string_view text) {
  if (text.empty() || absl::ascii_isspace(static_cast<unsigned char>(text.front())) ||
      absl::ascii_isspace(static_cast<unsigned char>(text.back()))) {
    return std::nullopt;
  }
  const std::string lower = absl::AsciiStrToLower(text);
  if (lower == ".inf" || lower == "+.inf") return std::numeric_limits<double>::infinity();
  if (lower == "-.inf") return -std::numeric_limits<double>::infinity();
  if (lower == ".nan") return std::numeric_limits<double>::quiet_NaN();
  double value = 0;
  if (absl::StartsWith(lower, "0x") || !absl::SimpleAtod(text, &value)) return std::nullopt;
  return value;
}

std::optional<bool> ParseBool(absl::string_view text) {
  if (text == "true" || text == "True" || text == "TRUE") return true;
  if (text == "false" || text == "False" || text == "FALSE") return false;
  return std::nullopt;
}

// Fills a message from a tree and collects what is wrong on the way.
class DocumentReader {
 public:
  void ReadRoot(const YamlNode& root, v1::JobSpec* spec) {
    if (root.kind != YamlNode::Kind::kMap) {
      Report(root, "", absl::StrCat("found ", Describe(root),
                                    "; a job is a map of fields such as name, resources and train"));
      return;
    }
    ReadMap(root, "", spec, 0);
  }

  absl::Status status() const { return problems_.status(); }

 private:
  void Report(const YamlNode& node, const std::string& path, absl::string_view what) {
    problems_.Add(absl::StrCat(node.where, ": ", path, path.empty() ? "" : ": ", what));
  }

  // False (once reported) when the walk must end: aliases can make a small text a huge tree.
  bool Enter(const YamlNode& node, const std::string& path, int depth) {
    if (exhausted_) return false;
    if (depth > kMaxDocumentDepth || ++nodes_ > kMaxDocumentNodes) {
      exhausted_ = true;
      Report(node, path, depth > kMaxDocumentDepth
                             ? absl::StrCat("nested deeper than ", kMaxDocumentDepth, " levels")
                             : absl::StrCat("the document has more than ", kMaxDocumentNodes,
                                            " values (aliases count as often as they are used)"));
      return false;
    }
    return true;
  }

  void WrongType(const YamlNode& node, const std::string& path, absl::string_view expected) {
    if (node.kind == YamlNode::Kind::kNull) {
      Report(node, path, absl::StrCat("has no value; give ", expected, " or leave the key out"));
    } else {
      Report(node, path, absl::StrCat("found ", Describe(node), ", expected ", expected));
    }
  }

  void UnknownKey(const YamlNode& node, const std::string& path, const std::string& key, const Descriptor* type) {
    const std::vector<std::string> here = FieldNames(type);
    std::string hint;
    if (key == "<<") {
      hint = "merge keys are not supported; write the fields out";
    } else if (const auto [first, last] = FieldsByName().equal_range(key); first != last) {
      std::vector<std::string> places;
      for (auto it = first; it != last && places.size() < 4; ++it) places.push_back(absl::StrCat("'", it->second, "'"));
      hint = absl::StrCat("did you mean ", absl::StrJoin(places, " or "), "?");
    } else if (const std::optional<std::string> nearest = NearestName(key, here)) {
      hint = absl::StrCat("did you mean '", *nearest, "'?");
    } else {
      std::vector<std::string> all;
      for (const auto& [name, place] : FieldsByName()) all.push_back(name);
      const std::optional<std::string> elsewhere = NearestName(key, all);
      hint = elsewhere ? absl::StrCat("did you mean '", FieldsByName().find(*elsewhere)->second, "'?")
                       : UnknownNameHint(key, here);
    }
    Report(node, Join(path, absl::Utf8SafeCEscape(key.substr(0, kMaxShownText))),
           absl::StrCat("unknown key; ", hint));
  }

  // What a message field may be given instead, for errors.
  std::string ExpectedOf(const Descriptor* type) {
    if (type->real_oneof_decl_count() > 0) {
      return absl::StrCat("a map with one of ", absl::StrJoin(Alternatives(type->oneof_decl(0)), ", "));
    }
    std::vector<std::string> names = FieldNames(type);
    if (names.size() > 4) names.resize(4);
    return absl::StrCat("a map with fields such as ", absl::StrJoin(names, ", "));
  }

  void ReadMessage(const YamlNode& node, const std::string& path, Message* message, int depth) {
    if (!Enter(node, path, depth)) return;
    const Descriptor* type = message->GetDescriptor();
    if (IsDuration(type)) return ReadDuration(node, path, message);
    if (IsStruct(type)) return ReadStruct(node, path, static_cast<google::protobuf::Struct*>(message), depth);
    switch (node.kind) {
      case YamlNode::Kind::kNull:
        return;  // `adam:` is the alternative with its defaults
      case YamlNode::Kind::kMap:
        return ReadMap(node, path, message, depth);
      case YamlNode::Kind::kScalar:
        return ReadAlternativeByName(node, path, message);
      case YamlNode::Kind::kList:
        return WrongType(node, path, ExpectedOf(type));
    }
  }

  // `optimizer: adam`
  void ReadAlternativeByName(const YamlNode& node, const std::string& path, Message* message) {
    const Descriptor* type = message->GetDescriptor();
    const OneofDescriptor* oneof = type->real_oneof_decl_count() > 0 ? type->oneof_decl(0) : nullptr;
    const bool by_name = oneof != nullptr && oneof->field(0)->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE &&
                         oneof->field_count() == type->field_count();
    if (!by_name) return WrongType(node, path, ExpectedOf(type));
    const FieldDescriptor* field = type->FindFieldByName(node.text);
    if (field == nullptr) {
      return Report(node, path, absl::StrCat(Shown(node.text), " is unknown; ",
                                             UnknownNameHint(node.text, Alternatives(oneof))));
    }
    message->GetReflection()->MutableMessage(message, field);
  }

  void ReadMap(const YamlNode& node, const std::string& path, Message* message, int depth) {
    const Descriptor* type = message->GetDescriptor();
    std::set<std::string> seen;
    std::map<const OneofDescriptor*, std::string> taken;
    for (const auto& [key, value] : node.entries) {
      if (exhausted_) return;
      const FieldDescriptor* field = type->FindFieldByName(key);
      if (field == nullptr) {
        UnknownKey(*value, path, key, type);
        continue;
      }
      const std::string at = Join(path, key);
      if (!seen.insert(key).second) {
        Report(*value, at, "is given twice; keep one");
        continue;
      }
      if (const OneofDescriptor* oneof = field->real_containing_oneof()) {
        const auto [other, fresh] = taken.emplace(oneof, key);
        if (!fresh) {
          Report(*value, path.empty() ? key : path,
                 absl::StrCat("'", other->second, "' and '", key, "' are both given; keep one"));
          continue;
        }
      }
      ReadField(*value, at, message, field, depth + 1);
    }
  }

  void ReadField(const YamlNode& node, const std::string& path, Message* message, const FieldDescriptor* field,
                 int depth) {
    const Reflection* reflection = message->GetReflection();
    if (field->is_map()) return ReadStringMap(node, path, message, field, depth);
    if (field->is_repeated()) {
      if (!Enter(node, path, depth)) return;
      if (node.kind != YamlNode::Kind::kList) {
        return WrongType(node, path, node.kind == YamlNode::Kind::kScalar
                                         ? absl::StrCat("a list such as [", node.text.substr(0, 20), "]")
                                         : "a list");
      }
      for (size_t i = 0; i < node.items.size() && !exhausted_; ++i) {
        const YamlNode& item = *node.items[i];
        const std::string at = absl::StrCat(path, "[", i, "]");
        if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
          ReadMessage(item, at, reflection->AddMessage(message, field), depth + 1);
        } else {
          ReadScalar(item, at, message, field, depth + 1);
        }
      }
      return;
    }
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      return ReadMessage(node, path, reflection->MutableMessage(message, field), depth);
    }
    ReadScalar(node, path, message, field, depth);
  }

  // map<string, string>: values as they are written, so that `OMP_NUM_THREADS: 4` is "4".
  void ReadStringMap(const YamlNode& node, const std::string& path, Message* message, const FieldDescriptor* field,
                     int depth) {
    if (!Enter(node, path, depth)) return;
    if (node.kind == YamlNode::Kind::kNull) return;
    if (node.kind != YamlNode::Kind::kMap) return WrongType(node, path, "a map of names to texts");
    std::set<std::string> seen;
    for (const auto& [key, value] : node.entries) {
      const std::string at = Join(path, absl::Utf8SafeCEscape(key.substr(0, kMaxShownText)));
      if (!Enter(*value, at, depth + 1)) return;
      if (!seen.insert(key).second) {
        Report(*value, at, "is given twice; keep one");
      } else if (value->kind != YamlNode::Kind::kScalar) {
        WrongType(*value, at, "text (\"\" for empty)");
      } else {
        Message* entry = message->GetReflection()->AddMessage(message, field);
        const Descriptor* type = entry->GetDescriptor();
        entry->GetReflection()->SetString(entry, type->map_key(), key);
        entry->GetReflection()->SetString(entry, type->map_value(), value->text);
      }
    }
  }

  void ReadScalar(const YamlNode& node, const std::string& path, Message* message, const FieldDescriptor* field,
                  int depth) {
    if (!Enter(node, path, depth)) return;
    const bool repeated = field->is_repeated();
    const Reflection* reflection = message->GetReflection();
    const bool scalar = node.kind == YamlNode::Kind::kScalar;
    const auto integer = [&](auto zero, bool quoted_is_fine, auto set, auto add) {
      using T = decltype(zero);
      constexpr bool kSigned = std::numeric_limits<T>::is_signed;
      const absl::string_view expected = kSigned ? "a whole number" : "a whole number from 0";
      // Protobuf's JSON writes 64-bit integers as strings.
      if (!scalar || (node.quoted && !quoted_is_fine) || !IsInteger(node.text)) {
        return WrongType(node, path, expected);
      }
      T value = 0;
      if (!absl::SimpleAtoi(node.text, &value)) {
        return Report(node, path,
                      absl::StrCat(Shown(node.text), " is out of range; use a whole number from ",
                                   std::numeric_limits<T>::min(), " to ", std::numeric_limits<T>::max()));
      }
      repeated ? (reflection->*add)(message, field, value) : (reflection->*set)(message, field, value);
    };
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_STRING:
        if (!scalar) return WrongType(node, path, "text");
        repeated ? reflection->AddString(message, field, node.text) : reflection->SetString(message, field, node.text);
        return;
      case FieldDescriptor::CPPTYPE_INT32:
        return integer(int32_t{0}, false, &Reflection::SetInt32, &Reflection::AddInt32);
      case FieldDescriptor::CPPTYPE_INT64:
        return integer(int64_t{0}, true, &Reflection::SetInt64, &Reflection::AddInt64);
      case FieldDescriptor::CPPTYPE_UINT32:
        return integer(uint32_t{0}, false, &Reflection::SetUInt32, &Reflection::AddUInt32);
      case FieldDescriptor::CPPTYPE_UINT64:
        return integer(uint64_t{0}, true, &Reflection::SetUInt64, &Reflection::AddUInt64);
      case FieldDescriptor::CPPTYPE_DOUBLE: {
        const std::optional<double> value = scalar && !node.quoted ? ParseReal(node.text) : std::nullopt;
        if (!value) return WrongType(node, path, "a number");
        repeated ? reflection->AddDouble(message, field, *value) : reflection->SetDouble(message, field, *value);
        return;
      }
      case FieldDescriptor::CPPTYPE_BOOL: {
        const std::optional<bool> value = scalar && !node.quoted ? ParseBool(node.text) : std::nullopt;
        if (!value) return WrongType(node, path, "true or false");
        repeated ? reflection->AddBool(message, field, *value) : reflection->SetBool(message, field, *value);
        return;
      }
      case FieldDescriptor::CPPTYPE_FLOAT:
      case FieldDescriptor::CPPTYPE_ENUM:
      case FieldDescriptor::CPPTYPE_MESSAGE:
        break;
    }
    Report(node, path, "a field of this type cannot be read from a document");  // a test reads every field there is
  }

  void ReadDuration(const YamlNode& node, const std::string& path, Message* message) {
    constexpr absl::string_view kExpected = "a duration such as 30m, 1h30m, 90s or a number of seconds";
    const std::optional<absl::Duration> value =
        node.kind == YamlNode::Kind::kScalar ? ParseDurationText(node.text) : std::nullopt;
    // protobuf's limit is ten thousand years; NaN is no duration
    if (!value || *value > absl::Hours(87'000'000) || *value < -absl::Hours(87'000'000)) {
      return WrongType(node, path, kExpected);
    }
    auto* duration = static_cast<google::protobuf::Duration*>(message);
    absl::Duration rest;
    duration->set_seconds(absl::IDivDuration(*value, absl::Seconds(1), &rest));
    duration->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(rest)));
  }

  void ReadStruct(const YamlNode& node, const std::string& path, google::protobuf::Struct* out, int depth) {
    if (node.kind == YamlNode::Kind::kNull) return;
    if (node.kind != YamlNode::Kind::kMap) return WrongType(node, path, "a map of options");
    for (const auto& [key, value] : node.entries) {
      const std::string at = Join(path, absl::Utf8SafeCEscape(key.substr(0, kMaxShownText)));
      if (out->fields().contains(key)) {
        Report(*value, at, "is given twice; keep one");
        continue;
      }
      ReadValue(*value, at, &(*out->mutable_fields())[key], depth + 1);
      if (exhausted_) return;
    }
  }

  // Free-form: here the looks of a scalar decide, as in YAML's core schema.
  void ReadValue(const YamlNode& node, const std::string& path, google::protobuf::Value* out, int depth) {
    if (!Enter(node, path, depth)) return;
    switch (node.kind) {
      case YamlNode::Kind::kNull:
        out->set_null_value(google::protobuf::NULL_VALUE);
        return;
      case YamlNode::Kind::kMap:
        return ReadStruct(node, path, out->mutable_struct_value(), depth);
      case YamlNode::Kind::kList: {
        google::protobuf::ListValue* list = out->mutable_list_value();
        for (size_t i = 0; i < node.items.size() && !exhausted_; ++i) {
          ReadValue(*node.items[i], absl::StrCat(path, "[", i, "]"), list->add_values(), depth + 1);
        }
        return;
      }
      case YamlNode::Kind::kScalar:
        break;
    }
    const bool may_be_word = node.quoted;
    const std::optional<bool> truth = may_be_word ? std::nullopt : ParseBool(node.text);
    const bool numeric = !node.text.empty() && (absl::ascii_isdigit(static_cast<unsigned char>(node.text[0])) ||
                                                absl::StrContains("+-.", node.text.substr(0, 1)));
    const std::optional<double> number = may_be_word || !numeric ? std::nullopt : ParseReal(node.text);
    if (truth) {
      out->set_bool_value(*truth);
    } else if (number && !std::isfinite(*number)) {
      Report(node, path, absl::StrCat(Shown(node.text), " is not a finite number"));
    } else if (number) {
      out->set_number_value(*number);
    } else {
      out->set_string_value(node.text);
    }
  }

  Problems problems_;
  int nodes_ = 0;
  bool exhausted_ = false;
};

// ---- overrides ----------------------------------------------------------------------------------------------

struct PathSegment {
  std::string name;
  std::vector<size_t> indices;  // "a[0][1]"
};

// "train.data.transforms[0].crop". Nothing when it is no path.
std::optional<std::vector<PathSegment>> ParsePath(absl::string_view path) {
  std::vector<PathSegment> out;
  size_t at = 0;
  while (true) {
    PathSegment segment;
    const size_t end = std::min(path.find_first_of(".[", at), path.size());
    segment.name = std::string(path.substr(at, end - at));
    if (segment.name.empty()) return std::nullopt;
    at = end;
    while (at < path.size() && path[at] == '[') {
      const size_t close = path.find(']', at);
      size_t index = 0;
      if (close == absl::string_view::npos || !IsInteger(path.substr(at + 1, close - at - 1)) ||
          !absl::SimpleAtoi(path.substr(at + 1, close - at - 1), &index)) {
        return std::nullopt;
      }
      segment.indices.push_back(index);
      at = close + 1;
    }
    out.push_back(std::move(segment));
    if (out.size() > kMaxPathSegments) return std::nullopt;
    if (at == path.size()) return out;
    if (path[at] != '.') return std::nullopt;
    ++at;
  }
}

// One override on its way down the tree. Nodes on the way are copied: an alias may share them.
class Override {
 public:
  static absl::Status Apply(absl::string_view text, YamlNodePtr* root) {
    const std::string where = absl::StrCat("override ", Shown(text));
    const size_t equals = text.find('=');
    const auto wrong = [&](absl::string_view what) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": ", what));
    };
    const absl::string_view path =
        absl::StripAsciiWhitespace(text.substr(0, std::min(equals, text.size())));
    const std::optional<std::vector<PathSegment>> segments = ParsePath(path);
    if (equals == absl::string_view::npos || !segments) {
      return wrong("write it as field=value, for example train.epochs=5");
    }
    const absl::string_view value = absl::StripAsciiWhitespace(text.substr(equals + 1));
    YamlNodePtr node;
    if (value.empty()) {
      node = std::make_shared<YamlNode>(YamlNode{.kind = YamlNode::Kind::kScalar, .where = where, .quoted = true});
    } else {
      ITWIN_ASSIGN_OR_RETURN(node, ParseYaml(value, where));
    }
    if ((*root)->kind != YamlNode::Kind::kMap) return absl::OkStatus();  // the reader says what is wrong with it
    Override change(where, *segments, std::move(node));
    return change.Descend(0, v1::JobSpec::descriptor(), "", root);
  }

 private:
  Override(std::string where, std::vector<PathSegment> segments, YamlNodePtr value)
      : where_(std::move(where)), segments_(std::move(segments)), value_(std::move(value)) {}

  absl::Status Wrong(const std::string& path, absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat(where_, ": ", path, ": ", what));
  }

  // `*slot` holds (or shall hold) the map in which segment `depth` is a key. `type` is null in free-form maps.
  absl::Status Descend(size_t depth, const Descriptor* type, const std::string& path, YamlNodePtr* slot) {
    *slot = std::make_shared<YamlNode>(**slot);
    YamlNode& map = **slot;
    if (map.kind == YamlNode::Kind::kScalar && type != nullptr && type->FindFieldByName(map.text) != nullptr) {
      // `optimizer: adam` opened up to `{adam: }`
      auto empty = std::make_shared<YamlNode>(YamlNode{.where = map.where});
      map = YamlNode{.kind = YamlNode::Kind::kMap, .where = map.where, .entries = {{map.text, std::move(empty)}}};
    }
    if (map.kind != YamlNode::Kind::kMap) map = YamlNode{.kind = YamlNode::Kind::kMap, .where = where_};
    const PathSegment& segment = segments_[depth];
    const std::string at = Join(path, segment.name);
    const FieldDescriptor* field = type == nullptr ? nullptr : type->FindFieldByName(segment.name);
    if (field != nullptr) DropAlternatives(field, &map);
    YamlNodePtr* child = Child(&map, segment.name);
    for (const size_t index : segment.indices) {
      if ((*child)->kind != YamlNode::Kind::kList || index >= (*child)->items.size()) {
        return Wrong(at, (*child)->kind == YamlNode::Kind::kList
                             ? absl::StrCat("there is no element ", index, "; the list has ", (*child)->items.size())
                             : "is not a list in the document; set the whole list");
      }
      *child = std::make_shared<YamlNode>(**child);
      child = &(*child)->items[index];
    }
    const bool last = depth + 1 == segments_.size();
    if (last) {
      *child = value_;
      return absl::OkStatus();
    }
    if (type != nullptr && field == nullptr) {
      return Replace(child);  // unknown key: the reader finds it and gives the hint
    }
    if (field == nullptr || (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && IsStruct(field->message_type()))) {
      return Descend(depth + 1, nullptr, at, child);
    }
    if (field->is_map()) {
      // The rest is one key, whatever dots it has.
      std::string key = segments_[depth + 1].name;
      for (size_t i = depth + 2; i < segments_.size(); ++i) absl::StrAppend(&key, ".", segments_[i].name);
      segments_.resize(depth + 1);
      segments_.push_back({.name = std::move(key), .indices = {}});
      return Descend(depth + 1, nullptr, at, child);
    }
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE || IsDuration(field->message_type())) {
      return Wrong(at, "is one value and has no fields");
    }
    if (field->is_repeated() && segment.indices.empty()) {
      return Wrong(at, absl::StrCat("is a list; name the element, as in ", at, "[0]"));
    }
    return Descend(depth + 1, field->message_type(), at, child);
  }

  absl::Status Replace(YamlNodePtr* child) {
    *child = value_;
    return absl::OkStatus();
  }

  // Naming one alternative of a oneof takes the place of the one in the document.
  static void DropAlternatives(const FieldDescriptor* field, YamlNode* map) {
    const OneofDescriptor* oneof = field->real_containing_oneof();
    if (oneof == nullptr) return;
    map->entries.erase(std::remove_if(map->entries.begin(), map->entries.end(),
                                      [&](const YamlEntry& entry) {
                                        const FieldDescriptor* other =
                                            field->containing_type()->FindFieldByName(entry.key);
                                        return other != nullptr && other != field &&
                                               other->real_containing_oneof() == oneof;
                                      }),
                       map->entries.end());
  }

  YamlNodePtr* Child(YamlNode* map, const std::string& key) {
    for (YamlEntry& entry : map->entries) {
      if (entry.key == key) return &entry.value;
    }
    map->entries.push_back({key, std::make_shared<YamlNode>(YamlNode{.where = where_})});
    return &map->entries.back().value;
  }

  const std::string where_;
  std::vector<PathSegment> segments_;
  YamlNodePtr value_;
};

}  // namespace

absl::StatusOr<v1::JobSpec> ParseSpecDocument(absl::string_view text, const std::vector<std::string>& overrides) {
  ITWIN_ASSIGN_OR_RETURN(YamlNodePtr root, ParseYaml(text));
  for (const std::string& change : overrides) ITWIN_RETURN_IF_ERROR(Override::Apply(change, &root));
  v1::JobSpec spec;
  DocumentReader reader;
  reader.ReadRoot(*root, &spec);
  ITWIN_RETURN_IF_ERROR(reader.status());
  return spec;
}

}  // namespace itwin
