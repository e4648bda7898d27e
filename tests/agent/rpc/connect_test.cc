// `itwin-agent connect`, `stop`, `status`: real processes.
#include "agent/rpc/connect.h"

#include <sys/socket.h>

#include <fstream>
#include <filesystem>

#include "absl/strings/match.h"
#include "tests/agent/agent_harness.h"

namespace itwin::testing {
namespace {

using namespace agent;  // NOLINT: the wire's names
namespace v1 = agent::v1;  // not itwin::v1, should a header bring it
using ::testing::HasSubstr;

struct Client {
  Subprocess process;
  FileDescriptor ours;
};

class ConnectTest : public ::testing::Test {
 protected:
  ~ConnectTest() override { (void)Command({"stop", "--root", root_.path(), "--kill-jobs"}); }

  CommandOutput Command(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), AgentProgram());
    auto out = RunCommand({.argv = std::move(arguments)}, absl::Seconds(30));
    EXPECT_OK(out);
    return out.ok() ? *out : CommandOutput{};
  }
  Client Connect(std::vector<std::string> flags = {}) {
    int fds[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    const FileDescriptor theirs(fds[1]);
    SubprocessOptions options;
    options.argv = {AgentProgram(), "connect", "--root", root_.path()};
    options.argv.insert(options.argv.end(), flags.begin(), flags.end());
    options.stdin_fd = options.stdout_fd = theirs.get();
    return {*Subprocess::Start(options), FileDescriptor(fds[0])};
  }
  absl::StatusOr<v1::HelloResponse> Hello(Client& client) {
    const int fd = fcntl(client.ours.get(), F_DUPFD_CLOEXEC, 3);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    auto stub = v1::Agent::NewStub(grpc::CreateInsecureChannelFromFd("agent", fd));
    grpc::ClientContext context;
    AgentHarness::Limit(&context);
    v1::HelloRequest request;
    request.set_protocol(1);
    v1::HelloResponse response;
    const absl::Status status = FromGrpc(stub->Hello(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
  int Daemons() {
    int count = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      std::ifstream in(entry.path() / "cmdline");
      std::string line((std::istreambuf_iterator<char>(in)), {});
      count += absl::StrContains(line, std::string("serve\0--detached", 16)) && absl::StrContains(line, root_.path());
    }
    return count;
  }
  bool Gone(pid_t pid) {
    const ProcessIdentity identity = IdentityOf(pid);
    return WaitUntil([&] { return !IsAlive(identity); });
  }
  TempDirectory root_;
};

TEST_F(ConnectTest, ManyAtOnceStartOneDaemonAndAllReachIt) {
  std::vector<Client> clients;
  for (int i = 0; i < 16; ++i) clients.push_back(Connect());
  for (Client& client : clients) {
    const auto hello = Hello(client);
    ASSERT_OK(hello);
    EXPECT_EQ(hello->spool(), root_.path());
  }
  EXPECT_EQ(Daemons(), 1);
}

TEST_F(ConnectTest, LeavesWithItsCaller) {
  Client client = Connect();
  ASSERT_OK(Hello(client));
  client.ours.Reset();
  EXPECT_TRUE(client.process.Wait(absl::Now() + absl::Seconds(10)).has_value());
  EXPECT_EQ(Daemons(), 1) << "the daemon stays";
}

TEST_F(ConnectTest, LeavesWithTheDaemonAndTheNextStartsAnother) {
  Client client = Connect();
  ASSERT_OK(Hello(client));
  const pid_t first = ReadOwnerRecord(root_.path())->process.pid;
  kill(first, SIGKILL);
  ASSERT_TRUE(client.process.Wait(absl::Now() + absl::Seconds(10)).has_value());
  Client next = Connect();
  ASSERT_OK(Hello(next));
  EXPECT_NE(ReadOwnerRecord(root_.path())->process.pid, first);
}

TEST_F(ConnectTest, AWrongByteStreamDoesNotHurtTheDaemon) {
  Client wild = Connect();
  const std::string noise(100'000, '\xff');
  (void)!send(wild.ours.get(), noise.data(), noise.size(), MSG_NOSIGNAL);
  EXPECT_TRUE(wild.process.Wait(absl::Now() + absl::Seconds(20)).has_value());
  Client good = Connect();
  EXPECT_OK(Hello(good));
  EXPECT_EQ(Daemons(), 1);
}

TEST_F(ConnectTest, TheSocketIsPrivateAlsoWhenThePathIsTooLong) {
  const std::string deep = root_.path() + "/" + std::string(120, 'd');
  const auto out = RunCommand({.argv = {AgentProgram(), "connect", "--root", deep}}, absl::Seconds(20));
  ASSERT_OK(out);
  const auto owner = ReadOwnerRecord(deep);
  ASSERT_TRUE(owner.has_value()) << out->err;
  EXPECT_LT(owner->socket.size(), 108u);
  struct stat info;
  ASSERT_EQ(stat(std::filesystem::path(owner->socket).parent_path().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
  Command({"stop", "--root", deep});
  std::error_code ignored;
  std::filesystem::remove_all(std::filesystem::path(owner->socket).parent_path(), ignored);
}

TEST_F(ConnectTest, AnIdleDaemonEndsWhenAskedTo) {
  Client client = Connect({"--idle-exit", "300ms"});
  ASSERT_OK(Hello(client));
  const pid_t pid = ReadOwnerRecord(root_.path())->process.pid;
  EXPECT_TRUE(IsAlive(IdentityOf(pid)));
  client.ours.Reset();
  EXPECT_TRUE(Gone(pid));
}

TEST_F(ConnectTest, ASecondDaemonIsRefused) {
  Client client = Connect();
  ASSERT_OK(Hello(client));
  const CommandOutput second = Command({"serve", "--root", root_.path()});
  EXPECT_EQ(second.exit.exit_code, 3);
  EXPECT_THAT(second.err, HasSubstr("serves " + root_.path() + " already"));
}

TEST_F(ConnectTest, ABadOptionIsToldToTheCaller) {
  const CommandOutput out = Command({"connect", "--root", root_.path(), "--launcher", "'open"});
  EXPECT_EQ(out.exit.exit_code, 1);
  EXPECT_THAT(out.err, HasSubstr("a quote is not closed"));
}

TEST_F(ConnectTest, StopAndStatusSayWhatIs) {
  EXPECT_THAT(Command({"status", "--root", root_.path()}).out, HasSubstr("no agent runs"));
  EXPECT_THAT(Command({"status", "--root", root_.path(), "--json"}).out, HasSubstr("\"running\":false"));
  EXPECT_THAT(Command({"stop", "--root", root_.path()}).out, HasSubstr("no agent runs"));
  Client client = Connect({"--slots", "3"});
  ASSERT_OK(Hello(client));
  EXPECT_THAT(Command({"status", "--root", root_.path()}).out, HasSubstr("0 of 3 slots"));
  EXPECT_THAT(Command({"status", "--root", root_.path(), "--json"}).out, HasSubstr("\"slots\":3"));
  EXPECT_THAT(Command({"stop", "--root", root_.path()}).out, HasSubstr("was stopped"));
  EXPECT_EQ(Daemons(), 0);
}

TEST_F(ConnectTest, StopWithKillJobsEndsTheJobs) {
  Client client = Connect({"--grace", "1s"});
  ASSERT_OK(Hello(client));
  const int fd = fcntl(client.ours.get(), F_DUPFD_CLOEXEC, 3);
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  Client another = Connect();
  const int other = fcntl(another.ours.get(), F_DUPFD_CLOEXEC, 3);
  fcntl(other, F_SETFL, fcntl(other, F_GETFL) | O_NONBLOCK);
  close(fd);
  auto stub = v1::Agent::NewStub(grpc::CreateInsecureChannelFromFd("agent", other));
  grpc::ClientContext context;
  AgentHarness::Limit(&context);
  v1::AttemptStatus status;
  ASSERT_OK(FromGrpc(stub->StartAttempt(&context, AgentHarness::Shell("00000000000000aa-1", "exec tail -f /dev/null"), &status)));
  const AttemptDirectory directory(root_.path(), *AttemptKey::Parse("00000000000000aa-1"));
  ASSERT_TRUE(WaitUntil([&] { return !ReadLifecycle(directory.lifecycle_path()).started.empty(); }));
  EXPECT_THAT(Command({"stop", "--root", root_.path(), "--kill-jobs"}).out, HasSubstr("1 unfinished attempts cancelled"));
  EXPECT_EQ(ReadLifecycle(directory.lifecycle_path()).exited->cause, kCauseCancelled);
}

}  // namespace
}  // namespace itwin::testing
