#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "agent/scheduler/slurm/slurm_state.h"
#include "itwin/agent/v1/agent.pb.h"

// What SLURM's commands print, read. Pure and total: whatever the bytes, a row that cannot be read is counted and left
// out, and nothing is split at blanks, '|' or '='. Fields are separated by 0x1f; times are seconds since 1970.
namespace itwin::agent {

// Of squeue or sacct. The same job has several rows in sacct (lives, steps).
struct SlurmJobRow {
  std::string id = {};
  std::string name = {};
  std::string word = {};  // the state as SLURM spells it
  SlurmState state = SlurmState::kUnrecognized;
  std::string reason = {};
  std::string partition = {};
  std::optional<absl::Time> submitted = {};
  std::optional<absl::Time> started = {};  // pending: expected
  std::optional<absl::Time> ended = {};
  int restarts = 0;
  std::optional<SlurmExit> exit = {};
  std::vector<std::string> nodes = {};
  bool step = false;  // sacct: a row of a step ("12.batch"), whose id is the job's
};
struct SlurmRows {
  std::vector<SlurmJobRow> rows = {};
  int bad = 0;                // could not be read
  int unrecognized = 0;       // states nobody has heard of
};

// For `squeue -O` and, where that does not take suffixes, `squeue -o`.
std::string QueueLongFormat();
std::string QueueShortFormat();
SlurmRows ParseQueueLong(absl::string_view text);
SlurmRows ParseQueueShort(absl::string_view text);
// `sacct --parsable2 --noheader --delimiter=<0x1f> --format=` this.
inline constexpr char kAccountingFields[] = "JobIDRaw,JobName,State,ExitCode,Submit,Start,End,NodeList,Reason";
// With JobName and Reason last but one they are free text, yet SLURM's delimiter cannot be part of them.
SlurmRows ParseAccounting(absl::string_view text);

// "12" or "12;cluster", on the last line that looks like it: a site's submit filter may print anything around.
struct SubmittedId {
  std::string id = {};
  std::string cluster = {};
};
std::optional<SubmittedId> ParseSubmitted(absl::string_view text);

// "n[1-3,08-10],m2" as names; at most `limit` of them. A text that is no such list is taken as one name.
std::vector<std::string> ExpandHostList(absl::string_view text, size_t limit = 10'000);

// `scontrol show config`: "Key = Value" lines.
std::map<std::string, std::string> ParseConfig(absl::string_view text);
// "20 sec", "300", "UNLIMITED": nothing for the last and for other text.
std::optional<absl::Duration> ParseConfigSeconds(absl::string_view text);
// "1-02:03:04", "02:03:04", "03:04", "5" (minutes); "UNLIMITED", "INFINITE", "NONE": nothing.
std::optional<absl::Duration> ParseTimeLimit(absl::string_view text);

// `scontrol show partition -o`; node sizes come from sinfo.
std::vector<v1::Partition> ParsePartitions(absl::string_view text);
// For `sinfo -h -a -o`, and what it prints: sizes of the largest node go into the partitions.
std::string NodesFormat();
void AddNodeSizes(absl::string_view text, std::vector<v1::Partition>* partitions);
// `sinfo -h -o %T`, a line a state ("idle", "mixed", "down*", "idle~"): does it name a node that takes no job for now, because it
// is down, drained, under maintenance or does not answer?
bool AnyNodeOutOfUse(absl::string_view text);
// "slurm-wlm 22.05.8" -> "22.05.8"; "" for other text.
std::string ParseVersion(absl::string_view text);
// Like "22.05.8" -> 220508, to compare with; 0 for other text.
int VersionNumber(absl::string_view version);
// `srun --mpi=list`, stdout and stderr: "pmix", "pmix_v4", "pmi2", ...
std::vector<std::string> ParseMpiPlugins(absl::string_view text);
// `scontrol ping`: whether any controller is up.
bool ParsePing(absl::string_view text);

// Whether sbatch's words mean that it was refused for good, as opposed to: nobody knows.
bool IsRefusal(absl::string_view error_text);
// Whether they mean that it was refused for now: a limit on how many may wait.
bool IsRefusedForNow(absl::string_view error_text);

}  // namespace itwin::agent
