#include "agent/scheduler/slurm/slurm_text.h"

#include <algorithm>
#include <iterator>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace itwin::agent {
namespace {

constexpr char kSeparator = '\x1f';
constexpr size_t kMaxRows = 200'000;

// In this order in both formats; the long one goes on with what the short one cannot say.
const char* const kLongFields[] = {"JobID",   "Name",     "State",     "Reason",     "SubmitTime", "StartTime",
                                   "EndTime", "NodeList", "Partition", "RestartCnt", "exit_code"};
const char* const kShortFields[] = {"%i", "%j", "%T", "%r", "%V", "%S", "%e", "%N", "%P"};

std::optional<absl::Time> ParseEpoch(absl::string_view text) {
  int64_t seconds = 0;
  if (!absl::SimpleAtoi(text, &seconds) || seconds <= 0 || seconds > 100'000'000'000) return std::nullopt;
  return absl::FromUnixSeconds(seconds);
}

bool IsJobId(absl::string_view text) {
  return !text.empty() && text.size() <= 32 && absl::ascii_isdigit(static_cast<unsigned char>(text[0])) &&
         std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '+' || c == '[' || c == ']' ||
                  c == '-' || c == '%' || c == ',';
         });
}

std::vector<std::string> NodesOf(absl::string_view text) {
  text = absl::StripAsciiWhitespace(text);
  if (text.empty() || text == "(null)" || text == "None assigned" || text == "None" || text == "N/A") return {};
  return ExpandHostList(text);
}

SlurmRows ParseQueue(absl::string_view text, bool with_more) {
  SlurmRows out;
  const size_t wanted = std::size(kShortFields) + (with_more ? 2 : 0);
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    std::vector<absl::string_view> fields = absl::StrSplit(line, kSeparator);
    // A suffix behind the last field leaves an empty one at the end.
    if (fields.size() == wanted + 1 && absl::StripAsciiWhitespace(fields.back()).empty()) fields.pop_back();
    if (fields.size() != wanted || !IsJobId(fields[0]) || fields[2].empty() || out.rows.size() >= kMaxRows) {
      ++out.bad;
      continue;
    }
    SlurmJobRow row;
    row.id = std::string(fields[0]);
    row.name = std::string(fields[1]);
    row.word = std::string(fields[2]);
    row.state = ParseSlurmState(row.word);
    row.reason = std::string(absl::StripAsciiWhitespace(fields[3]));
    row.submitted = ParseEpoch(fields[4]);
    row.started = ParseEpoch(fields[5]);
    row.ended = ParseEpoch(fields[6]);
    row.nodes = NodesOf(fields[7]);
    row.partition = std::string(fields[8]);
    if (with_more) {
      if (!absl::SimpleAtoi(fields[9], &row.restarts) || row.restarts < 0) row.restarts = 0;
      row.exit = ParseExit(fields[10]);
    }
    if (row.state == SlurmState::kUnrecognized) ++out.unrecognized;
    out.rows.push_back(std::move(row));
  }
  return out;
}

// "Key=Value Key=Value": a value ends at the blank before the next key, so it may hold blanks, not ours.
std::string ValueOf(absl::string_view line, absl::string_view key) {
  const std::string mark = absl::StrCat(key, "=");
  for (size_t at = line.find(mark); at != absl::string_view::npos; at = line.find(mark, at + 1)) {
    if (at > 0 && line[at - 1] != ' ') continue;
    const absl::string_view rest = line.substr(at + mark.size());
    return std::string(rest.substr(0, rest.find_first_of(" \n")));
  }
  return "";
}

void SetDuration(absl::Duration duration, google::protobuf::Duration* out) {
  out->set_seconds(absl::ToInt64Seconds(duration));
}

}  // namespace

std::string QueueLongFormat() {
  std::vector<std::string> fields;
  for (const char* field : kLongFields) fields.push_back(absl::StrCat(field, ":", std::string(1, kSeparator)));
  return absl::StrJoin(fields, ",");
}

std::string QueueShortFormat() { return absl::StrJoin(kShortFields, std::string(1, kSeparator)); }

SlurmRows ParseQueueLong(absl::string_view text) { return ParseQueue(text, /*with_more=*/true); }
SlurmRows ParseQueueShort(absl::string_view text) { return ParseQueue(text, /*with_more=*/false); }

SlurmRows ParseAccounting(absl::string_view text) {
  SlurmRows out;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (absl::StripAsciiWhitespace(line).empty()) continue;
    const std::vector<absl::string_view> fields = absl::StrSplit(line, kSeparator);
    if (fields.size() != 9 || fields[0].empty() || out.rows.size() >= kMaxRows) {
      ++out.bad;
      continue;
    }
    SlurmJobRow row;
    const size_t dot = fields[0].find('.');
    row.step = dot != absl::string_view::npos;
    row.id = std::string(fields[0].substr(0, dot));
    if (!IsJobId(row.id)) {
      ++out.bad;
      continue;
    }
    row.name = std::string(fields[1]);
    row.word = std::string(fields[2]);
    row.state = ParseSlurmState(row.word);
    row.exit = ParseExit(fields[3]);
    row.submitted = ParseEpoch(fields[4]);
    row.started = ParseEpoch(fields[5]);
    row.ended = ParseEpoch(fields[6]);
    row.nodes = NodesOf(fields[7]);
    row.reason = std::string(absl::StripAsciiWhitespace(fields[8]));
    if (row.state == SlurmState::kUnrecognized) ++out.unrecognized;
    out.rows.push_back(std::move(row));
  }
  return out;
}

std::optional<SubmittedId> ParseSubmitted(absl::string_view text) {
  std::optional<SubmittedId> out;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    line = absl::StripAsciiWhitespace(line);
    const size_t end = line.find(';');
    const absl::string_view id = line.substr(0, end);
    if (id.empty() || id.size() > 20 ||
        !std::all_of(id.begin(), id.end(), [](unsigned char c) { return absl::ascii_isdigit(c); })) {
      continue;
    }
    if (end != absl::string_view::npos && end + 1 == line.size()) continue;
    out = SubmittedId{std::string(id), end == absl::string_view::npos ? "" : std::string(line.substr(end + 1))};
  }
  return out;
}

std::vector<std::string> ExpandHostList(absl::string_view text, size_t limit) {
  std::vector<std::string> out;
  // Commas inside brackets belong to them.
  std::vector<std::string> parts(1);
  int depth = 0;
  for (const char c : text) {
    if (c == '[') ++depth;
    if (c == ']') --depth;
    if (depth < 0 || depth > 1) return {std::string(text)};
    if (c == ',' && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back().push_back(c);
    }
  }
  if (depth != 0) return {std::string(text)};
  for (const std::string& part : parts) {
    // One bracket after the other, for "rack[1-2]n[1-4]".
    std::vector<std::string> names = {""};
    absl::string_view rest = part;
    while (!rest.empty()) {
      const size_t open = rest.find('[');
      const absl::string_view plain = rest.substr(0, open);
      for (std::string& name : names) absl::StrAppend(&name, plain);
      if (open == absl::string_view::npos) break;
      const size_t close = rest.find(']', open);
      if (close == absl::string_view::npos) return {std::string(text)};
      std::vector<std::string> next;
      for (absl::string_view range : absl::StrSplit(rest.substr(open + 1, close - open - 1), ',')) {
        const std::pair<absl::string_view, absl::string_view> ends = absl::StrSplit(range, absl::MaxSplits('-', 1));
        int64_t first = 0, last = 0;
        if (!absl::SimpleAtoi(ends.first, &first) || first < 0) return {std::string(text)};
        last = first;
        if (range.find('-') != absl::string_view::npos && (!absl::SimpleAtoi(ends.second, &last) || last < first)) {
          return {std::string(text)};
        }
        const int width = ends.first[0] == '0' ? static_cast<int>(ends.first.size()) : 0;
        for (int64_t number = first; number <= last; ++number) {
          for (const std::string& name : names) {
            if (out.size() + next.size() >= limit) break;
            next.push_back(absl::StrFormat("%s%0*d", name, width, number));
          }
          if (out.size() + next.size() >= limit) break;
        }
      }
      names = std::move(next);
      rest.remove_prefix(close + 1);
    }
    for (std::string& name : names) {
      if (out.size() >= limit) return out;
      if (!name.empty()) out.push_back(std::move(name));
    }
  }
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

std::map<std::string, std::string> ParseConfig(absl::string_view text) {
  std::map<std::string, std::string> out;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const size_t at = line.find(" = ");
    if (at == absl::string_view::npos) continue;
    const absl::string_view key = absl::StripAsciiWhitespace(line.substr(0, at));
    if (!key.empty()) out[std::string(key)] = std::string(absl::StripAsciiWhitespace(line.substr(at + 3)));
  }
  return out;
}

std::optional<absl::Duration> ParseConfigSeconds(absl::string_view text) {
  const absl::string_view number = text.substr(0, text.find(' '));
  int64_t seconds = 0;
  if (!absl::SimpleAtoi(number, &seconds) || seconds < 0) return std::nullopt;
  if (absl::StrContains(text, " min")) return absl::Minutes(seconds);
  return absl::Seconds(seconds);
}

std::optional<absl::Duration> ParseTimeLimit(absl::string_view text) {
  text = absl::StripAsciiWhitespace(text);
  int64_t days = 0;
  bool has_days = false;
  if (const size_t dash = text.find('-'); dash != absl::string_view::npos) {
    if (!absl::SimpleAtoi(text.substr(0, dash), &days) || days < 0 || days > 100'000) return std::nullopt;
    has_days = true;
    text.remove_prefix(dash + 1);
  }
  std::vector<int64_t> numbers;
  for (absl::string_view part : absl::StrSplit(text, ':')) {
    int64_t number = 0;
    if (!absl::SimpleAtoi(part, &number) || number < 0 || number > 100'000'000) return std::nullopt;
    numbers.push_back(number);
  }
  if (numbers.size() > 3) return std::nullopt;
  int64_t seconds = 0;
  if (has_days) {  // D-H[:M[:S]]
    numbers.resize(3);
    seconds = numbers[0] * 3600 + numbers[1] * 60 + numbers[2];
  } else if (numbers.size() == 3) {
    seconds = numbers[0] * 3600 + numbers[1] * 60 + numbers[2];
  } else if (numbers.size() == 2) {
    seconds = numbers[0] * 60 + numbers[1];
  } else {
    seconds = numbers[0] * 60;
  }
  return absl::Seconds(days * 86'400 + seconds);
}

std::vector<v1::Partition> ParsePartitions(absl::string_view text) {
  std::vector<v1::Partition> out;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::string name = ValueOf(line, "PartitionName");
    if (name.empty()) continue;
    v1::Partition partition;
    partition.set_name(name);
    partition.set_is_default(ValueOf(line, "Default") == "YES");
    partition.set_up(ValueOf(line, "State") == "UP");
    if (const auto limit = ParseTimeLimit(ValueOf(line, "MaxTime"))) SetDuration(*limit, partition.mutable_max_time());
    int number = 0;
    if (absl::SimpleAtoi(ValueOf(line, "TotalNodes"), &number)) partition.set_nodes(std::max(0, number));
    if (absl::SimpleAtoi(ValueOf(line, "MaxNodes"), &number)) partition.set_max_nodes_per_job(std::max(0, number));
    out.push_back(std::move(partition));
  }
  return out;
}

std::string NodesFormat() { return absl::StrJoin({"%R", "%D", "%c", "%m", "%G"}, std::string(1, kSeparator)); }

void AddNodeSizes(absl::string_view text, std::vector<v1::Partition>* partitions) {
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line, kSeparator);
    if (fields.size() != 5) continue;
    const auto it = std::find_if(partitions->begin(), partitions->end(),
                                 [&](const v1::Partition& p) { return absl::string_view(p.name()) == fields[0]; });
    if (it == partitions->end()) continue;
    const auto number = [](absl::string_view field) {  // "4+" when nodes differ
      int64_t value = 0;
      return absl::SimpleAtoi(field.substr(0, field.find('+')), &value) && value > 0 ? value : int64_t{0};
    };
    it->set_cpus_per_node(std::max<int32_t>(it->cpus_per_node(), static_cast<int32_t>(std::min<int64_t>(number(fields[2]), 1 << 20))));
    it->set_memory_mib_per_node(std::max(it->memory_mib_per_node(), number(fields[3])));
    int gpus = 0;
    for (absl::string_view gres : absl::StrSplit(fields[4], ',')) {  // "gpu:a100:4(S:0-1)", "gpu:2"
      if (gres != "gpu" && !absl::StartsWith(gres, "gpu:")) continue;
      const absl::string_view plain = gres.substr(0, gres.find('('));
      const std::vector<absl::string_view> parts = absl::StrSplit(plain, ':');
      int count = 0;
      gpus += parts.size() == 1 ? 1 : absl::SimpleAtoi(parts.back(), &count) && count > 0 && count < 1000 ? count : 0;
    }
    it->set_gpus_per_node(std::max(it->gpus_per_node(), gpus));
  }
}

bool AnyNodeOutOfUse(absl::string_view text) {
  static constexpr absl::string_view kInUse[] = {"idle", "mixed", "allocated", "allocated+", "completing", "planned", "reserved"};
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    line = absl::StripAsciiWhitespace(line);
    if (line.empty()) continue;
    // Power saving, powering up or down and planned: SLURM wakes or frees it for a job by itself.
    for (const absl::string_view mark : {"~", "#", "!", "%", "-"}) {
      if (absl::ConsumeSuffix(&line, mark)) break;
    }
    if (std::find(std::begin(kInUse), std::end(kInUse), line) == std::end(kInUse)) return true;
  }
  return false;
}

std::string ParseVersion(absl::string_view text) {
  for (absl::string_view word : absl::StrSplit(text, absl::ByAnyChar(" \n\t"), absl::SkipEmpty())) {
    if (VersionNumber(word) > 0) return std::string(word);
  }
  return "";
}

int VersionNumber(absl::string_view version) {
  // A pre-release or a packager's mark may follow: "23.11.0-0rc1".
  const std::vector<absl::string_view> parts = absl::StrSplit(version.substr(0, version.find('-')), '.');
  int numbers[3] = {0, 0, 0};
  if (parts.size() < 2 || parts.size() > 4) return 0;
  for (size_t i = 0; i < std::min<size_t>(3, parts.size()); ++i) {
    if (!absl::SimpleAtoi(parts[i], &numbers[i]) || numbers[i] < 0 || numbers[i] > 99) return 0;
  }
  return numbers[0] * 10'000 + numbers[1] * 100 + numbers[2];
}

std::vector<std::string> ParseMpiPlugins(absl::string_view text) {
  std::set<std::string> out;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (absl::StartsWith(line, "srun: ")) line.remove_prefix(6);  // older versions print it as messages
    line = absl::StripAsciiWhitespace(line);
    if (absl::StartsWith(line, "specific")) {
      const size_t colon = line.find(':');
      if (colon == absl::string_view::npos) continue;
      for (absl::string_view word : absl::StrSplit(line.substr(colon + 1), absl::ByAnyChar(", "), absl::SkipEmpty())) {
        out.insert(std::string(word));
      }
      continue;
    }
    if (line.empty() || line.find_first_of(" :") != absl::string_view::npos) continue;
    out.insert(std::string(line));
  }
  return {out.begin(), out.end()};
}

bool ParsePing(absl::string_view text) {
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (absl::EndsWith(absl::StripAsciiWhitespace(line), " UP") || absl::StrContains(line, " is UP")) return true;
  }
  return false;
}

bool IsRefusedForNow(absl::string_view text) {
  const std::string lower = absl::AsciiStrToLower(text);
  for (const char* words : {"job submit limit", "AssocMaxSubmitJobLimit", "QOSMaxSubmitJobPerUserLimit", "MaxSubmitJob",
                            "Slurm temporarily unable to accept job", "Job queue is full", "queue full"}) {
    if (absl::StrContains(lower, absl::AsciiStrToLower(words))) return true;
  }
  return false;
}

bool IsRefusal(absl::string_view text) {
  if (IsRefusedForNow(text)) return false;
  for (const char* words :
       {"Requested node configuration is not available", "Invalid partition name", "invalid partition specified",
        "Invalid account", "Invalid qos", "Invalid generic resource", "Invalid feature specification",
        "Requested reservation is invalid", "Requested time limit is invalid", "Node count specification invalid",
        "More processors requested than permitted", "violates accounting/QOS policy", "Memory specification",
        "Access/permission denied", "access permission to requested", "User's group not permitted",
        "not permitted to use this partition", "Invalid node name", "Invalid job constraint", "CPU count specification",
        "CPU count per node can not be satisfied", "Batch script", "This does not look like a batch script",
        "unrecognized option", "Invalid --", "invalid option", "Invalid numeric value", "Pathname of a file",
        "Requested partition configuration not available", "Invalid Trackable RESource", "Invalid license",
        "Job size specification", "partition is required"}) {
    if (absl::StrContains(text, words)) return true;
  }
  return false;
}

}  // namespace itwin::agent
