#include "server/tunnel/ssh_tunnel.h"

#include <atomic>
#include <cmath>

#include "common/sha256.h"
#include "tests/contract/tunnel_contract.h"
#include "tests/testing/sshd.h"
#include "tests/testing/tcp_proxy.h"

namespace itwin::server {
namespace {

using ::itwin::testing::Ready;
using ::itwin::testing::Sshd;
using ::itwin::testing::StatusIs;
using ::itwin::testing::TcpProxy;
using ::itwin::testing::TempDirectory;
using ::itwin::testing::WaitUntil;
using ::testing::HasSubstr;

std::unique_ptr<SshTunnel> MakeTunnel(SshTunnelOptions options) {
  auto tunnel = SshTunnel::Create(std::move(options));
  EXPECT_OK(tunnel);
  return *std::move(tunnel);
}

// One for all cases of the contract; killed sessions end with their streams.
Sshd& SharedSshd() {
  static Sshd* const sshd = new Sshd({"AllowTcpForwarding no", "AllowStreamLocalForwarding no"});
  return *sshd;
}
class SharedSshdEnd : public ::testing::Environment {
 public:
  void TearDown() override { SharedSshd().Kill(); }
};
const auto* const kEnd = ::testing::AddGlobalTestEnvironment(new SharedSshdEnd);

INSTANTIATE_TEST_SUITE_P(Ssh, TunnelContract,
                         ::testing::Values(TunnelHarness{"ssh",
                                                         [](const std::string& command) -> std::unique_ptr<Tunnel> {
                                                           return MakeTunnel(SharedSshd().Options(command));
                                                         }}),
                         [](const auto& param) { return std::string(param.param.name); });

int64_t ResidentBytes() {
  int64_t pages = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}
// ---- bytes ----

TEST(SshTunnel, LargeTransfersKeepTheirHashesAlsoThroughKeyRenewal) {
  // Keys are renewed many times on the way.
  Sshd sshd({"RekeyLimit 4M"});
  const TempDirectory directory;
  auto tunnel = MakeTunnel(sshd.Options(absl::StrCat("exec bash -c 'tee >(sha256sum | cut -c1-64 > ", directory / "sum", ")'")));
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  std::string sent(96 << 20, '\0');
  uint64_t x = 88172645463325252u;
  for (size_t i = 0; i + 8 <= sent.size(); i += 8) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    memcpy(&sent[i], &x, 8);
  }
  std::thread writer([&] {
    EXPECT_TRUE(Send(socket.get(), sent));
    shutdown(socket.get(), SHUT_WR);
  });
  Sha256 received;
  size_t bytes = 0;
  while (true) {
    const std::string part = Receive(socket.get(), 1 << 20);
    if (part.empty()) break;
    received.Update(part);
    bytes += part.size();
  }
  writer.join();
  EXPECT_EQ(bytes, sent.size()) << (*stream)->Diagnostics();
  const std::string expected = Sha256Hex(sent);
  EXPECT_EQ(received.FinishHex(), expected);
  EXPECT_TRUE(WaitUntil([&] { return testing::ReadText(directory / "sum") == expected + "\n"; }));
}

TEST(SshTunnel, HalfClosePassesTheEndAndStillBringsTheAnswer) {
  auto tunnel = MakeTunnel(SharedSshd().Options("sha256sum | cut -c1-64; exit 7"));
  auto stream = tunnel->OpenCommand("sha256sum | cut -c1-64; exit 7", Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  ASSERT_TRUE(Send(socket.get(), "hello"));
  shutdown(socket.get(), SHUT_WR);
  EXPECT_EQ(Receive(socket.get(), 100), Sha256Hex("hello") + "\n");
  ASSERT_TRUE((*stream)->WaitForEnd(Soon()));
  EXPECT_TRUE((*stream)->exit().known);
  EXPECT_EQ((*stream)->exit().exit_code, 7);
}

TEST(SshTunnel, ReaderThatStopsBoundsOurMemoryAndBlocksTheFarSide) {
  const TempDirectory directory;
  auto tunnel = MakeTunnel(SharedSshd().Options());
  // 256 MiB if it is let; dd says at the end how much went out.
  auto stream = tunnel->OpenCommand(absl::StrCat("dd if=/dev/zero bs=1M count=256 2>", directory / "dd"), Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  ASSERT_EQ(Receive(socket.get(), 1 << 20).size(), size_t{1} << 20);
  const int64_t before = ResidentBytes();
  // Until nothing arrives any more: our side of the socket stays full.
  int64_t last = -1, quiet = 0;
  EXPECT_TRUE(WaitUntil([&] {
    const int64_t now = ResidentBytes();
    quiet = now == last ? quiet + 1 : 0;
    last = now;
    return quiet > 100;
  }));
  EXPECT_LT(ResidentBytes() - before, 24 << 20);
  EXPECT_EQ(testing::ReadText(directory / "dd"), "") << "it was let write all of it";
  // And then the rest comes, whole.
  size_t bytes = 1 << 20;
  while (true) {
    const std::string part = Receive(socket.get(), 1 << 20);
    bytes += part.size();
    if (part.empty()) break;
  }
  EXPECT_EQ(bytes, size_t{256} << 20) << (*stream)->Diagnostics();
  EXPECT_LT(ResidentBytes() - before, 32 << 20);
}

TEST(SshTunnel, WriterIntoAStoppedFarSideBlocks) {
  auto tunnel = MakeTunnel(SharedSshd().Options());
  auto stream = tunnel->OpenCommand("kill -STOP $$; cat >/dev/null", Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  const int64_t before = ResidentBytes();
  const std::string chunk(1 << 16, 'x');
  size_t taken = 0;
  while (taken < (64 << 20)) {
    const ssize_t sent = send(socket.get(), chunk.data(), chunk.size(), MSG_NOSIGNAL);
    if (sent > 0) taken += static_cast<size_t>(sent);
    if (sent < 0 && !Ready(socket.get(), POLLOUT, 500)) break;
  }
  EXPECT_LT(taken, size_t{16} << 20);
  EXPECT_LT(ResidentBytes() - before, 16 << 20);
  (*stream)->Close();
}

TEST(SshTunnel, StandardErrorIsKeptApart) {
  auto tunnel = MakeTunnel(SharedSshd().Options("echo out; echo 'agent: quota exceeded' >&2; kill -TERM $$"));
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  EXPECT_EQ(Receive(socket.get(), 100), "out\n");
  ASSERT_TRUE(WaitUntil([&] { return !(*stream)->alive(); }));
  EXPECT_THAT((*stream)->Diagnostics(), HasSubstr("agent: quota exceeded"));
  EXPECT_THAT((*stream)->Diagnostics(), HasSubstr("signal TERM"));
}

TEST(SshTunnel, ForcedCommandRunsInsteadOfOurs) {
  Sshd sshd;
  testing::WriteText(sshd.authorized_keys(), absl::StrCat("restrict,command=\"echo forced: $SSH_ORIGINAL_COMMAND; exec cat\" ",
                                                          testing::ReadText(sshd.client_key() + ".pub")));
  auto tunnel = MakeTunnel(sshd.Options("itwin-agent connect --root /scratch/ada"));
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  const std::string greeting = "forced: itwin-agent connect --root /scratch/ada\n";
  EXPECT_EQ(Receive(socket.get(), greeting.size()), greeting);
  ASSERT_TRUE(Send(socket.get(), "through"));
  EXPECT_EQ(Receive(socket.get(), 7), "through");
}

TEST(SshTunnel, CommandsNotAllowedIsSaid) {
  Sshd sshd({"MaxSessions 0"});
  EXPECT_THAT(MakeTunnel(sshd.Options())->Open(Soon()), StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("gives " + testing::CurrentUser() + " no session")));
}

// ---- the link ----

TEST(SshTunnel, SshdKilledInTheMiddleEndsTheStreamAndTheNextOpenReconnects) {
  Sshd sshd;
  auto tunnel = MakeTunnel(sshd.Options("exec cat"));
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  ASSERT_TRUE(Send(socket.get(), "x"));
  ASSERT_EQ(Receive(socket.get(), 1), "x");
  sshd.Kill();
  EXPECT_EQ(Receive(socket.get(), 1), "");
  EXPECT_TRUE(WaitUntil([&] { return !(*stream)->alive(); }));
  EXPECT_THAT((*stream)->Diagnostics(), HasSubstr("broke"));
  EXPECT_THAT(tunnel->Open(Soon()), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("Connection refused")));
  ASSERT_TRUE(sshd.Start());
  ASSERT_OK(tunnel->Open(Soon()));
}

TEST(SshTunnel, CutIsNoticedAtOnce) {
  TcpProxy proxy(SharedSshd().port());
  SshTunnelOptions options = SharedSshd().Options("exec cat");
  options.hosts = {{.host = "127.0.0.1", .port = proxy.port()}};
  options.fingerprints = {testing::FingerprintOfFile(SharedSshd().host_key() + ".pub")};
  auto tunnel = MakeTunnel(options);
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  const absl::Time start = absl::Now();
  proxy.Cut();
  EXPECT_EQ(Receive(socket.get(), 1), "");
  EXPECT_LT(absl::Now() - start, absl::Seconds(3));
  proxy.Pass();
  ASSERT_OK(tunnel->Open(Soon()));
}

TEST(SshTunnel, HalfOpenLinkIsNoticedInTheConfiguredTimeAlsoWhileWriting) {
  for (const bool writing : {false, true}) {
    TcpProxy proxy(SharedSshd().port());
    SshTunnelOptions options = SharedSshd().Options("exec cat");
    options.hosts = {{.host = "127.0.0.1", .port = proxy.port()}};
    options.fingerprints = {testing::FingerprintOfFile(SharedSshd().host_key() + ".pub")};
    options.keepalive_interval = absl::Milliseconds(500);
    options.keepalive_count = 3;
    auto tunnel = MakeTunnel(options);
    auto stream = tunnel->Open(Soon());
    ASSERT_OK(stream);
    const FileDescriptor socket = (*stream)->TakeSocket();
    // An idle link that answers lives on, well beyond the limit.
    EXPECT_FALSE(Ready(socket.get(), POLLIN, 2500));
    EXPECT_TRUE((*stream)->alive());
    const absl::Time start = absl::Now();
    proxy.Silence();
    std::thread writer;
    if (writing) {
      writer = std::thread([&] {
        const std::string chunk(1 << 16, 'x');
        while (send(socket.get(), chunk.data(), chunk.size(), MSG_NOSIGNAL) >= 0 || (errno == EAGAIN && Ready(socket.get(), POLLOUT, 10'000))) {
        }
      });
    }
    ASSERT_TRUE(WaitUntil([&] { return !(*stream)->alive(); }));
    const absl::Duration taken = absl::Now() - start;
    EXPECT_GE(taken, absl::Milliseconds(900));
    EXPECT_LT(taken, absl::Seconds(5));
    EXPECT_THAT((*stream)->Diagnostics(), HasSubstr("nothing heard"));
    if (writer.joinable()) writer.join();
  }
}

TEST(SshTunnel, CloseOfADeadLinkTakesSecondsAtMost) {
  TcpProxy proxy(SharedSshd().port());
  SshTunnelOptions options = SharedSshd().Options("exec cat");
  options.hosts = {{.host = "127.0.0.1", .port = proxy.port()}};
  options.fingerprints = {testing::FingerprintOfFile(SharedSshd().host_key() + ".pub")};
  auto tunnel = MakeTunnel(options);
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  proxy.Silence();
  const std::string chunk(1 << 16, 'x');
  while (send(socket.get(), chunk.data(), chunk.size(), MSG_NOSIGNAL) >= 0 || Ready(socket.get(), POLLOUT, 300)) {
  }
  const absl::Time start = absl::Now();
  (*stream)->Close();
  EXPECT_LT(absl::Now() - start, absl::Seconds(4));
  EXPECT_FALSE((*stream)->alive());
}

TEST(SshTunnel, SilentHostRunsIntoTheDeadlineAndShutdownDoesNotWaitForIt) {
  TcpProxy proxy(SharedSshd().port());
  proxy.Silence();
  SshTunnelOptions options = SharedSshd().Options();
  options.hosts = {{.host = "127.0.0.1", .port = proxy.port()}};
  auto tunnel = MakeTunnel(options);
  absl::Time start = absl::Now();
  EXPECT_THAT(tunnel->Open(start + absl::Milliseconds(700)), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("does not answer")));
  EXPECT_LT(absl::Now() - start, absl::Seconds(4));
  std::atomic<bool> opening{false};
  absl::Status status;
  std::thread opener([&] {
    opening = true;
    status = tunnel->Open(absl::Now() + absl::Minutes(5)).status();
  });
  ASSERT_TRUE(WaitUntil([&] { return opening.load(); }));
  start = absl::Now();
  tunnel->Cancel();
  opener.join();
  EXPECT_LT(absl::Now() - start, absl::Seconds(4));
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kCancelled, HasSubstr("stopping")));
  EXPECT_THAT(tunnel->Open(Soon()), StatusIs(absl::StatusCode::kCancelled, HasSubstr("stopping")));
}

TEST(SshTunnel, UnknownNameIsNamed) {
  SshTunnelOptions options = SharedSshd().Options();
  options.hosts = {{.host = "login.invalid"}};
  EXPECT_THAT(MakeTunnel(options)->Open(Soon()), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("login.invalid")));
}

TEST(SshTunnel, SecondLoginNodeTakesOverAndTheLastGoodOneStays) {
  Sshd first, second;
  SshTunnelOptions options = first.Options("exec cat");
  options.hosts.push_back(second.host());
  testing::WriteText(first.authorized_keys(), testing::ReadText(first.client_key() + ".pub"));
  testing::WriteText(second.authorized_keys(), testing::ReadText(first.client_key() + ".pub"));
  testing::WriteText(first.known_hosts(), testing::ReadText(first.known_hosts()) + testing::ReadText(second.known_hosts()));
  options.command = "echo $SSH_CONNECTION; exec cat";
  auto tunnel = MakeTunnel(options);
  const auto where = [&] {
    auto stream = tunnel->Open(Soon());
    EXPECT_OK(stream);
    if (!stream.ok()) return std::string();
    const FileDescriptor socket = (*stream)->TakeSocket();
    std::string text;
    while (text.empty() || text.back() != '\n') {
      const std::string byte = Receive(socket.get(), 1);
      if (byte.empty()) break;
      text += byte;
    }
    return text.substr(text.rfind(' ') + 1);
  };
  EXPECT_EQ(where(), absl::StrCat(first.port(), "\n"));
  first.Kill();
  EXPECT_EQ(where(), absl::StrCat(second.port(), "\n"));
  ASSERT_TRUE(first.Start());
  EXPECT_EQ(where(), absl::StrCat(second.port(), "\n")) << "the one that works is kept";
  second.Kill();
  EXPECT_EQ(where(), absl::StrCat(first.port(), "\n"));
}

TEST(SshTunnel, HostThatFailsIsLeftAloneWithTheSameWordsAndTriedAgainLater) {
  TcpProxy proxy(SharedSshd().port());
  SshTunnelOptions options = SharedSshd().Options();
  options.hosts = {{.host = "127.0.0.1", .port = proxy.port()}};
  options.fingerprints = {testing::FingerprintOfFile(SharedSshd().host_key() + ".pub")};
  auto tunnel = MakeTunnel(options);
  proxy.Cut();
  absl::Status last;
  int same = 0, tries = 0;
  while (same < 100) {
    const absl::Status status = tunnel->Open(Soon()).status();
    ASSERT_EQ(status.code(), absl::StatusCode::kUnavailable);
    same = status == last ? same + 1 : 0;
    last = status;
    ASSERT_LT(++tries, 1000);
  }
  EXPECT_LT(proxy.taken(), 20) << "each call went to the network";
  proxy.Pass();
  EXPECT_TRUE(WaitUntil([&] { return tunnel->Open(Soon()).ok(); }, absl::Seconds(60)));
}

TEST(SshTunnel, StreamsThatEndAtOnceOpenTheBreakerToo) {
  auto tunnel = MakeTunnel(SharedSshd().Options("exit 127"));
  absl::Status status;
  for (int i = 0; i < 12 && status.ok(); ++i) {
    auto stream = tunnel->Open(Soon());
    status = stream.status();
    if (stream.ok()) {
      EXPECT_TRUE(WaitUntil([&] { return !(*stream)->alive(); }));
    }
  }
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("as soon as")));
}

// ---- resources ----

TEST(SshTunnel, AThousandOpeningsLeakNothing) {
  Sshd sshd;
  auto tunnel = MakeTunnel(sshd.Options("exec cat"));
  SshTunnelOptions refused_options = sshd.Options("exec cat");
  refused_options.hosts = {{.host = "127.0.0.1", .port = testing::FreePort()}};
  SshTunnelOptions stranger = sshd.Options("exec cat");
  stranger.known_hosts_file = "";
  const auto good = [&] {
    auto stream = tunnel->Open(Soon());
    ASSERT_OK(stream);
    const FileDescriptor socket = (*stream)->TakeSocket();
    ASSERT_TRUE(Send(socket.get(), "x"));
    ASSERT_EQ(Receive(socket.get(), 1), "x");
  };
  const auto bad = [&](const SshTunnelOptions& options) { ASSERT_FALSE(MakeTunnel(options)->Open(Soon()).ok()); };
  good();
  bad(refused_options);
  bad(stranger);
  const size_t descriptors = CountEntries("/proc/self/fd");
  const size_t threads = CountEntries("/proc/self/task");
  const int64_t memory = ResidentBytes();
  // Whole sessions, and attempts that end at each stage. ITWIN_LONG_TESTS: all of them whole.
  const bool all = getenv("ITWIN_LONG_TESTS") != nullptr;
  for (int i = 0; i < 1000; ++i) {
    if (all || i % 20 == 0) {
      good();
    } else if (i % 20 == 1) {
      bad(stranger);
    } else {
      bad(refused_options);
    }
    if (HasFatalFailure()) return;
  }
  EXPECT_EQ(CountEntries("/proc/self/fd"), descriptors);
  EXPECT_LE(CountEntries("/proc/self/task"), threads);
  EXPECT_LT(ResidentBytes() - memory, 16 << 20);
}

}  // namespace
}  // namespace itwin::server
