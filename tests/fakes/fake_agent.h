#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/sha256.h"
#include "server/dispatch/agent_client.h"

namespace itwin::testing {

// A site in memory, with the agent's promises: an attempt starts once however often it is asked for, a cancel of an
// unknown one bars it, Follow sends what lies beyond the cursors. The test moves it, and loses replies. Thread-safe.
class FakeSite {
 public:
  struct Attempt {
    agent::v1::AttemptStatus status;
    agent::v1::StartAttemptRequest request;
    std::string metrics;
    std::string errors;
    int starts = 0;
    bool barred = false;
    bool cancel = false;
    std::map<std::string, std::string> outputs;
    std::vector<std::pair<std::string, int64_t>> traces;  // asked for: name and steps, each call
  };

  // -- what a test does --
  void Run(const std::string& key) { SetPhase(key, agent::v1::ATTEMPT_PHASE_RUNNING); }
  void SetPhase(const std::string& key, agent::v1::AttemptPhase phase) {
    absl::MutexLock lock(&mu_);
    attempts_[key].status.set_phase(phase);
    Changed(key);
  }
  void Write(const std::string& key, const std::string& lines) {
    absl::MutexLock lock(&mu_);
    attempts_[key].metrics += lines;
    Changed(key);
  }
  void SetOutput(const std::string& key, const std::string& path, const std::string& bytes) {
    absl::MutexLock lock(&mu_);
    attempts_[key].outputs[path] = bytes;
  }
  void Exit(const std::string& key, int code) {
    absl::MutexLock lock(&mu_);
    Attempt& attempt = attempts_[key];
    attempt.status.set_phase(agent::v1::ATTEMPT_PHASE_ENDED);
    attempt.status.set_cause(attempt.cancel ? agent::v1::END_CAUSE_CANCELLED : agent::v1::END_CAUSE_EXITED);
    attempt.status.set_exit_code(code);
    if (code == 0) attempt.status.set_result_json("{\"outcome\":\"succeeded\",\"metrics\":{\"x\":1}}");
    attempt.status.mutable_sizes()->set_metrics(static_cast<int64_t>(attempt.metrics.size()));
    attempt.status.mutable_sizes()->set_stderr_log(static_cast<int64_t>(attempt.errors.size()));
    Changed(key);
  }
  void Forget(const std::string& key) {
    absl::MutexLock lock(&mu_);
    attempts_.erase(key);
  }
  // The next StartAttempt takes effect, and its answer is lost.
  void LoseNextStart() {
    absl::MutexLock lock(&mu_);
    lose_start_ = true;
  }
  void RefuseStarts(const std::string& words) {
    absl::MutexLock lock(&mu_);
    refusal_ = words;
  }
  void SetReachable(bool reachable) {
    absl::MutexLock lock(&mu_);
    reachable_ = reachable;
    if (!reachable) ++generation_;
  }
  int slots = 4;
  // As an agent of before there were traces.
  void KnowTraces(bool knows) {
    absl::MutexLock lock(&mu_);
    knows_traces_ = knows;
  }
  // What Hello answers; before the loop looks.
  void SetHello(const agent::v1::HelloResponse& hello) {
    absl::MutexLock lock(&mu_);
    hello_ = hello;
  }
  void RefuseHello(const absl::Status& why) {
    absl::MutexLock lock(&mu_);
    hello_refusal_ = why;
  }
  void Change(const std::string& key, const std::function<void(agent::v1::AttemptStatus*)>& change) {
    absl::MutexLock lock(&mu_);
    change(&attempts_[key].status);
    Changed(key);
  }
  std::vector<agent::v1::HelloRequest> greetings() const {
    absl::MutexLock lock(&mu_);
    return greetings_;
  }
  std::string spool_id = "spool-1";

  std::map<std::string, Attempt> attempts() const {
    absl::MutexLock lock(&mu_);
    return attempts_;
  }
  std::set<std::string> inputs() const {
    absl::MutexLock lock(&mu_);
    return inputs_;
  }

  // -- what the gateway holds --
  absl::StatusOr<std::unique_ptr<server::AgentClient>> Connect();

 private:
  friend class FakeAgentClient;
  friend class FakeFollowStream;

  void Changed(const std::string& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    attempts_[key].status.set_attempt(key);
    ++version_;
  }
  agent::v1::AttemptStatus StatusOf(const std::string& key) const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    const auto found = attempts_.find(key);
    if (found != attempts_.end() && !found->second.barred) return found->second.status;
    agent::v1::AttemptStatus absent;
    absent.set_attempt(key);
    absent.set_phase(agent::v1::ATTEMPT_PHASE_ABSENT);
    return absent;
  }

  mutable absl::Mutex mu_;
  bool reachable_ ABSL_GUARDED_BY(mu_) = true;
  bool lose_start_ ABSL_GUARDED_BY(mu_) = false;
  bool knows_traces_ ABSL_GUARDED_BY(mu_) = true;
  std::string refusal_ ABSL_GUARDED_BY(mu_);
  agent::v1::HelloResponse hello_ ABSL_GUARDED_BY(mu_);
  absl::Status hello_refusal_ ABSL_GUARDED_BY(mu_);
  std::vector<agent::v1::HelloRequest> greetings_ ABSL_GUARDED_BY(mu_);
  int64_t generation_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t version_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<std::string, Attempt> attempts_ ABSL_GUARDED_BY(mu_);
  std::set<std::string> inputs_ ABSL_GUARDED_BY(mu_);
};

class FakeFollowStream : public server::FollowStream {
 public:
  FakeFollowStream(FakeSite* site, int64_t generation) : site_(*site), generation_(generation) {}

  bool Write(const agent::v1::FollowRequest& request) override {
    absl::MutexLock lock(&site_.mu_);
    for (const auto& add : request.add()) followed_[add.attempt()] = {add.cursor(), ""};
    for (const std::string& key : request.drop()) followed_.erase(key);
    ++site_.version_;
    return generation_ == site_.generation_ && !cancelled_;
  }
  bool Read(agent::v1::FollowResponse* response) override {
    absl::MutexLock lock(&site_.mu_);
    while (true) {
      if (cancelled_ || generation_ != site_.generation_) return false;
      if (Collect(response)) return true;
      const auto moved = [this] {
        site_.mu_.AssertHeld();
        return cancelled_ || generation_ != site_.generation_ || seen_ != site_.version_;
      };
      site_.mu_.Await(absl::Condition(&moved));
    }
  }
  void Cancel() override {
    absl::MutexLock lock(&site_.mu_);
    cancelled_ = true;
  }
  absl::Status Finish() override { return absl::UnavailableError("the stream is over"); }

 private:
  bool Collect(agent::v1::FollowResponse* response) ABSL_EXCLUSIVE_LOCKS_REQUIRED(site_.mu_) {
    seen_ = site_.version_;
    response->Clear();
    for (auto& [key, followed] : followed_) {
      const auto found = site_.attempts_.find(key);
      if (found == site_.attempts_.end()) continue;
      const std::string& metrics = found->second.metrics;
      if (followed.first.metrics() < static_cast<int64_t>(metrics.size())) {
        agent::v1::SpoolChunk* chunk = response->add_chunks();
        chunk->set_attempt(key);
        chunk->set_file(agent::v1::SPOOL_FILE_METRICS);
        chunk->set_offset(followed.first.metrics());
        chunk->set_data(metrics.substr(static_cast<size_t>(followed.first.metrics())));
        followed.first.set_metrics(static_cast<int64_t>(metrics.size()));
      }
      const std::string& errors = found->second.errors;
      if (followed.first.stderr_log() < static_cast<int64_t>(errors.size())) {
        agent::v1::SpoolChunk* chunk = response->add_chunks();
        chunk->set_attempt(key);
        chunk->set_file(agent::v1::SPOOL_FILE_STDERR);
        chunk->set_offset(followed.first.stderr_log());
        chunk->set_data(errors.substr(static_cast<size_t>(followed.first.stderr_log())));
        followed.first.set_stderr_log(static_cast<int64_t>(errors.size()));
      }
      const std::string status = site_.StatusOf(key).SerializeAsString();
      if (status != followed.second) *response->add_statuses() = site_.StatusOf(key);
      followed.second = status;
    }
    return response->chunks_size() > 0 || response->statuses_size() > 0;
  }

  FakeSite& site_;
  const int64_t generation_;
  bool cancelled_ ABSL_GUARDED_BY(site_.mu_) = false;
  int64_t seen_ ABSL_GUARDED_BY(site_.mu_) = -1;
  std::map<std::string, std::pair<agent::v1::SpoolCursor, std::string>> followed_ ABSL_GUARDED_BY(site_.mu_);
};

class FakeAgentClient : public server::AgentClient {
 public:
  FakeAgentClient(FakeSite* site, int64_t generation) : site_(*site), generation_(generation) {}

  absl::StatusOr<agent::v1::HelloResponse> Hello(const agent::v1::HelloRequest& request, absl::Time) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    absl::MutexLock lock(&site_.mu_);
    site_.greetings_.push_back(request);
    if (!site_.hello_refusal_.ok()) return site_.hello_refusal_;
    agent::v1::HelloResponse response = site_.hello_;
    response.set_protocol(1);
    response.set_agent_version("fake");
    if (response.scheduler().empty()) response.set_scheduler("process");
    response.set_slots(response.scheduler() == "process" ? site_.slots : 0);
    response.set_host("fake");
    response.set_spool("/spool");
    response.set_spool_id(site_.spool_id);
    response.add_capabilities("train");
    return response;
  }
  absl::StatusOr<std::vector<agent::v1::InputStatus>> StatInputs(const std::vector<std::string>& sha256, absl::Time) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    absl::MutexLock lock(&site_.mu_);
    std::vector<agent::v1::InputStatus> out;
    for (const std::string& hash : sha256) {
      out.emplace_back().set_sha256(hash);
      out.back().set_complete(site_.inputs_.contains(hash));
    }
    return out;
  }
  absl::Status PutInput(const std::string& sha256, int64_t, int64_t, const std::function<absl::StatusOr<std::string>()>& next,
                        absl::Duration) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    std::string all;
    while (true) {
      const auto chunk = next();
      if (!chunk.ok()) return chunk.status();
      if (chunk->empty()) break;
      all += *chunk;
    }
    if (Sha256Hex(all) != sha256) return absl::DataLossError("the hash does not fit");
    absl::MutexLock lock(&site_.mu_);
    site_.inputs_.insert(sha256);
    return absl::OkStatus();
  }
  absl::StatusOr<agent::v1::AttemptStatus> StartAttempt(const agent::v1::StartAttemptRequest& request, absl::Time) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    absl::MutexLock lock(&site_.mu_);
    if (!site_.refusal_.empty()) return absl::FailedPreconditionError(site_.refusal_);
    FakeSite::Attempt& attempt = site_.attempts_[request.attempt()];
    if (attempt.barred) return absl::FailedPreconditionError("it was cancelled before it began");
    if (attempt.starts == 0) {
      attempt.starts = 1;
      attempt.request = request;
      attempt.status.set_phase(agent::v1::ATTEMPT_PHASE_PENDING);
      attempt.status.set_submitted_us(1);
      site_.Changed(request.attempt());
    }
    if (std::exchange(site_.lose_start_, false)) return absl::DeadlineExceededError("the answer was lost");
    return site_.StatusOf(request.attempt());
  }
  absl::StatusOr<agent::v1::AttemptStatus> CancelAttempt(const std::string& key, const std::string&, absl::Time) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    absl::MutexLock lock(&site_.mu_);
    FakeSite::Attempt& attempt = site_.attempts_[key];
    if (attempt.starts == 0) attempt.barred = true;
    attempt.cancel = true;
    return site_.StatusOf(key);
  }
  absl::StatusOr<std::optional<agent::v1::FileEntry>> TraceAttempt(const std::string& key, int64_t steps, const std::string& name,
                                                                   absl::Time) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    absl::MutexLock lock(&site_.mu_);
    FakeSite::Attempt& attempt = site_.attempts_[key];
    if (attempt.status.phase() != agent::v1::ATTEMPT_PHASE_RUNNING) return absl::FailedPreconditionError("it does not run");
    if (!site_.knows_traces_) return absl::UnimplementedError("");
    attempt.traces.emplace_back(name, steps);
    const auto found = attempt.outputs.find(name);
    if (found == attempt.outputs.end()) return std::nullopt;
    return EntryOf(found->first, found->second);
  }
  absl::StatusOr<std::vector<agent::v1::AttemptStatus>> ListAttempts(const std::vector<std::string>& keys, absl::Time) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    absl::MutexLock lock(&site_.mu_);
    std::vector<agent::v1::AttemptStatus> out;
    for (const std::string& key : keys) out.push_back(site_.StatusOf(key));
    if (keys.empty()) {
      for (const auto& [key, attempt] : site_.attempts_) out.push_back(site_.StatusOf(key));
    }
    return out;
  }
  absl::Status Diagnose(const agent::v1::DiagnoseRequest&, const std::function<void(const agent::v1::CheckResult&)>& on_check,
                        absl::Time) override {
    agent::v1::CheckResult check;
    check.set_name("scheduler");
    check.set_verdict(agent::v1::CHECK_VERDICT_OK);
    on_check(check);
    return absl::OkStatus();
  }
  absl::StatusOr<std::string> InstallRelease(const agent::v1::InstallReleaseRequest&, absl::Time) override {
    return absl::UnimplementedError("the site in memory has no programs");
  }
  absl::Status Retire(absl::Time) override { return absl::OkStatus(); }
  absl::Status RemoveAttempt(const std::string& key, absl::Time) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    site_.Forget(key);
    return absl::OkStatus();
  }
  absl::StatusOr<std::unique_ptr<server::FollowStream>> Follow() override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    return std::unique_ptr<server::FollowStream>(std::make_unique<FakeFollowStream>(&site_, generation_));
  }
  absl::StatusOr<std::vector<agent::v1::FileEntry>> ListFiles(const std::string& key, const std::string&, absl::Time) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    absl::MutexLock lock(&site_.mu_);
    std::vector<agent::v1::FileEntry> out;
    for (const auto& [path, bytes] : site_.attempts_[key].outputs) out.push_back(EntryOf(path, bytes));
    return out;
  }
  absl::Status ReadFile(const std::string& key, const std::string&, const std::string& path, int64_t offset,
                        const std::function<absl::Status(absl::string_view)>& sink, absl::Duration) override {
    if (absl::Status gone = Gone(); !gone.ok()) return gone;
    std::string bytes;
    {
      absl::MutexLock lock(&site_.mu_);
      bytes = site_.attempts_[key].outputs[path];
    }
    return sink(absl::string_view(bytes).substr(static_cast<size_t>(offset)));
  }
  void Close() override { closed_ = true; }
  std::string Diagnostics() const override { return ""; }

 private:
  static agent::v1::FileEntry EntryOf(const std::string& path, const std::string& bytes) {
    agent::v1::FileEntry file;
    file.set_path(path);
    file.set_size_bytes(static_cast<int64_t>(bytes.size()));
    file.set_sha256(Sha256Hex(bytes));
    return file;
  }
  absl::Status Gone() const {
    absl::MutexLock lock(&site_.mu_);
    return closed_ || !site_.reachable_ || generation_ != site_.generation_ ? absl::UnavailableError("the site is away")
                                                                            : absl::OkStatus();
  }

  FakeSite& site_;
  const int64_t generation_;
  std::atomic<bool> closed_ = false;
};

inline absl::StatusOr<std::unique_ptr<server::AgentClient>> FakeSite::Connect() {
  absl::MutexLock lock(&mu_);
  if (!reachable_) return absl::UnavailableError("the site is away");
  return std::unique_ptr<server::AgentClient>(std::make_unique<FakeAgentClient>(this, generation_));
}

}  // namespace itwin::testing
