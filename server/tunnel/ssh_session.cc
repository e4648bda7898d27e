#include "server/tunnel/ssh_session.h"

#include <errno.h>
#include <fcntl.h>
#include <libssh/callbacks.h>
#include <libssh/libssh.h>
#include <libssh/server.h>  // ssh_send_keepalive
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "server/tunnel/ssh_certificate.h"
#include "server/tunnel/tcp_connect.h"

namespace itwin::server {
namespace {

// AES-GCM first: on machines with AES in hardware half as fast again as ChaCha20 (docs/adr/0008).
constexpr char kCiphers[] =
    "aes128-gcm@openssh.com,aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr";
// Key types of hosts in the order we like them, each with the signature algorithms that go with it.
constexpr std::array<std::pair<const char*, const char*>, 5> kHostKeys = {{
    {"ssh-ed25519", "ssh-ed25519"},
    {"ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256"},
    {"ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384"},
    {"ecdsa-sha2-nistp521", "ecdsa-sha2-nistp521"},
    {"ssh-rsa", "rsa-sha2-512,rsa-sha2-256"},
}};

constexpr uint32_t kReceiveWindow = 4 << 20;     // what a far side may have under way to us
constexpr uint32_t kWindowStep = 1 << 20;        // it is told of free room in steps of so much
constexpr int kMaxBuffered = 16 << 20;           // more than this has ignored the window
constexpr uint32_t kChunk = 128 << 10;           // towards the far side, at once
constexpr int kPacketsInARow = 32;               // before the other direction has its turn
constexpr int kTurnsInARow = 4;
constexpr absl::Duration kGoodbye = absl::Seconds(1);
constexpr int kMaxAuthenticationRounds = 16;
constexpr int64_t kMaxCredentialBytes = 1 << 20;

// ---- libssh's objects ----

struct KeyDeleter {
  void operator()(ssh_key key) const { ssh_key_free(key); }
};
using Key = std::unique_ptr<ssh_key_struct, KeyDeleter>;

// The library's log, per thread: warnings, and all it has when we are asked for debug output.
void LogFromLibrary(int priority, const char*, const char* text, void*) {
  log::Debug("libssh: {}", RedactSshLog(text == nullptr ? "" : text));
}
void TakeLibraryLog() {
  ssh_set_log_callback(LogFromLibrary);
  ssh_set_log_level(spdlog::should_log(spdlog::level::debug) ? SSH_LOG_PROTOCOL : SSH_LOG_NOLOG);
}

// One session over one socket.
class Link {
 public:
  static absl::StatusOr<std::unique_ptr<Link>> Create(const SshTunnelOptions& options, const SshHost& host,
                                                      const std::string& host_key_algorithms, FileDescriptor socket) {
    std::unique_ptr<Link> link(new Link());
    const std::string user = host.user.empty() ? options.user : host.user;
    link->name_ = absl::StrCat(host.host, ":", host.port);
    link->user_ = user;
    if (link->session_ == nullptr || link->event_ == nullptr) return absl::ResourceExhaustedError("no memory for a session");
    const bool no = false;
    const unsigned port = static_cast<unsigned>(host.port);
    const std::string& ciphers = options.ciphers.empty() ? std::string(kCiphers) : options.ciphers;
    const int verbosity = spdlog::should_log(spdlog::level::debug) ? SSH_LOG_PROTOCOL : SSH_LOG_NOLOG;
    const std::pair<ssh_options_e, const void*> settings[] = {
        {SSH_OPTIONS_PROCESS_CONFIG, &no},  // ~/.ssh/config is a person's
        {SSH_OPTIONS_LOG_VERBOSITY, &verbosity},
        {SSH_OPTIONS_SSH_DIR, "/nonexistent"},
        {SSH_OPTIONS_KNOWNHOSTS, "/dev/null"},  // checked by us
        {SSH_OPTIONS_GLOBAL_KNOWNHOSTS, "/dev/null"},
        {SSH_OPTIONS_HOST, host.host.c_str()},
        {SSH_OPTIONS_PORT, &port},
        {SSH_OPTIONS_USER, user.c_str()},
        {SSH_OPTIONS_HOSTKEYS, host_key_algorithms.c_str()},
        {SSH_OPTIONS_CIPHERS_C_S, ciphers.c_str()},
        {SSH_OPTIONS_CIPHERS_S_C, ciphers.c_str()},
    };
    for (const auto& [option, value] : settings) {
      if (ssh_options_set(link->session_, option, value) < 0) {
        return absl::InvalidArgumentError(absl::StrCat("libssh does not take this option: ", ssh_get_error(link->session_)));
      }
    }
    int fd = socket.Release();  // the library's from here on
    if (ssh_options_set(link->session_, SSH_OPTIONS_FD, &fd) < 0) {
      close(fd);
      return absl::InternalError("libssh does not take the socket");
    }
    link->pending_fd_ = FileDescriptor(fd);
    ssh_set_blocking(link->session_, 0);
    ssh_set_counters(link->session_, &link->counter_, nullptr);
    return link;
  }
  ~Link() {
    if (event_ != nullptr) {
      if (in_event_) ssh_event_remove_session(event_, session_);
      ssh_event_free(event_);
    }
    if (session_ != nullptr) ssh_free(session_);  // closes the socket, frees the channels
  }
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  ssh_session session() const { return session_; }
  const std::string& name() const { return name_; }
  const std::string& user() const { return user_; }
  // The library closes the socket once ssh_connect has seen it.
  void SocketTaken() { pending_fd_.Release(); }
  bool lost() const { return lost_ || !ssh_is_connected(session_) || (ssh_get_status(session_) & (SSH_CLOSED | SSH_CLOSED_ERROR)) != 0; }
  bool output_waits() const { return (ssh_get_status(session_) & SSH_WRITE_PENDING) != 0; }
  uint64_t heard() const { return counter_.in_bytes; }
  std::string error() const {
    const char* text = ssh_get_error(session_);
    if (text == nullptr || *text == '\0') return "the connection ended";
    std::string clean = std::string(text).substr(0, 300);  // some of it is the server's
    for (char& c : clean) {
      if (!absl::ascii_isprint(static_cast<unsigned char>(c))) c = ' ';
    }
    return clean;
  }

  // `eager`: also when the library wants to know that it could write.
  pollfd Wanted(bool eager) const {
    short events = POLLIN;
    if (output_waits() || (eager && (ssh_get_poll_flags(session_) & SSH_WRITE_PENDING) != 0)) events |= POLLOUT;
    return {ssh_get_fd(session_), events, 0};
  }

  // Takes what has arrived and sends what can be sent, without waiting.
  void Process() {
    if (!in_event_) {
      if (ssh_event_add_session(event_, session_) != SSH_OK) return;
      in_event_ = true;
    }
    for (int i = 0; i < kPacketsInARow && !lost(); ++i) {
      const int rc = ssh_event_dopoll(event_, 0);
      if (rc == SSH_ERROR) lost_ = true;
      if (rc == SSH_AGAIN || rc == SSH_ERROR) return;
    }
  }

  // Asks for an answer of any kind.
  void SendKeepalive() {
    // The first call of each pair sends; one that follows only takes note of the answer.
    if (asked_) ssh_send_keepalive(session_);
    ssh_send_keepalive(session_);
    asked_ = true;
  }

  // When the far side was last heard of. Call often.
  absl::Time HeardAt(absl::Time now) {
    if (heard() != heard_) {
      heard_ = heard();
      heard_at_ = now;
    }
    return heard_at_;
  }
  void HeardNow(absl::Time now) { heard_at_ = now; }

 private:
  Link() : session_(ssh_new()), event_(ssh_event_new()) {}
  const ssh_session session_;
  const ssh_event event_;
  FileDescriptor pending_fd_;
  ssh_counter_struct counter_ = {};
  std::string name_;
  std::string user_;
  bool in_event_ = false;
  bool lost_ = false;
  bool asked_ = false;
  uint64_t heard_ = 0;
  absl::Time heard_at_ = absl::InfinitePast();
};

// Moves bytes between a channel and a non-blocking socket. Bounded: what has been received and not been taken is at most
// two windows, what has been taken and not been sent at most one chunk and the socket's own buffers.
class ChannelPump {
 public:
  // Before anything can happen to the channel: a short command ends in the same breath as it starts.
  ChannelPump(Link* link, ssh_channel channel) : link_(link), channel_(channel), buffer_(new char[kReceiveWindow]) {
    callbacks_.userdata = this;
    callbacks_.channel_close_function = [](ssh_session, ssh_channel, void* self) {
      static_cast<ChannelPump*>(self)->closed_ = true;
    };
    callbacks_.channel_exit_status_function = [](ssh_session, ssh_channel, int status, void* self) {
      static_cast<ChannelPump*>(self)->exit_ = SshExit{.known = true, .exit_code = status};
    };
    callbacks_.channel_exit_signal_function = [](ssh_session, ssh_channel, const char* signal, int, const char*,
                                                 const char*, void* self) {
      static_cast<ChannelPump*>(self)->exit_ =
          SshExit{.known = true, .exit_code = 0, .signal = signal == nullptr ? "?" : std::string(signal).substr(0, 32)};
    };
    ssh_callbacks_init(&callbacks_);
    ssh_set_channel_callbacks(channel_, &callbacks_);
  }
  ~ChannelPump() { ssh_remove_channel_callbacks(channel_, &callbacks_); }
  ChannelPump(const ChannelPump&) = delete;
  ChannelPump& operator=(const ChannelPump&) = delete;

  // Then Step may be called.
  void Attach(int fd, SshSession::PumpEvents events) {
    fd_ = fd;
    events_ = std::move(events);
  }

  // Everything has been said and taken, or never will be.
  bool done() const { return link_->lost() || (closed_ && ToLocalEmpty() && drained_ && stderr_drained_) || !failure_.ok(); }
  const absl::Status& failure() const { return failure_; }

  void AddPoll(std::vector<pollfd>* entries) {
    short events = 0;
    if (CanTakeFromLocal()) events |= POLLIN;
    if (!ToLocalEmpty()) events |= POLLOUT;
    // With nothing wanted the socket is left out: poll() reports a hang-up whether asked or not.
    entries->push_back({events == 0 ? -1 : fd_, events, 0});
  }

  // Moves what can be moved now. True: there may be more to do at once.
  bool Step() {
    if (link_->lost() || !failure_.ok()) return false;
    const uint64_t heard = link_->heard();
    bool more = TakeStderr();
    for (int i = 0; i < kTurnsInARow && ToLocal(); ++i) more = true;
    for (int i = 0; i < kTurnsInARow && ToRemote(); ++i) more = true;
    if (closed_) {
      // The library takes in packets during most of its calls, so output may have come with the end just now.
      drained_ = ssh_channel_poll(channel_, 0) <= 0;
      more = TakeStderr() || more;
      if (!told_ && events_.on_exit) events_.on_exit(exit_);
      told_ = true;
    }
    // The same holds for everything else: what was taken in here wakes no poll() any more.
    return more || link_->heard() != heard;
  }

  void Close() {
    local_gone_ = local_ended_ = end_sent_ = true;
    to_local_at_ = to_local_size_ = 0;
    to_remote_.clear();
    ssh_channel_close(channel_);
  }
  bool closed_by_far_side() const { return closed_; }

 private:
  bool ToLocalEmpty() const { return to_local_at_ == to_local_size_; }
  bool CanTakeFromLocal() const {
    return !local_ended_ && to_remote_.empty() && !closed_ && !link_->output_waits() &&
           ssh_channel_window_size(channel_) > 0;
  }

  bool ToLocal() {
    bool moved = false;
    if (ToLocalEmpty()) {
      to_local_at_ = to_local_size_ = 0;
      // All of it: the library tells the far side of new room whenever something is read, however much else is still
      // unread. So nothing is read until what was read before has gone.
      const int there = ssh_channel_poll(channel_, 0);
      if (there > kMaxBuffered) {
        failure_ = absl::UnavailableError("the far side sends more than it was allowed to");
        return false;
      }
      if (there > 0) {
        int got;
        if (unannounced_ >= kWindowStep) {
          got = ssh_channel_read_timeout(channel_, buffer_.get(), kReceiveWindow, 0, 0);  // opens the whole window
          unannounced_ = 0;
        } else {
          got = ssh_channel_read_nonblocking(channel_, buffer_.get(), kReceiveWindow, 0);
        }
        if (got > 0) {
          unannounced_ += static_cast<uint32_t>(got);
          if (!local_gone_) to_local_size_ = static_cast<size_t>(got);
          moved = true;
        }
      }
      drained_ = ssh_channel_poll(channel_, 0) <= 0;
    }
    while (!ToLocalEmpty()) {
      const ssize_t sent = send(fd_, buffer_.get() + to_local_at_, to_local_size_ - to_local_at_, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent > 0) {
        to_local_at_ += static_cast<size_t>(sent);
        moved = true;
      } else if (sent < 0 && errno == EINTR) {
        continue;
      } else if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
        return false;
      } else {
        local_gone_ = true;  // nobody will take it
        to_local_at_ = to_local_size_ = 0;
      }
    }
    if (ToLocalEmpty() && !end_passed_on_ && (closed_ || ssh_channel_is_eof(channel_) != 0)) {
      // Looked at again: while the last piece was on its way, more may have come together with the end.
      drained_ = ssh_channel_poll(channel_, 0) <= 0;
      if (!drained_) return true;
      end_passed_on_ = true;
      shutdown(fd_, SHUT_WR);
    }
    return moved;
  }

  bool ToRemote() {
    if (CanTakeFromLocal()) {
      const uint32_t room = std::min(kChunk, ssh_channel_window_size(channel_));
      to_remote_.resize(room);
      const ssize_t got = recv(fd_, to_remote_.data(), room, MSG_DONTWAIT);
      to_remote_.resize(got > 0 ? static_cast<size_t>(got) : 0);
      if (got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) local_ended_ = true;
    }
    bool moved = false;
    if (!to_remote_.empty() && !closed_ && !link_->output_waits()) {
      const int sent = ssh_channel_write(channel_, to_remote_.data(), static_cast<uint32_t>(to_remote_.size()));
      if (sent < 0) {
        to_remote_.clear();  // the channel is closing; its end will be seen
        local_ended_ = true;
      } else {
        moved = sent > 0;
        to_remote_.erase(0, static_cast<size_t>(sent));
      }
    }
    if (local_ended_ && to_remote_.empty() && !end_sent_ && !closed_) {
      end_sent_ = ssh_channel_send_eof(channel_) == SSH_OK;
    }
    return moved;
  }

  // True: there is more.
  bool TakeStderr() {
    std::array<char, 8192> text;
    stderr_drained_ = true;
    for (int i = 0; i < kPacketsInARow; ++i) {
      const int there = ssh_channel_poll(channel_, 1);
      if (there > kMaxBuffered) failure_ = absl::UnavailableError("the far side sends more than it was allowed to");
      if (there <= 0) return false;
      const int got = ssh_channel_read_nonblocking(channel_, text.data(), std::min<uint32_t>(text.size(), static_cast<uint32_t>(there)), 1);
      if (got <= 0) return false;
      unannounced_ += static_cast<uint32_t>(got);
      if (events_.on_stderr) events_.on_stderr(absl::string_view(text.data(), static_cast<size_t>(got)));
    }
    stderr_drained_ = false;
    return true;
  }

  Link* const link_;
  const ssh_channel channel_;
  int fd_ = -1;
  SshSession::PumpEvents events_;
  ssh_channel_callbacks_struct callbacks_ = {};
  const std::unique_ptr<char[]> buffer_;  // from the far side: at_ up to size_ is still to be sent on
  size_t to_local_at_ = 0;
  size_t to_local_size_ = 0;
  std::string to_remote_;
  uint32_t unannounced_ = kWindowStep;  // the first read opens the window
  absl::Status failure_;
  SshExit exit_;
  bool drained_ = false;  // nothing of its output is left in the library
  bool stderr_drained_ = false;
  bool local_ended_ = false;
  bool local_gone_ = false;
  bool end_sent_ = false;
  bool end_passed_on_ = false;
  bool closed_ = false;
  bool told_ = false;
};

// ---- credentials ----

absl::StatusOr<std::string> FirstLine(const std::string& path) {
  ITWIN_ASSIGN_OR_RETURN(std::string text, ReadFile(path, kMaxCredentialBytes));
  return text.substr(0, text.find_first_of("\r\n"));
}

std::string FingerprintOfKey(ssh_key key) {
  char* base64 = nullptr;
  if (ssh_pki_export_pubkey_base64(key, &base64) != SSH_OK) return "?";
  std::string blob;
  absl::Base64Unescape(base64, &blob);
  ssh_string_free_char(base64);
  return FingerprintOf(blob);
}

absl::StatusOr<Key> LoadPrivateKey(const SshTunnelOptions& options) {
  const std::string& path = options.identity_file;
  struct stat info;
  if (stat(path.c_str(), &info) != 0) {
    return absl::UnauthenticatedError(absl::StrCat("the key ", path, " cannot be read: ", strerror(errno)));
  }
  if (info.st_uid == geteuid() && (info.st_mode & 077) != 0) {
    return absl::UnauthenticatedError(absl::StrCat("the key ", path, " can be read by others: chmod 600 ", path));
  }
  std::string passphrase;
  if (!options.passphrase_file.empty()) {
    absl::StatusOr<std::string> line = FirstLine(options.passphrase_file);
    if (!line.ok()) {
      return absl::UnauthenticatedError(absl::StrCat("the passphrase of ", path, " cannot be read: ", line.status().message()));
    }
    passphrase = *std::move(line);
  }
  // Without a function of ours, the libraries below would ask at the terminal.
  const auto never_ask = [](const char*, char*, size_t, int, int, void* asked) -> int {
    *static_cast<bool*>(asked) = true;
    return -1;
  };
  bool asked = false;
  ssh_key key = nullptr;
  const int rc = ssh_pki_import_privkey_file(path.c_str(), options.passphrase_file.empty() ? nullptr : passphrase.c_str(),
                                             never_ask, &asked, &key);
  std::fill(passphrase.begin(), passphrase.end(), '\0');
  if (rc == SSH_OK) return Key(key);
  return absl::UnauthenticatedError(absl::StrCat(
      "the key ", path, " cannot be used: ",
      rc == SSH_EOF                      ? "no permission to read it"
      : !options.passphrase_file.empty() ? absl::StrCat("it is damaged, or the passphrase in ", options.passphrase_file, " is not its own")
      : asked                            ? "it has a passphrase; put that into a file that only the gateway may read and name it as passphrase_file"
                                         : "it is damaged, or no private key"));
}

std::string CertificatePath(const SshTunnelOptions& options) {
  if (!options.certificate_file.empty()) return options.certificate_file;
  if (options.identity_file.empty()) return "";
  const std::string beside = absl::StrCat(options.identity_file, "-cert.pub");
  return access(beside.c_str(), F_OK) == 0 ? beside : "";
}

// ---- a chain of links ----

enum class Way { kCertificate, kKey, kAgent, kQuestions };

}  // namespace

struct SshSession::Parts {
  const SshTunnelOptions& options() const { return options_; }

  SshTunnelOptions options_;
  Interrupt* interrupt = nullptr;

  // From here to the end, in order: each jump host with the channel that feeds the next link, then the host itself.
  std::vector<std::unique_ptr<Link>> links;
  std::vector<FileDescriptor> ends;                 // our ends of the socket pairs between links
  std::vector<std::unique_ptr<ChannelPump>> pumps;  // of the jump hosts
  ssh_channel channel = nullptr;
  std::unique_ptr<ChannelPump> main_pump;

  ~Parts() {
    main_pump.reset();
    // From the far end on; a link's pump goes before it, because the link frees the channel.
    while (!links.empty()) {
      if (pumps.size() == links.size()) pumps.pop_back();
      links.pop_back();
    }
  }

  // Lets the links before the last carry their bytes, and waits until something happens.
  absl::Status WaitForNews(absl::Time deadline) {
    bool more = false;
    for (size_t i = 0; i < pumps.size(); ++i) {
      links[i]->Process();
      more = pumps[i]->Step() || more;
      if (pumps[i]->done()) {
        return absl::UnavailableError(absl::StrCat("the connection through ", links[i]->name(), " ended: ",
                                                   links[i]->lost() ? links[i]->error() : "it closed the channel"));
      }
    }
    std::vector<pollfd> entries;
    for (size_t i = 0; i < links.size(); ++i) entries.push_back(links[i]->Wanted(/*eager=*/i + 1 == links.size()));
    for (const auto& pump : pumps) pump->AddPoll(&entries);
    const absl::Status status = interrupt->Poll(&entries, more ? absl::Now() : deadline);
    if (more && status.code() == absl::StatusCode::kDeadlineExceeded && absl::Now() < deadline) return absl::OkStatus();
    return status;
  }

  // Repeats a call of the library until it no longer says "again".
  template <typename Call>
  absl::StatusOr<int> Drive(absl::Time deadline, int again, const Call& call) {
    while (true) {
      const int rc = call();
      if (rc != again) return rc;
      ITWIN_RETURN_IF_ERROR(WaitForNews(deadline));
    }
  }

  // Key exchange over this socket. The new link is the last.
  absl::StatusOr<HostKey> Handshake(const SshHost& host, const std::string& algorithms, FileDescriptor socket,
                                    absl::Time deadline) {
    ITWIN_ASSIGN_OR_RETURN(std::unique_ptr<Link> made, Link::Create(options_, host, algorithms, std::move(socket)));
    links.push_back(std::move(made));
    Link* const link = links.back().get();
    bool first = true;
    const absl::StatusOr<int> rc = Drive(deadline, SSH_AGAIN, [&] {
      const int result = ssh_connect(link->session());
      if (first) link->SocketTaken();
      first = false;
      return result;
    });
    if (!rc.ok()) return rc.status();
    if (*rc != SSH_OK) return absl::UnavailableError(absl::StrCat("no SSH connection: ", link->error()));
    ssh_key raw = nullptr;
    if (ssh_get_server_publickey(link->session(), &raw) != SSH_OK) return absl::UnavailableError("the host shows no key");
    const Key key(raw);
    char* base64 = nullptr;
    if (ssh_pki_export_pubkey_base64(key.get(), &base64) != SSH_OK) return absl::UnavailableError("the host's key cannot be read");
    HostKey shown;
    shown.host = KnownHostsName(host.host, host.port);
    absl::Base64Unescape(base64, &shown.blob);
    ssh_string_free_char(base64);
    // The type as it stands in the blob: ssh-rsa, whatever algorithm signed.
    const size_t size = shown.blob.size() > 4 ? static_cast<unsigned char>(shown.blob[3]) : 0;
    shown.type = shown.blob.size() > 4 + size ? shown.blob.substr(4, size) : "?";
    shown.fingerprint = FingerprintOf(shown.blob);
    return shown;
  }

  // A socket to the next host: TCP, or a channel of the last link.
  absl::StatusOr<FileDescriptor> Reach(const SshHost& host, absl::Time deadline) {
    if (links.empty()) return ConnectTcp(host.host, host.port, deadline, interrupt);
    Link* const link = links.back().get();
    ssh_channel forward = ssh_channel_new(link->session());
    if (forward == nullptr) return absl::ResourceExhaustedError("no memory for a channel");
    auto pump = std::make_unique<ChannelPump>(link, forward);
    ITWIN_ASSIGN_OR_RETURN(const int rc, Drive(deadline, SSH_AGAIN, [&] {
      return ssh_channel_open_forward(forward, host.host.c_str(), host.port, "127.0.0.1", 0);
    }));
    if (rc != SSH_OK) {
      const std::string error = link->error();
      if (absl::StrContains(error, "administratively") || absl::StrContains(error, "error (1)")) {
        return absl::PermissionDeniedError(absl::StrCat("jump host ", link->name(), " does not let ", link->user(),
                                                        " go on to ", host.host, ":", host.port, " (AllowTcpForwarding, PermitOpen)"));
      }
      return absl::UnavailableError(absl::StrCat("jump host ", link->name(), " does not reach ", host.host, ":", host.port, ": ", error));
    }
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) return ErrnoStatus(errno, "socketpair");
    ends.emplace_back(pair[0]);
    pump->Attach(pair[0], {});
    pumps.push_back(std::move(pump));
    return FileDescriptor(pair[1]);
  }

  // Takes the last link away again, and what only served it.
  void DropLast() {
    links.pop_back();
    if (!pumps.empty() && pumps.size() == links.size()) {
      pumps.back()->Close();
      pumps.pop_back();
      ends.pop_back();
    }
  }

  // Connects to the host and has it show its key: one that is known, if it has such a one.
  absl::StatusOr<HostKey> ShowKey(const SshHost& host, const std::string& known_hosts, absl::Time deadline) {
    const std::vector<std::string> types = KnownKeyTypes(known_hosts, KnownHostsName(host.host, host.port));
    // What we know first; the rest too, so that a changed key is seen and told.
    std::vector<std::string> algorithms;
    for (const auto& [type, signatures] : kHostKeys) {
      if (absl::c_linear_search(types, type)) algorithms.push_back(signatures);
    }
    for (const auto& [type, signatures] : kHostKeys) {
      if (!absl::c_linear_search(types, type)) algorithms.push_back(signatures);
    }
    const size_t depth = links.size();
    ITWIN_ASSIGN_OR_RETURN(FileDescriptor socket, Reach(host, deadline));
    ITWIN_ASSIGN_OR_RETURN(HostKey shown, Handshake(host, absl::StrJoin(algorithms, ","), std::move(socket), deadline));
    if (options_.fingerprints.empty() || Judge(known_hosts, shown).ok()) return shown;
    // A fingerprint does not tell the type of its key: it may be that of another one.
    for (const auto& [type, signatures] : kHostKeys) {
      if (type == shown.type) continue;
      while (links.size() > depth) DropLast();
      ITWIN_ASSIGN_OR_RETURN(FileDescriptor again, Reach(host, deadline));
      absl::StatusOr<HostKey> other = Handshake(host, signatures, std::move(again), deadline);
      if (other.ok() && Judge(known_hosts, *other).ok()) return other;
      if (other.status().code() == absl::StatusCode::kCancelled || other.status().code() == absl::StatusCode::kDeadlineExceeded) {
        return other.status();
      }
    }
    return shown;
  }

  absl::Status Join(const SshHost& host, absl::Time deadline) {
    ITWIN_ASSIGN_OR_RETURN(const std::string known_hosts, KnownHosts());
    ITWIN_ASSIGN_OR_RETURN(const HostKey shown, ShowKey(host, known_hosts, deadline));
    return Judge(known_hosts, shown);
  }

  absl::StatusOr<std::string> KnownHosts() const {
    if (options_.known_hosts_file.empty()) return std::string();
    absl::StatusOr<std::string> text = ReadFile(options_.known_hosts_file);
    if (text.status().code() == absl::StatusCode::kNotFound) return std::string();
    if (!text.ok()) {
      return absl::FailedPreconditionError(absl::StrCat("host keys cannot be checked: ", text.status().message()));
    }
    return text;
  }

  absl::Status Judge(const std::string& known_hosts, const HostKey& shown) const {
    const HostKeyCheck check = CheckHostKey(known_hosts, shown);
    if (check.verdict == HostKeyVerdict::kRevoked) {
      return absl::FailedPreconditionError(absl::StrCat(shown.host, " shows a host key that is marked as revoked in ",
                                                        options_.known_hosts_file, ": ", shown.type, " ", shown.fingerprint,
                                                        ". Do not go on; ask the site."));
    }
    if (absl::c_linear_search(options_.fingerprints, shown.fingerprint) || check.verdict == HostKeyVerdict::kKnown) {
      return absl::OkStatus();
    }
    std::vector<std::string> expected = check.expected;
    for (const std::string& fingerprint : options_.fingerprints) expected.push_back(fingerprint);
    const std::string accept = absl::StrCat("`itwin site add FILE --accept-host-key ", shown.fingerprint, "`");
    if (expected.empty()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the host key of ", shown.host, " is not known. It shows ", shown.type, " ", shown.fingerprint, "; expected: none",
          check.authority ? " (certificates of hosts, @cert-authority, are not supported)" : "",
          ". Compare it with what the site publishes, then accept it: ", accept));
    }
    return absl::FailedPreconditionError(absl::StrCat(
        "the host key of ", shown.host, " is not the one that is known: somebody may be in between, or the site has a new key. It shows ",
        shown.type, " ", shown.fingerprint, "; expected: ", absl::StrJoin(expected, ", "),
        ". Ask the site; if the key is theirs, accept it: ", accept));
  }

  // Logs in at the last link.
  absl::Status LogIn(absl::Time deadline) {
    Link* const link = links.back().get();
    const ssh_session session = link->session();
    std::vector<std::string> refused;   // for people: what was tried, what cannot be tried
    std::vector<Way> ways;
    Key key, plain_key;
    const std::string certificate_path = CertificatePath(options_);
    if (!options_.identity_file.empty()) {
      absl::StatusOr<Key> loaded = LoadPrivateKey(options_);
      if (!loaded.ok()) {
        refused.emplace_back(loaded.status().message());
      } else {
        plain_key = *std::move(loaded);
        if (!certificate_path.empty()) {
          absl::Status usable = AddCertificate(certificate_path, plain_key.get(), &key);
          if (usable.ok()) {
            ways.push_back(Way::kCertificate);
          } else {
            refused.emplace_back(usable.message());
          }
        }
        ways.push_back(Way::kKey);
      }
    }
    if (options_.use_agent) ways.push_back(Way::kAgent);
    if (options_.answers) ways.push_back(Way::kQuestions);

    ITWIN_ASSIGN_OR_RETURN(int rc, Drive(deadline, SSH_AUTH_AGAIN, [&] { return ssh_userauth_none(session, nullptr); }));
    bool partial = false;
    for (int round = 0; round < kMaxAuthenticationRounds && rc != SSH_AUTH_SUCCESS; ++round) {
      if (rc == SSH_AUTH_ERROR) return LogInBroke(*link, refused);
      const int offered = ssh_userauth_list(session, nullptr);
      const auto next = absl::c_find_if(ways, [&](Way way) {
        return (offered & (way == Way::kQuestions ? SSH_AUTH_METHOD_INTERACTIVE : SSH_AUTH_METHOD_PUBLICKEY)) != 0;
      });
      if (next == ways.end()) return LogInRefused(*link, offered, partial, refused);
      const Way way = *next;
      ways.erase(next);
      std::string what;
      absl::StatusOr<int> tried = SSH_AUTH_DENIED;
      switch (way) {
        case Way::kCertificate:
          what = absl::StrCat("the certificate ", certificate_path, CertificateHint(certificate_path, link->user()));
          tried = Drive(deadline, SSH_AUTH_AGAIN, [&] { return ssh_userauth_publickey(session, nullptr, key.get()); });
          break;
        case Way::kKey:
          what = absl::StrCat("the key ", options_.identity_file, " (", FingerprintOfKey(plain_key.get()), ")");
          tried = Drive(deadline, SSH_AUTH_AGAIN, [&] { return ssh_userauth_publickey(session, nullptr, plain_key.get()); });
          break;
        case Way::kAgent: {
          const absl::Status agent = ConnectAgent(session);
          if (!agent.ok()) {
            refused.emplace_back(agent.message());
            rc = SSH_AUTH_DENIED;
            continue;
          }
          what = "the keys of the ssh-agent";
          tried = Drive(deadline, SSH_AUTH_AGAIN, [&] { return ssh_userauth_agent(session, nullptr); });
          interrupt->Guard(-1);
          if (interrupt->is_set()) return absl::UnauthenticatedError("the ssh-agent does not answer");
          break;
        }
        case Way::kQuestions:
          what = "the answers to its questions";
          tried = Answer(link, deadline);
          // The hook's own words say best what is missing.
          if (tried.status().code() == absl::StatusCode::kUnauthenticated) {
            refused.emplace_back(tried.status().message());
            rc = SSH_AUTH_DENIED;
            return LogInRefused(*link, 0, partial, refused);
          }
          break;
      }
      if (!tried.ok()) return tried.status();
      rc = *tried;
      if (rc == SSH_AUTH_PARTIAL) {
        partial = true;
      } else if (rc != SSH_AUTH_SUCCESS) {
        refused.push_back(absl::StrCat("it does not take ", what));
        if (way == Way::kAgent && rc == SSH_AUTH_ERROR && !link->lost()) rc = SSH_AUTH_DENIED;  // the agent's trouble
      }
    }
    return rc == SSH_AUTH_SUCCESS ? absl::OkStatus()
                                  : LogInRefused(*link, ssh_userauth_list(session, nullptr), partial, refused);
  }

  // The connection ended while logging in.
  absl::Status LogInBroke(const Link& link, const std::vector<std::string>& refused) const {
    const std::string error = link.error();
    if (absl::StrContains(error, "Too many authentication failures")) {
      return absl::UnauthenticatedError(absl::StrCat(link.name(), " gave up after too many refused keys",
                                                     refused.empty() ? "" : ": ", absl::StrJoin(refused, "; "),
                                                     ". Name the one key to use as identity_file, or leave fewer in the ssh-agent."));
    }
    return absl::UnavailableError(absl::StrCat("the connection ended while logging in as ", link.user(), ": ", error));
  }

  absl::Status LogInRefused(const Link& link, int offered, bool partial, const std::vector<std::string>& refused) const {
    std::vector<std::string> takes;
    if (offered & SSH_AUTH_METHOD_PUBLICKEY) takes.push_back("a public key");
    if (offered & SSH_AUTH_METHOD_INTERACTIVE) takes.push_back("answers to questions (keyboard-interactive)");
    if (offered & SSH_AUTH_METHOD_PASSWORD) takes.push_back("a password (not supported)");
    if (offered & SSH_AUTH_METHOD_GSSAPI_MIC) takes.push_back("Kerberos (use a `command` with the system's ssh)");
    const bool nothing = options_.identity_file.empty() && !options_.use_agent && !options_.answers;
    return absl::UnauthenticatedError(absl::StrCat(
        link.name(), " does not let ", link.user(), " in: ",
        nothing ? "no key, ssh-agent or program for answers is set up for the site"
                : refused.empty() ? "nothing that is set up for the site fits" : absl::StrJoin(refused, "; "),
        partial ? ". A first proof was taken, another is wanted" : "",
        takes.empty() ? "" : absl::StrCat(". It takes ", absl::StrJoin(takes, " or ")),
        ". Put the public key into the account's authorized_keys (or the site's portal), renew an expired certificate in its place, "
        "or name other credentials in the site file; the gateway looks again by itself."));
  }

  static absl::Status AddCertificate(const std::string& path, ssh_key plain, Key* with_certificate) {
    const absl::StatusOr<std::string> text = ReadFile(path, kMaxCredentialBytes);
    if (!text.ok()) return absl::UnauthenticatedError(absl::StrCat("the certificate cannot be read: ", text.status().message()));
    const absl::StatusOr<SshCertificate> certificate = ParseSshCertificate(*text);
    if (!certificate.ok()) return absl::UnauthenticatedError(absl::StrCat(path, ": ", certificate.status().message()));
    const std::string why = WhyUnusable(*certificate, absl::Now());
    if (!why.empty()) return absl::UnauthenticatedError(absl::StrCat("the certificate ", path, " ", why));
    ssh_key raw = nullptr;
    if (ssh_pki_import_cert_file(path.c_str(), &raw) != SSH_OK) {
      return absl::UnauthenticatedError(absl::StrCat("the certificate ", path, " cannot be used"));
    }
    const Key parsed(raw);
    Key copy(ssh_key_dup(plain));
    if (copy == nullptr || ssh_pki_copy_cert_to_privkey(parsed.get(), copy.get()) != SSH_OK) {
      return absl::UnauthenticatedError(absl::StrCat("the certificate ", path, " does not go with the key"));
    }
    *with_certificate = std::move(copy);
    return absl::OkStatus();
  }

  static std::string CertificateHint(const std::string& path, const std::string& user) {
    const absl::StatusOr<std::string> text = ReadFile(path, kMaxCredentialBytes);
    if (!text.ok()) return "";
    const absl::StatusOr<SshCertificate> certificate = ParseSshCertificate(*text);
    if (!certificate.ok()) return "";
    return absl::StrCat(" (of authority ", certificate->authority, ", for ",
                        certificate->principals.empty() ? "any user" : absl::StrJoin(certificate->principals, ", "),
                        absl::c_linear_search(certificate->principals, user) || certificate->principals.empty()
                            ? ""
                            : absl::StrCat(": not for ", user),
                        ")");
  }

  // The library would wait for a silent agent for ever; the interrupt shuts this socket down.
  absl::Status ConnectAgent(ssh_session session) {
    const char* from_environment = getenv("SSH_AUTH_SOCK");
    const std::string path = !options_.agent_socket.empty()  ? options_.agent_socket
                             : from_environment != nullptr ? from_environment
                                                            : "";
    if (path.empty()) return absl::UnauthenticatedError("there is no ssh-agent: SSH_AUTH_SOCK is not set for the gateway");
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) return absl::UnauthenticatedError(absl::StrCat("the ssh-agent's path is too long: ", path));
    memcpy(address.sun_path, path.data(), path.size());
    FileDescriptor fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd.valid() || connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      return absl::UnauthenticatedError(absl::StrCat("the ssh-agent at ", path, " cannot be reached: ", strerror(errno)));
    }
    interrupt->Guard(fd.get());
    if (ssh_set_agent_socket(session, fd.Release()) != SSH_OK) return absl::UnauthenticatedError("libssh does not take the ssh-agent's socket");
    return absl::OkStatus();
  }

  absl::StatusOr<int> Answer(Link* link, absl::Time deadline) {
    const ssh_session session = link->session();
    const auto ask = [&] { return ssh_userauth_kbdint(session, nullptr, nullptr); };
    ITWIN_ASSIGN_OR_RETURN(int rc, Drive(deadline, SSH_AUTH_AGAIN, ask));
    for (int round = 0; round < kMaxAuthenticationRounds && rc == SSH_AUTH_INFO; ++round) {
      const auto text = [](const char* from) { return std::string(from == nullptr ? "" : from); };
      SshChallenge challenge;
      challenge.user = link->user();
      challenge.host = link->name();
      challenge.name = text(ssh_userauth_kbdint_getname(session));
      challenge.instruction = text(ssh_userauth_kbdint_getinstruction(session));
      const int prompts = std::clamp(ssh_userauth_kbdint_getnprompts(session), 0, 32);
      for (int i = 0; i < prompts; ++i) {
        char echo = 0;
        const char* prompt = ssh_userauth_kbdint_getprompt(session, static_cast<unsigned>(i), &echo);
        challenge.prompts.push_back({.text = text(prompt), .echo = echo != 0});
      }
      // Servers may send a round without questions; there is nothing to ask then.
      std::vector<std::string> answers;
      if (!challenge.prompts.empty()) {
        absl::StatusOr<std::vector<std::string>> given = options_.answers(challenge, deadline);
        if (!given.ok()) {
          return absl::UnauthenticatedError(absl::StrCat(link->name(), " asks '", absl::CHexEscape(challenge.prompts[0].text.substr(0, 200)),
                                                         "' and there is no answer: ", given.status().message()));
        }
        answers = *std::move(given);
        if (answers.size() != challenge.prompts.size()) {
          return absl::UnauthenticatedError(absl::StrCat(link->name(), " asks ", challenge.prompts.size(), " questions and got ",
                                                         answers.size(), " answers"));
        }
      }
      for (size_t i = 0; i < answers.size(); ++i) {
        if (ssh_userauth_kbdint_setanswer(session, static_cast<unsigned>(i), answers[i].c_str()) < 0) {
          return absl::ResourceExhaustedError("no memory for an answer");
        }
        std::fill(answers[i].begin(), answers[i].end(), '\0');
      }
      ITWIN_ASSIGN_OR_RETURN(rc, Drive(deadline, SSH_AUTH_AGAIN, ask));
    }
    return rc;
  }

  // A deadline that passed on the way says where.
  static absl::Status Where(const absl::Status& status, const SshHost& host, absl::string_view doing) {
    if (status.code() == absl::StatusCode::kDeadlineExceeded) {
      return absl::UnavailableError(absl::StrCat(host.host, ":", host.port, " does not answer (", doing, ")"));
    }
    if (status.code() == absl::StatusCode::kUnavailable || status.code() == absl::StatusCode::kResourceExhausted) {
      return Annotate(status, absl::StrCat(host.host, ":", host.port));
    }
    return status;
  }
};

SshSession::SshSession(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
SshSession::~SshSession() = default;

absl::StatusOr<std::unique_ptr<SshSession>> SshSession::Connect(const SshTunnelOptions& options, const SshHost& host,
                                                                absl::Time deadline, Interrupt* interrupt) {
  TakeLibraryLog();
  auto parts = std::make_unique<Parts>();
  parts->options_ = options;
  parts->interrupt = interrupt;
  std::vector<SshHost> way = options.jump;
  way.push_back(host);
  for (const SshHost& next : way) {
    ITWIN_RETURN_IF_ERROR(Parts::Where(parts->Join(next, deadline), next, "connecting"));
    ITWIN_RETURN_IF_ERROR(Parts::Where(parts->LogIn(deadline), next, "logging in"));
  }
  return std::unique_ptr<SshSession>(new SshSession(std::move(parts)));
}

absl::StatusOr<HostKey> SshSession::FetchKey(const SshTunnelOptions& options, const SshHost& host, absl::Time deadline,
                                             Interrupt* interrupt) {
  TakeLibraryLog();
  Parts parts;
  parts.options_ = options;
  parts.interrupt = interrupt;
  for (const SshHost& next : options.jump) {
    ITWIN_RETURN_IF_ERROR(Parts::Where(parts.Join(next, deadline), next, "connecting"));
    ITWIN_RETURN_IF_ERROR(Parts::Where(parts.LogIn(deadline), next, "logging in"));
  }
  ITWIN_ASSIGN_OR_RETURN(const std::string known_hosts, parts.KnownHosts());
  absl::StatusOr<HostKey> key = parts.ShowKey(host, known_hosts, deadline);
  if (!key.ok()) return Parts::Where(key.status(), host, "connecting");
  return key;
}

absl::Status SshSession::Exec(const std::string& command, absl::Time deadline) {
  Link* const link = parts_->links.back().get();
  parts_->channel = ssh_channel_new(link->session());
  if (parts_->channel == nullptr) return absl::ResourceExhaustedError("no memory for a channel");
  parts_->main_pump = std::make_unique<ChannelPump>(link, parts_->channel);
  absl::StatusOr<int> rc = parts_->Drive(deadline, SSH_AGAIN, [&] { return ssh_channel_open_session(parts_->channel); });
  if (rc.ok() && *rc == SSH_OK) {
    rc = parts_->Drive(deadline, SSH_AGAIN, [&] { return ssh_channel_request_exec(parts_->channel, command.c_str()); });
    if (rc.ok() && *rc != SSH_OK && !link->lost()) {
      return absl::PermissionDeniedError(absl::StrCat(link->name(), " does not let ", link->user(), " run commands: ", link->error()));
    }
  } else if (rc.ok() && !link->lost()) {
    return absl::PermissionDeniedError(absl::StrCat(link->name(), " gives ", link->user(), " no session: ", link->error()));
  }
  if (rc.status().code() == absl::StatusCode::kDeadlineExceeded) {
    return absl::UnavailableError(absl::StrCat(link->name(), " does not answer (starting the command)"));
  }
  if (!rc.ok()) return rc.status();
  if (*rc != SSH_OK) return absl::UnavailableError(absl::StrCat("the connection to ", link->name(), " broke: ", link->error()));
  return absl::OkStatus();
}

absl::Status SshSession::Pump(int socket, const PumpEvents& events) {
  Parts& parts = *parts_;
  const SshTunnelOptions& options = parts.options();
  parts.main_pump->Attach(socket, events);
  std::vector<ChannelPump*> pumps;
  for (const auto& pump : parts.pumps) pumps.push_back(pump.get());
  pumps.push_back(parts.main_pump.get());
  for (const auto& link : parts.links) link->HeardNow(absl::Now());

  absl::Time next_check = absl::Now();
  bool closing = false;
  absl::Time close_by = absl::InfiniteFuture();
  while (true) {
    bool more = false;
    for (size_t i = 0; i < pumps.size(); ++i) {
      parts.links[i]->Process();
      more = pumps[i]->Step() || more;
    }
    for (size_t i = 0; i < pumps.size(); ++i) {
      if (closing) break;
      if (!pumps[i]->failure().ok()) return pumps[i]->failure();
      const Link& link = *parts.links[i];
      if (link.lost() && !pumps[i]->closed_by_far_side()) {
        return absl::UnavailableError(absl::StrCat("the connection to ", link.name(), " broke: ", link.error()));
      }
      if (i + 1 < pumps.size() && pumps[i]->done()) {
        return absl::UnavailableError(absl::StrCat("jump host ", link.name(), " ended the connection"));
      }
    }
    const absl::Time now = absl::Now();
    if (parts.main_pump->done()) return absl::OkStatus();
    if (closing) {
      bool waits = false, lost = false;
      for (const auto& link : parts.links) {
        waits = waits || link->output_waits();
        lost = lost || link->lost();
      }
      if (now >= close_by || lost || (!waits && parts.main_pump->closed_by_far_side())) return Interrupt::Cancelled();
    } else if (now >= next_check) {
      next_check = now + options.keepalive_interval;
      for (const auto& link : parts.links) {
        const absl::Duration silent = now - link->HeardAt(now);
        if (silent >= options.keepalive_interval * options.keepalive_count) {
          return absl::UnavailableError(absl::StrCat("the connection to ", link->name(), " is dead: nothing heard for ",
                                                     absl::FormatDuration(absl::Trunc(silent, absl::Milliseconds(100)))));
        }
        if (silent >= options.keepalive_interval * 0.9) {
          link->SendKeepalive();
          more = true;  // it may have taken something in
        }
        // Exactly when the count is over, whenever the last sign of life was.
        next_check = std::min(next_check, link->HeardAt(now) + options.keepalive_interval * (silent / options.keepalive_interval + 1));
      }
      next_check = std::max(next_check, now + absl::Milliseconds(20));
    } else {
      for (const auto& link : parts.links) link->HeardAt(now);
    }

    std::vector<pollfd> entries;
    for (const auto& link : parts.links) entries.push_back(link->Wanted(/*eager=*/false));
    for (ChannelPump* pump : pumps) pump->AddPoll(&entries);
    const absl::Time until = more ? now : std::min(next_check, close_by);
    if (closing) {
      const int timeout_ms = std::max<int>(0, static_cast<int>(absl::ToInt64Milliseconds(until - now)) + 1);
      poll(entries.data(), entries.size(), more ? 0 : timeout_ms);
      continue;
    }
    const absl::Status waited = parts.interrupt->Poll(&entries, until);
    if (waited.code() == absl::StatusCode::kCancelled) {
      closing = true;
      close_by = absl::Now() + kGoodbye;
      parts.main_pump->Close();
    } else if (!waited.ok() && waited.code() != absl::StatusCode::kDeadlineExceeded) {
      return waited;
    }
  }
}

// ---- log ----

std::string RedactSshLog(absl::string_view text) {
  constexpr size_t kMaxLine = 400;
  constexpr size_t kLongestWord = 40;  // a code, a key, a hash: whatever is longer without a space is left out
  std::vector<std::string> words;
  std::string line(text.substr(0, kMaxLine * 2));
  for (char& c : line) {
    if (!absl::ascii_isprint(static_cast<unsigned char>(c))) c = ' ';
  }
  for (const absl::string_view word : absl::StrSplit(line, ' ', absl::SkipEmpty())) {
    words.push_back(word.size() > kLongestWord && !absl::StrContains(word, ',') ? absl::StrCat("<", word.size(), " characters>")
                                                                                : std::string(word));
  }
  return absl::StrJoin(words, " ").substr(0, kMaxLine);
}

}  // namespace itwin::server
