#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "agent/control_loop.h"
#include "agent/follow_loop.h"
#include "agent/rpc/gateway_claims.h"
#include "agent/spool/input_store.h"
#include "common/clock.h"
#include "itwin/agent/v1/agent.grpc.pb.h"

namespace itwin::agent {

inline constexpr int kAgentProtocol = 1;

// itwin.agent.v1.Agent over the loops. Unary calls and file transfers run in gRPC's threads: they post to the loops
// and wait, or work on files that no loop holds. Follow is a callback reactor that the follow loop feeds.
class AgentService final : public v1::Agent::WithCallbackMethod_Follow<v1::Agent::Service> {
 public:
  struct Options {
    std::string root = {};
    std::string scheduler_kind = {};
    std::string spool_id = {};
    int64_t term = 0;
    bool can_train = false;
    std::function<void()> retire = [] {};  // ends the daemon, soon
  };
  // Nothing is owned; all outlive the server.
  AgentService(Options options, ControlLoop* control, FollowLoop* follow, InputStore* inputs, Scheduler* scheduler);

  grpc::Status Hello(grpc::ServerContext*, const v1::HelloRequest*, v1::HelloResponse*) override;
  grpc::Status StatInputs(grpc::ServerContext*, const v1::StatInputsRequest*, v1::StatInputsResponse*) override;
  grpc::Status PutInput(grpc::ServerContext*, grpc::ServerReader<v1::PutInputRequest>*,
                        v1::PutInputResponse*) override;
  grpc::Status StartAttempt(grpc::ServerContext*, const v1::StartAttemptRequest*, v1::AttemptStatus*) override;
  grpc::Status CancelAttempt(grpc::ServerContext*, const v1::CancelAttemptRequest*, v1::AttemptStatus*) override;
  grpc::Status TraceAttempt(grpc::ServerContext*, const v1::TraceAttemptRequest*, v1::TraceAttemptResponse*) override;
  grpc::Status ListAttempts(grpc::ServerContext*, const v1::ListAttemptsRequest*, v1::ListAttemptsResponse*) override;
  grpc::Status RemoveAttempt(grpc::ServerContext*, const v1::RemoveAttemptRequest*, v1::RemoveAttemptResponse*) override;
  grpc::Status Diagnose(grpc::ServerContext*, const v1::DiagnoseRequest*, grpc::ServerWriter<v1::CheckResult>*) override;
  grpc::Status Retire(grpc::ServerContext*, const v1::RetireRequest*, v1::RetireResponse*) override;
  grpc::Status InstallRelease(grpc::ServerContext*, const v1::InstallReleaseRequest*, v1::InstallReleaseResponse*) override;
  grpc::Status ListFiles(grpc::ServerContext*, const v1::ListFilesRequest*, v1::ListFilesResponse*) override;
  grpc::Status ReadFile(grpc::ServerContext*, const v1::ReadFileRequest*,
                        grpc::ServerWriter<v1::ReadFileResponse>*) override;
  grpc::ServerBidiReactor<v1::FollowRequest, v1::FollowResponse>* Follow(grpc::CallbackServerContext*) override;

 private:
  absl::StatusOr<v1::AttemptStatus> StatusOf(const AttemptKey& key, absl::Time deadline);
  enum class Reads { kEnded, kRunningToo };
  absl::StatusOr<std::string> DirectoryToRead(const std::string& attempt, const std::string& directory, Reads reads,
                                              absl::Time deadline);
  absl::StatusOr<v1::TraceAttemptResponse> Trace(const v1::TraceAttemptRequest& request, absl::Time deadline);
  absl::StatusOr<v1::ListFilesResponse> ListBelow(const v1::ListFilesRequest& request, absl::Time deadline);

  const Options options_;
  ControlLoop* const control_;
  FollowLoop* const follow_;
  InputStore* const inputs_;
  Scheduler* const scheduler_;
  SystemClock clock_;
  GatewayClaims claims_;
  std::atomic<int> transfers_{0};
};

}  // namespace itwin::agent
