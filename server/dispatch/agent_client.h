#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "itwin/agent/v1/agent.pb.h"
#include "server/tunnel/tunnel.h"

// What a site's agent can be asked, over one connection. A connection that broke stays broken: every call then fails
// with kUnavailable, and a new client is made over a new stream.
namespace itwin::server {

// The stream of spools. One thread reads, any thread adds and drops.
class FollowStream {
 public:
  virtual ~FollowStream() = default;  // cancels
  // False when the connection is gone. May wait for flow control.
  virtual bool Write(const agent::v1::FollowRequest& request) = 0;
  // Waits for the next message; false at the end of the stream. While nobody reads, the agent is not let send.
  virtual bool Read(agent::v1::FollowResponse* response) = 0;
  // Ends Read and Write at once. Idempotent.
  virtual void Cancel() = 0;
  // After Read was false: why.
  virtual absl::Status Finish() = 0;
};

// Thread-safe; calls block and end at their deadlines at the latest. Errors are the agent's own (agent.proto);
// kDeadlineExceeded and kUnavailable leave open whether the call took effect.
class AgentClient {
 public:
  virtual ~AgentClient() = default;

  virtual absl::StatusOr<agent::v1::HelloResponse> Hello(const agent::v1::HelloRequest& request,
                                                         absl::Time deadline) = 0;
  virtual absl::StatusOr<std::vector<agent::v1::InputStatus>> StatInputs(const std::vector<std::string>& sha256,
                                                                         absl::Time deadline) = 0;
  // Sends what `next` gives (at most 1 MiB each, empty at the end) from `offset` on. An error of `next` ends the
  // call and is returned. The deadline is of progress: it is `stall` after the last chunk that was taken.
  virtual absl::Status PutInput(const std::string& sha256, int64_t size, int64_t offset,
                                const std::function<absl::StatusOr<std::string>()>& next, absl::Duration stall) = 0;
  virtual absl::StatusOr<agent::v1::AttemptStatus> StartAttempt(const agent::v1::StartAttemptRequest& request,
                                                                absl::Time deadline) = 0;
  virtual absl::StatusOr<agent::v1::AttemptStatus> CancelAttempt(const std::string& attempt, const std::string& reason,
                                                                 absl::Time deadline) = 0;
  // The whole trace, once it is there; nothing before. kUnimplemented: the agent is too old.
  virtual absl::StatusOr<std::optional<agent::v1::FileEntry>> TraceAttempt(const std::string& attempt, int64_t steps,
                                                                           const std::string& name, absl::Time deadline) = 0;
  virtual absl::StatusOr<std::vector<agent::v1::AttemptStatus>> ListAttempts(const std::vector<std::string>& attempts,
                                                                             absl::Time deadline) = 0;
  virtual absl::Status RemoveAttempt(const std::string& attempt, absl::Time deadline) = 0;
  virtual absl::StatusOr<std::unique_ptr<FollowStream>> Follow() = 0;
  virtual absl::StatusOr<std::vector<agent::v1::FileEntry>> ListFiles(const std::string& attempt,
                                                                      const std::string& directory,
                                                                      absl::Time deadline) = 0;
  // Gives the file's bytes from `offset` to `sink`, whose error ends the call and is returned.
  virtual absl::Status ReadFile(const std::string& attempt, const std::string& directory, const std::string& path,
                                int64_t offset, const std::function<absl::Status(absl::string_view)>& sink,
                                absl::Duration stall) = 0;

  // Gives each check to `on_check` as it is done.
  virtual absl::Status Diagnose(const agent::v1::DiagnoseRequest& request,
                                const std::function<void(const agent::v1::CheckResult&)>& on_check, absl::Time deadline) = 0;
  // Returns the directory at the site. kUnimplemented: the agent is too old to be renewed over its own connection.
  virtual absl::StatusOr<std::string> InstallRelease(const agent::v1::InstallReleaseRequest& request, absl::Time deadline) = 0;
  // The daemon ends after its answer.
  virtual absl::Status Retire(absl::Time deadline) = 0;

  // Ends every call under way with kUnavailable, and refuses new ones. Idempotent.
  virtual void Close() = 0;
  // What the far side had to say, for people; "" when nothing.
  virtual std::string Diagnostics() const = 0;
};

struct AgentClientOptions {
  absl::Duration keepalive_time = absl::Seconds(20);     // of silence, with a call open, until an answer is asked for
  absl::Duration keepalive_timeout = absl::Seconds(60);  // for that answer
};

// gRPC inside the stream. Says nothing yet: Hello comes first.
std::unique_ptr<AgentClient> MakeGrpcAgentClient(std::unique_ptr<TunnelStream> stream,
                                                 const AgentClientOptions& options = {});

}  // namespace itwin::server
