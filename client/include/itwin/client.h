#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stop_token>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "itwin/connect.h"
#include "itwin/connection.h"
#include "itwin/v1/jobs.pb.h"
#include "itwin/v1/sites.pb.h"

namespace itwin::client {

struct TransferProgress {
  enum class Phase { kHashing, kUploading, kDownloading };
  Phase phase = Phase::kHashing;
  std::string file;
  int64_t done_bytes = 0;   // of this file
  int64_t total_bytes = 0;
};
using OnProgress = std::function<void(const TransferProgress&)>;

struct SubmitOptions {
  std::string base_directory = ".";  // what relative paths in the spec are relative to
  // 1..128 of [A-Za-z0-9._-]; empty: a random one. The same id and spec again give the same job.
  std::string request_id{};
  OnProgress progress{};
};

struct WatchOptions {
  v1::WatchCursor cursor{};  // empty: from the start
  bool points = true;
  bool logs = false;
  std::stop_token stop{};    // ends the watch from another thread
  // How long the gateway may be out of reach in a row before the watch ends with kUnavailable.
  absl::Duration give_up_after = absl::InfiniteDuration();
  // Told when the stream broke and before it is opened again.
  std::function<void(const absl::Status&, absl::Duration)> on_reconnect{};
};

// Pages of jobs, newest first. Not thread-safe.
class JobPager {
 public:
  JobPager(std::shared_ptr<Connection> connection, v1::ListJobsRequest request)
      : connection_(std::move(connection)), request_(std::move(request)) {}
  bool done() const { return done_; }
  // The next page; empty at the end. After an error the same page can be asked for again.
  absl::StatusOr<std::vector<v1::Job>> Next();

 private:
  std::shared_ptr<Connection> connection_;
  v1::ListJobsRequest request_;
  bool done_ = false;
};

// A gateway, for programs:
//
//   absl::StatusOr<itwin::client::Client> client = itwin::client::Connect();
//   absl::StatusOr<itwin::v1::SubmitJobResponse> submitted = client->Submit(spec, {.base_directory = "."});
//   client->Watch(submitted->job().id(), {}, [](const itwin::v1::JobUpdate& update) { ...; return true; });
//
// A value: copies share the connection. Thread-safe; starts no thread: every call blocks its caller, and callbacks run
// in it. A job is named by its id or a unique prefix of at least four characters.
// Errors: kNotFound, kInvalidArgument (naming the field), kFailedPrecondition (not in this state), kUnauthenticated,
// kPermissionDenied, kResourceExhausted (quota, disk), kUnavailable (out of reach even after retries), kDataLoss.
class Client {
 public:
  explicit Client(std::shared_ptr<Connection> connection) : connection_(std::move(connection)) {}

  // Checks the spec, hashes the local files it names, uploads those that the gateway does not have (resuming where an
  // upload broke off), and submits. A file lies in the job's working directory under its path relative to the base
  // directory, or its base name when it is outside; two files in one place are kInvalidArgument.
  absl::StatusOr<v1::SubmitJobResponse> Submit(v1::JobSpec spec, const SubmitOptions& options = {});

  // What the gateway thinks of a spec (or a YAML or JSON document); nothing is stored.
  absl::StatusOr<v1::ValidateJobResponse> Validate(const v1::JobSpec& spec);
  absl::StatusOr<v1::ValidateJobResponse> Validate(const std::string& document,
                                                   const std::vector<std::string>& overrides);

  absl::StatusOr<v1::Job> Get(const std::string& job);
  JobPager List(v1::ListJobsRequest filter = {});
  absl::StatusOr<v1::Job> Cancel(const std::string& job, const std::string& reason = "");
  absl::StatusOr<v1::SubmitJobResponse> Retry(const std::string& job, bool fresh = false,
                                              const std::string& request_id = "");

  // The job now, and every change until it is final: then returns the job. Survives restarts of the gateway and broken
  // networks: it goes on after the last update that `on_update` got, repeating and losing nothing. Ends early, with the
  // job as last seen, when `on_update` returns false; with kCancelled at `stop`.
  absl::StatusOr<v1::Job> Watch(const std::string& job, const WatchOptions& options,
                                const std::function<bool(const v1::JobUpdate&)>& on_update);

  // Has the next `steps` (0: 20) training steps of all ranks of a running job traced, and waits until that is among its outputs:
  // a file for ui.perfetto.dev. Of `options` only `stop`, `give_up_after` and `on_reconnect` count. kFailedPrecondition: the job
  // does not run or does not train, or it ended before.
  absl::StatusOr<v1::OutputFile> Trace(const std::string& job, int64_t steps = 0, WatchOptions options = {});

  absl::StatusOr<std::vector<v1::JobEvent>> Events(const std::string& job);
  absl::StatusOr<v1::ReadLogResponse> ReadLog(const v1::ReadLogRequest& request);
  // All points there are at the moment after `cursor` (0: all), block by block; returns the cursor to go on from.
  // Series: empty for all; a trailing "*" matches any ending.
  absl::StatusOr<int64_t> Points(const std::string& job, const std::vector<std::string>& series, int64_t cursor,
                                 const std::function<absl::Status(const v1::PointBlock&)>& on_block);
  absl::StatusOr<std::vector<v1::SeriesBuckets>> QuerySeries(const std::string& job,
                                                             const std::vector<std::string>& series, int buckets);

  absl::StatusOr<std::vector<v1::OutputFile>> Outputs(const std::string& job);
  // Writes `path` whole or not at all: bytes go to `<path>.part` (and are kept there when the transfer breaks off, to
  // go on later), their SHA-256 is checked, then the file is renamed. A file that is there and right is left alone.
  // kDataLoss when the bytes are wrong.
  absl::Status Download(const v1::OutputFile& file, const std::string& path, const OnProgress& progress = {});
  // The same for a file below `directory` at the output's own path. kDataLoss for a path that would leave it.
  // Returns where it lies.
  absl::StatusOr<std::string> DownloadInto(const v1::OutputFile& file, const std::string& directory,
                                           const OnProgress& progress = {});

  absl::StatusOr<std::vector<v1::Site>> Sites();
  // With the site's file, for administrators. kNotFound names the nearest name.
  absl::StatusOr<v1::Site> Site(const std::string& name);
  // For administrators: takes a site file's text, reaches and examines the site, and keeps it when nothing is wrong.
  // `on_progress` gets each step as it goes; false ends it with kCancelled. kFailedPrecondition: an unknown host key (the message has
  // its fingerprint), or a check failed; nothing is kept then.
  absl::Status AddSite(const v1::AddSiteRequest& request, const std::function<bool(const v1::SiteProgress&)>& on_progress);
  // The same checks of a site that is there. OK also when some failed: count SITE_CHECK_ERROR.
  absl::Status DoctorSite(const std::string& name, bool without_jobs, const std::function<bool(const v1::SiteProgress&)>& on_progress);
  absl::StatusOr<v1::Site> PauseSite(const std::string& name, const std::string& reason = "");
  absl::StatusOr<v1::Site> ResumeSite(const std::string& name);
  // kFailedPrecondition while jobs are there.
  absl::Status RemoveSite(const std::string& name);
  absl::StatusOr<v1::GetVersionResponse> Version();

 private:
  std::shared_ptr<Connection> connection_;
};

}  // namespace itwin::client
