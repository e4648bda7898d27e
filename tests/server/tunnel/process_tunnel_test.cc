#include "server/tunnel/process_tunnel.h"

#include <sys/wait.h>

#include "tests/contract/tunnel_contract.h"

namespace itwin::server {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::HasSubstr;

std::unique_ptr<Tunnel> MakeShellTunnel(const std::string& command) {
  return std::make_unique<ProcessTunnel>(
      ProcessTunnelOptions{.argv = {"sh", "-c", command}, .env = {}, .grace = absl::Milliseconds(300)});
}

INSTANTIATE_TEST_SUITE_P(Process, TunnelContract,
                         ::testing::Values(TunnelHarness{"process", MakeShellTunnel}),
                         [](const auto& param) { return std::string(param.param.name); });

TEST(ProcessTunnel, ProgramThatDoesNotExistIsNamed) {
  ProcessTunnel tunnel({.argv = {"/nowhere/itwin-agent", "connect"}, .env = {}});
  EXPECT_THAT(tunnel.Open(absl::Now() + absl::Seconds(5)),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("/nowhere/itwin-agent")));
  EXPECT_EQ(tunnel.description(), "/nowhere/itwin-agent connect");
}

TEST(ProcessTunnel, LeavesNoChildBehind) {
  for (int i = 0; i < 10; ++i) {
    auto stream = MakeShellTunnel("exec cat")->Open(absl::Now() + absl::Seconds(5));
    ASSERT_OK(stream);
  }
  // No child at all, not even one that waits to be reaped.
  EXPECT_EQ(waitpid(-1, nullptr, WNOHANG), -1);
  EXPECT_EQ(errno, ECHILD);
}

TEST(ProcessTunnel, EnvironmentReachesTheProgram) {
  ProcessTunnel tunnel({.argv = {"sh", "-c", "printf %s \"$ITWIN_TEST_WORD\""}, .env = {{"ITWIN_TEST_WORD", "hello"}}});
  auto stream = tunnel.Open(absl::Now() + absl::Seconds(5));
  ASSERT_OK(stream);
  const FileDescriptor socket = (*stream)->TakeSocket();
  std::string got;
  char c;
  ASSERT_TRUE(testing::WaitUntil([&] {
    while (recv(socket.get(), &c, 1, 0) == 1) got.push_back(c);
    return got.size() >= 5;
  }));
  EXPECT_EQ(got, "hello");
}

}  // namespace
}  // namespace itwin::server
