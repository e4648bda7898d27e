// The program itself: terminal or not, Ctrl-C, broken pipe.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/subprocess.h"
#include "server/certificates.h"
#include "tests/client/gateway_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin {
namespace {

using ::itwin::testing::FakeGateway;
using ::itwin::testing::GatewayServer;
using ::itwin::testing::TempDirectory;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kJob[] = "0123456789abcdef";

class ProgramTest : public ::testing::Test {
 protected:
  ProgramTest() {
    const server::KeyAndCertificate authority = server::MakeAuthority("test", absl::Now()).value();
    const server::KeyAndCertificate certificate = server::IssueServerCertificate(authority, {"localhost"}, absl::Now()).value();
    server_ = std::make_unique<GatewayServer>(&fake_, certificate.key_pem, certificate.certificate_pem, "token-of-test");
    EXPECT_OK(WriteFileAtomically(directory_ / "ca.pem", authority.certificate_pem));
    EXPECT_OK(WriteFileAtomically(directory_ / "token", "token-of-test\n"));
    EXPECT_OK(WriteFileAtomically(directory_ / "config.yaml", "endpoint: " + server_->endpoint() + "\nca_file: ca.pem\ntoken_file: token\n"));
  }
  SubprocessOptions Options(std::vector<std::string> arguments) {
    fake_.Arranged();
    SubprocessOptions options{.argv = {absl::StrCat(getenv("ITWIN_BIN"), "/itwin")}, .directory = directory_.path(), .env = {}};
    options.argv.insert(options.argv.end(), arguments.begin(), arguments.end());
    options.env = {{"ITWIN_CONFIG", directory_ / "config.yaml"}, {"LC_ALL", "C.UTF-8"}, {"TERM", "xterm"}, {"NO_COLOR", ""}};
    return options;
  }
  // An endless watch: one update, then the stream closes, again and again.
  void AddRunningJob() {
    fake_.AddJob(kJob);
    *fake_.AddUpdate(kJob).mutable_job() = fake_.jobs[kJob];
  }

  TempDirectory directory_;
  FakeGateway fake_;
  std::unique_ptr<GatewayServer> server_;
};

// Reads from a descriptor until the text appears.
bool ReadUntil(int fd, const std::string& text, std::string* got) {
  const absl::Time end = absl::Now() + absl::Seconds(20);
  fcntl(fd, F_SETFL, O_NONBLOCK);
  while (got->find(text) == std::string::npos && absl::Now() < end) {
    pollfd entry{fd, POLLIN, 0};
    poll(&entry, 1, 100);
    char buffer[4096];
    const ssize_t n = read(fd, buffer, sizeof buffer);
    if (n > 0) got->append(buffer, static_cast<size_t>(n));
    if (n == 0) break;
  }
  return got->find(text) != std::string::npos;
}

TEST_F(ProgramTest, TalksToAGatewayOverTls) {
  absl::StatusOr<CommandOutput> output = RunCommand(Options({"version"}), absl::Seconds(20));
  ASSERT_OK(output);
  EXPECT_EQ(output->exit.exit_code, 0) << output->err;
  EXPECT_THAT(output->out, HasSubstr("gateway 0.1.0"));
  output = RunCommand(Options({"status", "beef"}), absl::Seconds(20));
  EXPECT_EQ(output->exit.exit_code, 3);
  EXPECT_THAT(output->err, AllOf(HasSubstr("itwin: no job 'beef'"), Not(HasSubstr("token-of-test"))));
  server_->Stop();
  output = RunCommand(Options({"version", "--timeout", "300ms"}), absl::Seconds(20));
  EXPECT_EQ(output->exit.exit_code, 5);
  EXPECT_THAT(output->err, AllOf(HasSubstr("cannot reach the gateway at localhost:"), Not(HasSubstr("token-of-test"))));
}

TEST_F(ProgramTest, CtrlCLeavesTheJobAloneAndSaysSo) {
  AddRunningJob();
  int master = -1, slave = -1;
  winsize size{};
  size.ws_col = 80;
  size.ws_row = 24;
  ASSERT_EQ(openpty(&master, &slave, nullptr, nullptr, &size), 0);
  FileDescriptor master_fd(master), slave_fd(slave);
  SubprocessOptions options = Options({"watch", kJob});
  options.stdout_fd = slave;
  options.stderr_fd = slave;
  absl::StatusOr<Subprocess> child = Subprocess::Start(options);
  ASSERT_OK(child);
  slave_fd.Reset();
  std::string got;
  ASSERT_TRUE(ReadUntil(master, "RUNNING", &got)) << got;
  EXPECT_THAT(got, HasSubstr("\x1b[36mRUNNING"));  // a terminal: colour, drawn in place
  child->Kill(SIGINT);
  std::optional<ExitStatus> exit = child->Wait(absl::Now() + absl::Seconds(20));
  ASSERT_TRUE(exit.has_value());
  EXPECT_EQ(exit->exit_code, 130);
  EXPECT_TRUE(ReadUntil(master, "itwin cancel 0123456789abcdef", &got)) << got;
  EXPECT_THAT(got, HasSubstr("The job goes on without this watch"));
  EXPECT_FALSE(fake_.jobs[kJob].cancel_requested());
}

TEST_F(ProgramTest, PrintsPlainLinesIntoAPipe) {
  AddRunningJob();
  v1::JobUpdate& last = fake_.AddUpdate(kJob);
  *last.mutable_job() = fake_.jobs[kJob];
  last.mutable_job()->set_state(v1::JOB_STATE_SUCCEEDED);
  absl::StatusOr<CommandOutput> output = RunCommand(Options({"watch", kJob}), absl::Seconds(20));
  ASSERT_OK(output);
  EXPECT_EQ(output->exit.exit_code, 0);
  EXPECT_THAT(output->out, AllOf(HasSubstr(" RUNNING\n"), HasSubstr(" SUCCEEDED\n"), Not(HasSubstr("\x1b"))));
}

TEST_F(ProgramTest, SaysWhenItsOutputCannotBeWritten) {
  absl::StatusOr<FileDescriptor> full = OpenFile("/dev/full", O_WRONLY);
  ASSERT_OK(full);
  SubprocessOptions options = Options({"version"});
  options.stdout_fd = full->get();
  absl::StatusOr<Subprocess> child = Subprocess::Start(options);
  ASSERT_OK(child);
  EXPECT_EQ(child->Wait(absl::Now() + absl::Seconds(20))->exit_code, 6);
}

}  // namespace
}  // namespace itwin
