#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cli/exit_code.h"
#include "client/cli/session.h"

// One function per verb, each in <verb>.cc. They return the exit code; an error is printed by the caller, which gives
// it its code.
namespace itwin::cli {

struct SubmitArguments {
  std::string file;  // "-" for standard input
  std::vector<std::string> overrides;
  std::string name;
  std::string request_id;
  std::string id_file;
  bool watch = false;
};
absl::StatusOr<int> Submit(Session& session, const SubmitArguments& arguments);

struct ValidateArguments {
  std::string file;
  std::vector<std::string> overrides;
  bool remote = false;
};
absl::StatusOr<int> Validate(Session& session, const ValidateArguments& arguments);

struct JobsArguments {
  std::vector<std::string> states;
  std::vector<std::string> labels;  // "key=value"
  std::string site;
  std::string name;
  int limit = 20;
  bool all = false;
  bool live = false;
  bool quiet = false;  // ids alone
};
absl::StatusOr<int> Jobs(Session& session, const JobsArguments& arguments);

absl::StatusOr<int> Status(Session& session, const std::string& job);
absl::StatusOr<int> Watch(Session& session, const std::string& job);

struct LogsArguments {
  std::string job;
  bool follow = false;
  bool from_stderr = false;
  int attempt = 0;  // newest
};
absl::StatusOr<int> Logs(Session& session, const LogsArguments& arguments);

struct MetricsArguments {
  std::string job;
  std::vector<std::string> series;
  bool csv = false;
  bool json = false;
};
absl::StatusOr<int> Metrics(Session& session, const MetricsArguments& arguments);

absl::StatusOr<int> Events(Session& session, const std::string& job);

struct CancelArguments {
  std::vector<std::string> jobs;
  std::string reason;
};
absl::StatusOr<int> Cancel(Session& session, const CancelArguments& arguments);

struct RetryArguments {
  std::string job;
  bool fresh = false;
  bool watch = false;
};
absl::StatusOr<int> Retry(Session& session, const RetryArguments& arguments);

struct GetArguments {
  std::string job;
  std::string directory;  // empty: named after the job
  std::vector<std::string> files;
};
absl::StatusOr<int> Get(Session& session, const GetArguments& arguments);

struct TraceArguments {
  std::string job;
  int64_t steps = 20;
  std::string file;  // empty: named after the job, here
};
absl::StatusOr<int> Trace(Session& session, const TraceArguments& arguments);

absl::StatusOr<int> Sites(Session& session);

struct SiteArguments {
  std::string file;             // add
  std::string fingerprint;      // add
  bool replace = false;         // add
  bool without_jobs = false;    // add, doctor
  std::string name;             // all others
  std::string reason;           // pause
};
absl::StatusOr<int> AddSite(Session& session, const SiteArguments& arguments);
absl::StatusOr<int> DoctorSite(Session& session, const SiteArguments& arguments);
absl::StatusOr<int> ShowSite(Session& session, const SiteArguments& arguments);
absl::StatusOr<int> PauseSite(Session& session, const SiteArguments& arguments);
absl::StatusOr<int> ResumeSite(Session& session, const SiteArguments& arguments);
absl::StatusOr<int> RemoveSite(Session& session, const SiteArguments& arguments);
absl::StatusOr<int> Version(Session& session);

}  // namespace itwin::cli
