// `itwin-agent run-attempt`, as a scheduler runs it.
#include "agent/scheduler/supervisor.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "agent/scheduler/lease.h"
#include "agent/scheduler/process_tree.h"
#include "agent/spool/lifecycle.h"
#include "common/files.h"
#include "common/sha256.h"
#include "common/subprocess.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::agent {
namespace {

using ::itwin::testing::TempDirectory;
using ::itwin::testing::WaitUntil;
using ::testing::HasSubstr;
using nlohmann::json;

class SupervisorTest : public ::testing::Test {
 protected:
  SupervisorTest() : directory_(root_.path(), *AttemptKey::Parse("00000000000000aa-1")) {
    request_.set_attempt(directory_.key().text());
    for (const std::string& path : {directory_.work_path(), directory_.outputs_path(), directory_.checkpoints_path()}) {
      EXPECT_OK(MakeDirectories(path));
    }
  }
  void Shell(const std::string& program) {
    for (const std::string& word : {std::string("/bin/sh"), std::string("-c"), program}) request_.add_argv(word);
  }
  Subprocess Start(std::vector<std::string> flags = {}, std::vector<std::pair<std::string, std::string>> env = {}) {
    EXPECT_OK(WriteFileAtomically(directory_.request_path(), request_.SerializeAsString()));
    SubprocessOptions options;
    options.argv = {std::string(getenv("ITWIN_BIN")) + "/itwin-agent", "run-attempt", "--grace", "1s"};
    options.argv.insert(options.argv.end(), flags.begin(), flags.end());
    options.argv.push_back(directory_.path());
    options.env = std::move(env);
    options.new_session = true;
    FileDescriptor log = *OpenFile(directory_.script_log_path(), O_WRONLY | O_CREAT | O_APPEND);
    options.stdout_fd = options.stderr_fd = log.get();
    return *Subprocess::Start(options);
  }
  ExitStatus Run(std::vector<std::string> flags = {}) {
    Subprocess process = Start(std::move(flags));
    const std::optional<ExitStatus> exit = process.Wait(absl::Now() + absl::Seconds(30));
    EXPECT_TRUE(exit.has_value());
    if (!exit) process.Kill(SIGKILL);
    return exit.value_or(ExitStatus{-1, 0});
  }
  Lifecycle Recorded() { return ReadLifecycle(directory_.lifecycle_path()); }
  bool WaitFor(const std::string& file) {
    return WaitUntil([&] { return !ReadFile(directory_.outputs_path() + "/" + file).value_or("").empty(); });
  }

  TempDirectory root_;
  AttemptDirectory directory_;
  v1::StartAttemptRequest request_;
};

TEST_F(SupervisorTest, RecordsStartAndEndAndListsTheOutputsOfACommand) {
  Shell("echo hello; echo oops >&2; pwd > \"$ITWIN_OUTPUTS/where\"; echo \"$ITWIN_ATTEMPT $GREETING\" > \"$ITWIN_OUTPUTS/who\"");
  (*request_.mutable_env())["GREETING"] = "good day";
  (*request_.mutable_env())["ITWIN_ATTEMPT"] = "forged";
  EXPECT_EQ(Run().exit_code, 0);
  EXPECT_EQ(*ReadFile(directory_.stdout_path()), "hello\n");
  EXPECT_EQ(*ReadFile(directory_.stderr_path()), "oops\n");
  EXPECT_EQ(*ReadFile(directory_.outputs_path() + "/where"), directory_.work_path() + "\n");
  EXPECT_EQ(*ReadFile(directory_.outputs_path() + "/who"), "00000000000000aa-1 good day\n");
  const Lifecycle lifecycle = Recorded();
  ASSERT_EQ(lifecycle.started.size(), 1u);
  EXPECT_EQ(lifecycle.started[0].host, HostName());
  ASSERT_TRUE(lifecycle.exited.has_value());
  EXPECT_EQ(lifecycle.exited->cause, "");
  EXPECT_GT(lifecycle.exited->max_rss_bytes, 100'000);
  const json result = json::parse(*ReadFile(directory_.result_path()));
  EXPECT_EQ(result["outcome"], "succeeded");
  ASSERT_EQ(result["outputs"].size(), 2u);
  EXPECT_EQ(result["outputs"][1]["path"], "who");
  EXPECT_EQ(result["outputs"][1]["sha256"], *Sha256OfFile(directory_.outputs_path() + "/who"));
  EXPECT_FALSE(FileExists(directory_.reserve_path()));
}

TEST_F(SupervisorTest, PassesExitCodeOnAndWritesNoResultOfAFailure) {
  Shell("exit 42");
  EXPECT_EQ(Run().exit_code, 42);
  EXPECT_EQ(Recorded().exited->exit_code, 42);
  EXPECT_FALSE(FileExists(directory_.result_path()));
}

TEST_F(SupervisorTest, ReportsSignalAndCpuTime) {
  Shell("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; kill -SEGV $$");
  EXPECT_EQ(Run().exit_code, 128 + SIGSEGV);
  EXPECT_EQ(Recorded().exited->signal, SIGSEGV);
  EXPECT_GT(Recorded().exited->cpu_seconds, 0.02);
}

TEST_F(SupervisorTest, KeepsAResultTheProgramWrote) {
  Shell("echo '{\"outcome\":\"succeeded\",\"mine\":1}' > \"$ITWIN_RESULT\"");
  EXPECT_EQ(Run().exit_code, 0);
  EXPECT_THAT(*ReadFile(directory_.result_path()), HasSubstr("mine"));
}

TEST_F(SupervisorTest, SaysWhatWasNotFound) {
  request_.add_argv("no-such-program-here");
  EXPECT_EQ(Run().exit_code, 127);
  EXPECT_EQ(Recorded().exited->cause, kCauseLaunchFailed);
  EXPECT_THAT(Recorded().exited->message, HasSubstr("'no-such-program-here' was not found in PATH"));
}

TEST_F(SupervisorTest, RunsAFileOfTheWorkingDirectoryOnlyWhenItIsExecutable) {
  request_.add_argv("./tool");
  ASSERT_OK(WriteFileAtomically(directory_.work_path() + "/tool", "#!/bin/sh\necho from tool\n", 0400));
  EXPECT_EQ(Run().exit_code, 127);
  EXPECT_THAT(Recorded().exited->message, HasSubstr("mark the input as executable"));
}

TEST_F(SupervisorTest, RunsAnExecutableInput) {
  request_.add_argv("./tool");
  ASSERT_OK(WriteFileAtomically(directory_.work_path() + "/tool", "#!/bin/sh\necho from tool\n", 0500));
  EXPECT_EQ(Run().exit_code, 0);
  EXPECT_EQ(*ReadFile(directory_.stdout_path()), "from tool\n");
}

TEST_F(SupervisorTest, EndsTheProgramAtTheWallLimit) {
  Shell("trap '' TERM; echo up > \"$ITWIN_OUTPUTS/up\"; echo $ITWIN_DEADLINE; while :; do tail -f /dev/null; done");
  request_.mutable_time()->set_seconds(1);
  const absl::Time before = absl::Now();
  EXPECT_EQ(Run().exit_code, 128 + SIGKILL);
  EXPECT_EQ(Recorded().exited->cause, kCauseTimeLimit);
  EXPECT_GE(absl::Now() - before, absl::Seconds(2));  // one of the limit, one of grace
  EXPECT_LT(absl::Now() - before, absl::Seconds(8));
  EXPECT_GE(std::stoll(*ReadFile(directory_.stdout_path())), absl::ToUnixSeconds(before));
}

TEST_F(SupervisorTest, CancelReachesAllProcessesAlsoThoseOfOtherSessions) {
  Shell("setsid sh -c \"trap '' TERM HUP; echo \\$\\$ > $ITWIN_OUTPUTS/far; while :; do tail -f /dev/null; done\" & "
        "echo $! > $ITWIN_OUTPUTS/near; wait");
  Subprocess process = Start();
  ASSERT_TRUE(WaitFor("far"));
  const ProcessIdentity far = IdentityOf(std::stoi(*ReadFile(directory_.outputs_path() + "/far")));
  ASSERT_TRUE(IsAlive(far));
  ASSERT_OK(WriteFileAtomically(directory_.cancelled_path(), "enough"));
  process.Kill(SIGTERM);
  ASSERT_TRUE(process.Wait(absl::Now() + absl::Seconds(20)).has_value());
  EXPECT_FALSE(IsAlive(far));
  EXPECT_EQ(Recorded().exited->cause, kCauseCancelled);
}

TEST_F(SupervisorTest, LeavesNoOrphanOfAProgramThatEnded) {
  Shell("setsid tail -f /dev/null > /dev/null 2>&1 & echo $! > \"$ITWIN_OUTPUTS/pid\"; exit 0");
  EXPECT_EQ(Run().exit_code, 0);
  EXPECT_FALSE(IsAlive(IdentityOf(std::stoi(*ReadFile(directory_.outputs_path() + "/pid")))));
}

TEST_F(SupervisorTest, ASignalFromOutsideIsNotOurCancel) {
  Shell("echo up > \"$ITWIN_OUTPUTS/up\"; exec tail -f /dev/null");
  Subprocess process = Start();
  ASSERT_TRUE(WaitFor("up"));
  process.Kill(SIGTERM);
  ASSERT_TRUE(process.Wait(absl::Now() + absl::Seconds(20)).has_value());
  EXPECT_EQ(Recorded().exited->cause, kCauseTerminated);
}

TEST_F(SupervisorTest, AProgramThatSavesItselfWhenToldToEndHasEndedByItself) {
  Shell("trap 'exit 85' TERM; echo up > \"$ITWIN_OUTPUTS/up\"; tail -f /dev/null & wait");
  Subprocess process = Start();
  ASSERT_TRUE(WaitFor("up"));
  process.Kill(SIGTERM);
  ASSERT_EQ(process.Wait(absl::Now() + absl::Seconds(20)).value().exit_code, 85);
  EXPECT_EQ(Recorded().exited->cause, "");
  EXPECT_EQ(Recorded().exited->exit_code, 85);
}

TEST_F(SupervisorTest, Usr1AsksToSaveAndStop) {
  Shell("echo up > \"$ITWIN_OUTPUTS/up\"; while [ ! -e \"$ITWIN_STOP\" ]; do :; done; exit 85");
  Subprocess process = Start();
  ASSERT_TRUE(WaitFor("up"));
  process.Kill(SIGUSR1);
  EXPECT_EQ(process.Wait(absl::Now() + absl::Seconds(20)).value().exit_code, 85);
}

TEST_F(SupervisorTest, DoesNotStartWhatWasCancelledBefore) {
  Shell("echo ran > \"$ITWIN_OUTPUTS/ran\"");
  ASSERT_OK(WriteFileAtomically(directory_.cancelled_path(), ""));
  Run();
  EXPECT_FALSE(FileExists(directory_.outputs_path() + "/ran"));
  EXPECT_TRUE(Recorded().started.empty());
  EXPECT_EQ(Recorded().exited->cause, kCauseCancelled);
}

TEST_F(SupervisorTest, OfManyCopiesExactlyOneRuns) {
  Shell("echo ran >> \"$ITWIN_OUTPUTS/runs\"");
  std::vector<Subprocess> copies;
  for (int i = 0; i < 12; ++i) copies.push_back(Start());
  for (Subprocess& copy : copies) ASSERT_TRUE(copy.Wait(absl::Now() + absl::Seconds(30)).has_value());
  EXPECT_EQ(*ReadFile(directory_.outputs_path() + "/runs"), "ran\n");
  EXPECT_EQ(Recorded().started.size(), 1u);
  EXPECT_EQ(Recorded().duplicates, 11);
  EXPECT_EQ(Recorded().bad_lines, 0);
}

TEST_F(SupervisorTest, AGigabyteOfOutputIsBoundedCountedAndQuick) {
  Shell("head -c 1000000000 /dev/zero; echo done >&2");
  request_.set_log_limit_bytes(1 << 20);
  const absl::Time before = absl::Now();
  EXPECT_EQ(Run().exit_code, 0);
  EXPECT_LT(absl::Now() - before, absl::Seconds(15));
  const auto size = std::filesystem::file_size(directory_.stdout_path());
  EXPECT_GT(size, 1u << 20);
  EXPECT_LT(size, (1u << 20) + 300);
  const std::string end = *ReadFileRange(directory_.stdout_path(), 1 << 20, 1000);
  EXPECT_THAT(end, HasSubstr("limit of 1048576 bytes; what follows is not kept"));
  const json dropped = json::parse(*ReadFile(directory_.dropped_path()));
  EXPECT_EQ(dropped["stdout"].get<int64_t>(), 1'000'000'000 - (1 << 20));
  EXPECT_EQ(dropped["stderr"], 0);
  EXPECT_EQ(*ReadFile(directory_.stderr_path()), "done\n");
}

TEST_F(SupervisorTest, LaunchesRanksUnderMpi) {
  request_.set_mpi(true);
  request_.set_ranks_per_node(2);
  Shell("echo rank $OMPI_COMM_WORLD_RANK of $OMPI_COMM_WORLD_SIZE threads $OMP_NUM_THREADS");
  ASSERT_EQ(Run().exit_code, 0) << *ReadFile(directory_.stderr_path());
  EXPECT_THAT(*ReadFile(directory_.stdout_path()), HasSubstr("rank 0 of 2"));
  EXPECT_THAT(*ReadFile(directory_.stdout_path()), HasSubstr("rank 1 of 2"));
}

TEST_F(SupervisorTest, OneKilledRankEndsAll) {
  request_.set_mpi(true);
  request_.set_ranks_per_node(2);
  Shell("[ $OMPI_COMM_WORLD_RANK = 1 ] && kill -KILL $$; exec tail -f /dev/null");
  EXPECT_NE(Run().exit_code, 0);
  EXPECT_EQ(Recorded().exited->cause, "");
  EXPECT_TRUE(ProcessesMarked("ITWIN_LEASE=" + ReadLease(directory_)->nonce, 0).empty());
}

// For real, where this test may make a control group of version 1 or 2 with a limit.
TEST_F(SupervisorTest, SaysOutOfMemoryOnTheKernelsEvidence) {
  const std::string name = "itwin-test-" + std::to_string(getpid());
  std::string group, limit;
  for (const auto& [parent, file] : {std::pair<std::string, std::string>{"/sys/fs/cgroup/memory/", "memory.limit_in_bytes"},
                                     {"/sys/fs/cgroup/", "memory.max"}}) {
    if (mkdir((parent + name).c_str(), 0700) != 0) continue;
    if (access((parent + name + "/" + file).c_str(), W_OK) == 0) {
      group = parent + name;
      limit = group + "/" + file;
      break;
    }
    rmdir((parent + name).c_str());
  }
  if (group.empty()) GTEST_SKIP() << "no control group with a memory limit can be made here";
  if (getenv("ITWIN_SANITIZED") != nullptr) GTEST_SKIP() << "a sanitizer's own memory is more than the limit";
  const auto write = [](const std::string& path, const std::string& text) {
    FileDescriptor file = *OpenFile(path, O_WRONLY);
    EXPECT_OK(WriteAll(file.get(), text, path));
  };
  write(limit, std::to_string(96 << 20));
  Shell("head -c 1G /dev/zero | tail -c 1G | wc -c; kill -KILL $$");  // tail keeps it all
  EXPECT_OK(WriteFileAtomically(directory_.request_path(), request_.SerializeAsString()));
  SubprocessOptions options;
  options.argv = {"/bin/sh", "-c", "echo $$ > " + group + "/cgroup.procs && exec \"$0\" run-attempt --grace 1s \"$1\"",
                  std::string(getenv("ITWIN_BIN")) + "/itwin-agent", directory_.path()};
  auto process = Subprocess::Start(options);
  ASSERT_OK(process);
  EXPECT_TRUE(process->Wait(absl::Now() + absl::Seconds(60)).has_value());
  WaitUntil([&] { return rmdir(group.c_str()) == 0; });
  const auto exited = ReadLifecycle(directory_.lifecycle_path()).exited;
  ASSERT_TRUE(exited.has_value());
  EXPECT_EQ(exited->cause, kCauseOutOfMemory);
  EXPECT_THAT(exited->message, HasSubstr("for lack of memory"));
}

TEST_F(SupervisorTest, AKillAloneIsNotOutOfMemory) {
  Shell("kill -KILL $$");
  Run();
  const auto exited = ReadLifecycle(directory_.lifecycle_path()).exited;
  ASSERT_TRUE(exited.has_value());
  EXPECT_EQ(exited->signal, SIGKILL);
  EXPECT_EQ(exited->cause, kCauseSelf);
}

TEST_F(SupervisorTest, SaysWhenTheLauncherIsMissing) {
  request_.set_mpi(true);
  Shell("true");
  EXPECT_EQ(Run({"--launcher", "no-such-mpirun -n {ranks}"}).exit_code, 127);
  EXPECT_THAT(Recorded().exited->message, HasSubstr("no-such-mpirun"));
}

TEST_F(SupervisorTest, WithoutSpaceForTheLeaseNothingStarts) {
  Shell("echo ran > \"$ITWIN_OUTPUTS/ran\"");
  if (geteuid() != 0) chmod(directory_.path().c_str(), 0500);
  // Root may write anywhere; for it the place of the lease is taken by a file.
  if (geteuid() == 0) {
    ASSERT_OK(WriteFileAtomically(directory_.lease_path(), ""));
  }
  Run();
  chmod(directory_.path().c_str(), 0700);
  EXPECT_FALSE(FileExists(directory_.outputs_path() + "/ran"));
}

}  // namespace
}  // namespace itwin::agent
