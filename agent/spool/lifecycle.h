#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

// lifecycle.jsonl: what the script of an attempt recorded about itself.
namespace itwin::agent {

struct StartedRecord {
  absl::Time time = {};
  std::string host = {};
  int64_t pid = 0;
  std::string scheduler_id = {};
};

// Why the script says the program ended; the words of the file.
inline constexpr char kCauseSelf[] = "";
inline constexpr char kCauseCancelled[] = "cancelled";
inline constexpr char kCauseTimeLimit[] = "time_limit";
inline constexpr char kCauseTerminated[] = "terminated";
inline constexpr char kCauseLaunchFailed[] = "launch_failed";
inline constexpr char kCauseOutOfMemory[] = "out_of_memory";  // the kernel says so

struct ExitedRecord {
  absl::Time time = {};
  int exit_code = 0;  // when signal is 0
  int signal = 0;
  double cpu_seconds = 0;
  int64_t max_rss_bytes = 0;
  std::string cause = {};
  std::string message = {};
};

struct Lifecycle {
  std::vector<StartedRecord> started;
  std::optional<ExitedRecord> exited;  // the first; later ones would be a bug and are counted as bad
  int duplicates = 0;
  int bad_lines = 0;
};

// Tolerant: a line without its newline is not there yet, a bad one is counted. Total.
Lifecycle ParseLifecycle(absl::string_view text);
// A missing file is an empty lifecycle. At most the first 1 MiB is read.
Lifecycle ReadLifecycle(const std::string& path);

// What the supervisor did not keep of stdout and stderr: dropped.json. A missing or bad file: nothing.
struct DroppedBytes {
  int64_t out = 0;
  int64_t err = 0;
};
DroppedBytes ReadDropped(const std::string& path);
std::string RenderDropped(const DroppedBytes& dropped);

std::string RenderStarted(const StartedRecord& record);
std::string RenderExited(const ExitedRecord& record);
std::string RenderDuplicate(absl::Time time, const std::string& host);

// Appends one line and makes it durable. A torn line left by a crash is closed first, so that it cannot swallow ours.
absl::Status AppendLine(const std::string& path, absl::string_view line);

// For records in JSON: seconds since 1970 with milliseconds; text that is not UTF-8 is repaired.
double UnixSeconds(absl::Time time);

}  // namespace itwin::agent
