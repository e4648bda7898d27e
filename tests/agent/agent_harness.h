#pragma once

#include <fcntl.h>
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "agent/rpc/connect.h"
#include "agent/rpc/root_lock.h"
#include "agent/scheduler/lease.h"
#include "agent/scheduler/process_tree.h"
#include "agent/spool/attempt_directory.h"
#include "agent/spool/lifecycle.h"
#include "common/grpc_status.h"
#include "common/sha256.h"
#include "common/subprocess.h"
#include "itwin/agent/v1/agent.grpc.pb.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::testing {

inline std::string AgentProgram() { return std::string(getenv("ITWIN_BIN")) + "/itwin-agent"; }

// A real itwin-agent process over a spool of its own, and calls to it. Whatever it started is killed at the end.
class AgentHarness {
 public:
  explicit AgentHarness(int slots = 2) : slots_(slots) {}
  ~AgentHarness() {
    Kill();
    agent::KillAll([&] { return Processes(); }, absl::Seconds(10));
  }

  // `crash_at`: see FaultPoint. Returns whether it came up.
  bool Serve(const std::string& crash_at = "", std::vector<std::string> flags = {}) {
    SubprocessOptions options;
    options.argv = {AgentProgram(), "serve", "--root", root(), "--slots", std::to_string(slots_), "--grace", "1s"};
    options.argv.insert(options.argv.end(), flags.begin(), flags.end());
    if (!crash_at.empty()) options.env = {{"ITWIN_TEST_CRASH_AT", crash_at}};
    FileDescriptor log = *OpenFile(root_.path() + "/test.log", O_WRONLY | O_CREAT | O_APPEND);
    options.stdout_fd = options.stderr_fd = log.get();
    options.new_session = true;
    process_ = *Subprocess::Start(options);
    const bool up = WaitUntil([&] {
      const auto owner = agent::ReadOwnerRecord(root());
      if (process_->Poll()) return true;
      return owner && owner->process.pid == process_->pid();
    });
    return up && !process_->Poll() && Connect();
  }
  bool Connect() {
    auto socket = agent::ConnectToAgent({.root = root(), .agent_program = "/nowhere"});
    if (!socket.ok()) return false;
    fcntl(socket->get(), F_SETFL, fcntl(socket->get(), F_GETFL) | O_NONBLOCK);
    stub_ = agent::v1::Agent::NewStub(grpc::CreateInsecureChannelFromFd("agent", socket->Release()));
    return true;
  }
  void Kill() {
    if (!process_) return;
    process_->Kill(SIGKILL);
    (void)process_->Wait(absl::Now() + absl::Seconds(10));
    process_.reset();
    stub_.reset();
  }
  Subprocess& process() { return *process_; }
  bool alive() { return process_ && !process_->Poll(); }
  const std::string& root() const { return root_.path(); }
  agent::AttemptDirectory DirectoryOf(const std::string& key) { return {root(), *AttemptKey::Parse(key)}; }
  agent::v1::Agent::Stub& stub() { return *stub_; }

  static agent::v1::StartAttemptRequest Shell(const std::string& key, const std::string& program) {
    agent::v1::StartAttemptRequest request;
    request.set_attempt(key);
    request.set_spec_json("{}");
    request.set_nodes(1);
    request.set_ranks_per_node(1);
    for (const std::string& word : {std::string("/bin/sh"), std::string("-c"), program}) request.add_argv(word);
    return request;
  }
  static void Limit(grpc::ClientContext* context, absl::Duration limit = absl::Seconds(20)) {
    context->set_deadline(absl::ToChronoTime(absl::Now() + limit));
  }
  absl::StatusOr<agent::v1::AttemptStatus> Start(const agent::v1::StartAttemptRequest& request) {
    return Call(request, &agent::v1::Agent::Stub::StartAttempt, agent::v1::AttemptStatus());
  }
  absl::StatusOr<agent::v1::AttemptStatus> Cancel(const std::string& key) {
    agent::v1::CancelAttemptRequest request;
    request.set_attempt(key);
    request.set_reason("by a test");
    return Call(request, &agent::v1::Agent::Stub::CancelAttempt, agent::v1::AttemptStatus());
  }
  absl::Status Remove(const std::string& key) {
    agent::v1::RemoveAttemptRequest request;
    request.set_attempt(key);
    return Call(request, &agent::v1::Agent::Stub::RemoveAttempt, agent::v1::RemoveAttemptResponse()).status();
  }
  absl::StatusOr<agent::v1::AttemptStatus> Status(const std::string& key) {
    agent::v1::ListAttemptsRequest request;
    request.add_attempts(key);
    auto list = Call(request, &agent::v1::Agent::Stub::ListAttempts, agent::v1::ListAttemptsResponse());
    if (!list.ok()) return list.status();
    return list->attempts(0);
  }
  // The status once it has ended, or at the time-out.
  agent::v1::AttemptStatus End(const std::string& key, absl::Duration limit = absl::Seconds(20)) {
    agent::v1::AttemptStatus out;
    WaitUntil([&] {
      auto status = Status(key);
      if (status.ok()) out = *status;
      return out.phase() == agent::v1::ATTEMPT_PHASE_ENDED;
    }, limit);
    EXPECT_EQ(out.phase(), agent::v1::ATTEMPT_PHASE_ENDED) << out.ShortDebugString();
    return out;
  }
  bool Reaches(const std::string& key, agent::v1::AttemptPhase phase) {
    return WaitUntil([&] {
      auto status = Status(key);
      return status.ok() && status->phase() == phase;
    });
  }
  absl::Status Put(const std::string& content) {
    grpc::ClientContext context;
    Limit(&context);
    agent::v1::PutInputResponse response;
    auto writer = stub_->PutInput(&context, &response);
    agent::v1::PutInputRequest request;
    request.set_sha256(Sha256Hex(content));
    request.set_size_bytes(static_cast<int64_t>(content.size()));
    request.set_data(content);
    writer->Write(request);
    writer->WritesDone();
    return FromGrpc(writer->Finish());
  }

  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(
      const Request& request,
      grpc::Status (agent::v1::Agent::Stub::*method)(grpc::ClientContext*, const Request&, Response*), Response response) {
    grpc::ClientContext context;
    Limit(&context);
    const absl::Status status = FromGrpc((stub_.get()->*method)(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }

  // Scripts and programs of this root's attempts.
  std::vector<pid_t> Processes() {
    std::vector<pid_t> out;
    const auto keys = agent::ListAttemptDirectories(root());
      for (const AttemptKey& key : keys.value()) {
      const auto owner = agent::ReadLease({root(), key});
      if (!owner) continue;
      for (pid_t pid : agent::ProcessesMarked("ITWIN_LEASE=" + owner->nonce, 0)) out.push_back(pid);
      if (agent::IsAlive(owner->process)) out.push_back(owner->process.pid);
    }
    return out;
  }

 private:
  TempDirectory root_;
  int slots_;
  std::optional<Subprocess> process_;
  std::unique_ptr<agent::v1::Agent::Stub> stub_;
};

// What a gateway does with Follow: keeps each file's bytes by offset and checks that none is missing or doubled.
class Follower {
 public:
  struct Files {
    std::map<std::string, std::string> data;  // "metrics", "stdout", "stderr", "node-<host>"
    std::vector<std::string> notes;
    std::vector<agent::v1::AttemptStatus> statuses;
  };
  explicit Follower(AgentHarness* harness) : harness_(harness) {}
  ~Follower() { Stop(); }

  // Goes on from what it has.
  void Start(const std::vector<std::string>& keys) {
    Stop();
    context_ = std::make_unique<grpc::ClientContext>();
    stream_ = harness_->stub().Follow(context_.get());
    agent::v1::FollowRequest request;
    {
      absl::MutexLock lock(&mu_);
      for (const std::string& key : keys) {
        auto* add = request.add_add();
        add->set_attempt(key);
        Files& files = files_[key];
        add->mutable_cursor()->set_metrics(Size(files, "metrics"));
        add->mutable_cursor()->set_stdout_log(Size(files, "stdout"));
        add->mutable_cursor()->set_stderr_log(Size(files, "stderr"));
        for (const auto& [name, data] : files.data) {
          if (name.rfind("node-", 0) == 0) (*add->mutable_cursor()->mutable_nodes())[name.substr(5)] = Size(files, name);
        }
      }
    }
    stream_->Write(request);
    thread_ = std::thread([this] { Run(); });
  }
  void Stop() {
    if (!thread_.joinable()) return;
    context_->TryCancel();
    thread_.join();
    (void)stream_->Finish();
    stream_.reset();
  }
  Files Get(const std::string& key) {
    absl::MutexLock lock(&mu_);
    return files_[key];
  }
  bool WaitFor(const std::string& key, const std::function<bool(const Files&)>& condition,
               absl::Duration limit = absl::Seconds(20)) {
    return WaitUntil([&] { return condition(Get(key)); }, limit);
  }
  static bool HasEnded(const Files& files) {
    return !files.statuses.empty() && files.statuses.back().phase() == agent::v1::ATTEMPT_PHASE_ENDED;
  }
  int errors() {
    absl::MutexLock lock(&mu_);
    return errors_;
  }

 private:
  static int64_t Size(Files& files, const std::string& name) {
    return static_cast<int64_t>(files.data[name].size());
  }
  void Run() {
    agent::v1::FollowResponse response;
    while (stream_->Read(&response)) {
      absl::MutexLock lock(&mu_);
      for (const auto& status : response.statuses()) files_[status.attempt()].statuses.push_back(status);
      for (const auto& chunk : response.chunks()) {
        Files& files = files_[chunk.attempt()];
        const std::string name = chunk.file() == agent::v1::SPOOL_FILE_METRICS  ? "metrics"
                                 : chunk.file() == agent::v1::SPOOL_FILE_STDOUT ? "stdout"
                                 : chunk.file() == agent::v1::SPOOL_FILE_STDERR ? "stderr"
                                                                                : "node-" + chunk.host();
        if (!chunk.note().empty()) files.notes.push_back(chunk.note());
        std::string& data = files.data[name];
        if (chunk.offset() != static_cast<int64_t>(data.size()) && chunk.note().empty()) ++errors_;
        if (!chunk.note().empty()) data.resize(static_cast<size_t>(chunk.offset()), '?');
        data += chunk.data();
      }
    }
  }
  AgentHarness* const harness_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::unique_ptr<grpc::ClientReaderWriter<agent::v1::FollowRequest, agent::v1::FollowResponse>> stream_;
  std::thread thread_;
  absl::Mutex mu_;
  std::map<std::string, Files> files_ ABSL_GUARDED_BY(mu_);
  int errors_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace itwin::testing
