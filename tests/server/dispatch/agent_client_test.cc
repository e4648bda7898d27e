// The gateway's side of the wire against a real itwin-agent.
#include "server/dispatch/agent_client.h"

#include <signal.h>

#include <filesystem>
#include <regex>
#include <thread>

#include "common/subprocess.h"
#include "server/tunnel/process_tunnel.h"
#include "tests/testing/sshd.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::server {
namespace {

absl::Time Soon() { return absl::Now() + absl::Minutes(2); }

class AgentClientTest : public ::testing::Test {
 protected:
  ~AgentClientTest() override {
    if (const pid_t pid = Daemon(); pid > 0) kill(pid, SIGCONT);
    SubprocessOptions stop;
    stop.argv = {Program(), "stop", "--root", root_.path(), "--kill-jobs"};
    RunCommand(stop, absl::Seconds(30)).status().IgnoreError();  // there may be none
  }
  static std::string Program() { return std::string(getenv("ITWIN_BIN")) + "/itwin-agent"; }
  pid_t Daemon() const {
    const std::string record = testing::ReadText(root_ / "agent.json");
    std::smatch pid;
    return std::regex_search(record, pid, std::regex("\"pid\"\\s*:\\s*(\\d+)")) ? static_cast<pid_t>(std::stol(pid[1])) : -1;
  }
  std::unique_ptr<AgentClient> Connect(const AgentClientOptions& options) {
    ProcessTunnel tunnel({.argv = {Program(), "connect", "--root", root_.path()}, .env = {}});
    auto stream = tunnel.Open(Soon());
    EXPECT_OK(stream);
    auto client = MakeGrpcAgentClient(*std::move(stream), options);
    agent::v1::HelloRequest hello;
    hello.set_protocol(1);
    hello.set_gateway_id("test");
    EXPECT_OK(client->Hello(hello, Soon()));
    return client;
  }
  testing::TempDirectory root_;
};

TEST_F(AgentClientTest, SilentConnectionThatAnswersPingsStays) {
  const auto client = Connect({.keepalive_time = absl::Seconds(1), .keepalive_timeout = absl::Seconds(10)});
  auto follow = client->Follow();
  ASSERT_OK(follow);
  // Far more pings than an agent that did not expect them would stand.
  std::thread ender([&] {
    EXPECT_FALSE(testing::WaitUntil([] { return false; }, absl::Seconds(6)));
    (*follow)->Cancel();
  });
  agent::v1::FollowResponse response;
  const absl::Time start = absl::Now();
  EXPECT_FALSE((*follow)->Read(&response));
  EXPECT_GE(absl::Now() - start, absl::Seconds(5)) << (*follow)->Finish();
  ender.join();
  EXPECT_OK(client->StatInputs({}, Soon()));
}

TEST_F(AgentClientTest, FrozenAgentIsNoticedByPings) {
  const auto client = Connect({.keepalive_time = absl::Seconds(1), .keepalive_timeout = absl::Seconds(1)});
  auto follow = client->Follow();
  ASSERT_OK(follow);
  ASSERT_GT(Daemon(), 0);
  kill(Daemon(), SIGSTOP);
  const absl::Time start = absl::Now();
  agent::v1::FollowResponse response;
  EXPECT_FALSE((*follow)->Read(&response));
  EXPECT_EQ((*follow)->Finish().code(), absl::StatusCode::kUnavailable) << (*follow)->Finish();
  EXPECT_LT(absl::Now() - start, absl::Seconds(15));
}

}  // namespace
}  // namespace itwin::server
