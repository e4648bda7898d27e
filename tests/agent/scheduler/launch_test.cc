#include "agent/scheduler/launch.h"

#include <unistd.h>

#include <gtest/gtest.h>

#include "common/files.h"
#include "common/subprocess.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(SplitCommandLine, SplitsAsAShellWould) {
  EXPECT_THAT(*SplitCommandLine("  a 'b c' \"d \\\" e\" f\\ g '' "), ElementsAre("a", "b c", "d \" e", "f g", ""));
  EXPECT_THAT(SplitCommandLine("a 'b"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not closed")));
}

TEST(ShellQuote, IsOneWordToARealShell) {
  const std::string nasty = "a'b\"c $HOME `id` \\ ;|&\nx";
  const auto out = RunCommand({.argv = {"/bin/sh", "-c", "printf %s " + ShellQuote(nasty)}}, absl::Seconds(10));
  ASSERT_OK(out);
  EXPECT_EQ(out->out, nasty);
}

TEST(LaunchCommand, FillsInTheRanks) {
  const AttemptDirectory directory("/r", *AttemptKey::Parse("00000000000000aa-1"));
  v1::StartAttemptRequest request;
  request.set_train(true);
  request.set_nodes(2);
  request.set_ranks_per_node(4);
  EXPECT_THAT(*LaunchCommand(directory, request, {.worker = "/w", .launcher = "run -n {ranks} -N {nodes}"}),
              ElementsAre("run", "-n", "8", "-N", "2", "/w", "--spec", "/r/00000000000000aa/1/spec.json", "--spool",
                          "/r/00000000000000aa/1"));
  EXPECT_THAT(LaunchCommand(directory, request, {}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no itwin-worker")));
}

TEST(LaunchCommand, ACommandWithoutMpiRunsAsItIs) {
  const AttemptDirectory directory("/r", *AttemptKey::Parse("00000000000000aa-1"));
  v1::StartAttemptRequest request;
  EXPECT_THAT(LaunchCommand(directory, request, {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("empty")));
  request.add_argv("x");
  request.add_argv("y z");
  EXPECT_THAT(*LaunchCommand(directory, request, {}), ElementsAre("x", "y z"));
}

TEST(LaunchEnvironment, TheContractWinsOverTheUser) {
  const AttemptDirectory directory("/r", *AttemptKey::Parse("00000000000000aa-2"));
  v1::StartAttemptRequest request;
  request.set_resume_attempt("00000000000000aa-1");
  request.set_cpus_per_rank(3);
  (*request.mutable_env())["ITWIN_SPEC"] = "forged";
  (*request.mutable_env())["A"] = "b";
  const auto env = LaunchEnvironment(directory, request, "nonce", absl::FromUnixSeconds(77));
  EXPECT_EQ(env.at("ITWIN_SPEC"), directory.spec_path());
  EXPECT_EQ(env.at("A"), "b");
  EXPECT_EQ(env.at("ITWIN_DEADLINE"), "77");
  EXPECT_EQ(env.at("ITWIN_RESUME"), "/r/00000000000000aa/1/checkpoints");
  EXPECT_EQ(env.at("OMP_NUM_THREADS"), "3");
  EXPECT_FALSE(env.contains("PRTE_ALLOW_RUN_AS_ROOT"));  // no ranks
}

TEST(LaunchEnvironment, TrainingMayGoOnFromOlderAttemptsOfTheJobWhereTheNewestIsDamaged) {
  const testing::TempDirectory root;
  const std::string job = root.path() + "/00000000000000aa/";
  for (const char* attempt : {"1", "3", "4", "5"}) {  // 4 has no checkpoint, 5 is newer than the one asked for
    const std::string step = job + attempt + "/checkpoints/step-7";
    ASSERT_OK(MakeDirectories(step));
    if (attempt[0] == '4') continue;
    ASSERT_OK(WriteFileAtomically(step + "/manifest.json", "{}"));
  }
  v1::StartAttemptRequest request;
  request.set_resume_attempt("00000000000000aa-3");
  const auto resume = [&](const std::string& at) {
    const AttemptDirectory directory(at, *AttemptKey::Parse("00000000000000bb-1"));
    return LaunchEnvironment(directory, request, "nonce", absl::InfiniteFuture()).at("ITWIN_RESUME");
  };
  EXPECT_EQ(resume(root.path()), job + "3/checkpoints") << "a command knows of one directory";
  request.set_train(true);
  EXPECT_EQ(resume(root.path()), job + "3/checkpoints:" + job + "1/checkpoints");
  request.set_resume_attempt("00000000000000aa-1");
  EXPECT_EQ(resume(root.path()), job + "1/checkpoints");
  request.set_resume_attempt("00000000000000aa-5");
  EXPECT_EQ(resume(root.path()), job + "5/checkpoints:" + job + "3/checkpoints:" + job + "1/checkpoints");
  // A path with a colon cannot be part of a list.
  ASSERT_EQ(symlink(root.path().c_str(), (root.path() + "/a:b").c_str()), 0);
  EXPECT_EQ(resume(root.path() + "/a:b"), root.path() + "/a:b/00000000000000aa/5/checkpoints");
}

TEST(LaunchEnvironment, RanksAreStartedByOpenMpi4AndBy5) {
  const AttemptDirectory directory("/r", *AttemptKey::Parse("00000000000000aa-1"));
  v1::StartAttemptRequest request;
  request.set_train(true);
  (*request.mutable_launch()->mutable_env())["ITWIN_COLLECTIVES"] = "mpi";
  const auto env = LaunchEnvironment(directory, request, "nonce", absl::InfiniteFuture());
  for (const char* name : {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "PRTE_ALLOW_RUN_AS_ROOT",
                           "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM"})
    EXPECT_EQ(env.at(name), "1");
  EXPECT_EQ(env.contains("OMPI_MCA_btl_vader_single_copy_mechanism"), env.contains("OMPI_MCA_btl_sm_single_copy_mechanism"));
  EXPECT_EQ(env.at("ITWIN_COLLECTIVES"), "mpi");  // the site's
}

}  // namespace
}  // namespace itwin::agent
