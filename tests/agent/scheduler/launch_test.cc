#include "agent/scheduler/launch.h"

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
