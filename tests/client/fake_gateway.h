#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/sha256.h"
#include "itwin/connection.h"

namespace itwin::testing {

// A gateway in memory with the behaviour of proto/itwin/v1 as far as clients can see it, and faults on order.
// Thread-safe.
class FakeGateway : public client::Connection {
 public:
  // ---- what a test arranges and looks at; not while calls run
  std::map<std::string, v1::Job> jobs;
  std::map<std::string, std::vector<v1::JobUpdate>> updates;  // a watch sends those after the cursor's event_sequence
  std::map<std::string, std::vector<v1::JobEvent>> events;
  std::map<std::string, std::vector<v1::PointBlock>> points;
  std::map<std::string, std::pair<std::string, std::string>> logs;  // stdout, stderr
  std::map<std::string, std::vector<v1::OutputFile>> outputs;
  std::map<std::string, std::string> artifacts;  // by hash
  std::map<std::string, std::string> partial;    // uploads that broke off
  std::vector<v1::Site> sites;
  std::vector<v1::SiteProgress> survey;    // what AddSite and DoctorSite tell
  absl::Status survey_result;              // of AddSite
  std::vector<v1::AddSiteRequest> added;
  v1::SubmitJobRequest last_submit;
  v1::ListJobsRequest last_list;
  v1::TraceJobRequest last_trace;
  std::vector<v1::WatchJobRequest> watches;
  std::vector<int64_t> upload_offsets;    // of each upload stream
  std::vector<int64_t> download_offsets;  // of each download stream
  int chunk_bytes = 4;                    // of downloads
  // The next statuses of any call, first come first served; OK lets one pass.
  std::vector<absl::Status> faults;
  // After so many updates (uploads: messages, downloads: chunks) the next streams end with kUnavailable.
  std::vector<int> cuts;
  bool corrupt_downloads = false;
  int calls = 0;

  v1::Job& AddJob(const std::string& id, v1::JobState state = v1::JOB_STATE_RUNNING) {
    v1::Job& job = jobs[id];
    job.set_id(id);
    job.set_name("job-" + id.substr(0, 4));
    job.set_state(state);
    job.set_created_us(1'700'000'000'000'000);
    if (state >= v1::JOB_STATE_SUCCEEDED) job.set_finished_us(1'700'000'100'000'000);
    return job;
  }
  // Appends an update to the job's watch; its cursor counts updates.
  v1::JobUpdate& AddUpdate(const std::string& id) {
    v1::JobUpdate& update = updates[id].emplace_back();
    update.mutable_cursor()->set_event_sequence(static_cast<int64_t>(updates[id].size()));
    return update;
  }
  void AddOutput(const std::string& id, const std::string& path, const std::string& bytes) {
    v1::OutputFile& file = outputs[id].emplace_back();
    file.set_path(path);
    file.set_sha256(Sha256Hex(bytes));
    file.set_size_bytes(static_cast<int64_t>(bytes.size()));
    artifacts[file.sha256()] = bytes;
  }

  // The calls of another process see what was arranged: it starts after this. A sanitizer sees the lock, not the process.
  void Arranged() { absl::MutexLock lock(&mu_); }

  // ---- the calls
  absl::StatusOr<v1::ValidateJobResponse> ValidateJob(const v1::ValidateJobRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    v1::ValidateJobResponse response;
    *response.mutable_spec() = request.spec();
    return response;
  }
  absl::StatusOr<v1::SubmitJobResponse> SubmitJob(const v1::SubmitJobRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    last_submit = request;
    v1::SubmitJobResponse response;
    const std::string id = absl::StrCat("5ab3177ed0000", absl::Dec(100 + submitted_.size(), absl::kZeroPad3));
    const auto [known, fresh] = submitted_.emplace(request.request_id(), id);
    response.set_existed(!fresh);
    *response.mutable_job() = AddJob(known->second, v1::JOB_STATE_QUEUED);
    return response;
  }
  absl::StatusOr<v1::Job> GetJob(const v1::GetJobRequest& request) override {
    absl::MutexLock lock(&mu_);
    return Find(request.job());
  }
  absl::StatusOr<v1::ListJobsResponse> ListJobs(const v1::ListJobsRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    last_list = request;
    v1::ListJobsResponse response;
    size_t at = request.page_token().empty() ? 0 : std::stoul(request.page_token());
    const size_t size = request.page_size() > 0 ? static_cast<size_t>(request.page_size()) : 50;
    std::vector<v1::Job> all;
    for (auto it = jobs.rbegin(); it != jobs.rend(); ++it) all.push_back(it->second);
    for (; at < all.size() && static_cast<size_t>(response.jobs_size()) < size; ++at) *response.add_jobs() = all[at];
    if (at < all.size()) response.set_next_page_token(std::to_string(at));
    return response;
  }
  absl::StatusOr<v1::Job> CancelJob(const v1::CancelJobRequest& request) override {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<v1::Job> job = Find(request.job());
    if (!job.ok()) return job;
    if (job->finished_us() != 0) return absl::FailedPreconditionError("the job has ended");
    jobs[job->id()].set_cancel_requested(true);
    return jobs[job->id()];
  }
  absl::StatusOr<v1::TraceJobResponse> TraceJob(const v1::TraceJobRequest& request) override {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<v1::Job> job = Find(request.job());
    if (!job.ok()) return job.status();
    if (job->state() != v1::JOB_STATE_RUNNING) return absl::FailedPreconditionError("only a RUNNING job can be traced");
    last_trace = request;
    v1::TraceJobResponse response;
    *response.mutable_job() = *job;
    response.set_output("trace-1.json");
    return response;
  }
  absl::StatusOr<v1::SubmitJobResponse> RetryJob(const v1::RetryJobRequest& request) override {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<v1::Job> job = Find(request.job());
    if (!job.ok()) return job.status();
    v1::SubmitJobResponse response;
    *response.mutable_job() = AddJob("eeeeeeeeeeeeeeee", v1::JOB_STATE_QUEUED);
    response.mutable_job()->set_retry_of(job->id());
    return response;
  }
  absl::StatusOr<v1::ListEventsResponse> ListEvents(const v1::ListEventsRequest& request) override {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<v1::Job> job = Find(request.job());
    if (!job.ok()) return job.status();
    v1::ListEventsResponse response;
    for (const v1::JobEvent& event : events[job->id()]) {
      if (event.sequence() > request.after_sequence() && response.events_size() < 2) *response.add_events() = event;
    }
    return response;
  }
  absl::StatusOr<v1::ListPointsResponse> ListPoints(const v1::ListPointsRequest& request) override {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<v1::Job> job = Find(request.job());
    if (!job.ok()) return job.status();
    v1::ListPointsResponse response;
    const std::vector<v1::PointBlock>& all = points[job->id()];
    size_t at = static_cast<size_t>(request.cursor());
    if (at < all.size()) *response.add_blocks() = all[at++];
    response.set_next_cursor(static_cast<int64_t>(at));
    response.set_end(at == all.size());
    return response;
  }
  absl::StatusOr<v1::QuerySeriesResponse> QuerySeries(const v1::QuerySeriesRequest& request) override {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<v1::Job> job = Find(request.job());
    if (!job.ok()) return job.status();
    v1::QuerySeriesResponse response;
    for (const v1::PointBlock& block : points[job->id()]) {
      v1::SeriesBuckets* series = response.add_series();
      series->set_series(block.series());
      series->set_points(block.values_size());
      for (int i = 0; i < block.values_size(); ++i) {
        series->add_first_step(block.steps(i));
        series->add_last_step(block.steps(i));
        series->add_min(block.values(i));
        series->add_max(block.values(i));
        series->add_last(block.values(i));
      }
    }
    return response;
  }
  absl::StatusOr<v1::ReadLogResponse> ReadLog(const v1::ReadLogRequest& request) override {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<v1::Job> job = Find(request.job());
    if (!job.ok()) return job.status();
    const auto& [out, err] = logs[job->id()];
    const std::string& text = request.stream() == v1::LOG_STREAM_STDERR ? err : out;
    v1::ReadLogResponse response;
    const size_t offset = std::min(text.size(), static_cast<size_t>(request.offset()));
    response.set_data(text.substr(offset, 5));
    response.set_offset(static_cast<int64_t>(offset));
    response.set_next_offset(static_cast<int64_t>(offset + response.data().size()));
    response.set_size(static_cast<int64_t>(text.size()));
    response.set_attempt(1);
    response.set_dropped_bytes(dropped_log_bytes);
    return response;
  }
  absl::StatusOr<v1::ListOutputsResponse> ListOutputs(const v1::ListOutputsRequest& request) override {
    absl::MutexLock lock(&mu_);
    absl::StatusOr<v1::Job> job = Find(request.job());
    if (!job.ok()) return job.status();
    v1::ListOutputsResponse response;
    for (const v1::OutputFile& file : outputs[job->id()]) *response.add_outputs() = file;
    return response;
  }
  absl::StatusOr<v1::StatArtifactsResponse> StatArtifacts(const v1::StatArtifactsRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    v1::StatArtifactsResponse response;
    for (const std::string& hash : request.sha256()) {
      v1::ArtifactStatus* status = response.add_artifacts();
      status->set_sha256(hash);
      status->set_complete(artifacts.count(hash) > 0);
      status->set_received_bytes(static_cast<int64_t>(partial[hash].size()));
    }
    return response;
  }
  absl::StatusOr<v1::ListSitesResponse> ListSites(const v1::ListSitesRequest&) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    v1::ListSitesResponse response;
    for (const v1::Site& site : sites) *response.add_sites() = site;
    return response;
  }
  absl::StatusOr<v1::Site> GetSite(const v1::GetSiteRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    return SiteNamed(request.name(), [](v1::Site*) {});
  }
  absl::StatusOr<v1::Site> PauseSite(const v1::PauseSiteRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    return SiteNamed(request.name(), [&](v1::Site* site) {
      site->set_state(v1::SITE_STATE_PAUSED);
      site->set_reason(request.reason());
    });
  }
  absl::StatusOr<v1::Site> ResumeSite(const v1::ResumeSiteRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    return SiteNamed(request.name(), [](v1::Site* site) { site->set_state(v1::SITE_STATE_READY); });
  }
  absl::StatusOr<v1::RemoveSiteResponse> RemoveSite(const v1::RemoveSiteRequest& request) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    const absl::Status there = SiteNamed(request.name(), [](v1::Site*) {}).status();
    if (!there.ok()) return there;
    sites.erase(std::remove_if(sites.begin(), sites.end(), [&](const v1::Site& site) { return site.name() == request.name(); }), sites.end());
    return v1::RemoveSiteResponse();
  }
  absl::Status AddSite(const v1::AddSiteRequest& request, const std::function<bool(const v1::SiteProgress&)>& on_progress) override {
    {
      absl::MutexLock lock(&mu_);
      added.push_back(request);
    }
    for (const v1::SiteProgress& progress : survey) {
      if (!on_progress(progress)) return absl::CancelledError("stopped");
    }
    return survey_result;
  }
  absl::Status DoctorSite(const v1::DoctorSiteRequest& request,
                          const std::function<bool(const v1::SiteProgress&)>& on_progress) override {
    {
      absl::MutexLock lock(&mu_);
      const absl::Status there = SiteNamed(request.name(), [](v1::Site*) {}).status();
      if (!there.ok()) return there;
    }
    for (const v1::SiteProgress& progress : survey) {
      if (!on_progress(progress)) return absl::CancelledError("stopped");
    }
    return absl::OkStatus();
  }
  absl::StatusOr<v1::GetVersionResponse> GetVersion(const v1::GetVersionRequest&) override {
    absl::MutexLock lock(&mu_);
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    v1::GetVersionResponse response;
    response.set_version("0.1.0");
    response.set_api(1);
    return response;
  }
  absl::Status WatchJob(const v1::WatchJobRequest& request, const std::stop_token& stop,
                        const std::function<bool(const v1::JobUpdate&)>& on_update) override {
    std::vector<v1::JobUpdate> send;
    int cut = -1;
    {
      absl::MutexLock lock(&mu_);
      watches.push_back(request);
      absl::StatusOr<v1::Job> job = Find(request.job());
      if (!job.ok()) return job.status();
      for (const v1::JobUpdate& update : updates[job->id()]) {
        if (update.cursor().event_sequence() > request.cursor().event_sequence()) send.push_back(update);
      }
      cut = NextCut();
    }
    for (const v1::JobUpdate& update : send) {
      if (cut-- == 0) return absl::UnavailableError("cut");
      if (stop.stop_requested()) return absl::CancelledError("stopped");
      if (!on_update(update)) return absl::OkStatus();
    }
    return absl::OkStatus();
  }
  absl::StatusOr<v1::UploadArtifactResponse> UploadArtifact(
      const std::function<absl::StatusOr<std::optional<v1::UploadArtifactRequest>>()>& next) override {
    int cut;
    {
      absl::MutexLock lock(&mu_);
      if (absl::Status fault = Fault(); !fault.ok()) return fault;
      cut = NextCut();
    }
    std::string hash;
    int64_t size = 0;
    while (true) {
      absl::StatusOr<std::optional<v1::UploadArtifactRequest>> request = next();
      if (!request.ok()) return request.status();
      if (!request->has_value()) break;
      absl::MutexLock lock(&mu_);
      if (hash.empty()) {
        hash = (*request)->sha256();
        size = (*request)->size_bytes();
        upload_offsets.push_back((*request)->offset());
        partial[hash].resize(static_cast<size_t>((*request)->offset()));
      }
      partial[hash] += (*request)->data();
      if (cut-- == 0) return absl::UnavailableError("cut");
    }
    absl::MutexLock lock(&mu_);
    const std::string bytes = partial[hash];
    partial.erase(hash);
    if (static_cast<int64_t>(bytes.size()) != size || Sha256Hex(bytes) != hash) return absl::DataLossError("wrong hash");
    artifacts[hash] = bytes;
    v1::UploadArtifactResponse response;
    response.set_sha256(hash);
    return response;
  }
  absl::Status DownloadArtifact(const v1::DownloadArtifactRequest& request,
                                const std::function<absl::Status(const v1::DownloadArtifactResponse&)>& sink) override {
    std::string bytes;
    int cut;
    {
      absl::MutexLock lock(&mu_);
      if (absl::Status fault = Fault(); !fault.ok()) return fault;
      download_offsets.push_back(request.offset());
      if (artifacts.count(request.sha256()) == 0) return absl::NotFoundError("no such artifact");
      bytes = artifacts[request.sha256()];
      cut = NextCut();
    }
    for (size_t at = static_cast<size_t>(request.offset()); at < bytes.size(); at += static_cast<size_t>(chunk_bytes)) {
      if (cut-- == 0) return absl::UnavailableError("cut");
      v1::DownloadArtifactResponse response;
      response.set_data(bytes.substr(at, static_cast<size_t>(chunk_bytes)));
      if (corrupt_downloads) (*response.mutable_data())[0] ^= 1;
      if (absl::Status status = sink(response); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

  int64_t dropped_log_bytes = 0;

 private:
  absl::Status Fault() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    ++calls;
    if (faults.empty()) return absl::OkStatus();
    const absl::Status fault = faults.front();
    faults.erase(faults.begin());
    return fault;
  }
  template <typename Change>
  absl::StatusOr<v1::Site> SiteNamed(const std::string& name, const Change& change) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    for (v1::Site& site : sites) {
      if (site.name() != name) continue;
      change(&site);
      return site;
    }
    return absl::NotFoundError(absl::StrCat("there is no site '", name, "'"));
  }
  int NextCut() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (cuts.empty()) return -1;
    const int cut = cuts.front();
    cuts.erase(cuts.begin());
    return cut;
  }
  absl::StatusOr<v1::Job> Find(const std::string& id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (absl::Status fault = Fault(); !fault.ok()) return fault;
    std::vector<v1::Job> found;
    for (const auto& [known, job] : jobs) {
      if (absl::StartsWith(known, id)) found.push_back(job);
    }
    if (found.empty()) return absl::NotFoundError(absl::StrCat("no job '", id, "'"));
    if (found.size() > 1) return absl::FailedPreconditionError(absl::StrCat("'", id, "' fits several jobs"));
    return found[0];
  }

  absl::Mutex mu_;
  std::map<std::string, std::string> submitted_;
};

}  // namespace itwin::testing
