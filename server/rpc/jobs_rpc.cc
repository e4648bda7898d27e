#include "server/rpc/jobs_rpc.h"

#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

template <typename Request, typename Response>
grpc::Status Answer(const JobsRpc::Parts& parts, const grpc::ServerContext& context, const Request& request,
                    Response* response,
                    absl::StatusOr<Response> (JobService::*method)(const Caller&, const Request&)) {
  absl::StatusOr<Caller> caller = parts.authenticator->Authenticate(context);
  if (!caller.ok()) return ToGrpc(caller.status());
  absl::StatusOr<Response> result = (parts.service->*method)(*caller, request);
  if (!result.ok()) return ToGrpc(result.status());
  *response = *std::move(result);
  return grpc::Status::OK;
}

// One watcher. At any time it is at rest (woken by the hub), waits for or runs on a feeder, or has a write under way;
// only the last two move it, so Finish is called once and by one of them, or by OnCancel at rest.
class WatchReactor : public grpc::ServerWriteReactor<v1::JobUpdate> {
 public:
  WatchReactor(const JobsRpc::Parts& parts, grpc::CallbackServerContext* context, const v1::WatchJobRequest& request)
      : parts_(parts), context_(*context), request_(request) {
    // Authentication and look-up read the database as well: they are the feeder's first task.
    parts_.feeders->Post([this] { Begin(); });
  }

  void OnWriteDone(bool ok) override {
    if (!ok || finished_) return End(ok ? absl::OkStatus() : absl::CancelledError("the watcher has gone"));
    parts_.feeders->Post([this] { Feed(); });
  }

  void OnCancel() override {
    bool at_rest;
    {
      absl::MutexLock lock(&mu_);
      cancelled_ = true;
      at_rest = state_ == State::kRest;
      if (at_rest) state_ = State::kEnded;
    }
    if (at_rest) Finish(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    watch_.reset();  // no wake-up comes after this
    delete this;
  }

 private:
  enum class State { kBusy, kRest, kEnded };

  void Begin() {
    if (absl::Status status = Open(); !status.ok()) return End(status);
    Feed();
  }

  absl::Status Open() {
    ITWIN_ASSIGN_OR_RETURN(const Caller caller, parts_.authenticator->Authenticate(context_));
    ITWIN_ASSIGN_OR_RETURN(const JobRow row, parts_.service->Find(caller, request_.job()));
    JobWatch::Options options;
    options.job = row.id;
    options.cursor = request_.cursor();
    options.points = request_.points();
    options.logs = request_.logs();
    ITWIN_ASSIGN_OR_RETURN(watch_, JobWatch::Open(parts_.store, parts_.hub, options, [this] { Wake(); }));
    return absl::OkStatus();
  }

  // On the store's writer thread.
  void Wake() {
    {
      absl::MutexLock lock(&mu_);
      woken_ = true;
      if (state_ != State::kRest) return;  // Feed looks at woken_ before it rests
      state_ = State::kBusy;
    }
    parts_.feeders->Post([this] { Feed(); });
  }

  void Feed() {
    while (true) {
      {
        absl::MutexLock lock(&mu_);
        woken_ = false;
        if (cancelled_) break;
      }
      absl::StatusOr<JobWatch::Step> step = watch_->Next();
      if (!step.ok()) return End(step.status());
      if (step->update != nullptr) {
        finished_ = step->finished;
        update_ = std::move(step->update);  // lives until the write is done
        StartWrite(update_.get());
        return;
      }
      if (step->finished) return End(absl::OkStatus());
      absl::MutexLock lock(&mu_);
      if (cancelled_) break;
      if (!woken_) {
        state_ = State::kRest;
        return;
      }
    }
    End(absl::CancelledError("the watcher has gone"));
  }

  void End(const absl::Status& status) {
    {
      absl::MutexLock lock(&mu_);
      state_ = State::kEnded;
    }
    Finish(ToGrpc(status));
  }

  const JobsRpc::Parts& parts_;
  grpc::CallbackServerContext& context_;
  const v1::WatchJobRequest request_;
  std::unique_ptr<JobWatch> watch_;                   // a feeder's, one at a time
  std::shared_ptr<const v1::JobUpdate> update_;       // being written
  bool finished_ = false;                             // update_ is the last

  absl::Mutex mu_;
  State state_ ABSL_GUARDED_BY(mu_) = State::kBusy;
  bool woken_ ABSL_GUARDED_BY(mu_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace

grpc::Status JobsRpc::ValidateJob(grpc::ServerContext* context, const v1::ValidateJobRequest* request,
                                  v1::ValidateJobResponse* response) {
  absl::StatusOr<Caller> caller = parts_.authenticator->Authenticate(*context);
  if (!caller.ok()) return ToGrpc(caller.status());
  absl::StatusOr<v1::ValidateJobResponse> result = parts_.service->Validate(*request);
  if (!result.ok()) return ToGrpc(result.status());
  *response = *std::move(result);
  return grpc::Status::OK;
}

grpc::Status JobsRpc::SubmitJob(grpc::ServerContext* context, const v1::SubmitJobRequest* request,
                                v1::SubmitJobResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::Submit);
}
grpc::Status JobsRpc::GetJob(grpc::ServerContext* context, const v1::GetJobRequest* request, v1::Job* response) {
  return Answer(parts_, *context, *request, response, &JobService::Get);
}
grpc::Status JobsRpc::ListJobs(grpc::ServerContext* context, const v1::ListJobsRequest* request,
                               v1::ListJobsResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::List);
}
grpc::Status JobsRpc::CancelJob(grpc::ServerContext* context, const v1::CancelJobRequest* request,
                                v1::Job* response) {
  return Answer(parts_, *context, *request, response, &JobService::Cancel);
}
grpc::Status JobsRpc::RetryJob(grpc::ServerContext* context, const v1::RetryJobRequest* request,
                               v1::SubmitJobResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::Retry);
}
grpc::Status JobsRpc::ListEvents(grpc::ServerContext* context, const v1::ListEventsRequest* request,
                                 v1::ListEventsResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::ListEvents);
}
grpc::Status JobsRpc::ListPoints(grpc::ServerContext* context, const v1::ListPointsRequest* request,
                                 v1::ListPointsResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::ListPoints);
}
grpc::Status JobsRpc::QuerySeries(grpc::ServerContext* context, const v1::QuerySeriesRequest* request,
                                  v1::QuerySeriesResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::QuerySeries);
}
grpc::Status JobsRpc::ReadLog(grpc::ServerContext* context, const v1::ReadLogRequest* request,
                              v1::ReadLogResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::ReadLog);
}
grpc::Status JobsRpc::ListOutputs(grpc::ServerContext* context, const v1::ListOutputsRequest* request,
                                  v1::ListOutputsResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::ListOutputs);
}

grpc::ServerWriteReactor<v1::JobUpdate>* JobsRpc::WatchJob(grpc::CallbackServerContext* context,
                                                           const v1::WatchJobRequest* request) {
  return new WatchReactor(parts_, context, *request);
}

}  // namespace itwin::server
