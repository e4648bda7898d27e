#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/ids.h"
#include "itwin/v1/jobs.pb.h"
#include "server/artifacts/blob_store.h"
#include "server/jobs/caller.h"
#include "server/jobs/site_directory.h"
#include "server/store/job_store.h"

namespace itwin::server {

// What users can do with jobs: the calls of itwin.v1.Jobs as plain functions, with their errors. A caller sees and moves
// its own jobs only, an admin all. Wherever a request names a job, an id or a unique prefix will do.
// Thread-safe; keeps nothing.
class JobService {
 public:
  // All must outlive the service.
  JobService(JobStore* store, const BlobStore* blobs, const SiteDirectory* sites)
      : store_(*store), blobs_(*blobs), sites_(*sites) {}

  absl::StatusOr<v1::ValidateJobResponse> Validate(const v1::ValidateJobRequest& request);
  // Beside the store's errors: kInvalidArgument naming the field; kFailedPrecondition naming input files that have not
  // been uploaded.
  absl::StatusOr<v1::SubmitJobResponse> Submit(const Caller& caller, const v1::SubmitJobRequest& request);
  absl::StatusOr<v1::Job> Get(const Caller& caller, const v1::GetJobRequest& request);
  absl::StatusOr<v1::ListJobsResponse> List(const Caller& caller, const v1::ListJobsRequest& request);
  absl::StatusOr<v1::Job> Cancel(const Caller& caller, const v1::CancelJobRequest& request);
  absl::StatusOr<v1::TraceJobResponse> Trace(const Caller& caller, const v1::TraceJobRequest& request);
  absl::StatusOr<v1::SubmitJobResponse> Retry(const Caller& caller, const v1::RetryJobRequest& request);
  absl::StatusOr<v1::ListEventsResponse> ListEvents(const Caller& caller, const v1::ListEventsRequest& request);
  absl::StatusOr<v1::ListPointsResponse> ListPoints(const Caller& caller, const v1::ListPointsRequest& request);
  absl::StatusOr<v1::QuerySeriesResponse> QuerySeries(const Caller& caller, const v1::QuerySeriesRequest& request);
  absl::StatusOr<v1::ReadLogResponse> ReadLog(const Caller& caller, const v1::ReadLogRequest& request);
  absl::StatusOr<v1::ListOutputsResponse> ListOutputs(const Caller& caller, const v1::ListOutputsRequest& request);

  // The job that `text` means, if the caller may see it. kPermissionDenied: it is somebody else's.
  absl::StatusOr<JobRow> Find(const Caller& caller, absl::string_view text);

 private:
  absl::Status CheckSite(absl::string_view site) const;
  absl::Status CheckInputs(const v1::JobSpec& spec) const;
  // What depends on the sites and artifacts of the moment.
  absl::Status CheckPossible(const v1::JobSpec& spec) const;

  JobStore& store_;
  const BlobStore& blobs_;
  const SiteDirectory& sites_;
};

}  // namespace itwin::server
