#include "agent/agent.h"

#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <optional>

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
#include "common/clock.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "common/version.h"

namespace itwin::agent {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;  // a spec with its inline parts
// Of gRPC for unary calls and transfers; beyond, callers see RESOURCE_EXHAUSTED and come back.
constexpr int kMaxThreads = 48;
constexpr int kMinPingIntervalMs = 500;

}  // namespace

// In order of construction; stopped in reverse.
struct Agent::Parts {
  Options options;
  std::optional<RootLock> lock;
  std::string socket_path;
  SystemClock clock;
  std::unique_ptr<InputStore> inputs;
  std::unique_ptr<Scheduler> scheduler;
  std::unique_ptr<FollowLoop> follow;
  std::unique_ptr<ControlLoop> control;
  std::unique_ptr<AgentService> service;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<Acceptor> acceptor;
};

absl::StatusOr<std::unique_ptr<Agent>> Agent::Start(Options options) {
  auto parts = std::make_unique<Parts>();
  Parts* p = parts.get();
  ITWIN_ASSIGN_OR_RETURN(const std::vector<std::string> launcher, SplitCommandLine(options.launch.launcher));
  if (launcher.empty()) return absl::InvalidArgumentError("--launcher is empty; leave it out for the default");
  p->options = std::move(options);
  const std::string& root = p->options.root;
  ITWIN_RETURN_IF_ERROR(MakeDirectories(root));
  ITWIN_ASSIGN_OR_RETURN(p->lock, RootLock::Take(root));
  p->lock->Withdraw();  // what a killed agent left
  p->inputs = std::make_unique<InputStore>(root + "/inputs");
  ITWIN_RETURN_IF_ERROR(p->inputs->Create());
  ITWIN_ASSIGN_OR_RETURN(p->scheduler,
                         ProcessScheduler::Create({.root = root,
                                                   .slots = p->options.slots,
                                                   .kill_after = p->options.launch.grace + absl::Seconds(10)},
                                                  &p->clock));
  const SchedulerDescription scheduler = p->scheduler->Describe();

  p->follow = std::make_unique<FollowLoop>(FollowLoop::Options{
      .root = root, .use_inotify = !IsSharedFileSystem(root), .on_ended = [p](const AttemptKey& key) {
        p->control->Post([p, key] { p->control->Ended(key); });
      }});
  p->control = std::make_unique<ControlLoop>(
      ControlLoop::Options{.root = root, .agent_program = p->options.agent_program, .launch = p->options.launch},
      p->scheduler.get(), p->inputs.get(), p->follow.get());
  std::unique_ptr<Agent> agent(new Agent(std::move(parts)));  // from here on its destructor stops what was started
  ITWIN_RETURN_IF_ERROR(p->control->Recover());
  p->follow->Start();
  p->control->Start();

  const bool can_train =
      !p->options.launch.worker.empty() && access(p->options.launch.worker.c_str(), X_OK) == 0;
  p->service = std::make_unique<AgentService>(
      AgentService::Options{.root = root, .scheduler_kind = scheduler.kind, .can_train = can_train},
      p->control.get(), p->follow.get(), p->inputs.get());
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
  log::Info("itwin-agent {} serves {} with {} slots on {}{}", kVersion, root, p->options.slots, p->socket_path,
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
  while (true) {
    const absl::Duration limit = may_idle ? std::min(RootLock::kRenewInterval, idle_look) : RootLock::kRenewInterval;
    pollfd entry{signal_fd, POLLIN, 0};
    poll(&entry, 1, static_cast<int>(absl::ToInt64Milliseconds(limit)));
    if (entry.revents != 0) return;
    if (!parts_->lock->Renew()) {
      log::Warn("{} was removed; there is nothing left to serve", parts_->options.root);
      return;
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
  if (parts_->lock) parts_->lock->Withdraw();
  log::Info("stopped; running jobs go on");
  parts_.reset();
}

}  // namespace itwin::agent
