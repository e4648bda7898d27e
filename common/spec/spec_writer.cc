#include <google/protobuf/descriptor.h>
#include <google/protobuf/duration.pb.h>
#include <google/protobuf/message.h>
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/check.h"
#include "common/spec/spec_document.h"

namespace itwin {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

// Plain only where no reader of YAML could take it for anything else.
void EmitText(YAML::Emitter& out, const std::string& text, bool always_quoted = false) {
  const bool plain = !always_quoted && !text.empty() && text.size() <= 64 &&
                     absl::ascii_isalpha(static_cast<unsigned char>(text[0])) &&
                     std::all_of(text.begin(), text.end(), [](char c) {
                       return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-' || c == '.' ||
                              c == '/';
                     });
  const std::string lower = absl::AsciiStrToLower(text);
  const bool reserved = lower == "true" || lower == "false" || lower == "null" || lower == "yes" || lower == "no" ||
                        lower == "on" || lower == "off" || lower == "y" || lower == "n";
  if (plain && !reserved) {
    out << text;
  } else {
    out << YAML::DoubleQuoted << text;
  }
}

// The shortest digits that read back to the same number.
std::string NumberText(double value) {
  if (std::isnan(value)) return ".nan";
  if (std::isinf(value)) return value > 0 ? ".inf" : "-.inf";
  for (int digits = 6; digits <= 17; ++digits) {
    char text[40];
    std::snprintf(text, sizeof text, "%.*g", digits, value);
    if (std::strtod(text, nullptr) == value) return text;
  }
  return absl::StrCat(value);
}

std::string DurationText(const google::protobuf::Duration& duration) {
  const absl::Duration value = absl::Seconds(duration.seconds()) + absl::Nanoseconds(duration.nanos());
  return absl::FormatDuration(value);
}

void EmitValue(YAML::Emitter& out, const google::protobuf::Value& value) {
  using google::protobuf::Value;
  switch (value.kind_case()) {
    case Value::kBoolValue: out << value.bool_value(); return;
    case Value::kNumberValue: out << NumberText(value.number_value()); return;
    case Value::kStringValue: EmitText(out, value.string_value()); return;
    case Value::kListValue:
      out << YAML::Flow << YAML::BeginSeq;
      for (const Value& item : value.list_value().values()) EmitValue(out, item);
      out << YAML::EndSeq;
      return;
    case Value::kStructValue: {
      const std::map<std::string, Value> sorted(value.struct_value().fields().begin(),
                                                value.struct_value().fields().end());
      out << YAML::Flow << YAML::BeginMap;
      for (const auto& [key, item] : sorted) {
        out << YAML::Key;
        EmitText(out, key, true);
        out << YAML::Value;
        EmitValue(out, item);
      }
      out << YAML::EndMap;
      return;
    }
    case Value::kNullValue:
    case Value::KIND_NOT_SET:
      out << YAML::Null;
      return;
  }
}

void EmitMessage(YAML::Emitter& out, const Message& message);

void EmitElement(YAML::Emitter& out, const Message& message, const FieldDescriptor* field, int index) {
  const Reflection* reflection = message.GetReflection();
  const bool repeated = index >= 0;
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      EmitText(out, repeated ? reflection->GetRepeatedString(message, field, index)
                             : reflection->GetString(message, field));
      return;
    case FieldDescriptor::CPPTYPE_INT32:
      out << (repeated ? reflection->GetRepeatedInt32(message, field, index) : reflection->GetInt32(message, field));
      return;
    case FieldDescriptor::CPPTYPE_INT64:
      out << (repeated ? reflection->GetRepeatedInt64(message, field, index) : reflection->GetInt64(message, field));
      return;
    case FieldDescriptor::CPPTYPE_UINT32:
      out << (repeated ? reflection->GetRepeatedUInt32(message, field, index) : reflection->GetUInt32(message, field));
      return;
    case FieldDescriptor::CPPTYPE_UINT64:
      out << (repeated ? reflection->GetRepeatedUInt64(message, field, index) : reflection->GetUInt64(message, field));
      return;
    case FieldDescriptor::CPPTYPE_DOUBLE:
      out << NumberText(repeated ? reflection->GetRepeatedDouble(message, field, index)
                                 : reflection->GetDouble(message, field));
      return;
    case FieldDescriptor::CPPTYPE_BOOL:
      out << (repeated ? reflection->GetRepeatedBool(message, field, index) : reflection->GetBool(message, field));
      return;
    case FieldDescriptor::CPPTYPE_MESSAGE:
      EmitMessage(out, repeated ? reflection->GetRepeatedMessage(message, field, index)
                                : reflection->GetMessage(message, field));
      return;
    case FieldDescriptor::CPPTYPE_FLOAT:
    case FieldDescriptor::CPPTYPE_ENUM:
      break;
  }
  ITWIN_CHECK(false);  // no field of a job spec has such a type; a test writes every field there is
}

void EmitStringMap(YAML::Emitter& out, const Message& message, const FieldDescriptor* field) {
  std::map<std::string, std::string> sorted;
  const Reflection* reflection = message.GetReflection();
  for (int i = 0; i < reflection->FieldSize(message, field); ++i) {
    const Message& entry = reflection->GetRepeatedMessage(message, field, i);
    const auto text = [&](const FieldDescriptor* f) { return entry.GetReflection()->GetString(entry, f); };
    sorted[text(entry.GetDescriptor()->map_key())] = text(entry.GetDescriptor()->map_value());
  }
  out << YAML::BeginMap;
  for (const auto& [key, value] : sorted) {
    out << YAML::Key;
    EmitText(out, key);
    out << YAML::Value;
    EmitText(out, value);
  }
  out << YAML::EndMap;
}

void EmitMessage(YAML::Emitter& out, const Message& message) {
  if (message.GetDescriptor() == google::protobuf::Duration::descriptor()) {
    out << DurationText(static_cast<const google::protobuf::Duration&>(message));
    return;
  }
  if (message.GetDescriptor() == google::protobuf::Struct::descriptor()) {
    google::protobuf::Value value;
    *value.mutable_struct_value() = static_cast<const google::protobuf::Struct&>(message);
    EmitValue(out, value);
    return;
  }
  const Reflection* reflection = message.GetReflection();
  std::vector<const FieldDescriptor*> fields;
  for (int i = 0; i < message.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message.GetDescriptor()->field(i);
    if (field->is_repeated() ? reflection->FieldSize(message, field) > 0 : reflection->HasField(message, field)) {
      fields.push_back(field);
    }
  }
  if (fields.empty()) {
    out << YAML::Flow << YAML::BeginMap << YAML::EndMap;
    return;
  }
  out << YAML::BeginMap;
  for (const FieldDescriptor* field : fields) {
    out << YAML::Key << field->name() << YAML::Value;
    if (field->is_map()) {
      EmitStringMap(out, message, field);
    } else if (field->is_repeated()) {
      if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) out << YAML::Flow;
      out << YAML::BeginSeq;
      for (int i = 0; i < reflection->FieldSize(message, field); ++i) EmitElement(out, message, field, i);
      out << YAML::EndSeq;
    } else {
      EmitElement(out, message, field, -1);
    }
  }
  out << YAML::EndMap;
}

}  // namespace

std::string SpecToJson(const v1::JobSpec& spec) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string out;
  // Fails only for durations beyond protobuf's range or texts that are not UTF-8; ValidateSpec refuses both.
  ITWIN_CHECK(google::protobuf::util::MessageToJsonString(spec, &out, options).ok());
  return out;
}

std::string SpecToYaml(const v1::JobSpec& spec) {
  YAML::Emitter out;
  out.SetIndent(2);
  EmitMessage(out, spec);
  return absl::StrCat(out.c_str(), "\n");
}

}  // namespace itwin
