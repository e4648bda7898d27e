#include "common/spec/validate.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "common/files.h"
#include "common/sha256.h"
#include "common/spec/checks.h"
#include "common/spec/file_references.h"

namespace itwin {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using google::protobuf::Value;

// Limits of spec.proto.
constexpr size_t kMaxSpecBytes = size_t{1} << 20;
constexpr int kMaxNameCharacters = 128;
constexpr int kMaxEnvEntries = 256;
constexpr size_t kMaxEnvBytes = size_t{64} << 10;
constexpr int kMaxLabels = 64;
constexpr int kMaxLabelCharacters = 63;
constexpr int kMaxInputs = 10'000;
constexpr size_t kMaxImageBytes = 1024;
constexpr int64_t kMaxMemoryMib = int64_t{1} << 30;
constexpr size_t kMaxSchedulerName = 256;
constexpr int kMaxExcludedNodes = 1'000;
constexpr int kMaxSchedulerOptions = 16;
constexpr size_t kMaxSchedulerOptionBytes = 512;
constexpr int64_t kMaxRetries = 1'000'000;
constexpr int kMaxArguments = 4'096;
constexpr size_t kMaxArgumentBytes = size_t{128} << 10;  // Linux's limit of one argument
constexpr size_t kMaxReferenceBytes = 4'096;
constexpr int kMaxOptionDepth = 16;

int Characters(absl::string_view utf8) {
  return static_cast<int>(std::count_if(utf8.begin(), utf8.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

bool HasControl(absl::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return absl::ascii_iscntrl(static_cast<unsigned char>(c)); });
}

bool IsEnvName(absl::string_view name) {
  if (name.empty() || absl::ascii_isdigit(static_cast<unsigned char>(name[0]))) return false;
  return std::all_of(name.begin(), name.end(),
                     [](char c) { return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_'; });
}

class JobChecks : SpecChecks {
 public:
  JobChecks() : SpecChecks(&found_) {}

  absl::Status Check(const v1::JobSpec& spec) {
    if (spec.ByteSizeLong() > kMaxSpecBytes) {
      return absl::InvalidArgumentError(absl::StrCat("the spec has ", spec.ByteSizeLong(), " bytes; the limit is ",
                                                     kMaxSpecBytes, " (data belong in files that the spec names)"));
    }
    CheckTexts(spec, "");
    if (!found_.none()) return found_.status();  // what follows shows texts

    if (!spec.name().empty()) CheckName(spec.name());
    CheckSite(spec.site());
    CheckImage(spec.image());
    CheckResources(spec.resources());
    switch (spec.kind_case()) {
      case v1::JobSpec::kTrain: CheckTrain(spec.train(), spec.resources(), &found_); break;
      case v1::JobSpec::kCommand: CheckCommand(spec.command()); break;
      case v1::JobSpec::KIND_NOT_SET:
        Report("train", "is missing; a job needs either `train` or `command`");
        break;
    }
    CheckEnv(spec);
    CheckInputs(spec);
    CheckRetry(spec.retry());
    CheckLabels(spec);
    CheckReferences(spec);
    return found_.status();
  }

 private:
  // All strings of the spec: valid UTF-8 without NUL. Free-form options: finite numbers, bounded depth.
  void CheckTexts(const Message& message, const std::string& prefix) {
    if (const auto* options = dynamic_cast<const google::protobuf::Struct*>(&message)) {
      Value value;
      *value.mutable_struct_value() = *options;
      CheckOption(value, prefix, 0);
      return;
    }
    const Reflection* reflection = message.GetReflection();
    std::vector<const FieldDescriptor*> fields;
    reflection->ListFields(message, &fields);
    for (const FieldDescriptor* field : fields) {
      const std::string path = prefix.empty() ? field->name() : absl::StrCat(prefix, ".", field->name());
      const int count = field->is_repeated() ? reflection->FieldSize(message, field) : 1;
      for (int i = 0; i < count; ++i) {
        const std::string at = field->is_repeated() && !field->is_map() ? absl::StrCat(path, "[", i, "]") : path;
        if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
          CheckTexts(field->is_repeated() ? reflection->GetRepeatedMessage(message, field, i)
                                          : reflection->GetMessage(message, field),
                     at);
        } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_STRING) {
          CheckText(field->is_repeated() ? reflection->GetRepeatedString(message, field, i)
                                         : reflection->GetString(message, field),
                    at);
        }
      }
    }
  }
  void CheckText(const std::string& text, const std::string& path) {
    if (!IsValidUtf8(text)) Report(path, "is not valid UTF-8");
    if (text.find('\0') != std::string::npos) Report(path, "contains a NUL character; remove it");
  }
  void CheckOption(const Value& value, const std::string& path, int depth) {
    if (depth > kMaxOptionDepth) {
      return Report(path, absl::StrCat("is nested deeper than ", kMaxOptionDepth, " levels"));
    }
    switch (value.kind_case()) {
      case Value::kNumberValue:
        if (!std::isfinite(value.number_value())) Report(path, "is not a finite number");
        return;
      case Value::kStringValue:
        return CheckText(value.string_value(), path);
      case Value::kListValue:
        for (int i = 0; i < value.list_value().values_size(); ++i) {
          CheckOption(value.list_value().values(i), absl::StrCat(path, "[", i, "]"), depth + 1);
        }
        return;
      case Value::kStructValue:
        for (const auto& [key, item] : value.struct_value().fields()) {
          CheckText(key, path);
          CheckOption(item, absl::StrCat(path, ".", absl::Utf8SafeCEscape(key.substr(0, kMaxShown))), depth + 1);
        }
        return;
      case Value::kNullValue:
      case Value::kBoolValue:
        return;
      case Value::KIND_NOT_SET:
        Report(path, "has no value");
        return;
    }
  }

  void CheckName(const std::string& name) {
    if (Characters(name) > kMaxNameCharacters) {
      Report("name", absl::StrCat("has ", Characters(name), " characters; use at most ", kMaxNameCharacters));
    }
    if (HasControl(name)) Report("name", "has a control character; use plain text in one line");
  }

  void CheckSite(const std::string& site) {
    const bool good = site.size() <= 64 && std::all_of(site.begin(), site.end(), [](char c) {
                        return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-' || c == '.';
                      });
    if (!good) {
      Report("site", absl::StrCat(Quoted(site), " is no site's name; use letters, digits, '-', '_' and '.', or 'any'"));
    }
  }

  void CheckImage(const std::string& image) {
    if (image.empty() || IsImageName(image)) return;
    Report("image", absl::StrCat(Quoted(image), " is no name of a container image; ", kImageNameRule));
  }

  void CheckResources(const v1::Resources& resources) {
    Range("resources.nodes", resources.nodes(), 0, kMaxNodes);
    Range("resources.ranks_per_node", resources.ranks_per_node(), 0, kMaxPerNode);
    Range("resources.cpus_per_rank", resources.cpus_per_rank(), 0, kMaxPerNode);
    Range("resources.gpus_per_node", resources.gpus_per_node(), 0, kMaxPerNode);
    Range("resources.memory_mib_per_node", resources.memory_mib_per_node(), 0, kMaxMemoryMib);
    if (resources.has_time()) {
      const google::protobuf::Duration& time = resources.time();
      const bool whole = time.nanos() >= 0 && time.nanos() < 1'000'000'000;
      if (!whole || time.seconds() < 1 || time.seconds() > kMaxWallSeconds ||
          (time.seconds() == kMaxWallSeconds && time.nanos() > 0)) {
        const std::string shown = std::abs(static_cast<double>(time.seconds())) < 1e12
                                      ? absl::FormatDuration(absl::Seconds(time.seconds()))
                                      : absl::StrCat(time.seconds(), "s");
        Report("resources.time", absl::StrCat(shown, " is out of range; use 1s to 720h (30 days)"));
      }
    }
    CheckSchedulerNames(resources);
  }

  // What goes to sbatch by name. The script quotes all of it; this is about mistakes that are seen here already.
  void CheckSchedulerNames(const v1::Resources& resources) {
    const auto word = [&](const std::string& field, const std::string& value, absl::string_view more) {
      if (value.empty()) return;
      const bool good = value.size() <= kMaxSchedulerName && value[0] != '-' && std::all_of(value.begin(), value.end(), [&](char c) {
        return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains(more, absl::string_view(&c, 1));
      });
      if (!good) {
        Report(field, absl::StrCat(Quoted(value), " is no name of SLURM's; use at most ", kMaxSchedulerName,
                                   " letters, digits and ", more, ", and begin with none of '-'"));
      }
    };
    word("resources.partition", resources.partition(), "_.-,");
    word("resources.account", resources.account(), "_.-");
    word("resources.qos", resources.qos(), "_.-");
    word("resources.reservation", resources.reservation(), "_.-,");
    word("resources.constraint", resources.constraint(), "_.-&|[]()*:=,");
    word("resources.gpu_type", resources.gpu_type(), "_.-");
    if (!resources.gpu_type().empty() && resources.gpus_per_node() == 0) {
      Report("resources.gpu_type", absl::StrCat(Quoted(resources.gpu_type()), " is given without gpus_per_node"));
    }
    if (resources.exclude_nodes_size() > kMaxExcludedNodes) {
      Report("resources.exclude_nodes", absl::StrCat("has ", resources.exclude_nodes_size(), " entries; use at most ", kMaxExcludedNodes));
      return;
    }
    for (int i = 0; i < resources.exclude_nodes_size(); ++i) {
      if (resources.exclude_nodes(i).empty()) Report(absl::StrCat("resources.exclude_nodes[", i, "]"), "is empty");
      word(absl::StrCat("resources.exclude_nodes[", i, "]"), resources.exclude_nodes(i), "_.-[],");
    }
    if (resources.scheduler_options_size() > kMaxSchedulerOptions) {
      Report("resources.scheduler_options", absl::StrCat("has ", resources.scheduler_options_size(), " entries; use at most ",
                                                         kMaxSchedulerOptions));
      return;
    }
    for (int i = 0; i < resources.scheduler_options_size(); ++i) {
      CheckSchedulerOption(absl::StrCat("resources.scheduler_options[", i, "]"), resources.scheduler_options(i));
    }
  }

  void CheckSchedulerOption(const std::string& field, const std::string& option) {
    const std::string name = option.substr(0, option.find('='));
    const bool shaped = absl::StartsWith(name, "--") && name.size() > 3 && option.size() <= kMaxSchedulerOptionBytes &&
                        std::all_of(name.begin() + 2, name.end(), [](char c) { return absl::ascii_islower(static_cast<unsigned char>(c)) || c == '-'; });
    if (!shaped) {
      return Report(field, absl::StrCat(Quoted(option), " is no option; write the long form with its value, such as --licenses=matlab:1"));
    }
    // Ours to say: the key, the exactly-once rules and the files rest on them.
    static constexpr struct {
      const char* option;
      const char* instead;
    } kOwned[] = {{"--job-name", "name"}, {"--nodes", "resources.nodes"}, {"--ntasks", "resources.ranks_per_node"},
                  {"--ntasks-per-node", "resources.ranks_per_node"}, {"--cpus-per-task", "resources.cpus_per_rank"},
                  {"--time", "resources.time"}, {"--mem", "resources.memory_mib_per_node"}, {"--partition", "resources.partition"},
                  {"--account", "resources.account"}, {"--qos", "resources.qos"}, {"--reservation", "resources.reservation"},
                  {"--constraint", "resources.constraint"}, {"--exclusive", "resources.exclusive"},
                  {"--exclude", "resources.exclude_nodes"}, {"--export", "env"}, {"--gpus-per-node", "resources.gpus_per_node"}};
    for (const auto& owned : kOwned) {
      if (name == owned.option) return Report(field, absl::StrCat(name, " is written as `", owned.instead, "`"));
    }
    for (const char* owned : {"--output", "--error", "--input", "--open-mode", "--chdir", "--requeue", "--no-requeue", "--array",
                              "--dependency", "--parsable", "--wrap", "--wait", "--test-only", "--signal", "--comment", "--uid", "--gid",
                              "--hold", "--clusters", "--export-file", "--get-user-env", "--propagate", "--deadline", "--kill-on-invalid-dep"}) {
      if (name == owned) return Report(field, absl::StrCat(name, " is the gateway's own; a job cannot set it"));
    }
  }

  void CheckEnv(const v1::JobSpec& spec) {
    if (spec.env_size() > kMaxEnvEntries) {
      Report("env", absl::StrCat("has ", spec.env_size(), " entries; use at most ", kMaxEnvEntries));
    }
    size_t bytes = 0;
    const std::map<std::string, std::string> sorted(spec.env().begin(), spec.env().end());
    for (const auto& [key, value] : sorted) {
      bytes += key.size() + value.size();
      if (!IsEnvName(key)) {
        Report("env", absl::StrCat(Quoted(key),
                                   " is not a name of a variable; use letters, digits and '_', not first a digit"));
      } else if (absl::StartsWith(key, "ITWIN_")) {
        Report(absl::StrCat("env.", key), "names that begin with ITWIN_ belong to the service; use another name");
      }
    }
    if (bytes > kMaxEnvBytes) {
      Report("env", absl::StrCat("has ", bytes, " bytes in all; use at most ", kMaxEnvBytes, " (put data in a file)"));
    }
  }

  void CheckInputs(const v1::JobSpec& spec) {
    if (spec.inputs_size() > kMaxInputs) {
      return Report("inputs", absl::StrCat("has ", spec.inputs_size(), " files; use at most ", kMaxInputs,
                                           " (pack them into one archive)"));
    }
    std::map<std::string, int> seen;
    for (int i = 0; i < spec.inputs_size(); ++i) {
      const v1::InputFile& input = spec.inputs(i);
      const std::string at = absl::StrCat("inputs[", i, "]");
      if (absl::Status good = CheckRelativePath(input.path()); !good.ok()) {
        Report(absl::StrCat(at, ".path"), good.message());
      } else if (const auto [first, fresh] = seen.emplace(input.path(), i); !fresh) {
        Report(absl::StrCat(at, ".path"),
               absl::StrCat(Quoted(input.path()), " is also inputs[", first->second, "]; give each file its own path"));
      }
      if (!IsSha256Hex(input.sha256())) {
        Report(absl::StrCat(at, ".sha256"), absl::StrCat(Quoted(input.sha256()), " is not 64 lower-case hex digits"));
      }
    }
    for (const auto& [path, index] : seen) {
      for (size_t slash = path.find('/'); slash != std::string::npos; slash = path.find('/', slash + 1)) {
        const auto parent = seen.find(path.substr(0, slash));
        if (parent == seen.end()) continue;
        Report(absl::StrCat("inputs[", index, "].path"),
               absl::StrCat(Quoted(path), " lies below inputs[", parent->second, "], which is a file"));
        break;
      }
    }
  }

  void CheckRetry(const v1::RetryPolicy& retry) {
    if (retry.has_infra()) Range("retry.infra", retry.infra(), 0, kMaxRetries);
    if (retry.has_preempted()) Range("retry.preempted", retry.preempted(), 0, kMaxRetries);
    if (retry.has_app()) Range("retry.app", retry.app(), 0, kMaxRetries);
  }

  void CheckLabels(const v1::JobSpec& spec) {
    if (spec.labels_size() > kMaxLabels) {
      Report("labels", absl::StrCat("has ", spec.labels_size(), " entries; use at most ", kMaxLabels));
    }
    const std::map<std::string, std::string> sorted(spec.labels().begin(), spec.labels().end());
    for (const auto& [key, value] : sorted) {
      if (key.empty()) Report("labels", "has an empty key; name it");
      for (const std::string* text : {&key, &value}) {
        if (Characters(*text) > kMaxLabelCharacters) {
          Report("labels", absl::StrCat(Quoted(*text), " has ", Characters(*text), " characters; use at most ",
                                        kMaxLabelCharacters));
        } else if (HasControl(*text)) {
          Report("labels", absl::StrCat(Quoted(*text), " has a control character; use plain text"));
        }
      }
    }
  }

  void CheckReferences(const v1::JobSpec& spec) {
    for (const v1::FileReference& reference : FileReferences(spec)) {
      const std::string& value = reference.value();
      if (value.empty()) {
        Report(reference.field(), "names no file; give a path, \"sha256:<hex>\" or \"site:<path>\"");
      } else if (value.size() > kMaxReferenceBytes || HasControl(value)) {
        Report(reference.field(), absl::StrCat(Quoted(value), " is no path (too long, or with control characters)"));
      } else if (PlaceOf(value) == FilePlace::kSite && !absl::StartsWith(value, "site:/")) {
        Report(reference.field(), absl::StrCat(Quoted(value), " needs an absolute path after 'site:'"));
      } else if (PlaceOf(value) == FilePlace::kArtifact && !IsSha256Hex(absl::StripPrefix(value, "sha256:"))) {
        Report(reference.field(), absl::StrCat(Quoted(value), " needs 64 lower-case hex digits after 'sha256:'"));
      }
    }
  }

  void CheckCommand(const v1::CommandSpec& command) {
    if (command.argv_size() == 0) return Report("command.argv", "is empty; give the program and its arguments as a list");
    if (command.argv(0).empty()) Report("command.argv[0]", "is empty; it is the program to run");
    if (command.argv_size() > kMaxArguments) {
      Report("command.argv", absl::StrCat("has ", command.argv_size(), " arguments; use at most ", kMaxArguments));
    }
    for (int i = 0; i < command.argv_size(); ++i) {
      if (command.argv(i).size() > kMaxArgumentBytes) {
        Report(absl::StrCat("command.argv[", i, "]"),
               absl::StrCat("has ", command.argv(i).size(), " bytes; use at most ", kMaxArgumentBytes));
      }
    }
    std::map<std::string, int> names;
    for (int i = 0; i < command.files_size(); ++i) {
      const std::string& file = command.files(i);
      if (file.empty() || PlaceOf(file) != FilePlace::kLocal) continue;
      const std::string at = absl::StrCat("command.files[", i, "]");
      const std::string name = file.substr(file.rfind('/') + 1);
      if (name.empty() || name == "." || name == "..") {
        Report(at, absl::StrCat(Quoted(file), " is a directory; name files"));
      } else if (const auto [first, fresh] = names.emplace(name, i); !fresh) {
        Report(at, absl::StrCat(Quoted(name), " is also the name of command.files[", first->second,
                                "]; files are placed under their base name, so rename one"));
      }
    }
  }

  Problems found_;
};

}  // namespace

absl::Status ValidateSpec(const v1::JobSpec& spec) { return JobChecks().Check(spec); }

bool IsImageName(absl::string_view name) {
  return !name.empty() && name.size() <= kMaxImageBytes && name[0] != '-' && std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains("/._-:@+=", absl::string_view(&c, 1));
  });
}

absl::StatusOr<std::pair<int64_t, int64_t>> ParseIndexRange(absl::string_view text) {
  const auto wrong = [&](absl::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat(Quoted(text), " is not a range", why,
                                                   "; write first..last, such as 0..108 (108 itself is not in it)"));
  };
  const std::vector<absl::string_view> ends = absl::StrSplit(text, "..");
  int64_t bounds[2] = {0, 0};
  if (ends.size() != 2) return wrong("");
  for (int i = 0; i < 2; ++i) {
    const bool digits = !ends[i].empty() && std::all_of(ends[i].begin(), ends[i].end(), [](char c) {
      return absl::ascii_isdigit(static_cast<unsigned char>(c));
    });
    if (!digits || !absl::SimpleAtoi(ends[i], &bounds[i])) return wrong("");
  }
  if (bounds[0] >= bounds[1]) return wrong(" with samples in it");
  return std::make_pair(bounds[0], bounds[1]);
}

const std::vector<std::string>& BuiltinModels() {
  static const auto* const kNames =
      new std::vector<std::string>{"mlp", "cnn", "resnet18", "unet", "lstm", "downscale", "transformer"};
  return *kNames;
}
const std::vector<std::string>& LossNames() {
  static const auto* const kNames =
      new std::vector<std::string>{"mse", "l1", "huber", "cross_entropy", "bce_logits", "nll", "smooth_l1", "quantile",
                                   "gaussian_nll", "crps", "crps_ensemble", "kl_div", "focal", "dice"};
  return *kNames;
}
const std::vector<std::string>& MetricNames() {
  static const auto* const kNames = new std::vector<std::string>{
      "accuracy", "mse", "rmse", "mae", "bias", "r2", "top_k", "confusion", "iou"};
  return *kNames;
}
const std::vector<std::string>& StrategyNames() {
  static const auto* const kNames = new std::vector<std::string>{"single", "ddp", "horovod", "zero1", "zero2", "zero3",
                                      "tensor", "pipeline", "mesh"};
  return *kNames;
}

}  // namespace itwin
