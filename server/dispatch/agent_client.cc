#include "server/dispatch/agent_client.h"

#include <grpcpp/create_channel_posix.h>
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/grpc_status.h"
#include "itwin/agent/v1/agent.grpc.pb.h"

namespace itwin::server {
namespace {

// A list of 10,000 attempts with their results fits; a chunk of 1 MiB does easily.
constexpr int kMaxMessageBytes = 32 << 20;

grpc::ChannelArguments Arguments(const AgentClientOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 1);
  // The tunnel notices a dead link; these pings notice an agent that no longer answers behind a link that lives. A ping
  // waits behind what is already in the tunnel's windows, so a slow link needs the long timeout.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, static_cast<int>(absl::ToInt64Milliseconds(options.keepalive_time)));
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, static_cast<int>(absl::ToInt64Milliseconds(options.keepalive_timeout)));
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // as many as it takes
  return arguments;
}

// Contexts of calls under way, so that Close can end them.
class CallSet {
 public:
  bool Add(grpc::ClientContext* context) {
    absl::MutexLock lock(&mu_);
    if (closed_) return false;
    calls_.insert(context);
    return true;
  }
  void Remove(grpc::ClientContext* context) {
    absl::MutexLock lock(&mu_);
    calls_.erase(context);
  }
  void Close() {
    absl::MutexLock lock(&mu_);
    closed_ = true;
    for (grpc::ClientContext* context : calls_) context->TryCancel();
  }
  bool closed() const {
    absl::MutexLock lock(&mu_);
    return closed_;
  }

 private:
  mutable absl::Mutex mu_;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  absl::flat_hash_set<grpc::ClientContext*> calls_ ABSL_GUARDED_BY(mu_);
};

// One call: registered while it lives.
class Call {
 public:
  explicit Call(CallSet* calls) : calls_(calls), open_(calls->Add(&context_)) {}
  ~Call() {
    if (open_) calls_->Remove(&context_);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  bool open() const { return open_; }
  grpc::ClientContext* context() { return &context_; }

 private:
  CallSet* const calls_;
  grpc::ClientContext context_;
  const bool open_;
};

// Cancels a streaming call that has not moved for `stall`: a deadline that moves along. One thread per transfer.
class StallGuard {
 public:
  StallGuard(grpc::ClientContext* context, absl::Duration stall)
      : context_(context), stall_(stall), last_(absl::Now()), thread_([this] { Run(); }) {}
  ~StallGuard() {
    {
      absl::MutexLock lock(&mu_);
      over_ = true;
    }
    thread_.join();
  }
  void Moved() {
    absl::MutexLock lock(&mu_);
    last_ = absl::Now();
  }
  bool stalled() const {
    absl::MutexLock lock(&mu_);
    return stalled_;
  }

 private:
  void Run() {
    absl::MutexLock lock(&mu_);
    while (!over_) {
      mu_.AwaitWithDeadline(absl::Condition(&over_), last_ + stall_);
      if (!over_ && absl::Now() >= last_ + stall_) {
        stalled_ = true;
        context_->TryCancel();
        return;
      }
    }
  }

  grpc::ClientContext* const context_;
  const absl::Duration stall_;
  mutable absl::Mutex mu_;
  bool over_ ABSL_GUARDED_BY(mu_) = false;
  bool stalled_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time last_ ABSL_GUARDED_BY(mu_);
  std::thread thread_;
};

absl::Status ClosedError() { return absl::UnavailableError("the connection to the agent is closed"); }

class GrpcFollowStream : public FollowStream {
 public:
  GrpcFollowStream(agent::v1::Agent::Stub* stub, std::shared_ptr<CallSet> calls)
      : calls_(std::move(calls)), call_(calls_.get()), stream_(call_.open() ? stub->Follow(call_.context()) : nullptr) {}
  ~GrpcFollowStream() override {
    Cancel();
    Finish().IgnoreError();  // why it ended has been asked for, or nobody cares
  }
  bool open() const { return stream_ != nullptr; }

  bool Write(const agent::v1::FollowRequest& request) override {
    absl::MutexLock lock(&write_mu_);
    return stream_->Write(request);
  }
  bool Read(agent::v1::FollowResponse* response) override { return stream_->Read(response); }
  void Cancel() override { call_.context()->TryCancel(); }
  absl::Status Finish() override {
    if (!finished_) {
      agent::v1::FollowResponse rest;
      while (stream_->Read(&rest)) {
      }
      status_ = FromGrpc(stream_->Finish());
      finished_ = true;
    }
    return status_;
  }

 private:
  const std::shared_ptr<CallSet> calls_;
  Call call_;
  absl::Mutex write_mu_;
  std::unique_ptr<grpc::ClientReaderWriter<agent::v1::FollowRequest, agent::v1::FollowResponse>> stream_;
  bool finished_ = false;
  absl::Status status_;
};

class GrpcAgentClient : public AgentClient {
 public:
  GrpcAgentClient(std::unique_ptr<TunnelStream> stream, const AgentClientOptions& options)
      : tunnel_(std::move(stream)),
        calls_(std::make_shared<CallSet>()),
        // The channel owns the socket from here on.
        channel_(grpc::CreateCustomInsecureChannelFromFd("agent", tunnel_->TakeSocket().Release(), Arguments(options))),
        stub_(agent::v1::Agent::NewStub(channel_)) {}
  ~GrpcAgentClient() override { Close(); }

  absl::StatusOr<agent::v1::HelloResponse> Hello(const agent::v1::HelloRequest& request, absl::Time deadline) override {
    return Unary<agent::v1::HelloResponse>(deadline, request, &agent::v1::Agent::Stub::Hello);
  }

  absl::StatusOr<std::vector<agent::v1::InputStatus>> StatInputs(const std::vector<std::string>& sha256,
                                                                 absl::Time deadline) override {
    agent::v1::StatInputsRequest request;
    request.mutable_sha256()->Assign(sha256.begin(), sha256.end());
    auto response = Unary<agent::v1::StatInputsResponse>(deadline, request, &agent::v1::Agent::Stub::StatInputs);
    if (!response.ok()) return response.status();
    if (response->inputs_size() != request.sha256_size()) return absl::InternalError("the agent's answer does not fit the question");
    return std::vector<agent::v1::InputStatus>(response->inputs().begin(), response->inputs().end());
  }

  absl::Status PutInput(const std::string& sha256, int64_t size, int64_t offset,
                        const std::function<absl::StatusOr<std::string>()>& next, absl::Duration stall) override {
    Call call(calls_.get());
    if (!call.open()) return ClosedError();
    agent::v1::PutInputResponse response;
    auto writer = stub_->PutInput(call.context(), &response);
    StallGuard guard(call.context(), stall);
    agent::v1::PutInputRequest request;
    request.set_sha256(sha256);
    request.set_size_bytes(size);
    request.set_offset(offset);
    absl::Status read;
    while (true) {
      absl::StatusOr<std::string> chunk = next();
      if (!chunk.ok()) {
        read = chunk.status();
        call.context()->TryCancel();
        break;
      }
      const bool first = !request.sha256().empty();
      if (chunk->empty() && !first) break;
      const bool last = chunk->empty();
      request.set_data(*std::move(chunk));
      if (!writer->Write(request) || last) break;
      guard.Moved();
      request.Clear();
    }
    writer->WritesDone();
    const absl::Status status = FromGrpc(writer->Finish());
    if (!read.ok()) return read;
    if (guard.stalled()) return absl::DeadlineExceededError("the agent took nothing for too long");
    return Closed(status);
  }

  absl::StatusOr<agent::v1::AttemptStatus> StartAttempt(const agent::v1::StartAttemptRequest& request,
                                                        absl::Time deadline) override {
    return Unary<agent::v1::AttemptStatus>(deadline, request, &agent::v1::Agent::Stub::StartAttempt);
  }

  absl::StatusOr<agent::v1::AttemptStatus> CancelAttempt(const std::string& attempt, const std::string& reason,
                                                         absl::Time deadline) override {
    agent::v1::CancelAttemptRequest request;
    request.set_attempt(attempt);
    request.set_reason(reason);
    return Unary<agent::v1::AttemptStatus>(deadline, request, &agent::v1::Agent::Stub::CancelAttempt);
  }

  absl::StatusOr<std::optional<agent::v1::FileEntry>> TraceAttempt(const std::string& attempt, int64_t steps,
                                                                   const std::string& name, absl::Time deadline) override {
    agent::v1::TraceAttemptRequest request;
    request.set_attempt(attempt);
    request.set_steps(steps);
    request.set_name(name);
    auto response = Unary<agent::v1::TraceAttemptResponse>(deadline, request, &agent::v1::Agent::Stub::TraceAttempt);
    if (!response.ok()) return response.status();
    if (!response->has_file()) return std::nullopt;
    return std::move(*response->mutable_file());
  }

  absl::StatusOr<std::vector<agent::v1::AttemptStatus>> ListAttempts(const std::vector<std::string>& attempts,
                                                                     absl::Time deadline) override {
    agent::v1::ListAttemptsRequest request;
    request.mutable_attempts()->Assign(attempts.begin(), attempts.end());
    auto response = Unary<agent::v1::ListAttemptsResponse>(deadline, request, &agent::v1::Agent::Stub::ListAttempts);
    if (!response.ok()) return response.status();
    return std::vector<agent::v1::AttemptStatus>(std::make_move_iterator(response->mutable_attempts()->begin()),
                                                 std::make_move_iterator(response->mutable_attempts()->end()));
  }

  absl::Status RemoveAttempt(const std::string& attempt, absl::Time deadline) override {
    agent::v1::RemoveAttemptRequest request;
    request.set_attempt(attempt);
    return Unary<agent::v1::RemoveAttemptResponse>(deadline, request, &agent::v1::Agent::Stub::RemoveAttempt).status();
  }

  absl::StatusOr<std::unique_ptr<FollowStream>> Follow() override {
    auto stream = std::make_unique<GrpcFollowStream>(stub_.get(), calls_);
    if (!stream->open()) {
      return ClosedError();
    }
    return std::unique_ptr<FollowStream>(std::move(stream));
  }

  absl::StatusOr<std::vector<agent::v1::FileEntry>> ListFiles(const std::string& attempt, const std::string& directory,
                                                              absl::Time deadline) override {
    agent::v1::ListFilesRequest request;
    request.set_attempt(attempt);
    request.set_directory(directory);
    auto response = Unary<agent::v1::ListFilesResponse>(deadline, request, &agent::v1::Agent::Stub::ListFiles);
    if (!response.ok()) return response.status();
    return std::vector<agent::v1::FileEntry>(response->files().begin(), response->files().end());
  }

  absl::Status ReadFile(const std::string& attempt, const std::string& directory, const std::string& path,
                        int64_t offset, const std::function<absl::Status(absl::string_view)>& sink,
                        absl::Duration stall) override {
    Call call(calls_.get());
    if (!call.open()) return ClosedError();
    agent::v1::ReadFileRequest request;
    request.set_attempt(attempt);
    request.set_directory(directory);
    request.set_path(path);
    request.set_offset(offset);
    auto reader = stub_->ReadFile(call.context(), request);
    absl::Status taken;
    bool stalled = false;
    {
      StallGuard guard(call.context(), stall);
      agent::v1::ReadFileResponse response;
      while (reader->Read(&response)) {
        guard.Moved();
        if (taken.ok()) taken = sink(response.data());
        if (!taken.ok()) call.context()->TryCancel();
      }
      stalled = guard.stalled();
    }
    const absl::Status status = FromGrpc(reader->Finish());
    if (!taken.ok()) return taken;
    if (stalled) return absl::DeadlineExceededError("the agent sent nothing for too long");
    return Closed(status);
  }

  absl::Status Diagnose(const agent::v1::DiagnoseRequest& request,
                        const std::function<void(const agent::v1::CheckResult&)>& on_check, absl::Time deadline) override {
    Call call(calls_.get());
    if (!call.open()) return ClosedError();
    call.context()->set_deadline(absl::ToChronoTime(deadline));
    auto reader = stub_->Diagnose(call.context(), request);
    agent::v1::CheckResult check;
    while (reader->Read(&check)) on_check(check);
    return Closed(FromGrpc(reader->Finish()));
  }

  absl::StatusOr<std::string> InstallRelease(const agent::v1::InstallReleaseRequest& request, absl::Time deadline) override {
    auto response = Unary<agent::v1::InstallReleaseResponse>(deadline, request, &agent::v1::Agent::Stub::InstallRelease);
    if (!response.ok()) return response.status();
    return response->directory();
  }

  absl::Status Retire(absl::Time deadline) override {
    return Unary<agent::v1::RetireResponse>(deadline, agent::v1::RetireRequest(), &agent::v1::Agent::Stub::Retire).status();
  }

  void Close() override {
    calls_->Close();
    tunnel_->Close();
  }

  std::string Diagnostics() const override { return tunnel_->Diagnostics(); }

 private:
  // A call that Close ended says so, rather than "cancelled".
  absl::Status Closed(const absl::Status& status) const {
    return !status.ok() && status.code() == absl::StatusCode::kCancelled && calls_->closed() ? ClosedError() : status;
  }

  template <typename Response, typename Request>
  absl::StatusOr<Response> Unary(absl::Time deadline, const Request& request,
                                 grpc::Status (agent::v1::Agent::Stub::*method)(grpc::ClientContext*, const Request&,
                                                                                Response*)) {
    Call call(calls_.get());
    if (!call.open()) return ClosedError();
    call.context()->set_deadline(absl::ToChronoTime(deadline));
    Response response;
    const absl::Status status = Closed(FromGrpc((stub_.get()->*method)(call.context(), request, &response)));
    if (!status.ok()) return status;
    return response;
  }

  const std::unique_ptr<TunnelStream> tunnel_;
  const std::shared_ptr<CallSet> calls_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<agent::v1::Agent::Stub> stub_;
};

}  // namespace

std::unique_ptr<AgentClient> MakeGrpcAgentClient(std::unique_ptr<TunnelStream> stream, const AgentClientOptions& options) {
  return std::make_unique<GrpcAgentClient>(std::move(stream), options);
}

}  // namespace itwin::server
