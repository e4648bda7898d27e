// SshTunnel over the WAN of a real cluster (docs/testcluster.md): root only, one cluster for all cases.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/sha256.h"
#include "common/subprocess.h"
#include "server/tunnel/ssh_command.h"
#include "server/tunnel/ssh_tunnel.h"
#include "tests/testing/socket_io.h"
#include "tests/testing/sshd.h"
#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using ::itwin::testing::MustRun;
using ::itwin::testing::Ready;
using ::itwin::testing::Receive;
using ::itwin::testing::Send;
using ::itwin::testing::Soon;
using ::itwin::testing::StatusIs;
using ::itwin::testing::WaitUntil;
using ::testing::HasSubstr;

class Cluster {
 public:
  Cluster() {
    char pattern[] = "/var/tmp/itwin-tc-XXXXXX";
    base_ = mkdtemp(pattern);
    chmod(base_.c_str(), 0755);
    status_ = nlohmann::json::parse(Tool("up", {"--json", "--jump", "--login2", "--nodes", "1"}));
  }
  ~Cluster() {
    Tool("down", {});
    std::filesystem::remove_all(base_);
  }
  std::string Tool(const std::string& command, std::vector<std::string> words) const {
    SubprocessOptions options;
    options.argv = {std::string(getenv("ITWIN_SOURCE")) + "/deploy/testcluster", command, "--dir", base_ + "/c"};
    options.argv.insert(options.argv.end(), words.begin(), words.end());
    const auto output = RunCommand(options, absl::Minutes(5));
    EXPECT_OK(output);
    EXPECT_EQ(output->exit.exit_code, 0) << output->err;
    return output->out;
  }
  void Link(std::vector<std::string> words) const { Tool("wan", std::move(words)); }
  std::string key(const std::string& name) const { return status_["keys"][name]; }
  SshHost Wan(const std::string& node) const { return {.host = Ssh(node)["wan_host"], .port = Ssh(node)["wan_port"]}; }
  SshHost Direct(const std::string& node) const { return {.host = Ssh(node)["direct_host"], .port = Ssh(node)["direct_port"]}; }
  std::string Home() const { return status_["sites"]["alpha"]["homes"]["ada"]; }

  SshTunnelOptions Options(const std::string& command = "exec cat") const {
    SshTunnelOptions options;
    options.hosts = {Wan("login")};
    options.user = "ada";
    options.command = command;
    options.identity_file = key("ada");
    for (const char* node : {"login", "login2", "jump"}) options.fingerprints.push_back(Ssh(node)["fingerprint"]);
    options.keepalive_interval = absl::Seconds(1);
    options.keepalive_count = 3;
    return options;
  }

 private:
  const nlohmann::json& Ssh(const std::string& node) const { return status_["nodes"][node]["ssh"]; }
  std::string base_;
  nlohmann::json status_;
};

class TunnelWan : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (geteuid() == 0) cluster_ = new Cluster;
  }
  static void TearDownTestSuite() {
    delete cluster_;
    cluster_ = nullptr;
  }
  void SetUp() override {
    if (cluster_ == nullptr) GTEST_SKIP() << "needs root";
  }
  void TearDown() override {
    if (cluster_ != nullptr) cluster_->Link({"restore"});
  }

  // Seconds for one byte there and back.
  static double RoundTrip(int fd) {
    const absl::Time start = absl::Now();
    char byte = 'x';
    EXPECT_EQ(send(fd, &byte, 1, MSG_NOSIGNAL), 1);
    EXPECT_TRUE(Ready(fd, POLLIN));
    EXPECT_EQ(recv(fd, &byte, 1, 0), 1);
    return absl::ToDoubleSeconds(absl::Now() - start);
  }
  // Sends and reads back; the hash of what came.
  static std::string ThroughCat(int fd, const std::string& bytes) {
    std::thread writer([&] { Send(fd, bytes); });
    const std::string back = Receive(fd, bytes.size());
    writer.join();
    return Sha256Hex(back);
  }
  static std::string Pattern(size_t size) {
    std::string bytes(size, '\0');
    uint32_t x = 77;
    for (char& c : bytes) c = static_cast<char>((x = x * 1664525u + 1013904223u) >> 24);
    return bytes;
  }
  static std::unique_ptr<SshTunnel> Tunnel(const SshTunnelOptions& options) {
    auto tunnel = SshTunnel::Create(options);
    EXPECT_OK(tunnel);
    return *std::move(tunnel);
  }

  static Cluster* cluster_;
};
Cluster* TunnelWan::cluster_ = nullptr;

TEST_F(TunnelWan, ReachesTheLoginNodeDirectlyAndThroughTheJumpHost) {
  const auto direct = RunSshCommand(cluster_->Options(), "hostname; id -un", nullptr, Soon());
  ASSERT_OK(direct);
  EXPECT_EQ(direct->out, "login\nada\n");
  SshTunnelOptions options = cluster_->Options();
  options.hosts = {cluster_->Direct("login")};
  options.jump = {cluster_->Wan("jump")};
  const auto jumped = RunSshCommand(options, "hostname; echo $SSH_CONNECTION", nullptr, Soon());
  ASSERT_OK(jumped);
  EXPECT_THAT(jumped->out, HasSubstr("login\n" + cluster_->Direct("jump").host));
}

TEST_F(TunnelWan, ForcedCommandStrangersAndCertificates) {
  cluster_->Tool("forced-command", {"echo \"asked: $SSH_ORIGINAL_COMMAND\""});
  SshTunnelOptions options = cluster_->Options();
  options.identity_file = cluster_->key("forced");
  const auto forced = RunSshCommand(options, "itwin-agent connect --root x", nullptr, Soon());
  ASSERT_OK(forced);
  EXPECT_EQ(forced->out, "asked: itwin-agent connect --root x\n");
  testing::TempDirectory directory;
  options.identity_file = directory / "stranger";
  testing::WriteText(options.identity_file, testing::ReadText(cluster_->key("stranger")));
  testing::WriteText(options.identity_file + ".pub", testing::ReadText(cluster_->key("stranger") + ".pub"));
  EXPECT_THAT(RunSshCommand(options, "true", nullptr, Soon()), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("authorized_keys")));
  MustRun({"ssh-keygen", "-q", "-s", cluster_->key("user_ca"), "-I", "test", "-n", "ada", "-V", "-1m:+5m", options.identity_file + ".pub"});
  EXPECT_OK(RunSshCommand(options, "true", nullptr, Soon()));
}

TEST_F(TunnelWan, DelayCostsTimeAndNothingElse) {
  const auto tunnel = Tunnel(cluster_->Options());
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  cluster_->Link({"delay", "200ms"});
  const double round_trip = RoundTrip(socket.get());
  EXPECT_GE(round_trip, 0.4);
  EXPECT_LT(round_trip, 2);
  const std::string bytes = Pattern(8 << 20);
  const absl::Time start = absl::Now();
  EXPECT_EQ(ThroughCat(socket.get(), bytes), Sha256Hex(bytes));
  // The window is wide enough: far more than one packet per round trip.
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
  EXPECT_OK(Tunnel(cluster_->Options())->Open(Soon())) << "a new connection over a slow link";
}

TEST_F(TunnelWan, ThrottledLinkIsSlowAndAlive) {
  SshTunnelOptions options = cluster_->Options();
  options.keepalive_interval = absl::Seconds(5);  // the default: an answer waits behind what is in the link's queues
  const auto tunnel = Tunnel(options);
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  cluster_->Link({"throttle", "200K"});
  // 2 MB each way take ten seconds; keep-alives must not take that for death.
  const std::string bytes = Pattern(2'000'000);
  const absl::Time start = absl::Now();
  EXPECT_EQ(ThroughCat(socket.get(), bytes), Sha256Hex(bytes));
  EXPECT_GT(absl::Now() - start, absl::Seconds(5));
  EXPECT_TRUE((*stream)->alive()) << (*stream)->Diagnostics();
}

TEST_F(TunnelWan, CutIsNoticedAndTheWayBackIsShort) {
  const auto tunnel = Tunnel(cluster_->Options());
  auto stream = tunnel->Open(Soon());
  ASSERT_OK(stream);
  absl::Time start = absl::Now();
  cluster_->Link({"cut"});
  ASSERT_TRUE(WaitUntil([&] { return !(*stream)->alive(); }));
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
  EXPECT_EQ(tunnel->Open(Soon()).status().code(), absl::StatusCode::kUnavailable);
  cluster_->Link({"restore"});
  start = absl::Now();
  ASSERT_TRUE(WaitUntil([&] { return tunnel->Open(Soon()).ok(); }));
  EXPECT_LT(absl::Now() - start, absl::Seconds(5));
}

TEST_F(TunnelWan, HalfOpenLinkIsNoticedWithinTheKeepalives) {
  for (const bool through_jump : {false, true}) {
    SshTunnelOptions options = cluster_->Options();
    if (through_jump) {
      options.hosts = {cluster_->Direct("login")};
      options.jump = {cluster_->Wan("jump")};
    }
    const auto tunnel = Tunnel(options);
    auto stream = tunnel->Open(Soon());
    ASSERT_OK(stream);
    const absl::Time start = absl::Now();
    cluster_->Link({"half-open"});
    ASSERT_TRUE(WaitUntil([&] { return !(*stream)->alive(); }));
    EXPECT_LT(absl::Now() - start, absl::Seconds(8));
    EXPECT_THAT((*stream)->Diagnostics(), HasSubstr("nothing heard"));
    EXPECT_EQ(tunnel->Open(absl::Now() + absl::Seconds(2)).status().code(), absl::StatusCode::kUnavailable);
    cluster_->Link({"restore"});
    EXPECT_TRUE(WaitUntil([&] { return tunnel->Open(Soon()).ok(); }, absl::Seconds(40)));
  }
}

TEST_F(TunnelWan, FlappingLinkIsComeBackToEachTime) {
  SshTunnelOptions options = cluster_->Options();
  const auto tunnel = Tunnel(options);
  cluster_->Link({"flap", "2s", "300ms", "4"});
  int opened = 0, lost = 0;
  const absl::Time until = absl::Now() + absl::Seconds(9);
  while (absl::Now() < until) {
    auto stream = tunnel->Open(absl::Now() + absl::Seconds(5));
    if (!stream.ok()) {
      EXPECT_EQ(stream.status().code(), absl::StatusCode::kUnavailable) << stream.status();
      continue;
    }
    ++opened;
    if (WaitUntil([&] { return !(*stream)->alive(); }, absl::Seconds(4))) ++lost;
  }
  EXPECT_GE(opened, 2);
  EXPECT_GE(lost, 1);
  cluster_->Link({"restore"});
  EXPECT_TRUE(WaitUntil([&] { return tunnel->Open(Soon()).ok(); }, absl::Seconds(40)));
}

TEST_F(TunnelWan, SessionsKilledAndSecondLoginNodeTakesOver) {
  SshTunnelOptions options = cluster_->Options("hostname; exec cat");
  options.hosts.push_back(cluster_->Wan("login2"));
  const auto tunnel = Tunnel(options);
  const auto open = [&](std::unique_ptr<TunnelStream>* kept) {
    auto stream = tunnel->Open(Soon());
    EXPECT_OK(stream);
    if (!stream.ok()) return std::string();
    const FileDescriptor socket = (*stream)->TakeSocket();
    std::string name;
    char byte = 0;
    while (byte != '\n' && Ready(socket.get(), POLLIN) && recv(socket.get(), &byte, 1, 0) == 1) name.push_back(byte);
    if (kept != nullptr) *kept = *std::move(stream);
    return name;
  };
  std::unique_ptr<TunnelStream> stream;
  EXPECT_EQ(open(&stream), "login\n");
  cluster_->Tool("kill", {"sshd", "login"});
  cluster_->Tool("kill", {"sessions", "login"});
  ASSERT_TRUE(WaitUntil([&] { return !stream->alive(); }));
  EXPECT_EQ(open(nullptr), "login2\n");
  cluster_->Tool("start", {"sshd", "login"});
  EXPECT_EQ(open(nullptr), "login2\n");
}

TEST_F(TunnelWan, UploadSurvivesACutInTheMiddle) {
  testing::TempDirectory directory;
  const std::string bytes = Pattern(16 << 20);
  testing::WriteText(directory / "worker", bytes);
  bool harmed = false;
  const auto send = [&] {
    return UploadFile(cluster_->Options(), directory / "worker", "itwin/worker", 0755, Soon(), [&](int64_t sent, int64_t) {
      if (sent < (8 << 20) || harmed) return;
      harmed = true;
      cluster_->Link({"cut"});
    });
  };
  EXPECT_EQ(send().code(), absl::StatusCode::kUnavailable);
  ASSERT_TRUE(harmed);
  cluster_->Link({"restore"});
  ASSERT_OK(send());
  EXPECT_EQ(*Sha256OfFile(cluster_->Home() + "/itwin/worker"), Sha256Hex(bytes));
}

}  // namespace
}  // namespace itwin::server
