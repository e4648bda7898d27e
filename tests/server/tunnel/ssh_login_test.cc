// Who is who: host keys, and every way to log in, against a real sshd.
#include <libssh/libssh.h>
#include <libssh/server.h>
#include <spdlog/sinks/ostream_sink.h>

#include <atomic>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "common/log.h"
#include "server/tunnel/ssh_command.h"
#include "server/tunnel/ssh_session.h"
#include "server/tunnel/ssh_tunnel.h"
#include "tests/testing/sshd.h"
#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using ::itwin::testing::FingerprintOfFile;
using ::itwin::testing::MakeSshKey;
using ::itwin::testing::MustRun;
using ::itwin::testing::ReadText;
using ::itwin::testing::Soon;
using ::itwin::testing::Sshd;
using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::itwin::testing::WaitUntil;
using ::itwin::testing::WriteText;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

absl::Status TryOpen(const SshTunnelOptions& options) {
  auto tunnel = SshTunnel::Create(options);
  if (!tunnel.ok()) return tunnel.status();
  return (*tunnel)->Open(Soon()).status();
}

// ---- options ----

TEST(SshOptions, MistakesAreNamedBeforeAnythingIsTried) {
  SshTunnelOptions good;
  good.hosts = {{.host = "login.example"}};
  good.user = "ada";
  EXPECT_OK(CheckSshOptions(good));
  const auto wrong = [&](const std::function<void(SshTunnelOptions*)>& change, const std::string& word) {
    SshTunnelOptions options = good;
    change(&options);
    EXPECT_THAT(SshTunnel::Create(options).status(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(word)));
  };
  wrong([](auto* o) { o->hosts.clear(); }, "hosts");
  wrong([](auto* o) { o->hosts[0].host = "-oProxyCommand=x"; }, "no host name");
  wrong([](auto* o) { o->hosts[0].host = "a b"; }, "no host name");
  wrong([](auto* o) { o->hosts[0].port = 0; }, "no port");
  wrong([](auto* o) { o->user = ""; }, "user");
  wrong([](auto* o) { o->jump = {{.host = ""}}; }, "jump");
  wrong([](auto* o) { o->fingerprints = {"MD5:aa"}; }, "fingerprints");
  wrong([](auto* o) { o->passphrase_file = "/x"; }, "passphrase_file");
  wrong([](auto* o) { o->certificate_file = "/x"; }, "certificate_file");
  wrong([](auto* o) { o->keepalive_count = 0; }, "keepalive");
  good.jump = {{.host = "gate.example", .port = 2222, .user = "eve"}};
  EXPECT_EQ((*SshTunnel::Create(good))->description(), "ssh ada@login.example through eve@gate.example:2222");
}

// ---- host keys ----

TEST(SshHostKey, UnknownIsRefusedWithFingerprintAndCommandThatAcceptsIt) {
  Sshd sshd;
  SshTunnelOptions options = sshd.Options();
  options.known_hosts_file = sshd.file("none");
  const std::string fingerprint = FingerprintOfFile(sshd.host_key() + ".pub");
  EXPECT_THAT(TryOpen(options),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("not known"), HasSubstr(fingerprint), HasSubstr("expected: none"),
                             HasSubstr(absl::StrCat("itwin site add FILE --accept-host-key ", fingerprint)))));
  // Nobody was logged in, nothing was run.
  EXPECT_THAT(sshd.log(), Not(HasSubstr("Accepted")));
  // What `site add` does then.
  const auto key = FetchHostKey(options, sshd.host(), Soon());
  ASSERT_OK(key);
  EXPECT_EQ(key->fingerprint, fingerprint);
  EXPECT_EQ(key->host, absl::StrCat("[127.0.0.1]:", sshd.port()));
  EXPECT_THAT(sshd.log(), Not(HasSubstr("Accepted")));
  ASSERT_OK(AcceptHostKey(options.known_hosts_file, *key));
  EXPECT_OK(TryOpen(options));
}

TEST(SshHostKey, ChangedShowsBoth) {
  Sshd sshd, other;
  SshTunnelOptions options = sshd.Options();
  WriteText(options.known_hosts_file, absl::StrCat("[127.0.0.1]:", sshd.port(), " ", ReadText(other.host_key() + ".pub")));
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kFailedPrecondition,
                                         AllOf(HasSubstr("not the one that is known"), HasSubstr(FingerprintOfFile(sshd.host_key() + ".pub")),
                                               HasSubstr(FingerprintOfFile(other.host_key() + ".pub")))));
  EXPECT_THAT(sshd.log(), Not(HasSubstr("Accepted")));
}

TEST(SshHostKey, RevokedIsRefusedEvenWhenPinned) {
  Sshd sshd;
  SshTunnelOptions options = sshd.Options();
  options.fingerprints = {FingerprintOfFile(sshd.host_key() + ".pub")};
  WriteText(options.known_hosts_file, absl::StrCat(ReadText(options.known_hosts_file), "@revoked * ", ReadText(sshd.host_key() + ".pub")));
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("revoked")));
}

TEST(SshHostKey, PinnedFingerprintOfAnyOfItsKeysWillDo) {
  Sshd sshd({}, {"ed25519", "ecdsa", "rsa"});
  SshTunnelOptions options = sshd.Options();
  options.known_hosts_file = "";
  for (const char* type : {"ed25519", "ecdsa", "rsa"}) {
    options.fingerprints = {FingerprintOfFile(sshd.host_key(type) + ".pub")};
    EXPECT_OK(TryOpen(options)) << type;
    const auto key = FetchHostKey(options, sshd.host(), Soon());
    ASSERT_OK(key);
    EXPECT_EQ(key->fingerprint, options.fingerprints[0]) << type;
  }
  options.fingerprints = {FingerprintOfFile(sshd.client_key() + ".pub")};
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(options.fingerprints[0])));
}

TEST(SshHostKey, KeyTypeThatIsKnownIsAskedFor) {
  Sshd sshd({}, {"ed25519", "rsa"});
  SshTunnelOptions options = sshd.Options();
  WriteText(options.known_hosts_file, absl::StrCat("[127.0.0.1]:", sshd.port(), " ", ReadText(sshd.host_key("rsa") + ".pub")));
  EXPECT_OK(TryOpen(options));
  MustRun({"ssh-keygen", "-q", "-H", "-f", options.known_hosts_file});
  EXPECT_OK(TryOpen(options));
}

// ---- keys ----

TEST(SshKey, StrangersKeyIsRefusedWithAdvice) {
  Sshd sshd;
  SshTunnelOptions options = sshd.Options();
  options.identity_file = sshd.file("stranger");
  MakeSshKey(options.identity_file);
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated,
                                         AllOf(HasSubstr(options.identity_file), HasSubstr(FingerprintOfFile(options.identity_file + ".pub")),
                                               HasSubstr("authorized_keys"))));
  options.identity_file = sshd.file("missing");
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("No such file")));
  options.identity_file = sshd.known_hosts();
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("damaged, or no private key")));
  options.identity_file = "";
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("no key, ssh-agent or program")));
}

TEST(SshKey, ReadableByOthersIsRefused) {
  Sshd sshd;
  chmod(sshd.client_key().c_str(), 0644);
  EXPECT_THAT(TryOpen(sshd.Options()), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("chmod 600")));
}

TEST(SshKey, EveryTypeWithAndWithoutPassphrase) {
  Sshd sshd;
  SshTunnelOptions options = sshd.Options();
  for (const std::string type : {"ed25519", "rsa"}) {
    options.identity_file = sshd.file(type);
    options.passphrase_file = "";
    MakeSshKey(options.identity_file, type, "open sesame");
    WriteText(sshd.authorized_keys(), ReadText(options.identity_file + ".pub"));
    EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("passphrase_file"))) << type;
    options.passphrase_file = sshd.file("passphrase");
    WriteText(options.passphrase_file, "open sesame\n");
    EXPECT_OK(TryOpen(options)) << type;
    WriteText(options.passphrase_file, "closed sesame\n");
    EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, AllOf(HasSubstr("not its own"), Not(HasSubstr("sesame")))));
  }
}

TEST(SshKey, PutRightOnDiskIsTakenAtTheNextTry) {
  Sshd sshd;
  SshTunnelOptions options = sshd.Options();
  const std::string good = ReadText(options.identity_file);
  WriteText(options.identity_file, "not a key\n");
  auto tunnel = SshTunnel::Create(options);
  ASSERT_OK(tunnel);
  for (int i = 0; i < 5; ++i) {
    EXPECT_THAT((*tunnel)->Open(Soon()), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("damaged")));
  }
  WriteText(options.identity_file, good);
  EXPECT_OK((*tunnel)->Open(Soon()));
}

TEST(SshKey, RefusedAccountIsNotHammered) {
  Sshd sshd;
  WriteText(sshd.authorized_keys(), "");
  auto tunnel = SshTunnel::Create(sshd.Options());
  ASSERT_OK(tunnel);
  for (int i = 0; i < 20; ++i) EXPECT_EQ((*tunnel)->Open(Soon()).status().code(), absl::StatusCode::kUnauthenticated);
  const std::string log = sshd.log();
  size_t connections = 0;
  for (size_t at = log.find("Connection from"); at != std::string::npos; at = log.find("Connection from", at + 1)) ++connections;
  EXPECT_LE(connections, 3u) << log;  // one of them is the check that sshd runs
}

// ---- agent ----

class Agent {
 public:
  Agent() {
    SubprocessOptions options;
    options.argv = {"ssh-agent", "-D", "-a", socket()};
    auto started = Subprocess::Start(options);
    EXPECT_OK(started);
    process_ = *std::move(started);
    EXPECT_TRUE(WaitUntil([&] { return access(socket().c_str(), F_OK) == 0; }));
  }
  ~Agent() {
    process_->Kill(SIGCONT);
    process_->Kill(SIGTERM);
    process_->Wait(absl::InfiniteFuture());
  }
  std::string socket() const { return directory_ / "socket"; }
  void Add(const std::string& key) {
    SubprocessOptions options;
    options.argv = {"ssh-add", "-q", key};
    options.env = {{"SSH_AUTH_SOCK", socket()}};
    EXPECT_OK(RunCommand(options, absl::Seconds(20)));
  }
  void Freeze() { process_->Kill(SIGSTOP); }

 private:
  const TempDirectory directory_;
  std::optional<Subprocess> process_;
};

TEST(SshAgent, KeysOfARealAgent) {
  Sshd sshd;
  Agent agent;
  SshTunnelOptions options = sshd.Options();
  options.identity_file = "";
  options.use_agent = true;
  options.agent_socket = agent.socket();
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("ssh-agent")));
  MakeSshKey(sshd.file("other"));
  agent.Add(sshd.file("other"));
  agent.Add(sshd.client_key());
  EXPECT_OK(TryOpen(options));
  options.agent_socket = sshd.file("nobody");
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("cannot be reached")));
}

TEST(SshAgent, FrozenAgentDoesNotHoldUsForEver) {
  Sshd sshd;
  Agent agent;
  agent.Add(sshd.client_key());
  SshTunnelOptions options = sshd.Options();
  options.identity_file = "";
  options.use_agent = true;
  options.agent_socket = agent.socket();
  options.connect_timeout = absl::Seconds(1);
  agent.Freeze();
  const absl::Time start = absl::Now();
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("ssh-agent does not answer")));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
}

// ---- certificates ----

class SshCertificateLogin : public ::testing::Test {
 protected:
  SshCertificateLogin() {
    MakeSshKey(sshd_.file("user"));
    options_ = sshd_.Options();
    options_.identity_file = sshd_.file("user");
    WriteText(sshd_.authorized_keys(), "cert-authority " + ReadText(Authority() + ".pub"));
  }
  // The authority's key is made once.
  static std::string Authority() {
    static const TempDirectory* directory = [] {
      auto* made = new TempDirectory;
      MakeSshKey(*made / "ca");
      return made;
    }();
    return *directory / "ca";
  }
  void Sign(const std::string& validity, const std::string& principals = testing::CurrentUser()) {
    MustRun({"ssh-keygen", "-q", "-s", Authority(), "-I", "test", "-n", principals, "-V", validity, options_.identity_file + ".pub"});
  }
  Sshd sshd_;
  SshTunnelOptions options_;
};

TEST_F(SshCertificateLogin, ValidIsTakenAndItsEndIsKnown) {
  Sign("-1m:+2h");
  auto tunnel = SshTunnel::Create(options_);
  ASSERT_OK(tunnel);
  EXPECT_OK((*tunnel)->Open(Soon()));
  EXPECT_NEAR(absl::ToDoubleSeconds((*tunnel)->CredentialsExpire() - absl::Now()), 7200, 120);
}

TEST_F(SshCertificateLogin, NamedFileAndEveryTypeOfKey) {
  for (const std::string type : {"ecdsa", "rsa"}) {
    options_.identity_file = sshd_.file("user_" + type);
    MakeSshKey(options_.identity_file, type);
    Sign("-1m:+2h");
    options_.certificate_file = sshd_.file("elsewhere-" + type);
    ASSERT_EQ(rename((options_.identity_file + "-cert.pub").c_str(), options_.certificate_file.c_str()), 0);
    EXPECT_OK(TryOpen(options_)) << type;
  }
}

TEST_F(SshCertificateLogin, ExpiredSaysWhenAndRenewedOnDiskIsTaken) {
  Sign("-2h:-1h");
  auto tunnel = SshTunnel::Create(options_);
  ASSERT_OK(tunnel);
  EXPECT_THAT((*tunnel)->Open(Soon()), StatusIs(absl::StatusCode::kUnauthenticated,
                                                AllOf(HasSubstr("expired"), HasSubstr("ago, at 20"), HasSubstr("renew"))));
  EXPECT_LT((*tunnel)->CredentialsExpire(), absl::Now());
  Sign("-1m:+1h");
  EXPECT_OK((*tunnel)->Open(Soon()));
}

TEST_F(SshCertificateLogin, NotYetValidMentionsTheClock) {
  Sign("+1h:+2h");
  EXPECT_THAT(TryOpen(options_), StatusIs(absl::StatusCode::kUnauthenticated, AllOf(HasSubstr("not valid before"), HasSubstr("clock"))));
}

TEST_F(SshCertificateLogin, WrongPrincipalNamesWhomItIsFor) {
  Sign("-1m:+1h", "somebody,else");
  EXPECT_THAT(TryOpen(options_), StatusIs(absl::StatusCode::kUnauthenticated,
                                          AllOf(HasSubstr("for somebody, else"), HasSubstr("not for " + testing::CurrentUser()))));
}

TEST_F(SshCertificateLogin, CertificateOfAnotherKeyIsRefused) {
  Sign("-1m:+1h");
  MakeSshKey(sshd_.file("second"));
  options_.certificate_file = options_.identity_file + "-cert.pub";
  options_.identity_file = sshd_.file("second");
  EXPECT_EQ(TryOpen(options_).code(), absl::StatusCode::kUnauthenticated);
}

TEST_F(SshCertificateLogin, PlainKeyIsTriedAfterAnExpiredCertificate) {
  Sign("-2h:-1h");
  WriteText(sshd_.authorized_keys(), ReadText(options_.identity_file + ".pub"));
  EXPECT_OK(TryOpen(options_));
}

// ---- keyboard-interactive ----

// OpenSSH asks questions only through PAM, which a test cannot set up; so the server is libssh's.
class QuestionServer {
 public:
  explicit QuestionServer(std::vector<std::string> prompts, std::vector<std::string> right) : prompts_(std::move(prompts)), right_(std::move(right)) {
    MakeSshKey(directory_ / "host");
    port_ = testing::FreePort();
    bind_ = ssh_bind_new();
    const std::string key = directory_ / "host";
    const bool no = false;
    ssh_bind_options_set(bind_, SSH_BIND_OPTIONS_PROCESS_CONFIG, &no);
    ssh_bind_options_set(bind_, SSH_BIND_OPTIONS_BINDADDR, "127.0.0.1");
    ssh_bind_options_set(bind_, SSH_BIND_OPTIONS_BINDPORT, &port_);
    ssh_bind_options_set(bind_, SSH_BIND_OPTIONS_HOSTKEY, key.c_str());
    EXPECT_EQ(ssh_bind_listen(bind_), SSH_OK) << ssh_get_error(bind_);
    thread_ = std::thread([this] { Serve(); });
  }
  ~QuestionServer() {
    stopping_ = true;
    testing::CanConnect(port_);  // wakes accept
    thread_.join();
    ssh_bind_free(bind_);
  }
  SshTunnelOptions Options() const {
    SshTunnelOptions options;
    options.hosts = {{.host = "127.0.0.1", .port = port_}};
    options.user = "ada";
    options.command = "hello";
    options.fingerprints = {FingerprintOfFile(directory_ / "host.pub")};
    return options;
  }
  const TempDirectory& directory() const { return directory_; }

 private:
  void Serve() {
    while (!stopping_) {
      ssh_session session = ssh_new();
      if (ssh_bind_accept(bind_, session) == SSH_OK && !stopping_) Talk(session);
      ssh_disconnect(session);
      ssh_free(session);
    }
  }
  void Talk(ssh_session session) {
    const long timeout = 20;
    ssh_options_set(session, SSH_OPTIONS_TIMEOUT, &timeout);
    if (ssh_handle_key_exchange(session) != SSH_OK) return;
    ssh_channel channel = nullptr;
    while (ssh_message message = ssh_message_get(session)) {
      bool handled = false;
      if (ssh_message_type(message) == SSH_REQUEST_AUTH) {
        ssh_message_auth_set_methods(message, SSH_AUTH_METHOD_INTERACTIVE);
        if (ssh_message_subtype(message) == SSH_AUTH_METHOD_INTERACTIVE) {
          handled = true;
          if (!ssh_message_auth_kbdint_is_response(message)) {
            std::vector<const char*> texts;
            std::vector<char> echo;
            for (const std::string& prompt : prompts_) {
              texts.push_back(prompt.c_str());
              echo.push_back(0);
            }
            ssh_message_auth_interactive_request(message, "Second factor", "Look at your token", static_cast<unsigned>(texts.size()), texts.data(), echo.data());
          } else {
            bool good = ssh_userauth_kbdint_getnanswers(session) == static_cast<int>(right_.size());
            for (size_t i = 0; good && i < right_.size(); ++i) good = right_[i] == ssh_userauth_kbdint_getanswer(session, static_cast<unsigned>(i));
            good ? ssh_message_auth_reply_success(message, 0) : ssh_message_reply_default(message);
          }
        }
      } else if (ssh_message_type(message) == SSH_REQUEST_CHANNEL_OPEN) {
        channel = ssh_message_channel_request_open_reply_accept(message);
        handled = channel != nullptr;
      } else if (ssh_message_type(message) == SSH_REQUEST_CHANNEL && ssh_message_subtype(message) == SSH_CHANNEL_REQUEST_EXEC) {
        ssh_message_channel_request_reply_success(message);
        ssh_channel_write(channel, "welcome\n", 8);
        ssh_channel_request_send_exit_status(channel, 0);
        ssh_channel_send_eof(channel);
        ssh_channel_close(channel);
        handled = true;
      }
      if (!handled) ssh_message_reply_default(message);
      ssh_message_free(message);
    }
  }

  const TempDirectory directory_;
  const std::vector<std::string> prompts_;
  const std::vector<std::string> right_;
  int port_ = 0;
  ssh_bind bind_ = nullptr;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

TEST(SshQuestions, AnsweredByAFunction) {
  QuestionServer server({"Password: ", "Code: "}, {"s3cret-word", "123456"});
  SshTunnelOptions options = server.Options();
  SshChallenge seen;
  options.answers = [&](const SshChallenge& challenge, absl::Time) -> absl::StatusOr<std::vector<std::string>> {
    seen = challenge;
    return std::vector<std::string>{"s3cret-word", "123456"};
  };
  const auto result = RunSshCommand(options, "hello", nullptr, Soon());
  ASSERT_OK(result);
  EXPECT_EQ(result->out, "welcome\n");
  EXPECT_EQ(seen.user, "ada");
  EXPECT_EQ(seen.name, "Second factor");
  EXPECT_EQ(seen.instruction, "Look at your token");
  ASSERT_EQ(seen.prompts.size(), 2u);
  EXPECT_EQ(seen.prompts[1].text, "Code: ");
  EXPECT_FALSE(seen.prompts[1].echo);

  options.answers = [](const SshChallenge&, absl::Time) -> absl::StatusOr<std::vector<std::string>> {
    return std::vector<std::string>{"s3cret-word", "000000"};
  };
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, AllOf(HasSubstr("answers to its questions"), Not(HasSubstr("s3cret")))));
  options.answers = nullptr;
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("keyboard-interactive")));
}

TEST(SshQuestions, AnsweredByAProgram) {
  QuestionServer server({"Password: ", "Code\x1b[31m: "}, {"s3cret-word", "123456"});
  SshTunnelOptions options = server.Options();
  const std::string program = server.directory() / "answer";
  WriteText(program,
            "#!/bin/sh\nread -r prompt\ncase \"$prompt $ITWIN_SSH_USER $ITWIN_SSH_NAME\" in\n"
            "  'Password: ada Second factor') echo s3cret-word; echo more ;;\n  Code*) echo 123456 ;;\nesac\n",
            0700);
  options.answers = AnswersFromProgram({program});
  const auto result = RunSshCommand(options, "hello", nullptr, Soon());
  ASSERT_OK(result);
  EXPECT_EQ(result->out, "welcome\n");
  WriteText(program, "#!/bin/sh\necho s3cret-word\necho 'no token in the slot' >&2\nexit 1\n", 0700);
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated,
                                         AllOf(HasSubstr("Password:"), HasSubstr("no token in the slot"), Not(HasSubstr("s3cret")))));
  options.answers = AnswersFromProgram({server.directory() / "nothing"});
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("nothing")));
}

// ---- several proofs ----

TEST(SshSeveral, TwoKeysInARow) {
  Agent agent;
  Sshd sshd({"AuthenticationMethods publickey,publickey"});
  MakeSshKey(sshd.file("second"));
  agent.Add(sshd.file("second"));
  WriteText(sshd.authorized_keys(), ReadText(sshd.client_key() + ".pub") + ReadText(sshd.file("second") + ".pub"));
  SshTunnelOptions options = sshd.Options();
  EXPECT_THAT(TryOpen(options), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("another is wanted")));
  options.use_agent = true;
  options.agent_socket = agent.socket();
  EXPECT_OK(TryOpen(options));
}

// ---- jump hosts ----

class SshJump : public ::testing::Test {
 protected:
  SshJump() : gate_({"AllowTcpForwarding local", "ForceCommand /bin/false"}), login_({"AllowTcpForwarding no"}) {
    WriteText(gate_.authorized_keys(), ReadText(login_.client_key() + ".pub"));
    options_ = login_.Options("exec cat");
    options_.jump = {gate_.host()};
    WriteText(options_.known_hosts_file, ReadText(login_.known_hosts()) + ReadText(gate_.known_hosts()));
  }
  Sshd gate_, login_;
  SshTunnelOptions options_;
};

TEST_F(SshJump, BytesGoThroughAndBothKeysAreChecked) {
  const std::string payload(3 << 20, 'p');
  size_t at = 0;
  const auto result = RunSshCommand(options_, "cat | wc -c; echo $SSH_CONNECTION; echo 'to stderr' >&2; exit 4",
                                    [&]() -> absl::StatusOr<std::string> {
                                      const std::string part = payload.substr(at, 100'000);
                                      at += part.size();
                                      return part;
                                    },
                                    Soon());
  ASSERT_OK(result);
  EXPECT_THAT(result->out, HasSubstr(absl::StrCat(payload.size(), "\n")));
  EXPECT_EQ(result->exit_code, 4);
  EXPECT_EQ(result->err, "to stderr");
  EXPECT_THAT(gate_.log(), HasSubstr("Accepted publickey"));
  EXPECT_THAT(login_.log(), HasSubstr("Accepted publickey"));

  WriteText(options_.known_hosts_file, ReadText(login_.known_hosts()).substr(0, 0) + ReadText(gate_.known_hosts()));
  EXPECT_THAT(TryOpen(options_), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(FingerprintOfFile(login_.host_key() + ".pub"))));
  const auto key = FetchHostKey(options_, login_.host(), Soon());
  ASSERT_OK(key);
  EXPECT_EQ(key->fingerprint, FingerprintOfFile(login_.host_key() + ".pub"));
  WriteText(options_.known_hosts_file, "");
  EXPECT_THAT(TryOpen(options_), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(FingerprintOfFile(gate_.host_key() + ".pub"))));
  const auto gate_key = FetchHostKey(options_, gate_.host(), Soon());
  ASSERT_OK(gate_key);
  EXPECT_EQ(gate_key->fingerprint, FingerprintOfFile(gate_.host_key() + ".pub"));
}

TEST_F(SshJump, EndOfTheJumpHostEndsTheStream) {
  auto tunnel = SshTunnel::Create(options_);
  ASSERT_OK(tunnel);
  auto stream = (*tunnel)->Open(Soon());
  ASSERT_OK(stream);
  gate_.KillSessions();
  ASSERT_TRUE(WaitUntil([&] { return !(*stream)->alive(); }));
  EXPECT_THAT((*stream)->Diagnostics(), HasSubstr(absl::StrCat(gate_.port())));
}

TEST_F(SshJump, ThroughThreeHosts) {
  Sshd middle({"AllowTcpForwarding local"});
  WriteText(middle.authorized_keys(), ReadText(login_.client_key() + ".pub"));
  options_.jump.push_back(middle.host());
  WriteText(options_.known_hosts_file, ReadText(options_.known_hosts_file) + ReadText(middle.known_hosts()));
  const auto result = RunSshCommand(options_, "echo arrived", nullptr, Soon());
  ASSERT_OK(result);
  EXPECT_EQ(result->out, "arrived\n");
}

TEST_F(SshJump, HostThatMayNotForwardIsNamed) {
  Sshd closed({"AllowTcpForwarding no"});
  WriteText(closed.authorized_keys(), ReadText(login_.client_key() + ".pub"));
  options_.jump = {closed.host()};
  WriteText(options_.known_hosts_file, ReadText(options_.known_hosts_file) + ReadText(closed.known_hosts()));
  EXPECT_THAT(TryOpen(options_), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("AllowTcpForwarding")));
}

TEST_F(SshJump, LoginNodeThatIsDownIsToldFromTheJumpHost) {
  login_.Kill();
  EXPECT_THAT(TryOpen(options_), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("does not reach")));
}

// ---- what nobody may see ----

TEST(SshSecrets, NothingSecretInTheLogAtItsMostTalkative) {
  std::ostringstream text;
  const auto before = spdlog::default_logger();
  auto sink = std::make_shared<spdlog::sinks::ostream_sink_mt>(text, true);
  auto logger = std::make_shared<spdlog::logger>("test", sink);
  logger->set_level(spdlog::level::trace);
  spdlog::set_default_logger(logger);
  std::string key_text;
  {
    Sshd sshd;
    SshTunnelOptions options = sshd.Options();
    options.identity_file = sshd.file("locked");
    options.passphrase_file = sshd.file("passphrase");
    MakeSshKey(options.identity_file, "ed25519", "hush-hush-passphrase");
    WriteText(options.passphrase_file, "hush-hush-passphrase\n");
    WriteText(sshd.authorized_keys(), ReadText(options.identity_file + ".pub"));
    key_text = ReadText(options.identity_file);
    EXPECT_OK(TryOpen(options));
    WriteText(sshd.authorized_keys(), "");
    EXPECT_FALSE(TryOpen(options).ok());
    QuestionServer server({"Code: "}, {"hush-hush-code"});
    SshTunnelOptions asked = server.Options();
    asked.answers = [](const SshChallenge&, absl::Time) -> absl::StatusOr<std::vector<std::string>> {
      return std::vector<std::string>{"hush-hush-code"};
    };
    EXPECT_OK(TryOpen(asked));
  }
  spdlog::set_default_logger(before);
  EXPECT_THAT(text.str(), HasSubstr("libssh: ")) << "the library's log is not there at all";
  EXPECT_THAT(text.str(), Not(HasSubstr("hush-hush")));
  // Any run of the private key's text.
  for (size_t at = key_text.find('\n') + 1; at + 24 < key_text.size(); at += 24) {
    EXPECT_THAT(text.str(), Not(HasSubstr(key_text.substr(at, 24))));
  }
  EXPECT_EQ(RedactSshLog("key " + std::string(60, 'A') + "\x1b[0m\nend"), "key <60 characters> [0m end");
}

}  // namespace
}  // namespace itwin::server
