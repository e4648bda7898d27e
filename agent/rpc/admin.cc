#include "agent/rpc/admin.h"

#include <fcntl.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <signal.h>

#include <memory>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "agent/rpc/agent_service.h"
#include "agent/rpc/root_lock.h"
#include "agent/rpc/socket.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "common/version.h"

namespace itwin::agent {
namespace {

constexpr absl::Duration kCallLimit = absl::Seconds(30);

// Calls over one connection.
class AgentCalls {
 public:
  explicit AgentCalls(FileDescriptor socket) {
    fcntl(socket.get(), F_SETFL, fcntl(socket.get(), F_GETFL) | O_NONBLOCK);
    stub_ = v1::Agent::NewStub(grpc::CreateInsecureChannelFromFd("agent", socket.Release()));
  }
  absl::StatusOr<v1::HelloResponse> Hello() {
    v1::HelloRequest request;
    request.set_protocol(kAgentProtocol);
    request.set_gateway_version(kVersion);
    request.set_gateway_id("shell");
    v1::HelloResponse response;
    grpc::ClientContext context;
    SetDeadline(&context);
    ITWIN_RETURN_IF_ERROR(FromGrpc(stub_->Hello(&context, request, &response)));
    return response;
  }
  absl::StatusOr<std::vector<v1::AttemptStatus>> Unfinished() {
    v1::ListAttemptsResponse response;
    grpc::ClientContext context;
    SetDeadline(&context);
    ITWIN_RETURN_IF_ERROR(FromGrpc(stub_->ListAttempts(&context, {}, &response)));
    std::vector<v1::AttemptStatus> out;
    for (v1::AttemptStatus& status : *response.mutable_attempts()) {
      if (status.phase() != v1::ATTEMPT_PHASE_ENDED) out.push_back(std::move(status));
    }
    return out;
  }
  absl::Status Cancel(const std::string& attempt) {
    v1::CancelAttemptRequest request;
    request.set_attempt(attempt);
    request.set_reason("the agent is stopped with --kill-jobs");
    v1::AttemptStatus response;
    grpc::ClientContext context;
    SetDeadline(&context);
    return FromGrpc(stub_->CancelAttempt(&context, request, &response));
  }

 private:
  static void SetDeadline(grpc::ClientContext* context) {
    context->set_deadline(absl::ToChronoTime(absl::Now() + kCallLimit));
  }
  std::unique_ptr<v1::Agent::Stub> stub_;
};

absl::Status CancelAll(const ConnectOptions& options, absl::Time deadline, std::string* words) {
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor socket, ConnectToAgent(options));
  AgentCalls agent(std::move(socket));
  ITWIN_ASSIGN_OR_RETURN(std::vector<v1::AttemptStatus> left, agent.Unfinished());
  absl::StrAppend(words, left.size(), " unfinished attempts cancelled\n");
  for (const v1::AttemptStatus& status : left) ITWIN_RETURN_IF_ERROR(agent.Cancel(status.attempt()));
  while (!left.empty()) {
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(absl::StrCat(left.size(), " attempts have not ended yet; ask again"));
    }
    poll(nullptr, 0, 50);
    ITWIN_ASSIGN_OR_RETURN(left, agent.Unfinished());
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status StopAgent(const ConnectOptions& options, bool kill_jobs, absl::Duration limit, std::string* words) {
  const absl::Time deadline = absl::Now() + limit;
  if (kill_jobs && FileExists(options.root)) ITWIN_RETURN_IF_ERROR(CancelAll(options, deadline, words));
  const std::optional<OwnerRecord> owner = ReadOwnerRecord(options.root);
  if (!owner || !OwnerLives(options.root, *owner)) {
    absl::StrAppend(words, "no agent runs for ", options.root, "\n");
    return absl::OkStatus();
  }
  if (!IsHere(*owner)) {
    return absl::FailedPreconditionError(absl::StrCat("the agent runs on ", owner->host, "; stop it there"));
  }
  kill(owner->process.pid, SIGTERM);
  while (IsAlive(owner->process)) {
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(absl::StrCat("process ", owner->process.pid, " has not ended yet"));
    }
    poll(nullptr, 0, 10);
  }
  absl::StrAppend(words, "the agent was stopped", kill_jobs ? "" : "; its running jobs go on", "\n");
  return absl::OkStatus();
}

absl::Status DescribeAgent(const ConnectOptions& options, bool json, std::string* words) {
  const std::optional<OwnerRecord> owner = ReadOwnerRecord(options.root);
  if (!owner || !OwnerLives(options.root, *owner)) {
    *words = json ? "{\"running\":false}\n" : absl::StrCat("no agent runs for ", options.root, "\n");
    return absl::OkStatus();
  }
  if (!IsHere(*owner)) {
    *words = json ? absl::StrCat("{\"running\":true,\"host\":\"", owner->host, "\"}\n")
                  : absl::StrCat("the agent of ", options.root, " runs on ", owner->host, "\n");
    return absl::OkStatus();
  }
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor socket, ConnectUnix(owner->socket));
  AgentCalls agent(std::move(socket));
  ITWIN_ASSIGN_OR_RETURN(const v1::HelloResponse hello, agent.Hello());
  ITWIN_ASSIGN_OR_RETURN(const std::vector<v1::AttemptStatus> left, agent.Unfinished());
  if (json) {
    std::string text, list;
    google::protobuf::util::JsonPrintOptions print;
    print.preserve_proto_field_names = true;
    print.always_print_primitive_fields = true;
    (void)google::protobuf::util::MessageToJsonString(hello, &text, print);
    for (const v1::AttemptStatus& status : left) {
      std::string one;
      (void)google::protobuf::util::MessageToJsonString(status, &one, print);
      absl::StrAppend(&list, list.empty() ? "" : ",", one);
    }
    *words = absl::StrCat("{\"running\":true,\"pid\":", owner->process.pid, ",\"agent\":", text, ",\"attempts\":[", list, "]}\n");
    return absl::OkStatus();
  }
  *words = absl::StrCat("agent ", hello.agent_version(), " on ", hello.host(), ", process ", owner->process.pid, "\nspool ",
                        hello.spool(), "\nscheduler ", hello.scheduler(), ", ", hello.slots_in_use(), " of ",
                        hello.slots(), " slots in use\n", left.size(), " unfinished attempts\n");
  for (const v1::AttemptStatus& status : left) {
    absl::StrAppend(words, "  ", status.attempt(), "  ", v1::AttemptPhase_Name(status.phase()).substr(14), "  ", status.reason(),
                    "\n");
  }
  return absl::OkStatus();
}

}  // namespace itwin::agent
