#include "agent/agent.h"

#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "agent/control_loop.h"
#include "agent/follow_loop.h"
#include "agent/rpc/acceptor.h"
#include "agent/rpc/agent_service.h"
#include "agent/rpc/root_lock.h"
#include "agent/rpc/socket.h"
#include "agent/scheduler/process_scheduler.h"
#include "agent/scheduler/slurm/slurm_scheduler.h"
#include "common/clock.h"
#include "common/ids.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "common/version.h"

namespace itwin::agent {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;  // a spec with its inline parts
// Of gRPC for unary calls and transfers; beyond, callers see RESOURCE_EXHAUSTED and come back.
constexpr int kMaxThreads = 48;
constexpr int kMinPingIntervalMs = 500;
constexpr absl::Duration kCleanInterval = absl::Hours(1);

// For SLURM's word on who killed an attempt, when its controller does not answer.
constexpr absl::Duration kAwaitScheduler = absl::Minutes(2);
constexpr absl::Duration kFirstLook = absl::Seconds(3);

// Random, and made with the spool: tells a gateway that there is another file system under the path it knows.
absl::StatusOr<std::string> SpoolId(const std::string& root) {
  const std::string path = root + "/spool_id";
  absl::StatusOr<std::string> text = ReadFile(path, 64);
  if (text.ok() && text->size() >= 16) return std::string(absl::StripAsciiWhitespace(*text));
  if (!text.ok() && !absl::IsNotFound(text.status())) return text.status();
  const std::string id = RandomHex(16);
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(path, id + "\n"));
  return id;
}

absl::StatusOr<std::unique_ptr<Scheduler>> MakeScheduler(const Agent::Options& options, Clock* clock,
                                                         std::function<absl::Status()> may_act) {
  if (options.scheduler == "slurm" || options.scheduler == "auto") {
    const char* path = getenv("PATH");
    absl::StatusOr<std::unique_ptr<SlurmScheduler>> slurm = SlurmScheduler::Create(
        {.root = options.root, .path = path == nullptr ? "" : path, .agent_program = options.agent_program, .launch = options.launch,
         .may_act = std::move(may_act)});
    if (slurm.ok()) return std::unique_ptr<Scheduler>(*std::move(slurm));
    if (options.scheduler == "slurm") return slurm.status();
  } else if (options.scheduler != "process") {
    return absl::InvalidArgumentError(absl::StrCat("--scheduler is '", options.scheduler, "'; write auto, slurm or process"));
  }
  ITWIN_ASSIGN_OR_RETURN(std::unique_ptr<ProcessScheduler> process,
                         ProcessScheduler::Create({.root = options.root,
                                                   .slots = options.slots,
                                                   .kill_after = options.launch.grace + absl::Seconds(10)},
                                                  clock));
  return std::unique_ptr<Scheduler>(std::move(process));
}

}  // namespace

// In order of construction; stopped in reverse.
struct Agent::Parts {
  Options options;
  std::unique_ptr<RootLock> lock;
  std::string socket_path;
  SystemClock clock;
  std::unique_ptr<InputStore> inputs;
  std::unique_ptr<Scheduler> scheduler;
  std::unique_ptr<FollowLoop> follow;
  std::unique_ptr<ControlLoop> control;
  std::unique_ptr<AgentService> service;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<Acceptor> acceptor;

  // The lease's own thread: a slow file system must hold up nobody else.
  std::thread renewer;
  FileDescriptor leaving{eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};   // Wait() is to return
  FileDescriptor stopping{eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};  // the renewer is to return

  void Leave(const std::string& why) {
    log::Info("{}: leaves {}", why, options.root);
    Signal(leaving);
  }
  static void Signal(const FileDescriptor& event) {
    const uint64_t one = 1;
    (void)!write(event.get(), &one, sizeof one);
  }
  void RenewLease() {
    pollfd entry{stopping.get(), POLLIN, 0};
    while (poll(&entry, 1, static_cast<int>(absl::ToInt64Milliseconds(RootLock::kLookInterval))) == 0) {
      switch (lock->Renew()) {
        case RootLock::Standing::kHeld:
          continue;
        case RootLock::Standing::kRootGone:
          return Leave("its root was removed");
        case RootLock::Standing::kTakenOver:
          return Leave("another agent has taken over");
        case RootLock::Standing::kAskedToLeave:
          return Leave("an agent on another host takes over");
      }
    }
  }
};

absl::StatusOr<std::unique_ptr<Agent>> Agent::Start(Options options) {
  auto parts = std::make_unique<Parts>();
  Parts* p = parts.get();
  ITWIN_ASSIGN_OR_RETURN(const std::vector<std::string> launcher, SplitCommandLine(options.launch.launcher));
  if (launcher.empty()) return absl::InvalidArgumentError("--launcher is empty; leave it out for the default");
  p->options = std::move(options);
  const std::string& root = p->options.root;
  ITWIN_RETURN_IF_ERROR(MakeDirectories(root));
  ITWIN_ASSIGN_OR_RETURN(p->lock, RootLock::Take(root, p->options.takeover_limit));
  std::unique_ptr<Agent> agent(new Agent(std::move(parts)));  // from here on its destructor stops what was started
  // The lease has to be renewed from now on, whatever else takes its time.
  p->renewer = std::thread([p] { p->RenewLease(); });
  ITWIN_ASSIGN_OR_RETURN(const std::string spool_id, SpoolId(root));
  p->inputs = std::make_unique<InputStore>(root + "/inputs");
  ITWIN_RETURN_IF_ERROR(p->inputs->Create());
  const std::function<absl::Status()> may_act = [p] { return p->lock->Check(); };
  ITWIN_ASSIGN_OR_RETURN(p->scheduler, MakeScheduler(p->options, &p->clock, may_act));
  const SchedulerDescription scheduler = p->scheduler->Describe();
  const bool polled = p->scheduler->change_fd() < 0;

  p->follow = std::make_unique<FollowLoop>(FollowLoop::Options{
      .root = root,
      .use_inotify = !IsSharedFileSystem(root),
      .on_ended = [p](const AttemptKey& key) { p->control->Post([p, key] { p->control->Ended(key); }); },
      .await_scheduler = polled ? kAwaitScheduler : absl::ZeroDuration(),
      .on_killed = [p](const AttemptKey&) { p->control->Post([p] { p->control->LookSoon(); }); },
      .may_act = may_act});
  p->control = std::make_unique<ControlLoop>(
      ControlLoop::Options{
          .root = root, .agent_program = p->options.agent_program, .launch = p->options.launch, .may_act = may_act},
      p->scheduler.get(), p->inputs.get(), p->follow.get());
  ITWIN_RETURN_IF_ERROR(p->control->Recover());
  p->follow->Start();
  p->control->Start();
  p->control->AwaitFirstLook(kFirstLook);

  const bool can_train =
      !p->options.launch.worker.empty() && access(p->options.launch.worker.c_str(), X_OK) == 0;
  p->service = std::make_unique<AgentService>(
      AgentService::Options{.root = root,
                            .scheduler_kind = scheduler.kind,
                            .spool_id = spool_id,
                            .term = p->lock->term(),
                            .can_train = can_train,
                            .retire = [p] { p->Leave("asked to retire"); }},
      p->control.get(), p->follow.get(), p->inputs.get(), p->scheduler.get());
  grpc::ServerBuilder builder;
  builder.RegisterService(p->service.get());
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(-1);
  // The gateway pings a silent connection (server/dispatch/agent_client.cc), more often than gRPC allows by itself.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kMinPingIntervalMs);
  grpc::ResourceQuota quota("agent");
  quota.SetMaxThreads(kMaxThreads);
  builder.SetResourceQuota(quota);
  p->server = builder.BuildAndStart();
  if (p->server == nullptr) return absl::InternalError("the gRPC server does not start");

  ITWIN_ASSIGN_OR_RETURN(p->socket_path, PrepareSocketPath(root));
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor listener, ListenUnix(p->socket_path));
  p->acceptor = std::make_unique<Acceptor>(std::move(listener), p->server.get());
  p->acceptor->Start();
  ITWIN_RETURN_IF_ERROR(p->lock->Publish(
      {.host = HostName(), .process = IdentityOf(0), .socket = p->socket_path, .version = kVersion}));
  log::Info("itwin-agent {} serves {} by {} on {}{}", kVersion, root,
            scheduler.kind == "process" ? absl::StrCat(p->options.slots, " slots of this host") : scheduler.kind, p->socket_path,
            can_train ? "" : "; no itwin-worker here, so only command jobs can run");
  return agent;
}

Agent::Agent(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

Agent::~Agent() { Stop(); }

const std::string& Agent::socket_path() const { return parts_->socket_path; }

void Agent::Wait(int signal_fd) {
  const bool may_idle = parts_->options.idle_exit != absl::InfiniteDuration();
  const absl::Duration idle_look = std::max(absl::Milliseconds(50), parts_->options.idle_exit / 10);
  absl::Time busy_until = absl::Now();
  absl::Time clean = absl::Now() + kCleanInterval;
  while (true) {
    const int limit = static_cast<int>(absl::ToInt64Milliseconds(may_idle ? std::min(idle_look, kCleanInterval) : kCleanInterval));
    pollfd entries[2] = {{signal_fd, POLLIN, 0}, {parts_->leaving.get(), POLLIN, 0}};
    poll(entries, 2, limit);
    if (entries[0].revents != 0 || entries[1].revents != 0) return;
    if (absl::Now() >= clean) {
      clean = absl::Now() + kCleanInterval;
      const int64_t bytes = parts_->inputs->RemoveUnused(absl::Now() - parts_->options.input_retention);
      if (bytes > 0) log::Info("removed {} bytes of inputs that no attempt has used for long", bytes);
    }
    if (!may_idle) continue;
    // The control loop may be waiting for the scheduler; then we are not idle.
    auto idle = std::make_shared<std::pair<absl::Notification, bool>>();
    parts_->control->Post([idle, control = parts_->control.get()] {
      idle->second = !control->busy();
      idle->first.Notify();
    });
    const bool answered = idle->first.WaitForNotificationWithTimeout(idle_look);
    if (!answered || !idle->second || parts_->acceptor->connections() > 0) busy_until = absl::Now();
    if (absl::Now() - busy_until >= parts_->options.idle_exit) {
      log::Info("nothing to do for {}: ends", absl::FormatDuration(parts_->options.idle_exit));
      return;
    }
  }
}

void Agent::Stop() {
  if (parts_ == nullptr) return;
  if (parts_->acceptor != nullptr) parts_->acceptor->Stop();
  if (!parts_->socket_path.empty()) unlink(parts_->socket_path.c_str());
  if (parts_->server != nullptr) {
    parts_->server->Shutdown(absl::ToChronoTime(absl::Now() + parts_->options.stop_limit));
    parts_->server->Wait();
  }
  if (parts_->control != nullptr) parts_->control->Stop();
  if (parts_->follow != nullptr) parts_->follow->Stop();
  if (parts_->renewer.joinable()) {
    Parts::Signal(parts_->stopping);
    parts_->renewer.join();
  }
  if (parts_->lock != nullptr) parts_->lock->Withdraw();
  log::Info("stopped; running jobs go on");
  parts_.reset();
}

}  // namespace itwin::agent
