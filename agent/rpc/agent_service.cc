#include "agent/rpc/agent_service.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "absl/algorithm/container.h"
#include "absl/cleanup/cleanup.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "agent/rpc/follow_reactor.h"
#include "agent/rpc/host_checks.h"
#include "agent/scheduler/process_tree.h"
#include "agent/spool/release.h"
#include "agent/spool/spool_files.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "common/version.h"

namespace itwin::agent {
namespace {

// File transfers hold a thread each; the rest of the threads stays free for the other calls.
constexpr int kMaxTransfers = 16;
constexpr int kMaxNamedAttempts = 100'000;
constexpr int kMaxNamedInputs = 10'000;
constexpr int64_t kMaxTraceSteps = 10'000;
// For callers without a deadline of their own.
constexpr absl::Duration kLongestWait = absl::Minutes(5);
constexpr absl::Duration kToTravel = absl::Seconds(1);  // so that why we give up arrives before the caller does
constexpr absl::Duration kHelloWait = absl::Seconds(4);

// Until when to wait for what an answer needs.
absl::Time DeadlineOf(const grpc::ServerContext& context) {
  const absl::Time now = absl::Now();
  const absl::Time deadline = std::min(absl::FromChrono(context.deadline()), now + kLongestWait);
  return deadline - std::min(kToTravel, std::max(deadline - now, absl::ZeroDuration()) / 10);
}

// Of this program's file; the gateway compares it with its own agent's. Read once: it does not change while we run.
const std::string& OwnSha256() {
  static const std::string* const hash = new std::string(Sha256OfFile("/proc/self/exe").value_or(""));
  return *hash;
}

std::string OwnProgram() {
  std::error_code error;
  std::string path = std::filesystem::read_symlink("/proc/self/exe", error).string();
  constexpr absl::string_view kDeleted = " (deleted)";  // replaced by another file since we started
  if (absl::EndsWith(path, kDeleted)) path.resize(path.size() - kDeleted.size());
  return path;
}

absl::StatusOr<std::string> Sha256OfOpen(const FileDescriptor& file) {
  return Sha256OfFile(absl::StrCat("/proc/self/fd/", file.get()));
}

bool IsTraceName(const std::string& name) {
  return !name.empty() && name.size() <= 100 && name.front() != '.' && absl::c_all_of(name, [](unsigned char c) {
    return absl::ascii_isalnum(c) || c == '-' || c == '_' || c == '.';
  });
}

// Runs `task` in the loop and waits for what it returns. The task runs to its end even when nobody waits any more.
template <typename T, typename Loop>
absl::StatusOr<T> RunIn(Loop* loop, absl::Time deadline, std::function<absl::StatusOr<T>()> task) {
  struct Call {
    absl::Notification done;
    absl::StatusOr<T> result = absl::UnknownError("not run");
  };
  auto call = std::make_shared<Call>();
  const bool posted = loop->Post([call, task = std::move(task)] {
    call->result = task();
    call->done.Notify();
  });
  if (!posted) return absl::UnavailableError("the agent is stopping; connect again");
  if (!call->done.WaitForNotificationWithDeadline(deadline)) {
    return absl::DeadlineExceededError("the site's file system or scheduler is slow; the outcome is not known, ask again");
  }
  return std::move(call->result);
}

// The same for what the control loop has done elsewhere: `begin` is given whom to tell.
absl::Status RunAside(ControlLoop* loop, absl::Time deadline, std::function<void(ControlLoop::Done)> begin) {
  struct Call {
    absl::Notification done;
    absl::Status result;
  };
  auto call = std::make_shared<Call>();
  const bool posted = loop->Post([call, begin = std::move(begin)] {
    begin([call](absl::Status status) {
      call->result = std::move(status);
      call->done.Notify();
    });
  });
  if (!posted) return absl::UnavailableError("the agent is stopping; connect again");
  if (!call->done.WaitForNotificationWithDeadline(deadline)) {
    return absl::DeadlineExceededError("the site's file system or scheduler is slow; the outcome is not known, ask again");
  }
  return call->result;
}

}  // namespace

AgentService::AgentService(Options options, ControlLoop* control, FollowLoop* follow, InputStore* inputs,
                           Scheduler* scheduler)
    : options_(std::move(options)), control_(control), follow_(follow), inputs_(inputs), scheduler_(scheduler),
      claims_(options_.root, &clock_) {}

grpc::Status AgentService::Hello(grpc::ServerContext* context, const v1::HelloRequest* request,
                                 v1::HelloResponse* response) {
  if (request->protocol() != kAgentProtocol) {
    const bool agent_old = request->protocol() > kAgentProtocol;
    return grpc::Status(
        grpc::StatusCode::FAILED_PRECONDITION,
        absl::StrCat("the ", agent_old ? "agent at the site" : "gateway", " is too old: the gateway (",
                     request->gateway_version(), ") speaks protocol ", request->protocol(), ", the agent (", kVersion,
                     ") protocol ", kAgentProtocol, ". ",
                     agent_old ? "Install the gateway's version of itwin-agent at the site and run: itwin-agent stop"
                               : "Update the gateway"));
  }
  if (const absl::Status claimed = claims_.Greet(*request); !claimed.ok()) return ToGrpc(claimed);
  if (!request->scheduler().empty() && request->scheduler() != options_.scheduler_kind) {
    return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION,
                        absl::StrCat("the site file says scheduler: ", request->scheduler(), ", but the agent on ", HostName(),
                                     " runs jobs by '", options_.scheduler_kind, "'; start it with --scheduler ",
                                     request->scheduler(), ", after: itwin-agent stop --root ", options_.root));
  }
  absl::Duration interval = absl::ZeroDuration();
  if (request->has_query_interval()) interval = absl::Seconds(std::max<int64_t>(0, request->query_interval().seconds()));
  // What is not known in time is left out: a scheduler that does not answer must not make the agent look dead.
  RunAside(control_, std::min(DeadlineOf(*context), absl::Now() + kHelloWait), [this](ControlLoop::Done done) {
    control_->LearnSite(std::move(done));
  }).IgnoreError();
  const absl::StatusOr<SchedulerDescription> scheduler = RunIn<SchedulerDescription>(
      control_, std::min(DeadlineOf(*context), absl::Now() + kHelloWait),
      [this, interval]() -> absl::StatusOr<SchedulerDescription> {
        if (interval > absl::ZeroDuration()) control_->SetQueryInterval(interval);
        return control_->Describe();
      });
  response->set_protocol(kAgentProtocol);
  response->set_agent_version(kVersion);
  response->set_agent_sha256(OwnSha256());
  response->set_agent_program(OwnProgram());
  response->set_host(HostName());
  const char* user = getenv("USER");
  response->set_user(user != nullptr ? user : absl::StrCat(getuid()));
  response->set_scheduler(options_.scheduler_kind);
  if (scheduler.ok()) {
    response->set_slots(scheduler->slots);
    response->set_slots_in_use(scheduler->slots_in_use);
    response->set_calls_per_minute(scheduler->calls_per_minute);
    if (scheduler->slurm) *response->mutable_slurm() = *scheduler->slurm;
  }
  response->set_spool_id(options_.spool_id);
  response->set_term(options_.term);
  response->set_cpus(static_cast<int>(std::thread::hardware_concurrency()));
  response->set_spool(options_.root);
  response->set_time_us(absl::ToUnixMicros(absl::Now()));
  response->add_capabilities("command");
  if (options_.can_train) response->add_capabilities("train");
  log::Debug("gateway {} ({}) says hello", request->gateway_id(), request->gateway_version());
  return grpc::Status::OK;
}

grpc::Status AgentService::InstallRelease(grpc::ServerContext*, const v1::InstallReleaseRequest* request,
                                          v1::InstallReleaseResponse* response) {
  absl::StatusOr<std::string> directory = itwin::agent::InstallRelease(options_.root, *request, inputs_);
  if (!directory.ok()) return ToGrpc(directory.status());
  log::Info("release {} is installed", *directory);
  response->set_directory(*std::move(directory));
  return grpc::Status::OK;
}

grpc::Status AgentService::StatInputs(grpc::ServerContext*, const v1::StatInputsRequest* request,
                                      v1::StatInputsResponse* response) {
  if (request->sha256_size() > kMaxNamedInputs) {
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT,
                        absl::StrCat("at most ", kMaxNamedInputs, " inputs can be asked about at once"));
  }
  for (const std::string& sha256 : request->sha256()) {
    const absl::StatusOr<InputState> state = inputs_->Stat(sha256);
    if (!state.ok()) return ToGrpc(state.status());
    v1::InputStatus* out = response->add_inputs();
    out->set_sha256(sha256);
    out->set_complete(state->complete);
    out->set_received_bytes(state->received_bytes);
  }
  return grpc::Status::OK;
}

grpc::Status AgentService::PutInput(grpc::ServerContext*, grpc::ServerReader<v1::PutInputRequest>* reader,
                                    v1::PutInputResponse*) {
  absl::Cleanup leave = [this] { --transfers_; };
  if (++transfers_ > kMaxTransfers) {
    return ToGrpc(absl::ResourceExhaustedError(absl::StrCat("more than ", kMaxTransfers, " transfers at once; try later")));
  }
  v1::PutInputRequest request;
  if (!reader->Read(&request)) {
    return ToGrpc(absl::InvalidArgumentError("the first message has to say sha256, size_bytes and offset"));
  }
  absl::StatusOr<InputStore::Upload> upload =
      inputs_->BeginUpload(request.sha256(), request.size_bytes(), request.offset());
  if (!upload.ok()) return ToGrpc(upload.status());
  do {
    if (static_cast<int64_t>(request.data().size()) > kMaxChunkBytes) {
      return ToGrpc(absl::InvalidArgumentError(absl::StrCat("a chunk has at most ", kMaxChunkBytes, " bytes")));
    }
    if (absl::Status written = upload->Write(request.data()); !written.ok()) return ToGrpc(written);
  } while (reader->Read(&request));
  return ToGrpc(upload->Finish());
}

absl::StatusOr<v1::AttemptStatus> AgentService::StatusOf(const AttemptKey& key, absl::Time deadline) {
  return RunIn<v1::AttemptStatus>(follow_, deadline, [this, key]() -> absl::StatusOr<v1::AttemptStatus> {
    return follow_->Status(key, /*with_result=*/true);
  });
}

grpc::Status AgentService::StartAttempt(grpc::ServerContext* context, const v1::StartAttemptRequest* request,
                                        v1::AttemptStatus* response) {
  const absl::Time deadline = DeadlineOf(*context);
  const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(request->attempt());
  if (!key.ok()) return ToGrpc(key.status());
  const absl::Status started = RunAside(control_, deadline, [this, request = *request](ControlLoop::Done done) {
    control_->StartAttempt(request, std::move(done));
  });
  if (!started.ok()) return ToGrpc(started);
  absl::StatusOr<v1::AttemptStatus> status = StatusOf(*key, deadline);
  if (!status.ok()) return ToGrpc(status.status());
  *response = *std::move(status);
  if (response->phase() == v1::ATTEMPT_PHASE_ABSENT) {  // barred: as over as it can be
    response->set_phase(v1::ATTEMPT_PHASE_ENDED);
    response->set_cause(v1::END_CAUSE_CANCELLED);
    response->set_ended_us(absl::ToUnixMicros(absl::Now()));
  }
  return grpc::Status::OK;
}

grpc::Status AgentService::CancelAttempt(grpc::ServerContext* context, const v1::CancelAttemptRequest* request,
                                         v1::AttemptStatus* response) {
  const absl::Time deadline = DeadlineOf(*context);
  const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(request->attempt());
  if (!key.ok()) return ToGrpc(key.status());
  const absl::Status asked =
      RunAside(control_, deadline, [this, key = *key, reason = request->reason()](ControlLoop::Done done) {
        control_->CancelAttempt(key, reason, std::move(done));
      });
  if (!asked.ok()) return ToGrpc(asked);
  absl::StatusOr<v1::AttemptStatus> status = StatusOf(*key, deadline);
  if (!status.ok()) return ToGrpc(status.status());
  *response = *std::move(status);
  return grpc::Status::OK;
}

absl::StatusOr<v1::TraceAttemptResponse> AgentService::Trace(const v1::TraceAttemptRequest& request, absl::Time deadline) {
  ITWIN_ASSIGN_OR_RETURN(const AttemptKey key, AttemptKey::Parse(request.attempt()));
  if (request.steps() < 1 || request.steps() > kMaxTraceSteps) {
    return absl::InvalidArgumentError(absl::StrCat("steps is ", request.steps(), "; use 1 to ", kMaxTraceSteps));
  }
  if (!IsTraceName(request.name())) return absl::InvalidArgumentError("name: use letters, digits, '-', '_' and '.', no dot first");
  ITWIN_ASSIGN_OR_RETURN(const v1::AttemptStatus status, StatusOf(key, deadline));
  if (status.phase() != v1::ATTEMPT_PHASE_RUNNING) {
    return absl::FailedPreconditionError(absl::StrCat("attempt ", request.attempt(), " does not run"));
  }
  const AttemptDirectory paths(options_.root, key);
  v1::TraceAttemptResponse response;
  const absl::StatusOr<FileDescriptor> trace = OpenBeneath(paths.outputs_path(), request.name());
  if (trace.ok()) {  // the worker gives the file its name when it is whole
    struct stat info;
    if (fstat(trace->get(), &info) != 0) return ErrnoStatus(errno, request.name());
    response.mutable_file()->set_path(request.name());
    response.mutable_file()->set_size_bytes(info.st_size);
    ITWIN_ASSIGN_OR_RETURN(*response.mutable_file()->mutable_sha256(), Sha256OfOpen(*trace));
    return response;
  }
  if (!absl::IsNotFound(trace.status())) return trace.status();
  // Taken away by the worker, which does what it has done once not again.
  if (!FileExists(paths.trace_request_path())) {
    ITWIN_RETURN_IF_ERROR(
        WriteFileAtomically(paths.trace_request_path(), absl::StrCat(request.steps(), " ", request.name(), "\n")));
  }
  return response;
}

grpc::Status AgentService::TraceAttempt(grpc::ServerContext* context, const v1::TraceAttemptRequest* request,
                                        v1::TraceAttemptResponse* response) {
  absl::StatusOr<v1::TraceAttemptResponse> trace = Trace(*request, DeadlineOf(*context));
  if (!trace.ok()) return ToGrpc(trace.status());
  *response = *std::move(trace);
  return grpc::Status::OK;
}

grpc::Status AgentService::ListAttempts(grpc::ServerContext* context, const v1::ListAttemptsRequest* request,
                                        v1::ListAttemptsResponse* response) {
  if (request->attempts_size() > kMaxNamedAttempts) {
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT,
                        absl::StrCat("at most ", kMaxNamedAttempts, " attempts can be named at once"));
  }
  std::vector<AttemptKey> named;
  for (const std::string& text : request->attempts()) {
    const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(text);
    if (!key.ok()) return ToGrpc(key.status());
    named.push_back(*key);
  }
  absl::StatusOr<v1::ListAttemptsResponse> list = RunIn<v1::ListAttemptsResponse>(
      follow_, DeadlineOf(*context), [this, named = std::move(named)]() -> absl::StatusOr<v1::ListAttemptsResponse> {
        v1::ListAttemptsResponse out;
        for (const AttemptKey& key : named.empty() ? follow_->Keys() : named) {
          *out.add_attempts() = follow_->Status(key, /*with_result=*/!named.empty());
        }
        return out;
      });
  if (!list.ok()) return ToGrpc(list.status());
  *response = *std::move(list);
  return grpc::Status::OK;
}

grpc::Status AgentService::RemoveAttempt(grpc::ServerContext* context, const v1::RemoveAttemptRequest* request,
                                         v1::RemoveAttemptResponse*) {
  const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(request->attempt());
  if (!key.ok()) return ToGrpc(key.status());
  const absl::StatusOr<std::string> trash = RunIn<std::string>(
      control_, DeadlineOf(*context), [this, key = *key]() { return control_->RemoveAttempt(key); });
  if (!trash.ok()) return ToGrpc(trash.status());
  if (trash->empty()) return grpc::Status::OK;
  // Gone for everybody; what is left over is tried again at the next start.
  if (absl::Status removed = RemoveTree(*trash); !removed.ok()) log::Warn("{}", std::string(removed.message()));
  return grpc::Status::OK;
}

absl::StatusOr<std::string> AgentService::DirectoryToRead(const std::string& attempt, const std::string& directory,
                                                          Reads reads, absl::Time deadline) {
  ITWIN_ASSIGN_OR_RETURN(const AttemptKey key, AttemptKey::Parse(attempt));
  const AttemptDirectory paths(options_.root, key);
  if (directory != "outputs" && directory != "checkpoints") {
    return absl::InvalidArgumentError(absl::StrCat("directory is '", directory, "'; use 'outputs' or 'checkpoints'"));
  }
  ITWIN_ASSIGN_OR_RETURN(const v1::AttemptStatus status, StatusOf(key, deadline));
  if (status.phase() == v1::ATTEMPT_PHASE_ABSENT) {
    return absl::NotFoundError(absl::StrCat("attempt ", attempt, " is not known at this site"));
  }
  const bool runs = status.phase() == v1::ATTEMPT_PHASE_RUNNING && reads == Reads::kRunningToo;
  if (status.phase() != v1::ATTEMPT_PHASE_ENDED && !runs) {
    return absl::FailedPreconditionError(
        absl::StrCat("attempt ", attempt, " has not ended; its files can be read afterwards"));
  }
  return directory == "outputs" ? paths.outputs_path() : paths.checkpoints_path();
}

absl::StatusOr<v1::ListFilesResponse> AgentService::ListBelow(const v1::ListFilesRequest& request,
                                                              absl::Time deadline) {
  ITWIN_ASSIGN_OR_RETURN(const std::string directory,
                         DirectoryToRead(request.attempt(), request.directory(), Reads::kEnded, deadline));
  ITWIN_ASSIGN_OR_RETURN(const std::vector<SpoolFileEntry> files, ListFilesBeneath(directory));
  // The result record has the sums of the outputs as the program left them: these are the ones to compare with.
  std::map<std::pair<std::string, int64_t>, std::string> known;
  if (request.directory() == "outputs") {
    ITWIN_ASSIGN_OR_RETURN(const AttemptKey key, AttemptKey::Parse(request.attempt()));
    const absl::StatusOr<std::string> text = itwin::ReadFile(AttemptDirectory(options_.root, key).result_path(), 64 << 20);
    const nlohmann::json result =
        text.ok() ? nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false) : nlohmann::json();
    if (result.is_object() && result.contains("outputs") && result["outputs"].is_array()) {
      for (const auto& output : result["outputs"]) {
        if (!output.is_object() || !output.contains("path") || !output["path"].is_string() || !output.contains("size") ||
            !output["size"].is_number_integer() || !output.contains("sha256") || !output["sha256"].is_string()) {
          continue;
        }
        const std::string sum = output["sha256"].get<std::string>();
        if (IsSha256Hex(sum)) known[{output["path"].get<std::string>(), output["size"].get<int64_t>()}] = sum;
      }
    }
  }
  v1::ListFilesResponse response;
  for (const SpoolFileEntry& file : files) {
    v1::FileEntry* out = response.add_files();
    out->set_path(file.path);
    out->set_size_bytes(file.size_bytes);
    const auto it = known.find({file.path, file.size_bytes});
    if (it != known.end()) {
      out->set_sha256(it->second);
      continue;
    }
    ITWIN_ASSIGN_OR_RETURN(const FileDescriptor opened, OpenBeneath(directory, file.path));
    ITWIN_ASSIGN_OR_RETURN(*out->mutable_sha256(), Sha256OfOpen(opened));
  }
  return response;
}

grpc::Status AgentService::ListFiles(grpc::ServerContext* context, const v1::ListFilesRequest* request,
                                     v1::ListFilesResponse* response) {
  absl::StatusOr<v1::ListFilesResponse> list = ListBelow(*request, DeadlineOf(*context));
  if (!list.ok()) return ToGrpc(list.status());
  *response = *std::move(list);
  return grpc::Status::OK;
}

grpc::Status AgentService::ReadFile(grpc::ServerContext* context, const v1::ReadFileRequest* request,
                                    grpc::ServerWriter<v1::ReadFileResponse>* writer) {
  absl::Cleanup leave = [this] { --transfers_; };
  if (++transfers_ > kMaxTransfers) {
    return ToGrpc(absl::ResourceExhaustedError(absl::StrCat("more than ", kMaxTransfers, " transfers at once; try later")));
  }
  const absl::StatusOr<std::string> directory =
      DirectoryToRead(request->attempt(), request->directory(), Reads::kRunningToo, DeadlineOf(*context));
  if (!directory.ok()) return ToGrpc(directory.status());
  const absl::StatusOr<FileDescriptor> file = OpenBeneath(*directory, request->path());
  if (!file.ok()) return ToGrpc(file.status());
  if (request->offset() < 0) return ToGrpc(absl::InvalidArgumentError("offset is negative"));
  int64_t offset = request->offset();
  v1::ReadFileResponse response;
  std::string* data = response.mutable_data();
  while (true) {
    data->resize(static_cast<size_t>(kMaxChunkBytes));
    const ssize_t got = pread(file->get(), data->data(), data->size(), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ToGrpc(ErrnoStatus(errno, request->path()));
    if (got == 0) return grpc::Status::OK;
    data->resize(static_cast<size_t>(got));
    offset += got;
    if (!writer->Write(response)) return grpc::Status::CANCELLED;
  }
}

grpc::Status AgentService::Diagnose(grpc::ServerContext* context, const v1::DiagnoseRequest* request,
                                    grpc::ServerWriter<v1::CheckResult>* writer) {
  const auto emit = [&](const v1::CheckResult& result) { return !context->IsCancelled() && writer->Write(result); };
  for (const v1::CheckResult& result : CheckHost(options_.root)) {
    if (!emit(result)) return grpc::Status::CANCELLED;
  }
  scheduler_->Diagnose(*request, emit);
  return grpc::Status::OK;
}

grpc::Status AgentService::Retire(grpc::ServerContext*, const v1::RetireRequest*, v1::RetireResponse*) {
  options_.retire();
  return grpc::Status::OK;
}

grpc::ServerBidiReactor<v1::FollowRequest, v1::FollowResponse>* AgentService::Follow(grpc::CallbackServerContext*) {
  return new FollowReactor(follow_);
}

}  // namespace itwin::agent
