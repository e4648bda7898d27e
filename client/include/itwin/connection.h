#pragma once

#include <functional>
#include <optional>
#include <stop_token>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "itwin/v1/artifacts.pb.h"
#include "itwin/v1/jobs.pb.h"
#include "itwin/v1/sites.pb.h"

namespace itwin::client {

// The gateway's calls, one method each: what Client stands on and what users fake in their tests. The real one (made
// by MakeConnection) speaks gRPC, repeats failed unary calls and has a deadline on everything.
//
// Thread-safe. Every call blocks its caller; callbacks run in the caller's thread. Errors have the codes and messages
// of proto/itwin/v1; kUnavailable means that the gateway could not be reached.
class Connection {
 public:
  virtual ~Connection() = default;

  virtual absl::StatusOr<v1::ValidateJobResponse> ValidateJob(const v1::ValidateJobRequest& request) = 0;
  virtual absl::StatusOr<v1::SubmitJobResponse> SubmitJob(const v1::SubmitJobRequest& request) = 0;
  virtual absl::StatusOr<v1::Job> GetJob(const v1::GetJobRequest& request) = 0;
  virtual absl::StatusOr<v1::ListJobsResponse> ListJobs(const v1::ListJobsRequest& request) = 0;
  virtual absl::StatusOr<v1::Job> CancelJob(const v1::CancelJobRequest& request) = 0;
  virtual absl::StatusOr<v1::TraceJobResponse> TraceJob(const v1::TraceJobRequest& request) = 0;
  virtual absl::StatusOr<v1::SubmitJobResponse> RetryJob(const v1::RetryJobRequest& request) = 0;
  virtual absl::StatusOr<v1::ListEventsResponse> ListEvents(const v1::ListEventsRequest& request) = 0;
  virtual absl::StatusOr<v1::ListPointsResponse> ListPoints(const v1::ListPointsRequest& request) = 0;
  virtual absl::StatusOr<v1::QuerySeriesResponse> QuerySeries(const v1::QuerySeriesRequest& request) = 0;
  virtual absl::StatusOr<v1::ReadLogResponse> ReadLog(const v1::ReadLogRequest& request) = 0;
  virtual absl::StatusOr<v1::ListOutputsResponse> ListOutputs(const v1::ListOutputsRequest& request) = 0;
  virtual absl::StatusOr<v1::StatArtifactsResponse> StatArtifacts(const v1::StatArtifactsRequest& request) = 0;
  virtual absl::StatusOr<v1::ListSitesResponse> ListSites(const v1::ListSitesRequest& request) = 0;
  virtual absl::StatusOr<v1::Site> GetSite(const v1::GetSiteRequest& request) = 0;
  virtual absl::StatusOr<v1::Site> PauseSite(const v1::PauseSiteRequest& request) = 0;
  virtual absl::StatusOr<v1::Site> ResumeSite(const v1::ResumeSiteRequest& request) = 0;
  virtual absl::StatusOr<v1::RemoveSiteResponse> RemoveSite(const v1::RemoveSiteRequest& request) = 0;
  virtual absl::StatusOr<v1::GetVersionResponse> GetVersion(const v1::GetVersionRequest& request) = 0;

  // Streams: one try each; Client goes on from where they broke off.
  // `on_update` returning false ends the stream with OK, as does `stop` with kCancelled.
  virtual absl::Status WatchJob(const v1::WatchJobRequest& request, const std::stop_token& stop,
                                const std::function<bool(const v1::JobUpdate&)>& on_update) = 0;
  // `on_progress` returning false ends the stream with kCancelled.
  virtual absl::Status AddSite(const v1::AddSiteRequest& request,
                               const std::function<bool(const v1::SiteProgress&)>& on_progress) = 0;
  virtual absl::Status DoctorSite(const v1::DoctorSiteRequest& request,
                                  const std::function<bool(const v1::SiteProgress&)>& on_progress) = 0;
  // `next` gives the messages in order and nothing at the end; its error ends the stream and is returned.
  virtual absl::StatusOr<v1::UploadArtifactResponse> UploadArtifact(
      const std::function<absl::StatusOr<std::optional<v1::UploadArtifactRequest>>()>& next) = 0;
  // An error of `sink` ends the stream and is returned.
  virtual absl::Status DownloadArtifact(
      const v1::DownloadArtifactRequest& request,
      const std::function<absl::Status(const v1::DownloadArtifactResponse&)>& sink) = 0;
};

}  // namespace itwin::client
