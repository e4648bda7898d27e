#pragma once

#include "itwin/v1/jobs.grpc.pb.h"
#include "server/jobs/event_hub.h"
#include "server/jobs/job_service.h"
#include "server/jobs/job_watch.h"
#include "server/rpc/authenticator.h"
#include "server/rpc/task_pool.h"

namespace itwin::server {

// itwin.v1.Jobs: proto in, proto out, no rules. Unary calls are synchronous; WatchJob is a callback reactor whose reads
// run on `feeders`. It deals in bytes, so that an update is encoded once for all who watch.
class JobsRpc : public v1::Jobs::WithRawCallbackMethod_WatchJob<v1::Jobs::Service> {
 public:
  struct Parts {  // all must outlive the server
    JobService* service;
    JobStore* store;
    EventHub* hub;
    Authenticator* authenticator;
    TaskPool* feeders;
  };
  explicit JobsRpc(const Parts& parts) : parts_(parts) {}

  grpc::Status ValidateJob(grpc::ServerContext* context, const v1::ValidateJobRequest* request,
                           v1::ValidateJobResponse* response) override;
  grpc::Status SubmitJob(grpc::ServerContext* context, const v1::SubmitJobRequest* request,
                         v1::SubmitJobResponse* response) override;
  grpc::Status GetJob(grpc::ServerContext* context, const v1::GetJobRequest* request, v1::Job* response) override;
  grpc::Status ListJobs(grpc::ServerContext* context, const v1::ListJobsRequest* request,
                        v1::ListJobsResponse* response) override;
  grpc::Status TraceJob(grpc::ServerContext* context, const v1::TraceJobRequest* request,
                        v1::TraceJobResponse* response) override;
  grpc::Status CancelJob(grpc::ServerContext* context, const v1::CancelJobRequest* request,
                         v1::Job* response) override;
  grpc::Status RetryJob(grpc::ServerContext* context, const v1::RetryJobRequest* request,
                        v1::SubmitJobResponse* response) override;
  grpc::Status ListEvents(grpc::ServerContext* context, const v1::ListEventsRequest* request,
                          v1::ListEventsResponse* response) override;
  grpc::Status ListPoints(grpc::ServerContext* context, const v1::ListPointsRequest* request,
                          v1::ListPointsResponse* response) override;
  grpc::Status QuerySeries(grpc::ServerContext* context, const v1::QuerySeriesRequest* request,
                           v1::QuerySeriesResponse* response) override;
  grpc::Status ReadLog(grpc::ServerContext* context, const v1::ReadLogRequest* request,
                       v1::ReadLogResponse* response) override;
  grpc::Status ListOutputs(grpc::ServerContext* context, const v1::ListOutputsRequest* request,
                           v1::ListOutputsResponse* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* WatchJob(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;

 private:
  const Parts parts_;
};

}  // namespace itwin::server
