// Sites that come and go while the gateway's parts run, with the real agent behind a command line.
#include "server/sites/site_registry.h"

#include <gmock/gmock.h>
#include <grpc/grpc.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/sha256.h"
#include "common/subprocess.h"
#include "common/version.h"
#include "server/store/sqlite_job_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::server {
namespace {

using ::itwin::testing::StatusIs;
using ::itwin::testing::WaitUntil;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

// gRPC stays up between registries, as the gateway's server keeps it.
const bool kGrpcStays = (grpc_init(), true);

class SiteRegistryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* bin = getenv("ITWIN_BIN");
    agent_ = absl::StrCat(bin != nullptr ? bin : "bin", "/itwin-agent");
    ASSERT_EQ(access(agent_.c_str(), X_OK), 0) << agent_ << " is not built";
    auto store = SqliteJobStore::Open({.path = directory_ / "gateway.db"});
    ASSERT_OK(store);
    store_ = *std::move(store);
    auto blobs = BlobStore::Open({.directory = directory_.path(), .min_free_bytes = 0});
    ASSERT_OK(blobs);
    blobs_ = *std::move(blobs);
    ASSERT_OK(MakeDirectories(directory_ / "sites"));
    programs_ = std::make_unique<GatewayPrograms>(agent_, "");
    Restart();
  }
  void TearDown() override {
    registry_.reset();
    for (const std::string& root : roots_) StopAgent(root);
  }

  void Restart(std::vector<SiteFile> configured = {}) {
    registry_.reset();
    board_ = std::make_unique<SiteBoard>();
    registry_ = std::make_unique<SiteRegistry>(
        SiteRegistry::Options{.directory = directory_ / "sites", .gateway_id = "test"},
        SiteRegistry::Dependencies{store_.get(), blobs_.get(), board_.get(), &clock_, programs_.get()});
    ASSERT_OK(registry_->Open(std::move(configured)));
    registry_->Start();
  }
  void StopAgent(const std::string& root) {
    SubprocessOptions stop;
    stop.argv = {agent_, "stop", "--root", root, "--kill-jobs"};
    RunCommand(stop, absl::Seconds(60)).IgnoreError();  // there may be none
  }
  std::string Root(const std::string& name) {
    roots_.insert(directory_ / name);
    return directory_ / name;
  }
  // A site file whose command line runs this agent.
  std::string Document(const std::string& name, const std::string& program = "", const std::string& more = "") {
    return absl::StrCat("name: ", name, "\ncommand: [bash, -c, 'exec ", program.empty() ? agent_ : program, " connect --root ", Root(name),
                        " --slots 2']\n", more);
  }
  absl::Status Add(const std::string& document, bool replace = false) {
    told_.clear();
    v1::AddSiteRequest request;
    request.set_document(document);
    request.set_replace(replace);
    request.set_without_jobs(true);
    return registry_->AddSite(request, [&](const v1::SiteProgress& progress) {
      told_.push_back(absl::StrCat(v1::SiteCheck_Name(progress.verdict()).substr(11), " ", progress.step(), ": ", progress.found()));
      return true;
    });
  }
  v1::Site Site(const std::string& name) {
    for (const v1::Site& site : board_->ListSites()) {
      if (site.name() == name) return site;
    }
    return {};
  }
  bool Ready(const std::string& name) {
    return WaitUntil([&] { return Site(name).state() == v1::SITE_STATE_READY; }, absl::Seconds(30));
  }
  JobId Submit(const std::string& site, const std::string& script = "true", const std::string& image = "") {
    NewJob job;
    job.owner = "alice";
    job.request_id = absl::StrCat("r", ++requests_);
    job.spec.set_site(site);
    job.spec.set_image(image);
    for (const char* word : {"/bin/bash", "-c", script.c_str()}) job.spec.mutable_command()->add_argv(word);
    job.message = "submitted";
    auto submitted = store_->Submit(job);
    EXPECT_OK(submitted);
    return submitted->job.id;
  }
  JobRow Row(const JobId& id) { return *store_->GetJob(id); }
  ::testing::AssertionResult Reaches(const JobId& id, JobState state) {
    if (WaitUntil([&] { return Row(id).record.state == state; }, absl::Seconds(40))) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "it is " << Name(Row(id).record.state) << ": " << Row(id).record.reason;
  }

  itwin::testing::TempDirectory directory_;
  std::string agent_;
  SystemClock clock_;
  std::unique_ptr<SqliteJobStore> store_;
  std::unique_ptr<BlobStore> blobs_;
  std::unique_ptr<GatewayPrograms> programs_;
  std::unique_ptr<SiteBoard> board_;
  std::unique_ptr<SiteRegistry> registry_;
  std::set<std::string> roots_;
  std::vector<std::string> told_;
  int requests_ = 0;
};

TEST_F(SiteRegistryTest, WhatAWorkerLacksIsKnownFromTheSitesFile) {
  const std::string list = directory_ / "operators.json";
  const std::string document = Document("lab", "", absl::StrCat("worker: {path: /opt/itwin-worker, operators: ", list, "}\n"));
  EXPECT_THAT(Add(document), StatusIs(absl::StatusCode::kNotFound, HasSubstr("worker.operators: ")));
  ASSERT_OK(WriteFileAtomically(list, "{}"));
  EXPECT_THAT(Add(document), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is not what `itwin-worker --operators` prints")));
  ASSERT_OK(WriteFileAtomically(list, R"({"libtorch": "1.13.0", "operators": ["aten::linear"]})"));
  ASSERT_OK(Add(document));
  v1::JobSpec spec;
  spec.set_site("lab");
  EXPECT_EQ(board_->WhyImpossible(spec, {"aten::linear"}), "");
  EXPECT_THAT(board_->WhyImpossible(spec, {"aten::rms_norm"}), HasSubstr("LibTorch of site lab (1.13.0) does not have aten::rms_norm"));
  ASSERT_OK(WriteFileAtomically(list, "{}"));
  Restart();  // it has jobs, perhaps
  EXPECT_EQ(board_->WhyImpossible(spec, {"aten::rms_norm"}), "");
}

TEST_F(SiteRegistryTest, ASiteIsAddedWhileJobsRunAndStays) {
  ASSERT_OK(Add(Document("lab")));
  EXPECT_THAT(told_, AllOf(Contains(HasSubstr("OK site file: lab")), Contains(HasSubstr(absl::StrCat("OK agent: itwin-agent ", kVersion))),
                           Contains(HasSubstr("OK clock")), Contains(HasSubstr("OK kept"))));
  ASSERT_TRUE(Ready("lab"));
  EXPECT_TRUE(Reaches(Submit("lab"), JobState::kSucceeded));
  EXPECT_TRUE(Reaches(Submit("any"), JobState::kSucceeded));

  // The same name again: only when it is meant.
  EXPECT_THAT(Add(Document("lab")), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("--replace")));
  const JobId running = Submit("lab", "while [ ! -e $ITWIN_OUTPUTS/../go ]; do sleep 0.05; done");
  ASSERT_TRUE(Reaches(running, JobState::kRunning));
  ASSERT_OK(Add(Document("lab", "", "max_waiting: 9\n"), /*replace=*/true));
  EXPECT_THAT(registry_->GetSite("lab")->document(), HasSubstr("max_waiting: 9"));

  // A gateway that starts again has it, and the job goes on.
  Restart();
  ASSERT_TRUE(Ready("lab"));
  EXPECT_EQ(Row(running).record.state, JobState::kRunning);
  ASSERT_OK(WriteFileAtomically(absl::StrCat(Root("lab"), "/", running.text(), "/1/go"), ""));
  EXPECT_TRUE(Reaches(running, JobState::kSucceeded));
}

TEST_F(SiteRegistryTest, ASiteThatCannotBeReachedIsNotKept) {
  EXPECT_THAT(Add("name: lab\ncommand: [bash, -c, 'echo Permission denied, sorry >&2; exit 255']\n"),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("Permission denied, sorry")));
  EXPECT_THAT(told_, Contains(HasSubstr("ERROR agent")));
  EXPECT_FALSE(fs::exists(directory_ / "sites/lab.yaml"));
  EXPECT_FALSE(board_->Exists("lab"));
  EXPECT_THAT(Add("name: lab\nssh: {hosts: [a], key: /none}\nroot: /r\n"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("ssh.key")));
  EXPECT_THAT(Add("name: lab\ncomand: [x]\n"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("site file:2: comand: unknown key; did you mean 'command'?")));
  // An agent that runs another scheduler than the file says.
  EXPECT_FALSE(Add(Document("lab", "", "scheduler: slurm\n")).ok());
  EXPECT_FALSE(board_->Exists("lab"));
  EXPECT_THAT(registry_->GetSite("lap"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("there is no site 'lap'")));
}

TEST_F(SiteRegistryTest, APausedSiteStartsNothingNewAlsoAfterARestart) {
  ASSERT_OK(Add(Document("lab")));
  ASSERT_TRUE(Ready("lab"));
  const JobId running = Submit("lab", "while [ ! -e $ITWIN_OUTPUTS/../go ]; do sleep 0.05; done");
  ASSERT_TRUE(Reaches(running, JobState::kRunning));
  EXPECT_EQ(registry_->PauseSite("lab", "root", "work on the cooling")->state(), v1::SITE_STATE_PAUSED);
  ASSERT_TRUE(WaitUntil([&] { return Site("lab").state() == v1::SITE_STATE_PAUSED; }));
  EXPECT_THAT(Site("lab").reason(), AllOf(HasSubstr("paused by root: work on the cooling"), HasSubstr("itwin site resume lab")));
  const JobId waiting = Submit("lab");
  // What runs goes on to its end.
  ASSERT_OK(WriteFileAtomically(absl::StrCat(Root("lab"), "/", running.text(), "/1/go"), ""));
  EXPECT_TRUE(Reaches(running, JobState::kSucceeded));
  EXPECT_EQ(Row(waiting).record.state, JobState::kQueued);

  Restart();
  ASSERT_TRUE(WaitUntil([&] { return Site("lab").state() == v1::SITE_STATE_PAUSED && Site("lab").connected_us() != 0; }, absl::Seconds(30)));
  EXPECT_EQ(Row(waiting).record.state, JobState::kQueued);
  ASSERT_OK(registry_->ResumeSite("lab"));
  EXPECT_TRUE(Reaches(waiting, JobState::kSucceeded));
  Restart();
  EXPECT_TRUE(Ready("lab"));
}

// A runtime that says what it was given, and runs the program in an environment of its own.
TEST_F(SiteRegistryTest, JobsRunInTheImageTheyName) {
  const std::string runtime = directory_ / "my runtime";
  ASSERT_OK(WriteFileAtomically(runtime, "#!/bin/bash\n[ \"$1\" = exec ] || exit 9\nexport IMAGE=$2\nshift 2\nexec \"$@\"\n", 0700));
  const std::string line = absl::StrCat("container: \"'", runtime, "' exec {image}\"\n");
  ASSERT_OK(Add(Document("boxes", "", line + "image: /images/site.sif\n")));
  ASSERT_OK(Add(Document("bare")));
  ASSERT_TRUE(Ready("boxes") && Ready("bare"));
  const auto printed = [&](const JobId& id) { return store_->ReadLog(id, 1, v1::LOG_STREAM_STDOUT, 0, 1000)->data; };
  const JobId own = Submit("any", "echo in $IMAGE", "docker://a/b:1"), other = Submit("boxes", "echo in $IMAGE");
  ASSERT_TRUE(Reaches(own, JobState::kSucceeded));
  EXPECT_EQ(Row(own).record.attempt, 1);
  EXPECT_EQ(printed(own), "in docker://a/b:1\n");
  ASSERT_TRUE(Reaches(other, JobState::kSucceeded));
  EXPECT_EQ(printed(other), "in /images/site.sif\n");
  const JobId nowhere = Submit("bare", "true", "docker://a/b:1");
  ASSERT_TRUE(Reaches(nowhere, JobState::kFailed));
  EXPECT_THAT(Row(nowhere).record.reason, HasSubstr("site bare runs jobs in no container"));

  // Without a default: said when the site is added, and to the job that names none, before it is handed over.
  ASSERT_OK(Add(Document("boxes", "", line), /*replace=*/true));
  EXPECT_THAT(told_, Contains(AllOf(HasSubstr("WARNING container"), HasSubstr("no default image"))));
  ASSERT_TRUE(Ready("boxes"));
  const JobId lost = Submit("boxes");
  ASSERT_TRUE(Reaches(lost, JobState::kFailed));
  EXPECT_THAT(Row(lost).record.reason, HasSubstr("no default image"));
  EXPECT_FALSE(fs::exists(absl::StrCat(Root("boxes"), "/", lost.text())));
}

TEST_F(SiteRegistryTest, ASiteIsRemovedWhenItsJobsHaveEnded) {
  ASSERT_OK(Add(Document("lab")));
  ASSERT_OK(Add(Document("other")));
  ASSERT_TRUE(Ready("lab") && Ready("other"));
  const JobId running = Submit("lab", "while [ ! -e $ITWIN_OUTPUTS/../go ]; do sleep 0.05; done");
  ASSERT_TRUE(Reaches(running, JobState::kRunning));
  EXPECT_THAT(registry_->RemoveSite("lab"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("1 job is still at site lab")));
  ASSERT_OK(WriteFileAtomically(absl::StrCat(Root("lab"), "/", running.text(), "/1/go"), ""));
  ASSERT_TRUE(Reaches(running, JobState::kSucceeded));
  ASSERT_OK(registry_->RemoveSite("lab"));
  EXPECT_FALSE(board_->Exists("lab"));
  EXPECT_FALSE(fs::exists(directory_ / "sites/lab.yaml"));
  EXPECT_THAT(registry_->RemoveSite("lab"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("no site 'lab'")));
  // Who names it all the same is told; another site answers for it.
  const JobId late = Submit("lab");
  EXPECT_TRUE(Reaches(late, JobState::kFailed));
  EXPECT_THAT(Row(late).record.reason, HasSubstr("'lab' is not configured any more"));
  EXPECT_TRUE(Reaches(Submit("any"), JobState::kSucceeded));
  Restart();
  EXPECT_EQ(board_->ListSites().size(), 1u);
}

TEST_F(SiteRegistryTest, SitesOfTheConfigurationAreChangedThere) {
  SiteFile site = *ParseSiteFile(Document("fixed"), "f");
  Restart({site});
  ASSERT_TRUE(Ready("fixed"));
  EXPECT_THAT(Add(Document("fixed"), true), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("gateway.yaml")));
  EXPECT_THAT(registry_->RemoveSite("fixed"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("gateway.yaml")));
  // A bad file among the kept ones keeps the gateway from nothing else.
  ASSERT_OK(WriteFileAtomically(directory_ / "sites/broken.yaml", "name: broken\nshh: 1\n"));
  Restart({site});
  EXPECT_TRUE(Ready("fixed"));
  EXPECT_FALSE(board_->Exists("broken"));
}

TEST_F(SiteRegistryTest, AnAgentOfAnotherVersionIsRenewedUnderARunningJob) {
  // Another build: the same program with a byte more, installed as a release.
  const std::string root = Root("lab");
  ASSERT_OK(MakeDirectories(root + "/releases/0.0.9-old"));
  const std::string old = root + "/releases/0.0.9-old/itwin-agent";
  ASSERT_OK(WriteFileAtomically(old, *ReadFile(agent_, int64_t{1} << 30) + "x", 0700));
  fs::permissions(old, fs::perms::owner_all);
  fs::create_symlink("0.0.9-old", root + "/releases/current");
  const std::string document = Document("lab", root + "/releases/current/itwin-agent");
  // A gateway of that build.
  programs_ = std::make_unique<GatewayPrograms>(old, "");
  Restart();
  ASSERT_OK(Add(document));
  ASSERT_TRUE(Ready("lab"));
  const JobId running = Submit("lab", "while [ ! -e $ITWIN_OUTPUTS/../go ]; do sleep 0.05; done; readlink /proc/$PPID/exe");
  ASSERT_TRUE(Reaches(running, JobState::kRunning));

  // The gateway is updated and starts again.
  registry_.reset();
  programs_ = std::make_unique<GatewayPrograms>(agent_, "");
  Restart();
  ASSERT_TRUE(WaitUntil([&] { return fs::read_symlink(root + "/releases/current") != "0.0.9-old"; }, absl::Seconds(60)));
  ASSERT_TRUE(Ready("lab"));
  const std::string release = fs::read_symlink(root + "/releases/current").string();
  EXPECT_EQ(release, ReleaseName(*programs_->Agent(), {}));
  EXPECT_EQ(*Sha256OfFile(root + "/releases/current/itwin-agent"), *Sha256OfFile(agent_));
  const auto daemons = [&](const std::string& program) {
    int count = 0;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator("/proc")) {
      const std::string exe = fs::read_symlink(entry.path() / "exe", error).string();
      const auto line = ReadFile(entry.path().string() + "/cmdline", 4096);
      if (exe == program && line.ok() && line->find("serve") != std::string::npos) ++count;
    }
    return count;
  };
  EXPECT_EQ(daemons(absl::StrCat(root, "/releases/", release, "/itwin-agent")), 1);
  EXPECT_TRUE(WaitUntil([&] { return daemons(old) == 0; }));
  // The job has not noticed: one start, one attempt, under the supervisor of the release it was started from.
  EXPECT_EQ(Row(running).record.state, JobState::kRunning);
  ASSERT_OK(WriteFileAtomically(absl::StrCat(root, "/", running.text(), "/1/go"), ""));
  ASSERT_TRUE(Reaches(running, JobState::kSucceeded));
  EXPECT_EQ(Row(running).record.attempt, 1);
  EXPECT_THAT(store_->ReadLog(running, 1, v1::LOG_STREAM_STDOUT, 0, 1000)->data, HasSubstr("0.0.9-old/itwin-agent"));
  EXPECT_TRUE(fs::exists(old));  // kept
  // The next one runs from the new release.
  const JobId next = Submit("lab", "readlink /proc/$PPID/exe");
  ASSERT_TRUE(Reaches(next, JobState::kSucceeded));
  EXPECT_THAT(store_->ReadLog(next, 1, v1::LOG_STREAM_STDOUT, 0, 1000)->data, HasSubstr(release + "/itwin-agent"));
}

}  // namespace
}  // namespace itwin::server
