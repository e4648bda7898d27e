#include "common/spec/validate.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "common/files.h"
#include "common/sha256.h"
#include "common/spec/file_references.h"
#include "common/spec/nearest_name.h"
#include "common/spec/spec_document.h"

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
constexpr int64_t kMaxWallSeconds = int64_t{30} * 24 * 3600;
// Beyond any machine there is: a typing error.
constexpr int64_t kMaxNodes = 100'000;
constexpr int64_t kMaxPerNode = 4'096;
constexpr int64_t kMaxMemoryMib = int64_t{1} << 30;
constexpr size_t kMaxSchedulerName = 256;
constexpr int kMaxExcludedNodes = 1'000;
constexpr int kMaxSchedulerOptions = 16;
constexpr size_t kMaxSchedulerOptionBytes = 512;
constexpr int64_t kMaxRetries = 1'000'000;
constexpr int kMaxArguments = 4'096;
constexpr size_t kMaxArgumentBytes = size_t{128} << 10;  // Linux's limit of one argument
constexpr int kMaxListedNames = 10'000;
constexpr int64_t kMaxEpochs = 1'000'000'000;
constexpr int kMaxPairs = 1'000;  // of lbfgs; each takes twice the model's memory
constexpr int kMaxTransforms = 64;
constexpr int kMaxDimensions = 16;
constexpr int64_t kMaxElements = int64_t{1} << 40;
constexpr size_t kMaxReferenceBytes = 4'096;
constexpr int kMaxOptionDepth = 16;
constexpr size_t kMaxShown = 60;

std::string Quoted(absl::string_view text) {
  return absl::StrCat("'", absl::Utf8SafeCEscape(text.substr(0, kMaxShown)), text.size() > kMaxShown ? "..." : "", "'");
}

std::string NumberText(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return absl::StrCat(static_cast<int64_t>(value));
  return absl::StrCat(value);
}

int Characters(absl::string_view utf8) {
  return static_cast<int>(std::count_if(utf8.begin(), utf8.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

bool HasControl(absl::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return absl::ascii_iscntrl(static_cast<unsigned char>(c)); });
}

// "1982", "1982-01", "1982-01-31", "1982-01-31T12:00".
bool LooksLikeDate(absl::string_view text) {
  return !text.empty() && absl::ascii_isdigit(static_cast<unsigned char>(text[0])) &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '-' || c == ':' || c == 'T';
         });
}

bool IsEnvName(absl::string_view name) {
  if (name.empty() || absl::ascii_isdigit(static_cast<unsigned char>(name[0]))) return false;
  return std::all_of(name.begin(), name.end(),
                     [](char c) { return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_'; });
}

class Checker {
 public:
  absl::Status Check(const v1::JobSpec& spec) {
    if (spec.ByteSizeLong() > kMaxSpecBytes) {
      return absl::InvalidArgumentError(absl::StrCat("the spec has ", spec.ByteSizeLong(), " bytes; the limit is ",
                                                     kMaxSpecBytes, " (data belong in files that the spec names)"));
    }
    CheckTexts(spec, "");
    if (!problems_.empty()) return status();  // what follows shows texts

    if (!spec.name().empty()) CheckName(spec.name());
    CheckSite(spec.site());
    CheckImage(spec.image());
    CheckResources(spec.resources());
    switch (spec.kind_case()) {
      case v1::JobSpec::kTrain: CheckTrain(spec.train(), spec.resources()); break;
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
    return status();
  }

 private:
  void Report(absl::string_view path, absl::string_view what) {
    ++total_;
    if (problems_.size() < static_cast<size_t>(kMaxProblems)) problems_.push_back(absl::StrCat(path, ": ", what));
  }
  absl::Status status() const {
    if (problems_.empty()) return absl::OkStatus();
    std::string more;
    if (total_ > problems_.size()) more = absl::StrCat("\n... and ", total_ - problems_.size(), " more");
    return absl::InvalidArgumentError(absl::StrCat(absl::StrJoin(problems_, "\n"), more));
  }

  void Range(absl::string_view path, int64_t value, int64_t min, int64_t max) {
    if (value >= min && value <= max) return;
    Report(path, absl::StrCat(value, " is out of range; use a whole number from ", min, " to ", max));
  }
  void Above(absl::string_view path, double value, double bound) {
    if (std::isfinite(value) && value > bound) return;
    Report(path, absl::StrCat(NumberText(value), " is out of range; use a number above ", NumberText(bound)));
  }
  void AtLeast(absl::string_view path, double value, double bound) {
    if (std::isfinite(value) && value >= bound) return;
    Report(path, absl::StrCat(NumberText(value), " is out of range; use a number from ", NumberText(bound)));
  }
  void Fraction(absl::string_view path, double value) {  // 0 <= value < 1
    if (std::isfinite(value) && value >= 0 && value < 1) return;
    Report(path, absl::StrCat(NumberText(value), " is out of range; use a number from 0 to below 1"));
  }
  void OneOf(absl::string_view path, const std::string& name, const std::vector<std::string>& known) {
    if (std::find(known.begin(), known.end(), name) != known.end()) return;
    Report(path, absl::StrCat(Quoted(name), " is unknown; ", UnknownNameHint(name, known)));
  }

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

  void CheckTrain(const v1::TrainSpec& train, const v1::Resources& resources) {
    switch (train.model().source_case()) {
      case v1::Model::kTorchscript:
      case v1::Model::kArchive: break;
      case v1::Model::kBuiltin: OneOf("train.model.builtin", train.model().builtin(), BuiltinModels()); break;
      case v1::Model::SOURCE_NOT_SET:
        Report("train.model", "is missing; give {archive: <file>}, {torchscript: <file>} or {builtin: <name>}");
        break;
    }
    if (train.model().source_case() == v1::Model::kTorchscript && train.model().options().fields_size() > 0) {
      Report("train.model.options", "belongs to built-in models; a TorchScript module is complete as it is");
    }
    if (train.model().source_case() == v1::Model::kArchive && train.model().options().fields_size() > 0) {
      Report("train.model.options", "belongs to built-in models; an archive is complete as it is");
    }
    CheckData(train.data());
    if (!train.loss().empty()) OneOf("train.loss", train.loss(), LossNames());
    std::set<std::string> metrics;
    for (int i = 0; i < train.metrics_size(); ++i) {
      const std::string at = absl::StrCat("train.metrics[", i, "]");
      OneOf(at, train.metrics(i), MetricNames());
      if (!metrics.insert(train.metrics(i)).second) Report(at, absl::StrCat(Quoted(train.metrics(i)), " is given twice"));
    }
    CheckOptimizer(train.optimizer(), train.has_optimizer(), "train.optimizer");
    Range("train.batch", train.batch(), 0, std::numeric_limits<int32_t>::max());
    Range("train.epochs", train.epochs(), 0, kMaxEpochs);
    Range("train.steps", train.steps(), 0, std::numeric_limits<int64_t>::max());
    const int64_t ranks = std::max<int64_t>(1, resources.nodes()) * std::max<int64_t>(1, resources.ranks_per_node());
    if (!train.strategy().empty()) {
      OneOf("train.strategy", train.strategy(), StrategyNames());
      if (train.strategy() == "single" && ranks > 1) {
        Report("train.strategy", absl::StrCat("'single' uses one rank but `resources` asks for ", ranks,
                                              "; use 'ddp' or one rank"));
      }
    }
    if (train.batch() > 0 && ranks > train.batch()) {
      Report("train.batch", absl::StrCat(train.batch(), " samples cannot be shared by ", ranks,
                                         " ranks; use a batch of at least one sample per rank"));
    }
    CheckStrategySettings(train);
    CheckLbfgs(train);
    CheckMesh(train, ranks);
    CheckGpu(train, resources, ranks);
    AtLeast("train.ddp.bucket_mb", train.ddp().bucket_mb(), 0);
    AtLeast("train.ddp.first_bucket_mb", train.ddp().first_bucket_mb(), 0);
    Range("train.validate_every", train.validate_every(), 0, kMaxEpochs);
    Range("train.checkpoint.every_epochs", train.checkpoint().every_epochs(), 0, kMaxEpochs);
    Range("train.checkpoint.keep", train.checkpoint().keep(), 0, 10'000);
    AtLeast("train.clip_norm", train.clip_norm(), 0);
    Range("train.accumulate", train.accumulate(), 0, 1'000'000);
    if (train.has_check_every()) Range("train.check_every", train.check_every(), 0, kMaxEpochs);
    AtLeast("train.clip_value", train.clip_value(), 0);
    Range("train.top_k", train.top_k(), 0, kMaxElements);
    if (train.has_schedule()) CheckSchedule(train.schedule());
    CheckPrecision(train);
    if (train.has_ema() && train.ema().has_decay() && !(train.ema().decay() > 0 && train.ema().decay() < 1)) {
      Report("train.ema.decay",
             absl::StrCat(NumberText(train.ema().decay()), " is out of range; use a number above 0 and below 1"));
    }
    if (train.has_early_stopping()) {
      const v1::EarlyStopping& stopping = train.early_stopping();
      if (!stopping.metric().empty()) CheckMetricPath("train.early_stopping.metric", stopping.metric());
      CheckDirection("train.early_stopping.direction", stopping.direction());
      Range("train.early_stopping.patience", stopping.patience(), 0, kMaxEpochs);
      AtLeast("train.early_stopping.min_delta", stopping.min_delta(), 0);
    }
    if (train.has_best()) {
      if (!train.best().metric().empty()) CheckMetricPath("train.best.metric", train.best().metric());
      CheckDirection("train.best.direction", train.best().direction());
    }
    CheckWatched(train);
    Range("train.validate_every_steps", train.validate_every_steps(), 0, std::numeric_limits<int64_t>::max());
    CheckParameterGroups(train);
    CheckPhases(train);
    CheckLossOptions(train);
    CheckPredict(train);
    CheckProfile(train.profile());
  }

  void CheckPrecision(const v1::TrainSpec& train) {
    if (!train.precision().empty()) OneOf("train.precision", train.precision(), {"fp32", "bf16", "fp16"});
    if (!train.has_loss_scale()) return;
    if (train.precision() != "fp16") Report("train.loss_scale", "belongs to precision fp16; remove it");
    const v1::LossScale& scale = train.loss_scale();
    if (scale.has_smallest()) Above("train.loss_scale.smallest", scale.smallest(), 0);
    if (scale.has_initial()) AtLeast("train.loss_scale.initial", scale.initial(), scale.has_smallest() ? scale.smallest() : 1);
    if (scale.has_window()) Range("train.loss_scale.window", scale.window(), 1, kMaxEpochs);
    if (scale.has_hysteresis()) Range("train.loss_scale.hysteresis", scale.hysteresis(), 1, kMaxEpochs);
  }

  // What watches evaluations needs some samples to evaluate on.
  void CheckWatched(const v1::TrainSpec& train) {
    const v1::Split& split = train.data().split();
    if (!split.validation().empty() || split.validation_fraction() > 0) return;
    const std::pair<const char*, bool> watching[] = {
        {"train.schedule.plateau", train.schedule().has_plateau()},
        {"train.early_stopping", train.has_early_stopping()},
        {"train.best", train.has_best()},
        {"train.validate_every_steps", train.validate_every_steps() > 0}};
    for (const auto& [field, given] : watching) {
      if (given) Report(field, "needs a validation split; give train.data.split.validation or validation_fraction");
    }
  }

  void CheckDirection(const std::string& at, const std::string& direction) {
    if (!direction.empty()) OneOf(at, direction, {"min", "max"});
  }

  void CheckSchedule(const v1::Schedule& schedule) {
    const std::string at = "train.schedule";
    constexpr int64_t kMaxSteps = std::numeric_limits<int64_t>::max();
    if (!schedule.unit().empty()) OneOf(at + ".unit", schedule.unit(), {"step", "epoch"});
    Range(at + ".warmup_steps", schedule.warmup_steps(), 0, kMaxSteps);
    if (schedule.has_warmup_start()) AtLeast(at + ".warmup_start", schedule.warmup_start(), 0);
    switch (schedule.kind_case()) {
      case v1::Schedule::kConstant: return;
      case v1::Schedule::kLinear:
        if (schedule.linear().has_start()) AtLeast(at + ".linear.start", schedule.linear().start(), 0);
        if (schedule.linear().has_end()) AtLeast(at + ".linear.end", schedule.linear().end(), 0);
        return Range(at + ".linear.length", schedule.linear().length(), 0, kMaxSteps);
      case v1::Schedule::kStep:
        if (schedule.step().has_gamma()) Above(at + ".step.gamma", schedule.step().gamma(), 0);
        return Range(at + ".step.every", schedule.step().every(), 1, kMaxSteps);
      case v1::Schedule::kMultiStep: {
        const v1::MultiStepSchedule& steps = schedule.multi_step();
        if (steps.has_gamma()) Above(at + ".multi_step.gamma", steps.gamma(), 0);
        if (steps.milestones_size() == 0) Report(at + ".multi_step.milestones", "is missing; such as [30, 60]");
        if (steps.milestones_size() > kMaxListedNames) Report(at + ".multi_step.milestones", "has too many entries");
        for (int i = 0; i < std::min(steps.milestones_size(), kMaxListedNames); ++i) {
          if (steps.milestones(i) > (i == 0 ? 0 : steps.milestones(i - 1))) continue;
          Report(absl::StrCat(at, ".multi_step.milestones[", i, "]"),
                 absl::StrCat(steps.milestones(i), " does not rise; give rising numbers from 1"));
        }
        return;
      }
      case v1::Schedule::kExponential: return Above(at + ".exponential.gamma", schedule.exponential().gamma(), 0);
      case v1::Schedule::kCosine:
        AtLeast(at + ".cosine.min_factor", schedule.cosine().min_factor(), 0);
        return Range(at + ".cosine.length", schedule.cosine().length(), 0, kMaxSteps);
      case v1::Schedule::kOneCycle: {
        const v1::OneCycleSchedule& cycle = schedule.one_cycle();
        Range(at + ".one_cycle.length", cycle.length(), 0, kMaxSteps);
        if (cycle.has_rise() && !(cycle.rise() > 0 && cycle.rise() < 1)) {
          Report(at + ".one_cycle.rise",
                 absl::StrCat(NumberText(cycle.rise()), " is out of range; use a number above 0 and below 1"));
        }
        if (cycle.has_initial_divisor()) Above(at + ".one_cycle.initial_divisor", cycle.initial_divisor(), 0);
        if (cycle.has_final_divisor()) Above(at + ".one_cycle.final_divisor", cycle.final_divisor(), 0);
        if (schedule.warmup_steps() > 0) {
          Report(at + ".warmup_steps", "does not go with one_cycle, which has its own rise; remove it");
        }
        return;
      }
      case v1::Schedule::kPolynomial:
        if (schedule.polynomial().has_power()) Above(at + ".polynomial.power", schedule.polynomial().power(), 0);
        AtLeast(at + ".polynomial.min_factor", schedule.polynomial().min_factor(), 0);
        return Range(at + ".polynomial.length", schedule.polynomial().length(), 0, kMaxSteps);
      case v1::Schedule::kPlateau: {
        const v1::PlateauSchedule& plateau = schedule.plateau();
        if (plateau.has_factor() && !(plateau.factor() > 0 && plateau.factor() < 1)) {
          Report(at + ".plateau.factor",
                 absl::StrCat(NumberText(plateau.factor()), " is out of range; use a number above 0 and below 1"));
        }
        if (plateau.has_patience()) Range(at + ".plateau.patience", plateau.patience(), 0, kMaxEpochs);
        if (plateau.has_threshold()) AtLeast(at + ".plateau.threshold", plateau.threshold(), 0);
        Range(at + ".plateau.cooldown", plateau.cooldown(), 0, kMaxEpochs);
        AtLeast(at + ".plateau.min_factor", plateau.min_factor(), 0);
        if (!plateau.metric().empty()) CheckMetricPath(at + ".plateau.metric", plateau.metric());
        return CheckDirection(at + ".plateau.direction", plateau.direction());
      }
      case v1::Schedule::KIND_NOT_SET: return;  // a warm-up alone
    }
  }

  // "validation/rmse": which evaluation and which of its values.
  void CheckMetricPath(const std::string& at, const std::string& metric) {
    if (absl::StartsWith(metric, "validation/") && metric.size() > std::string("validation/").size()) return;
    Report(at, absl::StrCat(Quoted(metric), " is no metric of the evaluation; write validation/<name>, such as validation/loss"));
  }

  void CheckParameterGroups(const v1::TrainSpec& train) {
    if (train.parameter_groups_size() > kMaxListedNames) return Report("train.parameter_groups", "has too many entries");
    for (int i = 0; i < train.parameter_groups_size(); ++i) {
      const v1::ParameterGroup& group = train.parameter_groups(i);
      const std::string at = absl::StrCat("train.parameter_groups[", i, "]");
      if (group.match_size() == 0) Report(at + ".match", "is missing; name parameters, such as [\"encoder.*\"]");
      Names(at + ".match", group.match());
      if (group.has_lr()) AtLeast(at + ".lr", group.lr(), 0);
      if (group.has_weight_decay()) AtLeast(at + ".weight_decay", group.weight_decay(), 0);
      if (group.freeze() && (group.has_lr() || group.has_weight_decay())) {
        Report(at + ".freeze", "leaves nothing to train, so lr and weight_decay have no meaning; remove them");
      }
    }
  }

  void CheckPhases(const v1::TrainSpec& train) {
    if (train.phases_size() == 0) return;
    if (train.phases_size() > kMaxListedNames) return Report("train.phases", "has too many entries");
    if (train.has_optimizer()) Report("train.phases", "have an optimizer each; leave `optimizer` out");
    if (!train.loss().empty()) Report("train.phases", "have methods that bring their own loss; leave `loss` out");
    if (train.model().source_case() == v1::Model::kBuiltin) {
      Report("train.phases", "are for TorchScript modules with a method each, not for built-in models");
    }
    const std::set<std::string> able = {"", "single", "ddp", "horovod", "zero1", "zero2"};
    if (!able.contains(train.strategy())) {
      Report("train.phases", absl::StrCat("work with the strategies single, ddp, horovod, zero1 and zero2, not with ",
                                          train.strategy()));
    }
    std::set<std::string> names;
    for (int i = 0; i < train.phases_size(); ++i) {
      const v1::Phase& phase = train.phases(i);
      const std::string at = absl::StrCat("train.phases[", i, "]");
      if (phase.name().empty()) Report(at + ".name", "is missing");
      if (!names.insert(phase.name()).second) Report(at + ".name", absl::StrCat(Quoted(phase.name()), " is given twice"));
      if (phase.match_size() == 0) Report(at + ".match", "is missing; name its parameters, such as [\"generator\"]");
      Names(at + ".match", phase.match());
      Range(at + ".repeats", phase.repeats(), 0, 1'000'000);
      CheckOptimizer(phase.optimizer(), phase.has_optimizer(), at + ".optimizer");
    }
  }

  void CheckLossOptions(const v1::TrainSpec& train) {
    const v1::LossOptions& options = train.loss_options();
    const std::string at = "train.loss_options";
    const auto belongs = [&](const char* key, bool given, const std::vector<std::string>& losses) {
      if (!given || std::find(losses.begin(), losses.end(), train.loss()) != losses.end()) return;
      Report(absl::StrCat(at, ".", key),
             absl::StrCat("belongs to the loss ", absl::StrJoin(losses, ", "), train.loss().empty() ? "" : "; this job's is ",
                          train.loss()));
    };
    belongs("label_smoothing", options.label_smoothing() != 0, {"cross_entropy"});
    belongs("class_weights", options.class_weights_size() > 0, {"cross_entropy", "nll", "focal"});
    belongs("delta", options.has_delta(), {"huber"});
    belongs("beta", options.has_beta(), {"smooth_l1"});
    belongs("gamma", options.has_gamma(), {"focal"});
    belongs("quantiles", options.quantiles_size() > 0, {"quantile"});
    belongs("smooth", options.has_smooth(), {"dice"});
    belongs("members", options.members() != 0, {"crps_ensemble"});
    if (options.members() != 0) Range(at + ".members", options.members(), 2, kMaxListedNames);
    Fraction(at + ".label_smoothing", options.label_smoothing());
    if (options.has_delta()) Above(at + ".delta", options.delta(), 0);
    if (options.has_beta()) Above(at + ".beta", options.beta(), 0);
    if (options.has_gamma()) AtLeast(at + ".gamma", options.gamma(), 0);
    if (options.has_smooth()) AtLeast(at + ".smooth", options.smooth(), 0);
    for (int i = 0; i < std::min(options.class_weights_size(), kMaxListedNames); ++i) {
      AtLeast(absl::StrCat(at, ".class_weights[", i, "]"), options.class_weights(i), 0);
    }
    for (int i = 0; i < std::min(options.quantiles_size(), kMaxListedNames); ++i) {
      const double lower = i == 0 ? 0 : options.quantiles(i - 1);
      if (!(options.quantiles(i) > lower && options.quantiles(i) < 1)) {
        Report(absl::StrCat(at, ".quantiles[", i, "]"),
               absl::StrCat(NumberText(options.quantiles(i)), " is out of range; give rising numbers between 0 and 1"));
      }
    }
    if (train.loss() == "quantile" && options.quantiles_size() == 0) {
      Report(at + ".quantiles", "is missing; the loss quantile needs them, as in [0.1, 0.5, 0.9]");
    }
  }

  // A setting of a strategy that is not the job's would do nothing.
  void CheckStrategySettings(const v1::TrainSpec& train) {
    const std::string& strategy = train.strategy();
    const auto belongs = [&](bool given, absl::string_view key, absl::string_view to, bool fits) {
      if (given && !fits) {
        Report(absl::StrCat("train.", key), absl::StrCat("belongs to strategy ", to, ", but the strategy is ",
                                                         strategy.empty() ? "ddp" : strategy, "; remove one"));
      }
    };
    const bool ddp = strategy.empty() || strategy == "ddp" || strategy == "single";
    belongs(train.has_ddp(), "ddp", "ddp", ddp);
    belongs(train.has_local_sgd(), "local_sgd", "ddp", ddp);
    belongs(train.has_horovod(), "horovod", "horovod", strategy == "horovod");
    belongs(train.has_zero(), "zero", "zero1, zero2 or zero3", absl::StartsWith(strategy, "zero"));
    if (train.has_local_sgd()) {
      Range("train.local_sgd.every", train.local_sgd().every(), 1, kMaxEpochs);
      if (train.local_sgd().every() > 1 && !train.ddp().compression().empty()) {
        Report("train.ddp.compression", "compresses gradients, which local_sgd does not exchange; remove one");
      }
    }
    if (!train.ddp().compression().empty())
      OneOf("train.ddp.compression", train.ddp().compression(), {"none", "fp16", "bf16"});
    AtLeast("train.horovod.fusion_mb", train.horovod().fusion_mb(), 0);
    AtLeast("train.horovod.cycle_ms", train.horovod().cycle_ms(), 0);
    AtLeast("train.zero.bucket_mb", train.zero().bucket_mb(), 0);
  }

  // LBFGS needs the whole gradient of one unchanging loss on every rank.
  void CheckLbfgs(const v1::TrainSpec& train) {
    for (int i = 0; i < train.phases_size(); ++i) {
      if (!train.phases(i).optimizer().has_lbfgs()) continue;
      Report(absl::StrCat("train.phases[", i, "].optimizer"), "is lbfgs, which trains all parameters by itself; use another");
    }
    if (!train.optimizer().has_lbfgs()) return;
    const auto refuse = [&](bool given, absl::string_view key, absl::string_view why) {
      if (given) Report(absl::StrCat("train.", key), absl::StrCat("does not go with the optimizer lbfgs, ", why));
    };
    refuse(!train.strategy().empty() && train.strategy() != "single" && train.strategy() != "ddp", "strategy",
           "which works with single and ddp");
    refuse(train.local_sgd().every() > 1, "local_sgd", "whose ranks must see the same gradient; remove it");
    refuse(train.precision() == "fp16", "precision", "whose search has no step to skip; use fp32 or bf16");
    refuse(train.clip_norm() > 0, "clip_norm", "which needs the gradient as it is; remove it");
    refuse(train.clip_value() > 0, "clip_value", "which needs the gradient as it is; remove it");
    for (const v1::ParameterGroup& group : train.parameter_groups()) {
      refuse(!group.freeze(), "parameter_groups", "which has one rate for all; groups can only freeze");
    }
  }

  // What works on GPUs; the worker knows the same (agent/worker/device/device.cc).
  void CheckGpu(const v1::TrainSpec& train, const v1::Resources& resources, int64_t ranks) {
    if (resources.gpus_per_node() <= 0) {
      if (train.has_gpu()) Report("train.gpu", "is for jobs with GPUs; set resources.gpus_per_node, or remove it");
      return;
    }
    if (resources.ranks_per_node() > resources.gpus_per_node()) {
      Report("resources.ranks_per_node", absl::StrCat(resources.ranks_per_node(), " ranks cannot share the ", resources.gpus_per_node(),
                                                      " of gpus_per_node; each rank of a training job needs a GPU of its own"));
    }
    const std::string strategy = ranks == 1 ? "single" : train.strategy().empty() ? "ddp" : train.strategy();
    const std::set<std::string> able = {"single", "ddp", "zero1", "zero2"};
    if (!able.contains(strategy)) {
      Report("train.strategy", absl::StrCat(Quoted(strategy), " does not work on GPUs; use ddp, zero1 or zero2, or leave "
                                                              "resources.gpus_per_node out"));
    }
    if (train.optimizer().has_lbfgs()) Report("train.optimizer", "is lbfgs, which runs on processors only; use adam, or leave resources.gpus_per_node out");
    const bool measured = train.optimizer().has_lamb() || train.optimizer().has_lars();
    if (measured && absl::StartsWith(strategy, "zero")) {
      Report("train.optimizer", absl::StrCat("lamb and lars do not go with strategy ", strategy, " on GPUs; use ddp"));
    }
    if (!train.gpu().graphs()) return;
    if (train.phases_size() > 0) Report("train.gpu.graphs", "does not go with phases, each of which is another step; remove one");
    if (strategy == "zero2") {
      Report("train.gpu.graphs", "does not go with strategy zero2, whose gradients move; use ddp or zero1");
    }
  }

  void CheckMesh(const v1::TrainSpec& train, int64_t ranks) {
    const std::string& strategy = train.strategy();
    const bool is_mesh = strategy == "tensor" || strategy == "pipeline" || strategy == "mesh";
    if (!is_mesh) {
      if (train.has_mesh()) {
        Report("train.mesh", absl::StrCat("belongs to strategy tensor, pipeline or mesh, but the strategy is ",
                                          strategy.empty() ? "ddp" : strategy, "; remove one"));
      }
      return;
    }
    const v1::Mesh& mesh = train.mesh();
    Range("train.mesh.data", mesh.data(), 0, kMaxNodes * kMaxPerNode);
    Range("train.mesh.tensor", mesh.tensor(), 0, kMaxNodes);
    Range("train.mesh.pipeline", mesh.pipeline(), 0, kMaxNodes);
    Range("train.mesh.micro_batches", mesh.micro_batches(), 0, 1'000'000);
    if (!mesh.schedule().empty()) OneOf("train.mesh.schedule", mesh.schedule(), {"1f1b", "gpipe"});
    if (train.accumulate() > 1) {
      Report("train.accumulate", absl::StrCat("does not go with strategy ", strategy,
                                              "; train.mesh.micro_batches says in how many parts a step is run"));
    }
    if (ranks == 1) return;  // runs single
    const auto refuse = [&](bool given, absl::string_view path, absl::string_view what) {
      if (given) Report(path, absl::StrCat(what, " does not go with strategy ", strategy, ", which splits the model"));
    };
    refuse(!train.precision().empty() && train.precision() != "fp32", "train.precision", train.precision());
    refuse(train.optimizer().has_lamb(), "train.optimizer", "lamb");
    refuse(train.optimizer().has_lars(), "train.optimizer", "lars");
    refuse(train.has_best(), "train.best", "keeping the best weights");
    refuse(train.has_predict(), "train.predict", "prediction");
    refuse(train.has_ema(), "train.ema", "an average of the weights");
    for (const v1::ParameterGroup& group : train.parameter_groups())
      refuse(group.freeze(), "train.parameter_groups", "freezing parameters");
    if (mesh.data() < 0 || mesh.tensor() < 0 || mesh.pipeline() < 0) return;
    const int64_t given = std::max<int64_t>(1, mesh.data()) * std::max<int64_t>(1, mesh.tensor()) *
                          std::max<int64_t>(1, mesh.pipeline());
    const bool open = mesh.data() == 0 || (strategy == "tensor" && mesh.tensor() == 0) ||
                      (strategy == "pipeline" && mesh.pipeline() == 0);
    if (open ? ranks % given != 0 : ranks != given) {
      Report("train.mesh", absl::StrCat("data x tensor x pipeline is ", given, open ? ", which does not divide " : ", but there are ",
                                        "the ", ranks, " ranks that `resources` asks for"));
    }
    if (strategy == "mesh" && mesh.tensor() <= 1 && mesh.pipeline() <= 1) {
      Report("train.mesh", "splits nothing; set tensor or pipeline above 1, or use strategy ddp");
    }
    const std::string& model = train.model().builtin();
    // An archive may hold a graph, which can be cut into stages but has no halves of layers; the worker tells.
    if (train.model().source_case() == v1::Model::kArchive && strategy != "tensor" && mesh.tensor() <= 1) return;
    if (model != "mlp" && model != "transformer") {
      Report("train.strategy", absl::StrCat(strategy, " splits the layers of a built-in mlp or transformer, and exported graphs "
                                            "into the stages of a pipeline, not ",
                                            model.empty() ? "a module that was handed over" : model,
                                            "; use ddp, or zero1, zero2, zero3 to save memory"));
      return;
    }
    CheckMeshOptions(train, ranks);
  }

  // What of the model's options a mesh cannot do.
  void CheckMeshOptions(const v1::TrainSpec& train, int64_t ranks) {
    const v1::Mesh& mesh = train.mesh();
    const int64_t others = std::max<int64_t>(1, mesh.data()) * std::max<int64_t>(1, mesh.pipeline());
    const int64_t tensor = mesh.tensor() > 0 ? mesh.tensor() : train.strategy() == "tensor" ? ranks / others : 1;
    const int64_t pipeline = mesh.pipeline() > 0                ? mesh.pipeline()
                             : train.strategy() == "pipeline" ? ranks / std::max<int64_t>(1, mesh.data() * tensor)
                                                                : 1;
    const auto& options = train.model().options().fields();
    const auto number = [&](const char* name, double otherwise) {
      const auto found = options.find(name);
      return found == options.end() ? otherwise : found->second.number_value();
    };
    const auto divides = [&](const std::string& name, double value) {
      if (std::fmod(value, static_cast<double>(tensor)) == 0) return;
      Report(absl::StrCat("train.model.options.", name),
             absl::StrCat(NumberText(value), " cannot be shared by ", tensor, " ranks (tensor); make it a multiple"));
    };
    if (tensor > 1) {
      if (number("dropout", 0) > 0) {
        Report("train.model.options.dropout", "ranks that share layers would drop different things; set it to 0");
      }
      if (train.model().builtin() == "transformer") {
        divides("heads", number("heads", 4));
        if (options.contains("vocabulary")) divides("vocabulary", number("vocabulary", 0));
      } else if (const auto hidden = options.find("hidden"); hidden != options.end()) {
        for (int i = 0; i < hidden->second.list_value().values_size(); i += 2)
          divides("hidden", hidden->second.list_value().values(i).number_value());
      }
    }
    if (pipeline > 1 && train.model().builtin() == "transformer") {
      const auto tied = options.find("tied");
      if (tied == options.end() || tied->second.bool_value()) {
        Report("train.model.options.tied",
               "is true (the default), but the first and the last stage of a pipeline cannot share the embedding; set it "
               "to false");
      }
      if (pipeline > number("layers", 2) + 2) {
        Report("train.mesh.pipeline", absl::StrCat(pipeline, " stages are more than the model's layers"));
      }
    }
  }

  void CheckPredict(const v1::TrainSpec& train) {
    if (!train.has_predict()) return;
    const v1::Predict& predict = train.predict();
    if (!predict.split().empty()) {
      OneOf("train.predict.split", predict.split(), {"train", "validation", "test", "all"});
    }
    if (!predict.format().empty()) OneOf("train.predict.format", predict.format(), {"npy", "netcdf"});
    if (predict.weights().empty() && train.model().source_case() == v1::Model::kBuiltin) {
      Report("train.predict.weights", "is missing; a built-in model needs the weights of a job, such as weights.safetensors");
    }
  }

  void CheckProfile(const v1::Profile& profile) {
    Range("train.profile.trace_steps", profile.trace_steps(), 0, 10'000);
    Range("train.profile.at_step", profile.at_step(), 0, std::numeric_limits<int64_t>::max());
    if (profile.has_hang_timeout()) {
      const int64_t seconds = profile.hang_timeout().seconds();
      if (seconds < 1 || seconds > kMaxWallSeconds) {
        Report("train.profile.hang_timeout", "is out of range; use 1s to 720h (30 days)");
      }
    }
  }

  void CheckAdam(const std::string& at, const v1::Adam& adam) {
    if (adam.has_lr()) Above(absl::StrCat(at, ".lr"), adam.lr(), 0);
    if (adam.has_beta1()) Fraction(absl::StrCat(at, ".beta1"), adam.beta1());
    if (adam.has_beta2()) Fraction(absl::StrCat(at, ".beta2"), adam.beta2());
    if (adam.has_eps()) Above(absl::StrCat(at, ".eps"), adam.eps(), 0);
    if (adam.has_weight_decay()) AtLeast(absl::StrCat(at, ".weight_decay"), adam.weight_decay(), 0);
  }

  void CheckOptimizer(const v1::Optimizer& optimizer, bool given, const std::string& at) {
    switch (optimizer.kind_case()) {
      case v1::Optimizer::kSgd: {
        const v1::Sgd& sgd = optimizer.sgd();
        if (sgd.has_lr()) Above(at + ".sgd.lr", sgd.lr(), 0);
        AtLeast(at + ".sgd.momentum", sgd.momentum(), 0);
        AtLeast(at + ".sgd.weight_decay", sgd.weight_decay(), 0);
        AtLeast(at + ".sgd.dampening", sgd.dampening(), 0);
        if (sgd.nesterov() && (!(sgd.momentum() > 0) || sgd.dampening() != 0)) {
          Report(at + ".sgd.nesterov", "needs a momentum above 0 and no dampening");
        }
        return;
      }
      case v1::Optimizer::kAdam: return CheckAdam(at + ".adam", optimizer.adam());
      case v1::Optimizer::kAdamw: return CheckAdam(at + ".adamw", optimizer.adamw());
      case v1::Optimizer::kRmsprop: {
        const v1::RmsProp& rmsprop = optimizer.rmsprop();
        if (rmsprop.has_lr()) Above(at + ".rmsprop.lr", rmsprop.lr(), 0);
        if (rmsprop.has_alpha()) Fraction(at + ".rmsprop.alpha", rmsprop.alpha());
        if (rmsprop.has_eps()) Above(at + ".rmsprop.eps", rmsprop.eps(), 0);
        AtLeast(at + ".rmsprop.weight_decay", rmsprop.weight_decay(), 0);
        AtLeast(at + ".rmsprop.momentum", rmsprop.momentum(), 0);
        return;
      }
      case v1::Optimizer::kAdagrad: {
        const v1::Adagrad& adagrad = optimizer.adagrad();
        if (adagrad.has_lr()) Above(at + ".adagrad.lr", adagrad.lr(), 0);
        AtLeast(at + ".adagrad.lr_decay", adagrad.lr_decay(), 0);
        AtLeast(at + ".adagrad.weight_decay", adagrad.weight_decay(), 0);
        AtLeast(at + ".adagrad.initial_accumulator", adagrad.initial_accumulator(), 0);
        if (adagrad.has_eps()) AtLeast(at + ".adagrad.eps", adagrad.eps(), 0);
        return;
      }
      case v1::Optimizer::kLamb: {
        const v1::Lamb& lamb = optimizer.lamb();
        if (lamb.has_lr()) Above(at + ".lamb.lr", lamb.lr(), 0);
        if (lamb.has_beta1()) Fraction(at + ".lamb.beta1", lamb.beta1());
        if (lamb.has_beta2()) Fraction(at + ".lamb.beta2", lamb.beta2());
        if (lamb.has_eps()) Above(at + ".lamb.eps", lamb.eps(), 0);
        if (lamb.has_weight_decay()) AtLeast(at + ".lamb.weight_decay", lamb.weight_decay(), 0);
        return;
      }
      case v1::Optimizer::kLars: {
        const v1::Lars& lars = optimizer.lars();
        if (lars.has_lr()) Above(at + ".lars.lr", lars.lr(), 0);
        if (lars.has_momentum()) AtLeast(at + ".lars.momentum", lars.momentum(), 0);
        if (lars.has_weight_decay()) AtLeast(at + ".lars.weight_decay", lars.weight_decay(), 0);
        if (lars.has_trust()) Above(at + ".lars.trust", lars.trust(), 0);
        if (lars.nesterov() && lars.has_momentum() && !(lars.momentum() > 0)) {
          Report(at + ".lars.nesterov", "needs a momentum above 0");
        }
        return;
      }
      case v1::Optimizer::kLbfgs: {
        const v1::Lbfgs& lbfgs = optimizer.lbfgs();
        if (lbfgs.has_lr()) Above(at + ".lbfgs.lr", lbfgs.lr(), 0);
        if (lbfgs.has_max_iter()) Range(at + ".lbfgs.max_iter", lbfgs.max_iter(), 1, 1'000'000);
        if (lbfgs.has_max_eval()) Range(at + ".lbfgs.max_eval", lbfgs.max_eval(), 1, 1'000'000);
        if (lbfgs.has_tolerance_grad()) AtLeast(at + ".lbfgs.tolerance_grad", lbfgs.tolerance_grad(), 0);
        if (lbfgs.has_tolerance_change()) AtLeast(at + ".lbfgs.tolerance_change", lbfgs.tolerance_change(), 0);
        if (lbfgs.has_history()) Range(at + ".lbfgs.history", lbfgs.history(), 1, kMaxPairs);
        return;
      }
      case v1::Optimizer::KIND_NOT_SET:
        if (given) {
          Report(at,
                 "names no optimizer; use one of sgd, adam, adamw, rmsprop, adagrad, lamb, lars, lbfgs");
        }
        return;
    }
  }

  void Required(absl::string_view path, const std::string& text) {
    if (text.empty()) Report(path, "is missing; name a file");
  }
  template <typename List>
  void Names(const std::string& path, const List& names) {
    if (names.size() > kMaxListedNames) return Report(path, absl::StrCat("has more than ", kMaxListedNames, " names"));
    std::set<std::string> seen;
    for (int i = 0; i < names.size(); ++i) {
      const std::string at = absl::StrCat(path, "[", i, "]");
      if (names.Get(i).empty()) Report(at, "is empty; name it");
      if (!seen.insert(names.Get(i)).second) Report(at, absl::StrCat(Quoted(names.Get(i)), " is given twice"));
    }
  }
  template <typename List>
  void Shape(const std::string& path, const List& shape) {
    if (shape.size() > kMaxDimensions) {
      return Report(path, absl::StrCat("has ", shape.size(), " dimensions; use at most ", kMaxDimensions));
    }
    double elements = 1;
    for (int i = 0; i < shape.size(); ++i) {
      Range(absl::StrCat(path, "[", i, "]"), shape.Get(i), 1, kMaxElements);
      elements *= static_cast<double>(shape.Get(i));
    }
    if (elements > static_cast<double>(kMaxElements)) Report(path, "has too many elements; check the sizes");
  }

  void CheckData(const v1::Data& data) {
    switch (data.source_case()) {
      case v1::Data::kNetcdf:
        if (data.variables_size() == 0) {
          Report("train.data.variables", "is missing; list the variables of the NetCDF file to use, such as [UWND, VWND]");
        }
        break;
      case v1::Data::kIdx: {
        const v1::IdxFiles& idx = data.idx();
        Required("train.data.idx.train_images", idx.train_images());
        Required("train.data.idx.train_labels", idx.train_labels());
        if (idx.test_images().empty() != idx.test_labels().empty()) {
          Report(idx.test_images().empty() ? "train.data.idx.test_images" : "train.data.idx.test_labels",
                 "is missing; the test images and labels come as a pair");
        }
        break;
      }
      case v1::Data::kNpz: break;
      case v1::Data::kNpy:
        Required("train.data.npy.input", data.npy().input());
        Required("train.data.npy.target", data.npy().target());
        break;
      case v1::Data::kCsv: {
        const v1::CsvFile& csv = data.csv();
        Required("train.data.csv.path", csv.path());
        if (csv.inputs_size() == 0) Report("train.data.csv.inputs", "is missing; list the columns that go in");
        if (csv.targets_size() == 0) Report("train.data.csv.targets", "is missing; list the columns to predict");
        Names("train.data.csv.inputs", csv.inputs());
        Names("train.data.csv.targets", csv.targets());
        if (csv.target_is_class() && csv.targets_size() > 1) {
          Report("train.data.csv.targets", "has several columns; with target_is_class there is one");
        }
        break;
      }
      case v1::Data::kSynthetic: {
        const v1::SyntheticData& synthetic = data.synthetic();
        Range("train.data.synthetic.samples", synthetic.samples(), 1, kMaxElements);
        if (synthetic.input_shape_size() == 0) Report("train.data.synthetic.input_shape", "is missing; such as [32]");
        Shape("train.data.synthetic.input_shape", synthetic.input_shape());
        Shape("train.data.synthetic.target_shape", synthetic.target_shape());
        if (synthetic.classes() == 1) Report("train.data.synthetic.classes", "1 is out of range; use 0 or at least 2");
        Range("train.data.synthetic.classes", synthetic.classes(), 0, 1'000'000'000);
        break;
      }
      case v1::Data::kHdf5: Required("train.data.hdf5.path", data.hdf5().path()); break;
      case v1::Data::kZarr:
        Required("train.data.zarr.path", data.zarr().path());
        if (!data.zarr().path().empty() && PlaceOf(data.zarr().path()) != FilePlace::kSite) {
          Report("train.data.zarr.path", absl::StrCat(Quoted(data.zarr().path()),
                                                      " is not at the site; a store is a directory, which is read in place: "
                                                      "name it \"site:/<path>\", or convert it to NetCDF to upload it"));
        }
        break;
      case v1::Data::kSafetensors: break;
      case v1::Data::kRaw:
        CheckRaw("train.data.raw.input", data.raw().input());
        CheckRaw("train.data.raw.target", data.raw().target());
        break;
      case v1::Data::SOURCE_NOT_SET:
        Report("train.data", "is missing; give one of netcdf, hdf5, zarr, idx, npz, npy, csv, safetensors, raw, synthetic");
        break;
    }
    if (data.more_files_size() > 0) {
      const auto source = data.source_case();
      if (source != v1::Data::kNetcdf && source != v1::Data::kHdf5 && source != v1::Data::kNpz &&
          source != v1::Data::kCsv && source != v1::Data::kSafetensors) {
        Report("train.data.more_files", "belongs to netcdf, hdf5, npz, csv and safetensors data; remove it");
      }
    }
    if (!data.load().empty()) {
      OneOf("train.data.load", data.load(), {"memory", "stream", "auto"});
      if (data.load() == "stream" && data.source_case() != v1::Data::kNetcdf && data.source_case() != v1::Data::kHdf5 &&
          data.source_case() != v1::Data::kZarr) {
        Report("train.data.load", "'stream' is for netcdf, hdf5 and zarr data; other files are mapped into memory anyway");
      }
    }
    if (!data.cache().empty()) OneOf("train.data.cache", data.cache(), {"node"});
    if (!data.cache().empty() && data.has_zarr()) {
      Report("train.data.cache", "is for files; a zarr store is read where it lies; remove it");
    }
    if (data.variables_size() > 0 && data.source_case() != v1::Data::kNetcdf &&
        data.source_case() != v1::Data::SOURCE_NOT_SET) {
      Report("train.data.variables", "belongs to netcdf data; remove it");
    }
    Names("train.data.variables", data.variables());
    CheckSplit(data.split());
    CheckTransforms(data);
  }

  void CheckRaw(const std::string& at, const v1::RawArray& array) {
    Required(at + ".path", array.path());
    OneOf(at + ".type", array.type(),
          {"float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool"});
    Shape(at + ".shape", array.shape());
  }

  void CheckSplit(const v1::Split& split) {
    struct Part {
      const char* name;
      std::pair<int64_t, int64_t> range;
    };
    std::vector<Part> parts;
    const std::pair<const char*, const std::string*> texts[] = {
        {"train", &split.train()}, {"validation", &split.validation()}, {"test", &split.test()}};
    for (const auto& [name, text] : texts) {
      if (text->empty()) continue;
      const std::string at = absl::StrCat("train.data.split.", name);
      if (absl::StrContains(absl::StripPrefix(*text, "-"), "-") && absl::StrContains(*text, "..")) {  // dates: read by the worker, which knows the time axis
        const std::vector<absl::string_view> ends = absl::StrSplit(*text, "..");
        if (ends.size() != 2 || !LooksLikeDate(ends[0]) || !LooksLikeDate(ends[1])) {
          Report(at, absl::StrCat(Quoted(*text), " is no range of time; write dates, such as 1982-01..1990-12"));
        }
        continue;
      }
      absl::StatusOr<std::pair<int64_t, int64_t>> range = ParseIndexRange(*text);
      if (!range.ok()) {
        Report(at, range.status().message());
        continue;
      }
      for (const Part& other : parts) {
        if (range->first < other.range.second && other.range.first < range->second) {
          Report(at, absl::StrCat(*text, " overlaps ", other.name, " ", other.range.first, "..", other.range.second,
                                  "; a sample belongs to one of them"));
        }
      }
      parts.push_back({name, *range});
    }
    Fraction("train.data.split.validation_fraction", split.validation_fraction());
    Fraction("train.data.split.test_fraction", split.test_fraction());
    if (split.validation_fraction() + split.test_fraction() >= 1) {
      Report("train.data.split", "validation_fraction and test_fraction leave nothing to train on; their sum must be below 1");
    }
    if (!split.validation().empty() && split.validation_fraction() != 0) {
      Report("train.data.split.validation_fraction", "is given beside a validation range; keep one");
    }
    if (!split.test().empty() && split.test_fraction() != 0) {
      Report("train.data.split.test_fraction", "is given beside a test range; keep one");
    }
  }

  void CheckTransforms(const v1::Data& data) {
    if (data.transforms_size() > kMaxTransforms) {
      return Report("train.data.transforms", absl::StrCat("has ", data.transforms_size(), "; use at most ", kMaxTransforms));
    }
    for (int i = 0; i < data.transforms_size(); ++i) {
      const v1::Transform& transform = data.transforms(i);
      const std::string at = absl::StrCat("train.data.transforms[", i, "]");
      switch (transform.kind_case()) {
        case v1::Transform::kStandardize:
          Names(at + ".standardize.arrays", transform.standardize().arrays());
          break;
        case v1::Transform::kScale:
          Names(at + ".scale.arrays", transform.scale().arrays());
          if (!std::isfinite(transform.scale().multiply())) Report(at + ".scale.multiply", "is not a finite number");
          if (!std::isfinite(transform.scale().add())) Report(at + ".scale.add", "is not a finite number");
          if (transform.scale().multiply() == 0 && transform.scale().add() == 0) {
            Report(at + ".scale", "changes nothing; give multiply, add or both");
          }
          break;
        case v1::Transform::kCrop:
          if (transform.crop().sizes_size() == 0) Report(at + ".crop.sizes", "is missing; such as [72, 144]");
          Shape(at + ".crop.sizes", transform.crop().sizes());
          break;
        case v1::Transform::kCoarsen: {
          Range(at + ".coarsen.factor", transform.coarsen().factor(), 2, 4'096);
          for (int j = 0; j < transform.coarsen().baselines_size(); ++j) {
            OneOf(absl::StrCat(at, ".coarsen.baselines[", j, "]"), transform.coarsen().baselines(j),
                  {"bilinear", "bicubic"});
          }
          Names(at + ".coarsen.baselines", transform.coarsen().baselines());
          break;
        }
        case v1::Transform::kFillMissing:
          if (transform.fill_missing().has_value() && !std::isfinite(transform.fill_missing().value())) {
            Report(at + ".fill_missing.value", "is not a finite number");
          }
          break;
        case v1::Transform::kWindow:
          Range(at + ".window.length", transform.window().length(), 1, 1'000'000);
          Range(at + ".window.horizon", transform.window().horizon(), 1, 1'000'000);
          break;
        case v1::Transform::kReshape:
          if (transform.reshape().array().empty()) Report(at + ".reshape.array", "is missing; name the array");
          if (transform.reshape().shape_size() == 0) Report(at + ".reshape.shape", "is missing; such as [1, 28, 28]");
          Shape(at + ".reshape.shape", transform.reshape().shape());
          break;
        case v1::Transform::kLog:
          Names(at + ".log.arrays", transform.log().arrays());
          if (!std::isfinite(transform.log().add())) Report(at + ".log.add", "is not a finite number");
          break;
        case v1::Transform::kClip: {
          const v1::Clip& clip = transform.clip();
          Names(at + ".clip.arrays", clip.arrays());
          if (!clip.has_min() && !clip.has_max()) Report(at + ".clip", "has neither min nor max; give one or both");
          if (clip.has_min() && clip.has_max() && !(clip.min() <= clip.max())) Report(at + ".clip.min", "is above max");
          break;
        }
        case v1::Transform::KIND_NOT_SET:
          Report(at, "is empty; use one of standardize, scale, crop, coarsen, fill_missing, window, reshape, log, clip");
          break;
      }
    }
  }

  std::vector<std::string> problems_;
  size_t total_ = 0;
};

}  // namespace

absl::Status ValidateSpec(const v1::JobSpec& spec) { return Checker().Check(spec); }

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
