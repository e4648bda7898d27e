#include "server/dispatch/failure_signs.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace itwin::server {
namespace {

constexpr size_t kMaxQuoted = 200;

// Printed when a node's hardware or its fabric is broken; whole phrases, so that a program that merely talks about
// such things is not taken for it. Compared without case.
constexpr absl::string_view kHardware[] = {
    "uncorrectable ecc",
    "ecc error",
    "cuda_error_ecc_uncorrectable",
    "fallen off the bus",
    "nvrm: xid",
    "unhandled cuda error",
    "unhandled system error",
    "cuda-capable device(s) is/are busy or unavailable",
    "signal: bus error",
    "bus error (core dumped)",
    "bus error  ",  // a shell's columns
    "bus error\n",
    "local catastrophic error",
    "transport retry counter exceeded",
};

bool IsHardware(absl::string_view line) {
  const std::string lower = absl::StrCat(absl::AsciiStrToLower(line), "\n");
  return std::any_of(std::begin(kHardware), std::end(kHardware),
                     [&](absl::string_view phrase) { return absl::StrContains(lower, phrase); });
}

bool IsHostChar(char c) {
  return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '.' || c == '_';
}

// The word at the start of `text`.
absl::string_view HostAt(absl::string_view text) {
  size_t end = 0;
  while (end < text.size() && IsHostChar(text[end])) ++end;
  while (end > 0 && (text[end - 1] == '.' || text[end - 1] == '-')) --end;  // a sentence's own
  return text.substr(0, end);
}

std::optional<int> NumberAt(absl::string_view text) {
  size_t end = 0;
  while (end < text.size() && absl::ascii_isdigit(static_cast<unsigned char>(text[end]))) ++end;
  int number = 0;
  if (end == 0 || !absl::SimpleAtoi(text.substr(0, end), &number)) return std::nullopt;
  return number;
}

absl::string_view After(absl::string_view line, absl::string_view mark) {
  const size_t at = line.find(mark);
  return at == absl::string_view::npos ? absl::string_view() : line.substr(at + mark.size());
}

// "srun: error: n2: task 3: Exited with exit code 1", "srun: error: n2: tasks 2-3: Killed"
bool ReadSrun(absl::string_view line, FailureSigns* out) {
  const absl::string_view rest = After(line, "srun: error: ");
  const absl::string_view host = HostAt(rest);
  if (host.empty()) return false;
  absl::string_view task = rest.substr(host.size());
  if (!absl::ConsumePrefix(&task, ": task ") && !absl::ConsumePrefix(&task, ": tasks ")) return false;
  const std::optional<int> rank = NumberAt(task);
  if (!rank) return false;
  out->rank = rank;
  out->host = std::string(host);
  return true;
}

// "mpirun noticed that process rank 1 with PID 12 on node n2 exited on signal 9 (Killed)."
bool ReadMpirun(absl::string_view line, FailureSigns* out) {
  const absl::string_view rest = After(line, "noticed that process rank ");
  const std::optional<int> rank = NumberAt(rest);
  if (!rank) return false;
  out->rank = rank;
  out->host = std::string(HostAt(After(rest, " on node ")));
  return true;
}

// "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD"
bool ReadAbort(absl::string_view line, FailureSigns* out) {
  const std::optional<int> rank = NumberAt(After(line, "MPI_ABORT was invoked on rank "));
  if (!rank) return false;
  out->rank = rank;
  return true;
}

bool Names(absl::string_view line, const std::string& node) {
  for (size_t at = line.find(node); !node.empty() && at != absl::string_view::npos; at = line.find(node, at + 1)) {
    const size_t end = at + node.size();
    const bool starts = at == 0 || !IsHostChar(line[at - 1]);
    const bool ends = end == line.size() || line[end] == '.' || !IsHostChar(line[end]);
    if (starts && ends) return true;
  }
  return false;
}

}  // namespace

FailureSigns ReadSigns(absl::string_view stderr_tail, absl::Span<const std::string> nodes) {
  FailureSigns out;
  std::string named;  // by the hardware line itself
  for (const absl::string_view line : absl::StrSplit(stderr_tail, absl::ByAnyChar("\n\r"), absl::SkipEmpty())) {
    if (!out.rank && !ReadSrun(line, &out) && !ReadMpirun(line, &out)) ReadAbort(line, &out);
    if (!out.hardware.empty() || !IsHardware(line)) continue;
    out.hardware = std::string(absl::StripAsciiWhitespace(line).substr(0, kMaxQuoted));
    for (const std::string& node : nodes) {
      if (Names(line, node)) named = node;
    }
    if (const absl::string_view rest = After(line, "srun: error: "); named.empty() && !rest.empty()) named = std::string(HostAt(rest));
  }
  if (out.hardware.empty()) return out;
  if (!named.empty()) {
    out.bad_node = named;
  } else if (nodes.size() == 1) {
    out.bad_node = nodes[0];
  } else if (!out.host.empty()) {
    out.bad_node = out.host;
  }
  return out;
}

std::vector<std::string> NodesToAvoid(const std::vector<std::string>& asked,
                                      const std::vector<std::vector<std::string>>& bad_by_attempt, int needed,
                                      int available) {
  std::vector<std::string> out = asked;
  size_t room = kMaxAvoidedNodes;
  if (available > 0) {
    const int spare = available - std::max(1, needed) - static_cast<int>(asked.size());
    room = std::min(room, static_cast<size_t>(std::max(0, spare)));
  }
  for (auto attempt = bad_by_attempt.rbegin(); attempt != bad_by_attempt.rend(); ++attempt) {
    for (const std::string& node : *attempt) {
      if (room == 0) return out;
      if (node.empty() || std::find(out.begin(), out.end(), node) != out.end()) continue;
      out.push_back(node);
      --room;
    }
  }
  return out;
}

}  // namespace itwin::server
