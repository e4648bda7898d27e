#include "server/rpc/jobs_rpc.h"

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <memory>
#include <string>
#include <utility>

#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "server/rpc/feed_turn.h"

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

// The bytes of an update as a message, without a copy of them: all watchers at the same place are sent the same ones.
grpc::ByteBuffer MessageOf(const std::shared_ptr<const std::string>& bytes) {
  auto* const reference = new std::shared_ptr<const std::string>(bytes);
  const grpc::Slice slice(const_cast<char*>(bytes->data()), bytes->size(),
                          [](void* held) { delete static_cast<std::shared_ptr<const std::string>*>(held); }, reference);
  return grpc::ByteBuffer(&slice, 1);
}

// One watcher. Whoever has its turn moves it, so Finish is called once: by a feeder, or by OnCancel at rest.
class WatchReactor : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  WatchReactor(const JobsRpc::Parts& parts, grpc::CallbackServerContext* context, const grpc::ByteBuffer& request)
      : parts_(parts), context_(*context), encoded_request_(request) {
    // Authentication and look-up read the database as well: they are the feeder's first task.
    parts_.feeders->Post([this] { Begin(); });
  }

  void OnWriteDone(bool ok) override {
    if (!ok || finished_) return End(ok ? absl::OkStatus() : absl::CancelledError("the watcher has gone"));
    // Most often there is nothing new yet, which is known without the store and a change of threads.
    if (turn_.Look() && watch_->Rests() && turn_.Rest()) return;
    parts_.feeders->Post([this] { Feed(); });
  }

  void OnCancel() override {
    if (turn_.Cancel()) Finish(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    watch_.reset();  // no wake-up comes after this
    delete this;
  }

 private:
  void Begin() {
    if (absl::Status status = Open(); !status.ok()) return End(status);
    Feed();
  }

  absl::Status Open() {
    ITWIN_ASSIGN_OR_RETURN(const Caller caller, parts_.authenticator->Authenticate(context_));
    v1::WatchJobRequest request;
    ITWIN_RETURN_IF_ERROR(FromGrpc(grpc::SerializationTraits<v1::WatchJobRequest>::Deserialize(&encoded_request_, &request)));
    ITWIN_ASSIGN_OR_RETURN(const JobRow row, parts_.service->Find(caller, request.job()));
    JobWatch::Options options;
    options.job = row.id;
    options.cursor = request.cursor();
    options.points = request.points();
    options.logs = request.logs();
    ITWIN_ASSIGN_OR_RETURN(watch_, JobWatch::Open(parts_.store, parts_.hub, options, [this] { Wake(); }));
    return absl::OkStatus();
  }

  // On the store's writer thread or the hub's.
  void Wake() {
    if (turn_.Wake()) parts_.feeders->Post([this] { Feed(); });
  }

  void Feed() {
    while (turn_.Look()) {
      absl::StatusOr<JobWatch::Step> step = watch_->Next();
      if (!step.ok()) return End(step.status());
      if (step->update != nullptr) {
        message_ = MessageOf(step->update);  // lives until the write is done
        finished_ = step->finished;
        StartWrite(&message_);
        return;
      }
      if (step->finished) return End(absl::OkStatus());
      if (turn_.Rest()) return;
    }
    End(absl::CancelledError("the watcher has gone"));
  }

  void End(const absl::Status& status) {
    turn_.End();
    Finish(ToGrpc(status));
  }

  const JobsRpc::Parts& parts_;
  grpc::CallbackServerContext& context_;
  grpc::ByteBuffer encoded_request_;
  FeedTurn turn_;
  // Whose turn it is:
  std::unique_ptr<JobWatch> watch_;
  grpc::ByteBuffer message_;  // being written
  bool finished_ = false;     // message_ is the last
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
grpc::Status JobsRpc::TraceJob(grpc::ServerContext* context, const v1::TraceJobRequest* request,
                               v1::TraceJobResponse* response) {
  return Answer(parts_, *context, *request, response, &JobService::Trace);
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

grpc::ServerWriteReactor<grpc::ByteBuffer>* JobsRpc::WatchJob(grpc::CallbackServerContext* context,
                                                              const grpc::ByteBuffer* request) {
  return new WatchReactor(parts_, context, *request);
}

}  // namespace itwin::server
