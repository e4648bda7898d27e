#include "agent/scheduler/slurm/batch_script.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "agent/scheduler/launch.h"
#include "common/files.h"
#include "common/subprocess.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

const AttemptKey& Key() {
  static const AttemptKey key = *AttemptKey::Parse("00000000000000aa-1");
  return key;
}

Submission Plain(const std::string& root = "/r") { return {.directory = AttemptDirectory(root, Key())}; }

TEST(SbatchOptions, SayWhatIsAskedFor) {
  Submission submission = Plain();
  submission.nodes = 2;
  submission.ranks_per_node = 4;
  submission.cpus_per_rank = 3;
  submission.gpus_per_node = 2;
  submission.memory_mib_per_node = 4000;
  submission.time = absl::Seconds(90);
  submission.slurm.set_partition("booster,devel");
  submission.slurm.set_account("my-project");
  submission.slurm.set_constraint("gpu&[rack1|rack2]");
  submission.slurm.set_exclusive(true);
  submission.slurm.add_exclude_nodes("n7");
  submission.slurm.add_exclude_nodes("n9");
  submission.slurm.mutable_signal_before()->set_seconds(120);
  submission.slurm.add_options("--licenses=fs:1");
  const auto options = SbatchOptions(submission, "itwin-x");
  ASSERT_OK(options);
  for (const char* wanted : {"--job-name=itwin-x", "--comment=itwin-x", "--no-requeue", "--nodes=2", "--ntasks-per-node=4",
                             "--cpus-per-task=3", "--gpus-per-node=2", "--mem=4000M", "--time=2", "--partition=booster,devel",
                             "--account=my-project", "--constraint=gpu&[rack1|rack2]", "--exclusive", "--exclude=n7,n9",
                             "--signal=B:USR2@120", "--licenses=fs:1", "--output=/r/00000000000000aa/1/script.log"}) {
    EXPECT_THAT(*options, Contains(wanted));
  }
  EXPECT_EQ(GrantedTime(submission), absl::Minutes(2));
}

TEST(SbatchOptions, GpusAsTheSiteWantsThem) {
  Submission submission = Plain();
  submission.gpus_per_node = 4;
  submission.slurm.set_gpu_type("a100");
  EXPECT_THAT(*SbatchOptions(submission, "x"), Contains("--gpus-per-node=a100:4"));
  submission.slurm.set_gpu_request("--gres=gpu:{type}:{gpus} --gpu-bind=none");
  EXPECT_THAT(*SbatchOptions(submission, "x"), Contains("--gres=gpu:a100:4"));
  EXPECT_THAT(*SbatchOptions(submission, "x"), Contains("--gpu-bind=none"));
  submission.slurm.set_gpu_request("script.sh");
  EXPECT_THAT(SbatchOptions(submission, "x"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no option")));
}

TEST(SbatchOptions, NoSettingBecomesAnotherOption) {
  const auto with = [](const std::function<void(v1::SlurmSettings*)>& change) {
    Submission submission = Plain();
    change(&submission.slurm);
    return SbatchOptions(submission, "x").status();
  };
  for (const std::string bad : {"a\n#SBATCH --wrap=id", "-A x", "$(id)", "`id`", "a b", "a;id", "a'b"}) {
    EXPECT_THAT(with([&](auto* s) { s->set_partition(bad); }), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_)) << bad;
    EXPECT_THAT(with([&](auto* s) { s->set_account(bad); }), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_)) << bad;
    EXPECT_THAT(with([&](auto* s) { s->add_exclude_nodes(bad); }), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_)) << bad;
  }
  for (const std::string ours : {"--job-name=other", "-Jother", "-J", "--requeue", "--array=1-9", "--wrap=id", "--export=NONE", "script"}) {
    EXPECT_THAT(with([&](auto* s) { s->add_options(ours); }), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_)) << ours;
  }
}

TEST(SbatchOptions, ShapesDifferByWhatIsAskedForAlone) {
  Submission other{.directory = AttemptDirectory("/other", *AttemptKey::Parse("00000000000000bb-2"))};
  EXPECT_EQ(ShapeOf(*SbatchOptions(Plain(), "x")), ShapeOf(*SbatchOptions(other, "y")));
  other.nodes = 2;
  EXPECT_NE(ShapeOf(*SbatchOptions(Plain(), "x")), ShapeOf(*SbatchOptions(other, "y")));
}

// A real bash runs the script in an empty PATH: all it may do is to become script.sh, which says how it was called.
std::string RunIt(const TempDirectory& root, const Submission& submission, const BatchSite& site) {
  EXPECT_OK(MakeDirectories(submission.directory.path()));
  EXPECT_OK(WriteFileAtomically(submission.directory.script_path(), "#!/bin/sh\necho \"ran $# $SRUN_CPUS_PER_TASK $ITWIN_KILL_WAIT\"\n", 0700));
  const std::string path = root.path() + "/batch";
  EXPECT_OK(WriteFileAtomically(path, RenderBatchScript(submission, site), 0700));
  const auto out = RunCommand({.argv = {"/bin/bash", path}, .directory = root.path(), .env = {{"PATH", "/nowhere"}}, .clear_env = true},
                              absl::Seconds(20));
  EXPECT_OK(out);
  return out.ok() ? out->out + out->err : "";
}

TEST(BatchScript, BecomesTheAttemptsScript) {
  TempDirectory root;
  Submission submission = Plain(root.path());
  submission.cpus_per_rank = 5;
  EXPECT_EQ(RunIt(root, submission, {.version = 220508, .kill_wait = absl::Seconds(7)}), "ran 0 5 7\n");
}

TEST(BatchScript, HostileNamesRunNothing) {
  TempDirectory base;
  std::mt19937 random(20261125);
  const std::string pieces[] = {"'", "\"", "`touch ../pwned`", "$(touch ../pwned)", ";touch ../pwned;", "\n", " ", "\\", "&", "|", "#",
                                "!", "*", "~", "{a,b}", "$HOME", "\xc3\xa4", "-", ">x", "<", "\t", "%j", "=", ","};
  for (int round = 0; round < 150; ++round) {
    std::string name = "d";
    for (int i = static_cast<int>(random() % 6); i >= 0; --i) name += pieces[random() % std::size(pieces)];
    name += "x";
    const std::string root = absl::StrCat(base.path(), "/", name);
    std::error_code error;
    std::filesystem::create_directories(root, error);
    if (error) continue;  // a '/' would be another directory
    Submission submission = Plain(root);
    submission.cpus_per_rank = 1;
    EXPECT_EQ(RunIt(base, submission, {.kill_wait = absl::Seconds(9)}), "ran 0 1 9\n") << name;
    EXPECT_FALSE(FileExists(base.path() + "/pwned")) << name;
    EXPECT_FALSE(FileExists(root + "/../pwned")) << name;
    // And as an option it stays one word, in which sbatch's own patterns are off.
    const auto options = SbatchOptions(submission, "x");
    ASSERT_OK(options);
    std::error_code ignored;
    std::filesystem::remove_all(root, ignored);
  }
}

TEST(Prologue, ItsLinesRunAndTheProgramIsNeverTextOfTheScript) {
  v1::StartAttemptRequest request;
  request.mutable_launch()->add_prologue("export GREETING='hello there'");
  request.mutable_launch()->add_prologue("[ -f /nowhere ] && echo never");  // a test that fails is no failure
  request.mutable_launch()->add_prologue("if true; then\n export MORE=1\nfi");
  for (const char* word : {"/usr/bin/printf", "%s|%s", "$(id) `id` '\"", "; id"}) request.add_argv(word);
  const auto command = LaunchCommand(AttemptDirectory("/r", Key()), request, {});
  ASSERT_OK(command);
  auto out = RunCommand({.argv = *command}, absl::Seconds(20));
  ASSERT_OK(out);
  EXPECT_EQ(out->out, "$(id) `id` '\"|; id");
  request.clear_argv();
  for (const char* word : {"/bin/sh", "-c", "echo $GREETING $MORE"}) request.add_argv(word);
  out = RunCommand({.argv = *LaunchCommand(AttemptDirectory("/r", Key()), request, {})}, absl::Seconds(20));
  EXPECT_EQ(out->out, "hello there 1\n");
}

TEST(Prologue, ALineThatFailsIsNamed) {
  v1::StartAttemptRequest request;
  request.mutable_launch()->add_prologue("module-that-is-not-there load OpenMPI");
  request.add_argv("/bin/true");
  const auto out = RunCommand({.argv = *LaunchCommand(AttemptDirectory("/r", Key()), request, {})}, absl::Seconds(20));
  ASSERT_OK(out);
  EXPECT_NE(out->exit.exit_code, 0);
  EXPECT_THAT(out->err, HasSubstr("the prologue of this site failed (exit code 127) at: module-that-is-not-there load OpenMPI"));
}

TEST(LaunchSettings, TheRequestGoesBeforeTheOptions) {
  v1::StartAttemptRequest request;
  request.set_train(true);
  request.set_nodes(2);
  request.set_ranks_per_node(2);
  request.mutable_launch()->set_launcher("srun --mpi=pmix -N {nodes} -n {ranks}");
  request.mutable_launch()->set_worker("/opt/w");
  request.mutable_launch()->set_container("apptainer exec --nv 'my image.sif'");
  const auto command = LaunchCommand(AttemptDirectory("/r", Key()), request, {.worker = "/other"});
  ASSERT_OK(command);
  EXPECT_THAT(*command, ::testing::ElementsAre("srun", "--mpi=pmix", "-N", "2", "-n", "4", "apptainer", "exec", "--nv", "my image.sif",
                                               "/opt/w", "--spec", "/r/00000000000000aa/1/spec.json", "--spool",
                                               "/r/00000000000000aa/1"));
}

}  // namespace
}  // namespace itwin::agent
