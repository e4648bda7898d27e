#include "common/subprocess.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <signal.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin {
namespace {

using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::HasSubstr;

SubprocessOptions Shell(const std::string& script) { return {.argv = {"/bin/sh", "-c", script}, .directory = "", .env = {}}; }

TEST(RunCommand, ReturnsOutputAndExit) {
  absl::StatusOr<CommandOutput> output = RunCommand(Shell("echo out; echo err >&2; exit 7"), absl::Seconds(20));
  ASSERT_OK(output);
  EXPECT_EQ(output->out, "out\n");
  EXPECT_EQ(output->err, "err\n");
  EXPECT_EQ(output->exit.exit_code, 7);
  EXPECT_EQ(output->exit.signal, 0);
  EXPECT_FALSE(output->truncated);
}

TEST(RunCommand, PassesArgumentsWithoutAShell) {
  absl::StatusOr<CommandOutput> output =
      RunCommand({.argv = {"printf", "%s|", "a b", "$HOME", "'q'", "", "x\ny"}, .directory = "", .env = {}}, absl::Seconds(20));
  ASSERT_OK(output);
  EXPECT_EQ(output->out, "a b|$HOME|'q'||x\ny|");
}

TEST(RunCommand, ReportsTheSignal) {
  absl::StatusOr<CommandOutput> output = RunCommand(Shell("kill -9 $$"), absl::Seconds(20));
  ASSERT_OK(output);
  EXPECT_EQ(output->exit.signal, SIGKILL);
}

TEST(RunCommand, IsBounded) {
  absl::StatusOr<CommandOutput> output =
      RunCommand(Shell("head -c 300000 /dev/zero; head -c 10 /dev/zero >&2"), absl::Seconds(20), 1000);
  ASSERT_OK(output);
  EXPECT_EQ(output->out.size(), 1000u);
  EXPECT_EQ(output->err.size(), 10u);
  EXPECT_TRUE(output->truncated);
}

TEST(RunCommand, KillsTheWholeGroupAtTheLimit) {
  TempDirectory directory;
  const absl::Time start = absl::Now();
  EXPECT_THAT(RunCommand(Shell("tail -f /dev/null & echo $! > '" + directory / "pid" + "'; tail -f /dev/null"),
                         absl::Milliseconds(500)),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("did not end within 500ms")));
  EXPECT_LT(absl::Now() - start, absl::Seconds(10));
  int pid = 0;
  ASSERT_TRUE(absl::SimpleAtoi(ReadFile(directory / "pid").value(), &pid));
  // gone, or a zombie whose parent has not looked yet
  EXPECT_TRUE(testing::WaitUntil([&] {
    if (kill(pid, 0) != 0) return true;
    const auto stat = ReadFile(absl::StrCat("/proc/", pid, "/stat"));
    return !stat.ok() || stat->find(") Z") != std::string::npos;
  }));
}

TEST(Subprocess, SaysWhatCannotBeRun) {
  TempDirectory directory;
  EXPECT_THAT(Subprocess::Start({.argv = {"no-such-program-anywhere"}, .directory = "", .env = {}}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no-such-program-anywhere")));
  EXPECT_THAT(Subprocess::Start({.argv = {}, .directory = "", .env = {}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("name of a program")));
  ASSERT_OK(WriteFileAtomically(directory / "data", "x"));
  EXPECT_THAT(Subprocess::Start({.argv = {directory / "data"}, .directory = "", .env = {}}),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("data")));
  EXPECT_THAT(Subprocess::Start({.argv = {"true"}, .directory = directory / "none", .env = {}}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
}

TEST(Subprocess, GivesDirectoryEnvironmentAndDescriptors) {
  TempDirectory directory;
  setenv("ITWIN_TEST_INHERITED", "yes", 1);
  setenv("ITWIN_TEST_REPLACED", "old", 1);
  SubprocessOptions options = Shell("pwd; echo $ITWIN_TEST_INHERITED $ITWIN_TEST_REPLACED $ITWIN_TEST_NEW");
  options.directory = directory.path();
  options.env = {{"ITWIN_TEST_REPLACED", "new"}, {"ITWIN_TEST_NEW", "a=b c"}};
  EXPECT_EQ(RunCommand(options, absl::Seconds(20))->out, directory.path() + "\nyes new a=b c\n");
  options.clear_env = true;
  EXPECT_EQ(RunCommand(options, absl::Seconds(20))->out, directory.path() + "\nnew a=b c\n");
}

TEST(Subprocess, LeavesNoDescriptorsOpenInTheChild) {
  TempDirectory directory;
  FileDescriptor leak = std::move(OpenFile(directory / "x", O_RDWR | O_CREAT)).value();
  absl::StatusOr<CommandOutput> output = RunCommand(Shell("ls -l /proc/self/fd"), absl::Seconds(20));
  ASSERT_OK(output);
  EXPECT_THAT(output->out, ::testing::Not(HasSubstr(directory.path())));
}

TEST(Subprocess, ResetsSignalsInTheChild) {
  signal(SIGPIPE, SIG_IGN);
  sigset_t set, before;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &set, &before);
  absl::StatusOr<CommandOutput> output = RunCommand(Shell("kill -TERM $$; echo still here"), absl::Seconds(20));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ASSERT_OK(output);
  EXPECT_EQ(output->exit.signal, SIGTERM);
  EXPECT_EQ(output->out, "");
}

TEST(Subprocess, CanBePolledKilledAndWaitedFor) {
  absl::StatusOr<Subprocess> child = Subprocess::Start({.argv = {"tail", "-f", "/dev/null"}, .directory = "", .env = {}});
  ASSERT_OK(child);
  EXPECT_FALSE(child->Poll().has_value());
  EXPECT_FALSE(child->Wait(absl::Now() + absl::Milliseconds(20)).has_value());
  child->Kill(SIGTERM);
  std::optional<ExitStatus> exit = child->Wait(absl::Now() + absl::Seconds(20));
  ASSERT_TRUE(exit.has_value());
  EXPECT_EQ(exit->signal, SIGTERM);
  EXPECT_EQ(child->Poll()->signal, SIGTERM);  // again
  child->Kill(SIGKILL);                       // harmless
}

}  // namespace
}  // namespace itwin
