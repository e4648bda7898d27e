#include "server/tunnel/ssh_tunnel.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "server/tunnel/login_rotation.h"
#include "server/tunnel/ssh_certificate.h"
#include "server/tunnel/ssh_session.h"

namespace itwin::server {
namespace {

constexpr absl::Duration kGoodStream = absl::Seconds(10);        // one that ended sooner counts as a failure of its host
constexpr absl::Duration kLookAtCertificate = absl::Seconds(10);  // at most so often
constexpr absl::Duration kLastWords = absl::Seconds(2);          // from the deadline of Open to its return at the latest
constexpr int64_t kMaxCertificateBytes = 1 << 20;

std::string HostText(const SshHost& host) { return host.port == 22 ? host.host : absl::StrCat(host.host, ":", host.port); }

std::string DescribeExit(const SshExit& exit) {
  if (!exit.signal.empty()) return absl::StrCat("it was ended by signal ", exit.signal);
  return absl::StrCat("it ended with exit code ", exit.exit_code);
}

bool IsRefusal(const absl::Status& status) {
  return status.code() == absl::StatusCode::kUnauthenticated || status.code() == absl::StatusCode::kPermissionDenied ||
         status.code() == absl::StatusCode::kFailedPrecondition;
}

// One session in a thread of its own, from the first packet to the last.
class SessionStream : public SshStream {
 public:
  struct Setup {
    SshTunnelOptions options;
    SshHost host;
    std::string command;
    absl::Time deadline;
    FileDescriptor ours;      // what TakeSocket gives
    FileDescriptor pumped;    // its other end
    FileDescriptor guard;     // a duplicate of ours, to shut it down with
    std::shared_ptr<Interrupt> interrupt;
    std::function<void(bool early, bool by_itself)> on_end;  // once, if it was opened
  };

  explicit SessionStream(Setup setup)
      : setup_(std::move(setup)), socket_(std::move(setup_.ours)), thread_([this] { Run(); }) {}
  ~SessionStream() override { Close(); }

  // Until the command runs or it is clear that it will not.
  absl::Status WaitUntilOpen() {
    {
      absl::MutexLock lock(&mu_);
      const auto settled = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return opened_.has_value(); };
      // The session keeps the deadline itself; what it calls may not.
      if (mu_.AwaitWithDeadline(absl::Condition(&settled), setup_.deadline + kLastWords)) return *opened_;
    }
    setup_.interrupt->Set();
    absl::MutexLock lock(&mu_);
    const auto settled = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return opened_.has_value(); };
    mu_.Await(absl::Condition(&settled));
    return opened_->code() == absl::StatusCode::kCancelled
               ? absl::UnavailableError(absl::StrCat(HostText(setup_.host), " does not answer"))
               : *opened_;
  }

  FileDescriptor TakeSocket() override { return std::move(socket_); }

  std::string Diagnostics() const override {
    absl::MutexLock lock(&mu_);
    std::string text = errors_;
    if (!over_) return text;
    if (!text.empty() && text.back() != '\n') text.push_back('\n');
    if (exit_.known) return absl::StrCat(text, setup_.host.host, ": ", DescribeExit(exit_));
    return absl::StrCat(text, std::string(end_.message()).substr(0, 500));
  }

  bool alive() const override {
    absl::MutexLock lock(&mu_);
    return !over_;
  }

  SshExit exit() const override {
    absl::MutexLock lock(&mu_);
    return exit_;
  }

  bool WaitForEnd(absl::Time deadline) override {
    absl::MutexLock lock(&mu_);
    return mu_.AwaitWithDeadline(absl::Condition(&over_), deadline);
  }

  void Close() override {
    absl::MutexLock lock(&close_mu_);
    if (!thread_.joinable()) return;
    {
      absl::MutexLock inner(&mu_);
      closing_ = true;
    }
    setup_.interrupt->Set();
    thread_.join();
    socket_.Reset();
    setup_.guard.Reset();
    setup_.pumped.Reset();
  }

 private:
  void Run() {
    absl::StatusOr<std::unique_ptr<SshSession>> session =
        SshSession::Connect(setup_.options, setup_.host, setup_.deadline, setup_.interrupt.get());
    absl::Status status = session.status();
    if (status.ok()) status = (*session)->Exec(setup_.command, setup_.deadline);
    const absl::Time opened = absl::Now();
    {
      absl::MutexLock lock(&mu_);
      opened_ = status;
    }
    const bool was_open = status.ok();
    bool by_itself = false;
    if (was_open) {
      status = (*session)->Pump(setup_.pumped.get(), {.on_stderr = [this](absl::string_view text) { KeepError(text); },
                                                      .on_exit =
                                                          [this](const SshExit& exit) {
                                                            absl::MutexLock lock(&mu_);
                                                            exit_ = exit;
                                                            over_ = true;
                                                          }});
      by_itself = !setup_.interrupt->is_set();
    }
    if (session.ok()) session->reset();
    // Whoever holds the other end sees the end of the file, whatever happened.
    shutdown(setup_.guard.get(), SHUT_RDWR);
    {
      absl::MutexLock lock(&mu_);
      end_ = closing_      ? absl::CancelledError("the connection was closed")
             : status.ok() ? absl::UnavailableError("the far side closed the connection")
                           : status;
      over_ = true;
    }
    if (was_open) setup_.on_end(absl::Now() - opened < kGoodStream, by_itself);
  }

  void KeepError(absl::string_view text) {
    absl::MutexLock lock(&mu_);
    errors_.append(text.data(), text.size());
    constexpr size_t kKeep = kMaxDiagnosticsBytes - 600;  // room for how it ended
    if (errors_.size() <= kKeep) return;
    errors_.erase(0, errors_.size() - kKeep);
    const size_t line = errors_.find('\n');
    if (line != std::string::npos && line + 1 < errors_.size()) errors_.erase(0, line + 1);
  }

  Setup setup_;            // constant, but for the descriptors, which Close resets when the thread has ended
  FileDescriptor socket_;  // until taken

  absl::Mutex close_mu_;
  mutable absl::Mutex mu_;
  std::optional<absl::Status> opened_ ABSL_GUARDED_BY(mu_);
  std::string errors_ ABSL_GUARDED_BY(mu_);
  SshExit exit_ ABSL_GUARDED_BY(mu_);
  absl::Status end_ ABSL_GUARDED_BY(mu_);
  bool over_ ABSL_GUARDED_BY(mu_) = false;
  bool closing_ ABSL_GUARDED_BY(mu_) = false;

  std::thread thread_;  // last: everything it uses exists before it starts
};

// Changes when one of the files that decide about being let in does.
std::string StampOf(const SshTunnelOptions& options) {
  std::string stamp;
  for (const std::string& path : {options.identity_file, options.certificate_file, absl::StrCat(options.identity_file, "-cert.pub"),
                                  options.passphrase_file, options.known_hosts_file, options.agent_socket}) {
    struct stat info;
    if (path.empty() || stat(path.c_str(), &info) != 0) {
      absl::StrAppend(&stamp, "-;");
    } else {
      absl::StrAppend(&stamp, info.st_ino, ",", info.st_size, ",", info.st_mtim.tv_sec, ".", info.st_mtim.tv_nsec, ";");
    }
  }
  return stamp;
}

}  // namespace

struct SshTunnel::State {
  explicit State(SshTunnelOptions given)
      : options(std::move(given)), rotation(options.hosts.size(), LoginRotationOptions{}, std::random_device{}()) {}

  const SshTunnelOptions options;

  absl::Mutex mu;
  bool cancelled ABSL_GUARDED_BY(mu) = false;
  std::set<std::shared_ptr<Interrupt>> opening ABSL_GUARDED_BY(mu);
  LoginRotation rotation ABSL_GUARDED_BY(mu);
  std::string stamp ABSL_GUARDED_BY(mu);
  absl::Status last_failure ABSL_GUARDED_BY(mu) = absl::UnavailableError("not connected yet");
  absl::Time certificate_read ABSL_GUARDED_BY(mu) = absl::InfinitePast();
  absl::Time certificate_ends ABSL_GUARDED_BY(mu) = absl::InfiniteFuture();
  absl::Time warned_about ABSL_GUARDED_BY(mu) = absl::InfinitePast();

  void StreamEnded(size_t host, bool early, bool by_itself) {
    absl::MutexLock lock(&mu);
    if (!early) rotation.Succeeded(host);
    if (early && by_itself) rotation.Failed(host, /*refused=*/false, absl::Now());
  }
};

SshTunnel::SshTunnel(std::shared_ptr<State> state) : state_(std::move(state)) {}
SshTunnel::~SshTunnel() { Cancel(); }

absl::StatusOr<std::unique_ptr<SshTunnel>> SshTunnel::Create(SshTunnelOptions options) {
  ITWIN_RETURN_IF_ERROR(CheckSshOptions(options));
  return std::unique_ptr<SshTunnel>(new SshTunnel(std::make_shared<State>(std::move(options))));
}

absl::StatusOr<std::unique_ptr<TunnelStream>> SshTunnel::Open(absl::Time deadline) {
  absl::StatusOr<std::unique_ptr<SshStream>> stream = OpenCommand(state_->options.command, deadline);
  if (!stream.ok()) return stream.status();
  return std::unique_ptr<TunnelStream>(*std::move(stream));
}

absl::StatusOr<std::unique_ptr<SshStream>> SshTunnel::OpenCommand(const std::string& command, absl::Time deadline) {
  State& state = *state_;
  std::vector<size_t> candidates;
  {
    const std::string stamp = StampOf(state.options);
    absl::MutexLock lock(&state.mu);
    if (state.cancelled) return absl::CancelledError("the gateway is stopping");
    if (stamp != state.stamp) {
      state.rotation.CredentialsChanged();
      state.stamp = stamp;
    }
    candidates = state.rotation.Choose(absl::Now());
    // Word for word what it was, so that who asks again sees no news where there is none.
    if (candidates.empty()) return state.last_failure;
  }
  CredentialsExpire();  // warns if it is time to

  std::vector<std::string> messages;
  absl::StatusCode code = absl::StatusCode::kUnavailable;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const size_t index = candidates[i];
    const SshHost& host = state.options.hosts[index];
    const absl::Time now = absl::Now();
    if (now >= deadline) {
      messages.push_back("no time was left for the others");
      break;
    }
    SessionStream::Setup setup;
    setup.options = state.options;
    setup.host = host;
    setup.command = command;
    setup.deadline = std::min(now + state.options.connect_timeout, now + (deadline - now) / static_cast<int64_t>(candidates.size() - i));
    setup.on_end = [shared = state_, index](bool early, bool by_itself) { shared->StreamEnded(index, early, by_itself); };
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) return ErrnoStatus(errno, "socketpair");
    setup.ours = FileDescriptor(pair[0]);
    setup.pumped = FileDescriptor(pair[1]);
    setup.guard = FileDescriptor(fcntl(pair[0], F_DUPFD_CLOEXEC, 3));
    if (!setup.guard.valid()) return ErrnoStatus(errno, "dup");
    ITWIN_ASSIGN_OR_RETURN(setup.interrupt, Interrupt::Create());
    const std::shared_ptr<Interrupt> interrupt = setup.interrupt;
    {
      absl::MutexLock lock(&state.mu);
      if (state.cancelled) return absl::CancelledError("the gateway is stopping");
      state.opening.insert(interrupt);
    }
    auto stream = std::make_unique<SessionStream>(std::move(setup));
    const absl::Status status = stream->WaitUntilOpen();
    absl::MutexLock lock(&state.mu);
    state.opening.erase(interrupt);
    if (state.cancelled) return absl::CancelledError("the gateway is stopping");
    if (status.ok()) {
      state.rotation.Opened(index);
      state.last_failure = absl::UnavailableError(absl::StrCat(HostText(host), ": connections end as soon as they are made"));
      return std::unique_ptr<SshStream>(std::move(stream));
    }
    state.rotation.Failed(index, IsRefusal(status), absl::Now());
    if (IsRefusal(status)) code = status.code();
    const std::string message(status.message());
    if (std::find(messages.begin(), messages.end(), message) == messages.end()) messages.push_back(message);
  }
  absl::Status failure(code, absl::StrJoin(messages, "; "));
  absl::MutexLock lock(&state.mu);
  state.last_failure = failure;
  return failure;
}

std::string SshTunnel::description() const {
  const SshTunnelOptions& options = state_->options;
  const auto named = [&](const SshHost& host) {
    return absl::StrCat(host.user.empty() ? options.user : host.user, "@", HostText(host));
  };
  std::vector<std::string> hosts, jumps;
  for (const SshHost& host : options.hosts) hosts.push_back(named(host));
  for (const SshHost& host : options.jump) jumps.push_back(named(host));
  return absl::StrCat("ssh ", absl::StrJoin(hosts, " or "), jumps.empty() ? "" : " through ", absl::StrJoin(jumps, ", "));
}

void SshTunnel::Cancel() {
  absl::MutexLock lock(&state_->mu);
  state_->cancelled = true;
  for (const std::shared_ptr<Interrupt>& interrupt : state_->opening) interrupt->Set();
}

absl::Time SshTunnel::CredentialsExpire() const {
  State& state = *state_;
  const SshTunnelOptions& options = state.options;
  if (options.identity_file.empty()) return absl::InfiniteFuture();
  const absl::Time now = absl::Now();
  absl::MutexLock lock(&state.mu);
  if (now - state.certificate_read < kLookAtCertificate) return state.certificate_ends;
  state.certificate_read = now;
  const std::string path = options.certificate_file.empty() ? absl::StrCat(options.identity_file, "-cert.pub") : options.certificate_file;
  absl::StatusOr<SshCertificate> certificate = absl::NotFoundError("");
  if (const auto text = ReadFile(path, kMaxCertificateBytes); text.ok()) certificate = ParseSshCertificate(*text);
  state.certificate_ends = certificate.ok() ? certificate->valid_before : absl::InfiniteFuture();
  if (certificate.ok() && state.warned_about != certificate->valid_before && now >= certificate->valid_before - WarnBefore(*certificate)) {
    state.warned_about = certificate->valid_before;
    log::Warn("{}: the certificate {} {} at {}; put a new one in its place", description(), path,
              now < certificate->valid_before ? "expires" : "expired",
              absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", certificate->valid_before, absl::UTCTimeZone()));
  }
  return state.certificate_ends;
}

absl::StatusOr<HostKey> FetchHostKey(const SshTunnelOptions& options, const SshHost& host, absl::Time deadline) {
  ITWIN_RETURN_IF_ERROR(CheckSshOptions(options));
  SshTunnelOptions way = options;
  const auto same = [&](const SshHost& other) { return other.host == host.host && other.port == host.port; };
  way.jump.erase(std::find_if(way.jump.begin(), way.jump.end(), same), way.jump.end());
  ITWIN_ASSIGN_OR_RETURN(const std::shared_ptr<Interrupt> interrupt, Interrupt::Create());
  return SshSession::FetchKey(way, host, deadline, interrupt.get());
}

}  // namespace itwin::server
