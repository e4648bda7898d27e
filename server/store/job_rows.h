#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "common/ids.h"
#include "common/job_state.h"
#include "itwin/agent/v1/agent.pb.h"
#include "itwin/v1/jobs.pb.h"
#include "itwin/v1/spec.pb.h"

// What goes into the job store and comes out of it: plain values.
namespace itwin::server {

inline constexpr int kMaxSeriesPerJob = 10'000;    // of all attempts; points of further series are refused and counted
inline constexpr size_t kMaxSeriesNameBytes = 200;

struct NewJob {
  std::string owner;       // name of the token
  std::string request_id;  // made by the client; unique per owner
  v1::JobSpec spec;        // checked
  std::string actor;       // of the first event; "user:<owner>" when empty
  std::string message;     // of the first event
  std::string retry_of;    // id of the job that this one repeats
  std::optional<AttemptKey> resume;  // attempt whose checkpoint the first attempt goes on from
};

// A job as lists show it; its spec is read apart.
struct JobRow {
  JobId id;
  std::string name;
  std::string owner;
  JobRecord record;
  int64_t version = 0;  // sequence number of the newest event
  absl::Time created;
  absl::Time started = absl::InfinitePast();   // first rank of the newest attempt; InfinitePast before
  absl::Time finished = absl::InfinitePast();  // InfinitePast before
  v1::Progress progress;
  std::map<std::string, double> summary;
  std::map<std::string, std::string> labels;
  int ranks = 1;
  std::string requested_site;  // the spec's: a name, "any" or ""
  std::string retry_of;
  std::optional<AttemptKey> resume;
  std::string waiting;  // why it waits now, when that has changed since its last event; "" otherwise
};

struct Submitted {
  JobRow job;
  bool existed = false;
};

struct AttemptRow {
  int number = 0;
  std::string site;
  std::string scheduler_id;
  absl::Time submitted = absl::InfinitePast();
  absl::Time started = absl::InfinitePast();
  absl::Time ended = absl::InfinitePast();
  std::string host;
  std::optional<int> exit_code;
  int signal = 0;
  agent::v1::EndCause cause = agent::v1::END_CAUSE_UNSPECIFIED;
  FailureClass failure = FailureClass::kNone;
  std::string reason;
  double cpu_seconds = 0;
  int64_t max_rss_bytes = 0;
  int64_t max_step = 0;     // largest step or progress seen
  bool checkpoint = false;  // at least one complete checkpoint
  std::string resume_attempt;  // key of the attempt it went on from; "" for a fresh start
  std::string result_json;
  agent::v1::SpoolCursor cursor;                    // how far its files are stored
  std::optional<agent::v1::SpoolSizes> final_sizes;  // once it has ended
  int64_t bad_lines = 0;  // journal lines that could not be read
  std::vector<std::string> bad_nodes;  // failed it; later attempts at that site stay away from them
};

// What is new about an attempt; unset members leave what is stored.
struct AttemptUpdate {
  std::optional<std::string> scheduler_id;
  std::optional<absl::Time> submitted;
  std::optional<absl::Time> started;  // also becomes the job's
  std::optional<absl::Time> ended;
  std::optional<std::string> host;
  std::optional<int> exit_code;
  std::optional<int> signal;
  std::optional<agent::v1::EndCause> cause;
  std::optional<FailureClass> failure;
  std::optional<std::string> reason;
  std::optional<double> cpu_seconds;
  std::optional<int64_t> max_rss_bytes;
  std::optional<int64_t> max_step;
  std::optional<bool> checkpoint;
  std::optional<std::string> resume_attempt;
  std::optional<std::string> result_json;
  std::optional<agent::v1::SpoolSizes> final_sizes;
  std::optional<std::vector<std::string>> bad_nodes;
  std::optional<std::map<std::string, double>> summary;      // becomes the job's
  std::optional<std::vector<v1::OutputFile>> outputs;        // become the job's; replace earlier ones, but for early outputs
  std::optional<v1::OutputFile> early_output;                // becomes the job's, while the attempt runs, and stays
  std::optional<v1::Progress> progress;                      // becomes the job's
  std::optional<std::string> waiting;                        // becomes the job's, until its next event

  // Nothing is set.
  bool empty() const;
};

struct StoredEvent {
  int64_t sequence = 0;  // of all jobs; grows
  JobEvent event;
  JobState state = JobState::kQueued;  // after it
};

// Points of one series, column by column; the three have the same length.
struct PointColumns {
  std::string series;
  std::vector<int64_t> steps;
  std::vector<int64_t> times_us;
  std::vector<double> values;
};

// A range [begin_offset, end_offset) of one file of an attempt's spool, and what it held.
struct SpoolBatch {
  AttemptKey attempt;
  agent::v1::SpoolFile file = agent::v1::SPOOL_FILE_UNSPECIFIED;
  std::string host;  // SPOOL_FILE_NODE
  int64_t begin_offset = 0;
  int64_t end_offset = 0;
  std::vector<PointColumns> points;      // a series at most once
  std::optional<v1::Progress> progress;  // the newest one in the range
  int64_t bad_lines = 0;
  std::string log;  // SPOOL_FILE_STDOUT and _STDERR: the bytes
};

struct SpoolCommit {
  enum class Outcome { kStored, kSkipped, kUnknownAttempt };
  Outcome outcome = Outcome::kStored;
  int64_t cursor = 0;          // where the file stands now
  int64_t refused_points = 0;  // of series beyond kMaxSeriesPerJob or with a name that is none; counted as bad lines
};

// Every member has a default, so that callers can name just those they mean.
struct JobFilter {
  std::vector<JobState> states = {};  // empty: all
  bool live_only = false;
  std::string site = {};
  std::string name_contains = {};
  std::map<std::string, std::string> labels = {};
  std::string owner = {};  // empty: all
  int page_size = 50;
  std::string page_token = {};
};
struct JobPage {
  std::vector<JobRow> jobs;
  std::string next_page_token;  // empty at the end
};

struct PointsPage {
  std::vector<v1::PointBlock> blocks;
  int64_t next_cursor = 0;
  bool end = true;  // nothing more at the moment
};

struct LogSlice {
  std::string data;
  int64_t offset = 0;
  int64_t next_offset = 0;
  int64_t size = 0;
  bool complete = false;  // the attempt has ended and all of it is here
  int64_t dropped_bytes = 0;
  int attempt = 0;
};

// What a commit changed, job by job.
struct JobChange {
  JobId job;
  bool event = false;     // an event was appended (or the job is new)
  bool attempt = false;   // facts about an attempt, summary, outputs
  bool progress = false;
  bool points = false;
  bool logs = false;
  std::shared_ptr<const JobRow> row = nullptr;  // with `event`: the job after it
};
class CommitListener {
 public:
  virtual ~CommitListener() = default;
  virtual void OnCommit(absl::Span<const JobChange> changes) = 0;
};

}  // namespace itwin::server
