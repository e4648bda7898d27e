#include "itwin/client.h"

#include <algorithm>
#include <filesystem>
#include <limits>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "client/src/placement.h"
#include "client/src/retry.h"
#include "client/src/transfer.h"
#include "common/files.h"
#include "common/ids.h"
#include "common/spec/file_references.h"
#include "common/spec/validate.h"
#include "common/status_macros.h"

namespace itwin::client {
namespace {

constexpr int kRequestIdBytes = 16;

bool IsFinal(v1::JobState state) {
  return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED || state == v1::JOB_STATE_CANCELLED;
}

// Waits that `stop` cuts short.
Pacing StoppablePacing(const std::stop_token& stop) {
  Pacing pacing = SystemPacing();
  if (stop.stop_possible()) {
    pacing.pause = [stop](absl::Duration delay) {
      absl::Notification stopped;
      std::stop_callback wake(stop, [&stopped] { stopped.Notify(); });
      return !stopped.WaitForNotificationWithTimeout(delay);
    };
  }
  return pacing;
}

}  // namespace

absl::StatusOr<std::vector<v1::Job>> JobPager::Next() {
  std::vector<v1::Job> out;
  if (done_) return out;
  ITWIN_ASSIGN_OR_RETURN(v1::ListJobsResponse response, connection_->ListJobs(request_));
  request_.set_page_token(response.next_page_token());
  done_ = response.next_page_token().empty();
  for (v1::Job& job : *response.mutable_jobs()) out.push_back(std::move(job));
  return out;
}

absl::StatusOr<v1::SubmitJobResponse> Client::Submit(v1::JobSpec spec, const SubmitOptions& options) {
  ITWIN_RETURN_IF_ERROR(ValidateSpec(spec));
  OnHashed on_hashed;
  if (options.progress) {
    on_hashed = [&](const std::string& path, int64_t done, int64_t size) {
      options.progress({TransferProgress::Phase::kHashing, path, done, size});
    };
  }
  ITWIN_ASSIGN_OR_RETURN(std::vector<LocalFile> files, PlaceLocalFiles(&spec, options.base_directory, on_hashed));
  ITWIN_RETURN_IF_ERROR(PlaceArtifacts(&spec));
  ITWIN_RETURN_IF_ERROR(ValidateSpec(spec));
  ITWIN_RETURN_IF_ERROR(UploadFiles(*connection_, files, options.progress, SystemPacing()));
  v1::SubmitJobRequest request;
  request.set_request_id(options.request_id.empty() ? RandomHex(kRequestIdBytes) : options.request_id);
  *request.mutable_spec() = std::move(spec);
  return connection_->SubmitJob(request);
}

absl::StatusOr<v1::ValidateJobResponse> Client::Validate(const v1::JobSpec& spec) {
  v1::ValidateJobRequest request;
  *request.mutable_spec() = spec;
  return connection_->ValidateJob(request);
}

absl::StatusOr<v1::ValidateJobResponse> Client::Validate(const std::string& document,
                                                         const std::vector<std::string>& overrides) {
  v1::ValidateJobRequest request;
  request.set_document(document);
  for (const std::string& text : overrides) request.add_overrides(text);
  return connection_->ValidateJob(request);
}

absl::StatusOr<v1::Job> Client::Get(const std::string& job) {
  v1::GetJobRequest request;
  request.set_job(job);
  return connection_->GetJob(request);
}

JobPager Client::List(v1::ListJobsRequest filter) { return JobPager(connection_, std::move(filter)); }

absl::StatusOr<v1::Job> Client::Cancel(const std::string& job, const std::string& reason) {
  v1::CancelJobRequest request;
  request.set_job(job);
  request.set_reason(reason);
  return connection_->CancelJob(request);
}

absl::StatusOr<v1::SubmitJobResponse> Client::Retry(const std::string& job, bool fresh, const std::string& request_id) {
  v1::RetryJobRequest request;
  request.set_job(job);
  request.set_fresh(fresh);
  request.set_request_id(request_id.empty() ? RandomHex(kRequestIdBytes) : request_id);
  return connection_->RetryJob(request);
}

absl::StatusOr<v1::Job> Client::Watch(const std::string& job, const WatchOptions& options,
                                      const std::function<bool(const v1::JobUpdate&)>& on_update) {
  v1::WatchJobRequest request;
  request.set_job(job);
  request.set_points(options.points);
  request.set_logs(options.logs);
  *request.mutable_cursor() = options.cursor;

  RetryPolicy policy;
  policy.max_exhausted = std::numeric_limits<int>::max();  // too many watchers: wait for a place
  const Pacing pacing = StoppablePacing(options.stop);
  Backoff backoff(policy, pacing.random);
  absl::Time last_contact = pacing.now();
  v1::Job seen;
  bool ended_by_caller = false;
  while (true) {
    bool heard = false;
    absl::Status status = connection_->WatchJob(request, options.stop, [&](const v1::JobUpdate& update) {
      heard = true;
      if (update.has_job()) {
        seen = update.job();
        request.set_job(seen.id());  // a prefix may become ambiguous while we watch
      }
      const bool go_on = on_update(update);
      // Only now: what the caller has not got is sent again.
      if (update.has_cursor()) *request.mutable_cursor() = update.cursor();
      ended_by_caller = !go_on;
      return go_on;
    });
    if (options.stop.stop_requested()) return absl::CancelledError("the watch was stopped");
    if (ended_by_caller || (status.ok() && IsFinal(seen.state()))) return seen;
    // A stream may end by its deadline while nothing happened to the job: ask whether anybody is there.
    const bool expired = status.code() == absl::StatusCode::kDeadlineExceeded;
    if (expired && !heard) heard = connection_->GetVersion({}).ok();
    if (heard) {
      backoff.Reset();
      last_contact = pacing.now();
    }
    // The gateway closed the stream (it stops, or the stream was open for long): go on with a new one.
    if (status.ok()) status = absl::UnavailableError("the gateway closed the stream");
    if (!IsTransient(status.code(), Idempotency::kIdempotent)) return status;
    const absl::Duration delay = backoff.Next();
    if (pacing.now() + delay - last_contact > options.give_up_after) return status;
    if (options.on_reconnect && !(expired && heard)) options.on_reconnect(status, delay);
    if (!pacing.pause(delay)) return absl::CancelledError("the watch was stopped");
  }
}

absl::StatusOr<v1::OutputFile> Client::Trace(const std::string& job, int64_t steps, WatchOptions options) {
  v1::TraceJobRequest request;
  request.set_job(job);
  request.set_steps(steps);
  ITWIN_ASSIGN_OR_RETURN(const v1::TraceJobResponse asked, connection_->TraceJob(request));
  options.points = false;
  options.logs = false;
  options.cursor = {};
  options.cursor.set_event_sequence(asked.job().version());
  std::string said;
  const absl::StatusOr<v1::Job> watched = Watch(asked.job().id(), options, [&](const v1::JobUpdate& update) {
    for (const v1::JobEvent& event : update.events()) {
      // Whoever was asked is over once another attempt is to be made.
      if (event.kind() == "traced" || event.kind() == "requeued") said = event.message();
    }
    return said.empty();
  });
  if (!watched.ok()) return watched.status();
  ITWIN_ASSIGN_OR_RETURN(const std::vector<v1::OutputFile> outputs, Outputs(asked.job().id()));
  for (const v1::OutputFile& file : outputs) {
    if (file.path() == asked.output()) return file;
  }
  return absl::FailedPreconditionError(
      absl::StrCat("there is no ", asked.output(), " of job ", asked.job().id(), ": ", said.empty() ? "it ended before" : said));
}

absl::StatusOr<std::vector<v1::JobEvent>> Client::Events(const std::string& job) {
  v1::ListEventsRequest request;
  request.set_job(job);
  std::vector<v1::JobEvent> out;
  while (true) {
    ITWIN_ASSIGN_OR_RETURN(v1::ListEventsResponse response, connection_->ListEvents(request));
    if (response.events().empty()) return out;
    for (v1::JobEvent& event : *response.mutable_events()) out.push_back(std::move(event));
    if (out.back().sequence() <= request.after_sequence()) return absl::InternalError("events do not advance");
    request.set_after_sequence(out.back().sequence());
  }
}

absl::StatusOr<v1::ReadLogResponse> Client::ReadLog(const v1::ReadLogRequest& request) {
  return connection_->ReadLog(request);
}

absl::StatusOr<int64_t> Client::Points(const std::string& job, const std::vector<std::string>& series, int64_t cursor,
                                       const std::function<absl::Status(const v1::PointBlock&)>& on_block) {
  v1::ListPointsRequest request;
  request.set_job(job);
  request.set_cursor(cursor);
  for (const std::string& name : series) request.add_series(name);
  while (true) {
    ITWIN_ASSIGN_OR_RETURN(v1::ListPointsResponse response, connection_->ListPoints(request));
    for (const v1::PointBlock& block : response.blocks()) {
      if (block.steps_size() != block.values_size() || block.times_us_size() != block.values_size()) {
        return absl::InternalError(absl::StrCat("a block of '", block.series(), "' has columns of different length"));
      }
      ITWIN_RETURN_IF_ERROR(on_block(block));
    }
    if (response.end() || response.next_cursor() <= request.cursor()) {
      return std::max(response.next_cursor(), request.cursor());
    }
    request.set_cursor(response.next_cursor());
  }
}

absl::StatusOr<std::vector<v1::SeriesBuckets>> Client::QuerySeries(const std::string& job,
                                                                   const std::vector<std::string>& series,
                                                                   int buckets) {
  v1::QuerySeriesRequest request;
  request.set_job(job);
  request.set_buckets(buckets);
  for (const std::string& name : series) request.add_series(name);
  ITWIN_ASSIGN_OR_RETURN(v1::QuerySeriesResponse response, connection_->QuerySeries(request));
  return std::vector<v1::SeriesBuckets>(response.series().begin(), response.series().end());
}

absl::StatusOr<std::vector<v1::OutputFile>> Client::Outputs(const std::string& job) {
  v1::ListOutputsRequest request;
  request.set_job(job);
  ITWIN_ASSIGN_OR_RETURN(v1::ListOutputsResponse response, connection_->ListOutputs(request));
  return std::vector<v1::OutputFile>(response.outputs().begin(), response.outputs().end());
}

absl::Status Client::Download(const v1::OutputFile& file, const std::string& path, const OnProgress& progress) {
  return DownloadFile(*connection_, file, path, progress, SystemPacing());
}

absl::StatusOr<std::string> Client::DownloadInto(const v1::OutputFile& file, const std::string& directory,
                                                 const OnProgress& progress) {
  if (absl::Status good = CheckRelativePath(file.path()); !good.ok()) {
    return absl::DataLossError(absl::StrCat("the gateway names an output that is no safe path: ", good.message()));
  }
  const std::string path = (std::filesystem::path(directory) / file.path()).string();
  ITWIN_RETURN_IF_ERROR(Download(file, path, progress));
  return path;
}

absl::StatusOr<std::vector<v1::Site>> Client::Sites() {
  ITWIN_ASSIGN_OR_RETURN(v1::ListSitesResponse response, connection_->ListSites({}));
  return std::vector<v1::Site>(response.sites().begin(), response.sites().end());
}

absl::StatusOr<v1::Site> Client::Site(const std::string& name) {
  v1::GetSiteRequest request;
  request.set_name(name);
  return connection_->GetSite(request);
}

absl::Status Client::AddSite(const v1::AddSiteRequest& request, const std::function<bool(const v1::SiteProgress&)>& on_progress) {
  return connection_->AddSite(request, on_progress);
}

absl::Status Client::DoctorSite(const std::string& name, bool without_jobs,
                                const std::function<bool(const v1::SiteProgress&)>& on_progress) {
  v1::DoctorSiteRequest request;
  request.set_name(name);
  request.set_without_jobs(without_jobs);
  return connection_->DoctorSite(request, on_progress);
}

absl::StatusOr<v1::Site> Client::PauseSite(const std::string& name, const std::string& reason) {
  v1::PauseSiteRequest request;
  request.set_name(name);
  request.set_reason(reason);
  return connection_->PauseSite(request);
}

absl::StatusOr<v1::Site> Client::ResumeSite(const std::string& name) {
  v1::ResumeSiteRequest request;
  request.set_name(name);
  return connection_->ResumeSite(request);
}

absl::Status Client::RemoveSite(const std::string& name) {
  v1::RemoveSiteRequest request;
  request.set_name(name);
  return connection_->RemoveSite(request).status();
}

absl::StatusOr<v1::GetVersionResponse> Client::Version() { return connection_->GetVersion({}); }

}  // namespace itwin::client
