// The loop of a site against a site in memory, with the real database; time and turns are the test's.
#include "server/dispatch/site_dispatcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/store/sqlite_job_store.h"
#include "tests/fakes/fake_agent.h"
#include "tests/testing/fake_clock.h"
#include "tests/testing/server_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::server {
namespace {

using ::itwin::testing::FakeClock;
using ::itwin::testing::FakeSite;
using ::itwin::testing::WaitUntil;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::Pair;

// Runs what it is given at once: one thread, one order.
class InlineExecutor : public Executor {
 public:
  void Submit(std::function<void()> task) override { task(); }
  void Stop() override {}
};

int64_t Count(const std::vector<std::string>& words, const std::string& word) {
  return std::count(words.begin(), words.end(), word);
}

class SiteDispatcherTest : public ::testing::Test {
 protected:
  void SetUp() override {
    store_ = testing::OpenStore(directory_ / "gateway.db");
    blobs_ = testing::OpenBlobs(directory_.path());
    Restart();
  }
  void TearDown() override {
    if (dispatcher_) dispatcher_->Stop();
    dispatcher_.reset();
  }

  // A gateway that begins anew over the same database.
  void Restart() {
    if (dispatcher_) dispatcher_->Stop();
    SiteOptions options;
    options.name = "local";
    options.adopts_strays = true;
    options.max_waiting = 3;
    options.seed = 7;
    options.settings = settings_;
    dispatcher_ = std::make_unique<SiteDispatcher>(
        std::move(options),
        SiteDispatcher::Dependencies{.store = store_.get(),
                                     .blobs = blobs_.get(),
                                     .board = &board_,
                                     .clock = &clock_,
                                     .connect = [this](absl::Time) { return site_.Connect(); },
                                     .gateway_id = "test",
                                     .gateway_version = "test",
                                     .gateway_place = "here",
                                     .gateway_label = "host:/data",
                                     .calls = std::make_unique<InlineExecutor>(),
                                     .transfers = std::make_unique<InlineExecutor>()});
    ASSERT_OK(dispatcher_->Open());
  }

  JobId Submit(const std::string& owner = "alice", int ranks = 1, const std::string& site = "any", const std::string& image = "") {
    NewJob job;
    job.owner = owner;
    job.request_id = absl::StrCat("r", ++requests_);
    job.spec.set_site(site);
    job.spec.set_image(image);
    job.spec.mutable_command()->add_argv("true");
    job.spec.mutable_resources()->set_ranks_per_node(ranks);
    job.spec.mutable_resources()->set_nodes(1);
    for (const std::string& hash : inputs_) {
      v1::InputFile* input = job.spec.add_inputs();
      input->set_path(absl::StrCat("in", job.spec.inputs_size()));
      input->set_sha256(hash);
    }
    job.message = "submitted";
    auto submitted = store_->Submit(job);
    EXPECT_OK(submitted);
    return submitted->job.id;
  }
  JobRow Row(const JobId& id) { return *store_->GetJob(id); }
  JobState State(const JobId& id) { return Row(id).record.state; }
  std::string Key(const JobId& id) { return AttemptKey(id, Row(id).record.attempt).text(); }

  // Turns of the loop until it has come to `state`; the reader's thread may need a moment.
  ::testing::AssertionResult Reaches(const JobId& id, JobState state) {
    const bool reached = WaitUntil([&] {
      dispatcher_->RunOnce();
      return State(id) == state;
    }, absl::Seconds(10));
    if (reached) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "is " << Name(State(id)) << ": " << Row(id).record.reason;
  }
  void Turns(int count = 5) {
    for (int i = 0; i < count; ++i) dispatcher_->RunOnce();
  }
  void Advance(absl::Duration by) {
    clock_.Advance(by);
    Turns();
  }
  std::vector<StoredEvent> Events(const JobId& id) {
    auto events = store_->ListEvents(id, 0, 1000);
    EXPECT_OK(events);
    return *std::move(events);
  }
  std::vector<std::string> Kinds(const JobId& id) {
    std::vector<std::string> out;
    for (const StoredEvent& event : Events(id)) out.emplace_back(Name(event.event.kind));
    return out;
  }
  void RequestCancel(const JobId& id) {
    JobEvent event;
    event.kind = EventKind::kCancelRequested;
    event.actor = "user:alice";
    ASSERT_OK(store_->AppendEvent(id, event));
  }

  itwin::testing::TempDirectory directory_;
  FakeClock clock_{absl::Now()};
  FakeSite site_;
  SiteBoard board_{{"local"}};
  std::unique_ptr<SqliteJobStore> store_;
  std::unique_ptr<BlobStore> blobs_;
  std::unique_ptr<SiteDispatcher> dispatcher_;
  std::vector<std::string> inputs_;
  SiteSettings settings_;  // for the next Restart
  int requests_ = 0;
};

TEST_F(SiteDispatcherTest, BringsAJobThroughItsLife) {
  inputs_ = {*blobs_->PutText("the input")};
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  EXPECT_EQ(site_.inputs().size(), 1u);
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  site_.Write(Key(id), "{\"step\":3,\"metrics\":{\"x\":1}}\n");
  site_.Exit(Key(id), 0);
  ASSERT_TRUE(Reaches(id, JobState::kSucceeded));
  EXPECT_THAT(Kinds(id), ElementsAre("submitted", "placed", "staged", "accepted", "started", "ended", "succeeded"));
  EXPECT_EQ(store_->ListPoints(id, 0, {}, 100)->blocks.size(), 1u);
  EXPECT_EQ(Row(id).summary.at("x"), 1);
}

TEST_F(SiteDispatcherTest, ALostAnswerIsLookedUpAndNothingStartsTwice) {
  site_.LoseNextStart();
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kSubmitUnknown));
  EXPECT_THAT(Row(id).record.reason, HasSubstr("the answer was lost"));
  Advance(absl::Seconds(2));
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  EXPECT_EQ(site_.attempts().at(Key(id)).starts, 1);
  EXPECT_EQ(Row(id).record.attempt, 1);
}

// A mount that is missing shows an empty directory under the same path, where every attempt is absent.
TEST_F(SiteDispatcherTest, AnotherSpoolUnderTheSameNamePausesTheSiteAndConcludesNothing) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  site_.SetReachable(false);
  site_.spool_id = "spool-2";
  site_.SetReachable(true);
  for (int i = 0; i < 20; ++i) Advance(absl::Minutes(1));
  EXPECT_EQ(State(id), JobState::kRunning);
  const v1::Site shown = board_.ListSites().at(0);
  EXPECT_EQ(shown.state(), v1::SITE_STATE_PAUSED);
  EXPECT_THAT(shown.reason(), AllOf(HasSubstr("/spool is another spool than before"), HasSubstr("accept-spool local")));
  // Also for a gateway that has been started meanwhile.
  Restart();
  for (int i = 0; i < 20; ++i) Advance(absl::Minutes(1));
  EXPECT_EQ(State(id), JobState::kRunning);
  // Mounted again.
  site_.spool_id = "spool-1";
  for (int i = 0; i < 5; ++i) Advance(absl::Minutes(1));
  EXPECT_EQ(board_.ListSites().at(0).state(), v1::SITE_STATE_READY);
  site_.Exit(Key(id), 0);
  EXPECT_TRUE(Reaches(id, JobState::kSucceeded));
  // Or given up.
  site_.SetReachable(false);
  site_.spool_id = "spool-3";
  site_.SetReachable(true);
  for (int i = 0; i < 5; ++i) Advance(absl::Minutes(1));
  EXPECT_EQ(board_.ListSites().at(0).state(), v1::SITE_STATE_PAUSED);
  ASSERT_OK(store_->ForgetSpool("local"));
  for (int i = 0; i < 5; ++i) Advance(absl::Minutes(1));
  EXPECT_EQ(board_.ListSites().at(0).state(), v1::SITE_STATE_READY);
}

TEST_F(SiteDispatcherTest, RestartsAtEveryStateGoOn) {
  const JobId id = Submit();
  for (const JobState state : {JobState::kPending, JobState::kRunning}) {
    ASSERT_TRUE(Reaches(id, state));
    Restart();
    Turns();
    EXPECT_EQ(State(id), state);
    if (state == JobState::kPending) site_.Run(Key(id));
  }
  site_.Write(Key(id), "{\"metrics\":{\"x\":1}}\n");
  Turns();
  Restart();
  site_.Write(Key(id), "{\"metrics\":{\"x\":2}}\n");
  site_.Exit(Key(id), 0);
  ASSERT_TRUE(Reaches(id, JobState::kSucceeded));
  EXPECT_EQ(store_->ListPoints(id, 0, {}, 100)->blocks[0].values_size(), 2);
  EXPECT_EQ(site_.attempts().at(Key(id)).starts, 1);
}

TEST_F(SiteDispatcherTest, ASiteThatIsAwayPausesAndFailsNothing) {
  const JobId running = Submit();
  ASSERT_TRUE(Reaches(running, JobState::kPending));
  site_.Run(Key(running));
  ASSERT_TRUE(Reaches(running, JobState::kRunning));
  site_.SetReachable(false);
  ASSERT_TRUE(WaitUntil([&] {
    Turns(1);
    return board_.ListSites()[0].state() == v1::SITE_STATE_UNREACHABLE;
  }));
  EXPECT_THAT(board_.ListSites()[0].reason(), HasSubstr("broke"));
  const JobId queued = Submit();
  for (int i = 0; i < 100; ++i) Advance(absl::Seconds(60));
  EXPECT_EQ(State(running), JobState::kRunning);
  EXPECT_EQ(State(queued), JobState::kQueued);
  site_.Exit(Key(running), 0);
  site_.SetReachable(true);
  Advance(absl::Seconds(60));
  ASSERT_TRUE(Reaches(running, JobState::kSucceeded));
  ASSERT_TRUE(Reaches(queued, JobState::kPending));
}

TEST_F(SiteDispatcherTest, AnAttemptThatTheSiteForgotIsDoneAgainOnlyAfterItSaidSoTwice) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  site_.Forget(Key(id));
  Advance(absl::Seconds(11));  // the periodic list: absent once
  EXPECT_EQ(State(id), JobState::kRunning);
  Advance(absl::Seconds(3));
  ASSERT_TRUE(Reaches(id, JobState::kQueued));
  EXPECT_EQ(Row(id).record.retries_infra, 1);
  Advance(absl::Seconds(2));
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  EXPECT_EQ(Row(id).record.attempt, 2);
}

TEST_F(SiteDispatcherTest, OnlySoManyWaitAtTheSiteAndOwnersTakeTurns) {
  std::vector<JobId> alices, bobs;
  for (int i = 0; i < 5; ++i) alices.push_back(Submit("alice"));
  for (int i = 0; i < 5; ++i) bobs.push_back(Submit("bob"));
  Turns(20);
  EXPECT_EQ(site_.attempts().size(), 3u);
  EXPECT_EQ(State(bobs[0]), JobState::kPending) << "the second owner does not wait behind the first one's five";
  EXPECT_EQ(board_.ListSites()[0].live_jobs(), 3);
  for (const auto& [key, attempt] : site_.attempts()) site_.Run(key);
  ASSERT_TRUE(WaitUntil([&] {
    Turns(1);
    return site_.attempts().size() == 6;
  }));
}

TEST_F(SiteDispatcherTest, WhatCanNeverRunIsNotQueuedForEver) {
  const JobId id = Submit("alice", 5);
  ASSERT_TRUE(Reaches(id, JobState::kFailed));
  EXPECT_EQ(Row(id).record.failure, FailureClass::kUser);
  EXPECT_THAT(Row(id).record.reason, HasSubstr("5 ranks"));
  EXPECT_THAT(Row(id).record.reason, HasSubstr("4 slots"));
  const JobId stray = Submit("alice", 1, "removed");
  ASSERT_TRUE(Reaches(stray, JobState::kFailed));
  EXPECT_THAT(Row(stray).record.reason, HasSubstr("'removed'"));
}

TEST_F(SiteDispatcherTest, AJobsImageTakesItsPlaceInTheSitesContainerLine) {
  settings_.launch.set_container("run {image} --");
  settings_.image = "site.sif";
  Restart();
  const JobId own = Submit("alice", 1, "any", "docker://a/b:1"), other = Submit();
  ASSERT_TRUE(Reaches(own, JobState::kPending));
  ASSERT_TRUE(Reaches(other, JobState::kPending));
  EXPECT_EQ(site_.attempts().at(Key(own)).request.launch().container(), "run docker://a/b:1 --");
  EXPECT_EQ(site_.attempts().at(Key(other)).request.launch().container(), "run site.sif --");
  settings_.launch.clear_container();
  settings_.image.clear();
  Restart();
  const JobId lost = Submit("alice", 1, "any", "docker://a/b:1");
  ASSERT_TRUE(Reaches(lost, JobState::kFailed));
  EXPECT_EQ(Row(lost).record.failure, FailureClass::kUser);
  EXPECT_THAT(Row(lost).record.reason, HasSubstr("site local runs jobs in no container"));
}

TEST_F(SiteDispatcherTest, ANewAttemptHasTheSameWishes) {
  settings_.launch.set_container("run {image} --");  // and no image of the site's own
  Restart();
  const JobId id = Submit("alice", 1, "any", "docker://a/b:1");
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Change(Key(id), [&](agent::v1::AttemptStatus* status) {
    status->set_phase(agent::v1::ATTEMPT_PHASE_ENDED);
    status->set_cause(agent::v1::END_CAUSE_NODE_FAILED);
  });
  ASSERT_TRUE(Reaches(id, JobState::kQueued));
  Advance(absl::Minutes(10));
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  EXPECT_EQ(Row(id).record.attempt, 2);
  EXPECT_EQ(site_.attempts().at(Key(id)).request.launch().container(), "run docker://a/b:1 --");
}

TEST_F(SiteDispatcherTest, ARefusalFailsTheJobInTheSitesWords) {
  site_.RefuseStarts("invalid partition specified: gpu");
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kFailed));
  EXPECT_EQ(Row(id).record.failure, FailureClass::kUser);
  EXPECT_THAT(Row(id).record.reason, HasSubstr("invalid partition specified: gpu"));
  EXPECT_TRUE(site_.attempts().at(Key(id)).barred);
}

TEST_F(SiteDispatcherTest, CancelOfAQueuedJobIsImmediate) {
  site_.SetReachable(false);
  const JobId id = Submit();
  Turns();
  RequestCancel(id);
  ASSERT_TRUE(Reaches(id, JobState::kCancelled));
  EXPECT_THAT(site_.attempts(), IsEmpty());
}

TEST_F(SiteDispatcherTest, CancelOfARunningJobWaitsForItsEnd) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  RequestCancel(id);
  Turns();
  EXPECT_TRUE(site_.attempts().at(Key(id)).cancel);
  EXPECT_EQ(State(id), JobState::kRunning);
  site_.Exit(Key(id), 143);
  ASSERT_TRUE(Reaches(id, JobState::kCancelled));
}

TEST_F(SiteDispatcherTest, ATraceIsFetchedWhileTheJobRuns) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  JobEvent event;
  event.kind = EventKind::kTraceRequested;
  event.attempt = 1;
  event.steps = 7;
  ASSERT_OK(store_->AppendEvent(id, event));
  const auto asked = [&] { return site_.attempts().at(Key(id)).traces.size(); };
  ASSERT_TRUE(WaitUntil([&] { Turns(1); return asked() == 1; }));
  Turns();
  EXPECT_EQ(asked(), 1u) << "again only after a while";
  // Another gateway process goes on with it.
  Restart();
  ASSERT_TRUE(WaitUntil([&] { Turns(1); return asked() > 1; }));
  EXPECT_THAT(site_.attempts().at(Key(id)).traces, Each(Pair("trace-1.json", 7)));
  EXPECT_THAT(*store_->ListOutputs(id), IsEmpty());

  site_.SetOutput(Key(id), "trace-1.json", "{}");
  ASSERT_TRUE(WaitUntil([&] { Advance(kTraceInterval); return Row(id).record.trace_steps == 0; }));
  EXPECT_EQ(State(id), JobState::kRunning);
  EXPECT_EQ(Kinds(id).back(), "traced");
  ASSERT_EQ(store_->ListOutputs(id)->size(), 1u);
  EXPECT_TRUE(blobs_->StatBlob(store_->ListOutputs(id)->at(0).sha256())->complete);
  const size_t calls = asked();
  Advance(kTraceInterval * 3);
  EXPECT_EQ(asked(), calls) << "nothing is wanted any more";

  // What was fetched early is among the outputs once.
  site_.SetOutput(Key(id), "model.pt", "weights");
  site_.Exit(Key(id), 0);
  ASSERT_TRUE(Reaches(id, JobState::kSucceeded));
  std::vector<std::string> paths;
  const auto outputs = store_->ListOutputs(id);
  for (const v1::OutputFile& file : *outputs) paths.push_back(file.path());
  EXPECT_THAT(paths, ElementsAre("model.pt", "trace-1.json"));
}

TEST_F(SiteDispatcherTest, AnAgentThatTakesNoTracesIsAskedAgainForTheNext) {
  site_.KnowTraces(false);
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  JobEvent event;
  event.kind = EventKind::kTraceRequested;
  event.attempt = 1;
  event.steps = 7;
  ASSERT_OK(store_->AppendEvent(id, event));
  ASSERT_TRUE(WaitUntil([&] { Turns(1); return Row(id).record.trace_steps == 0; }));
  EXPECT_THAT(Events(id).back().event.message, HasSubstr("takes no traces"));
  EXPECT_THAT(*store_->ListOutputs(id), IsEmpty());
  site_.KnowTraces(true);  // it was renewed
  ASSERT_OK(store_->AppendEvent(id, event));
  ASSERT_TRUE(WaitUntil([&] { Turns(1); return !site_.attempts().at(Key(id)).traces.empty(); }));
  EXPECT_EQ(Row(id).record.trace_steps, 7);
}

TEST_F(SiteDispatcherTest, BadLinesAreNotedOnceAndCounted) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  site_.Write(Key(id), "garbage\n");
  ASSERT_TRUE(WaitUntil([&] {
    Turns(1);
    const std::vector<std::string> kinds = Kinds(id);
    return std::find(kinds.begin(), kinds.end(), "note") != kinds.end();
  }));
  for (int i = 0; i < 10; ++i) {
    site_.Write(Key(id), "more garbage\n{\"metrics\":{\"x\":1}}\n");
    Turns();
  }
  site_.Exit(Key(id), 0);
  ASSERT_TRUE(Reaches(id, JobState::kSucceeded));
  std::vector<std::string> notes;
  for (const StoredEvent& event : Events(id)) {
    if (event.event.kind == EventKind::kNote) notes.push_back(event.event.message);
  }
  EXPECT_THAT(notes, ElementsAre(HasSubstr("garbage"), HasSubstr("in all, 11 lines")));
}

TEST_F(SiteDispatcherTest, OutputsComeBackWithTheirHashes) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  const std::string key = Key(id);
  site_.Write(key, "");
  site_.SetOutput(key, "a/model.pt", std::string(100'000, 'm'));
  site_.SetOutput(key, "empty", "");
  site_.Exit(key, 0);
  ASSERT_TRUE(Reaches(id, JobState::kSucceeded));
  const auto outputs = store_->ListOutputs(id);
  ASSERT_OK(outputs);
  ASSERT_EQ(outputs->size(), 2u);
  for (const v1::OutputFile& file : *outputs) EXPECT_TRUE(blobs_->StatBlob(file.sha256())->complete);
}

TEST_F(SiteDispatcherTest, AMissingArtifactNamesTheFile) {
  inputs_ = {std::string(64, 'a')};
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kFailed));
  EXPECT_EQ(Row(id).record.failure, FailureClass::kUser);
  EXPECT_THAT(Row(id).record.reason, HasSubstr("'in1'"));
}

TEST_F(SiteDispatcherTest, EventsTellOfALongOutageOnceAndOfItsEnd) {
  const JobId running = Submit();
  ASSERT_TRUE(Reaches(running, JobState::kPending));
  site_.Run(Key(running));
  ASSERT_TRUE(Reaches(running, JobState::kRunning));
  const JobId anywhere = Submit("alice", 1, "any");
  ASSERT_TRUE(Reaches(anywhere, JobState::kPending));
  site_.SetReachable(false);
  ASSERT_TRUE(WaitUntil([&] {
    Turns(1);
    return board_.ListSites()[0].state() == v1::SITE_STATE_UNREACHABLE;
  }));
  Advance(absl::Seconds(10));
  EXPECT_THAT(Kinds(running), Not(Contains("note"))) << "a short cut is nobody's business";
  const JobId here = Submit("alice", 1, "local");
  const JobId elsewhere = Submit("alice", 1, "any");
  for (int i = 0; i < 20; ++i) Advance(absl::Seconds(60));
  for (const JobId& id : {running, here}) {
    EXPECT_THAT(Row(id).waiting, AllOf(HasSubstr("cannot be reached since"), HasSubstr("site local"))) << id.text();
    EXPECT_EQ(Row(id).record.failure, FailureClass::kNone);
    EXPECT_EQ(Count(Kinds(id), "note"), 1) << id.text();
  }
  EXPECT_THAT(Kinds(elsewhere), Not(Contains("note"))) << "it may go anywhere";
  site_.SetReachable(true);
  Advance(absl::Seconds(60));
  ASSERT_TRUE(Reaches(here, JobState::kPending));
  EXPECT_EQ(Row(running).waiting, "");
  EXPECT_EQ(Count(Kinds(running), "note"), 2);
  EXPECT_THAT(Events(running).back().event.message, HasSubstr("is back"));
}

TEST_F(SiteDispatcherTest, RefusedCredentialsPauseAndSaySoAtOnce) {
  site_.RefuseHello(absl::UnauthenticatedError("the certificate ended at 12:00; renew it with `renew`"));
  const JobId id = Submit("alice", 1, "local");
  Turns();
  EXPECT_EQ(board_.ListSites()[0].state(), v1::SITE_STATE_PAUSED_AUTH);
  EXPECT_EQ(State(id), JobState::kQueued);
  EXPECT_THAT(Row(id).waiting, AllOf(HasSubstr("credentials"), HasSubstr("renew it with `renew`")));
  site_.RefuseHello(absl::OkStatus());
  Advance(absl::Seconds(10));
  ASSERT_TRUE(Reaches(id, JobState::kPending));
}

TEST_F(SiteDispatcherTest, SaysHelloAgainAndLeavesWhenItIsFenced) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  const size_t before = site_.greetings().size();
  for (int i = 0; i < 10; ++i) Advance(absl::Seconds(12));
  EXPECT_EQ(site_.greetings().size() - before, 3u);  // with the first look at the queue after 30 s
  EXPECT_EQ(site_.greetings().back().gateway_place(), "here");
  EXPECT_EQ(site_.greetings().back().gateway_label(), "host:/data");
  site_.RefuseHello(absl::FailedPreconditionError("fenced: another gateway is there"));
  for (int i = 0; i < 10; ++i) Advance(absl::Seconds(12));
  EXPECT_EQ(board_.ListSites()[0].state(), v1::SITE_STATE_UNREACHABLE);
  EXPECT_THAT(board_.ListSites()[0].reason(), HasSubstr("fenced"));
  EXPECT_EQ(State(id), JobState::kRunning);
  EXPECT_THAT(Row(id).waiting, HasSubstr("fenced"));
}

TEST_F(SiteDispatcherTest, CallsToTheSchedulerAreShownAsOfTheLastGreeting) {
  agent::v1::HelloResponse hello;
  hello.set_calls_per_minute(7.5);
  site_.SetHello(hello);
  Restart();
  Turns();
  EXPECT_EQ(board_.ListSites()[0].calls_per_minute(), 7.5);
  hello.set_calls_per_minute(1.25);
  site_.SetHello(hello);
  Turns();
  EXPECT_EQ(board_.ListSites()[0].calls_per_minute(), 7.5) << "it is not asked all the time";
  for (int i = 0; i < 4; ++i) Advance(absl::Seconds(12));
  EXPECT_EQ(board_.ListSites()[0].calls_per_minute(), 1.25);
  site_.SetReachable(false);
  ASSERT_TRUE(WaitUntil([&] {
    Turns(1);
    return board_.ListSites()[0].state() == v1::SITE_STATE_UNREACHABLE;
  }));
  EXPECT_EQ(board_.ListSites()[0].calls_per_minute(), 0);
}

TEST_F(SiteDispatcherTest, ASitesClockDoesNotMatter) {
  agent::v1::HelloResponse hello;
  hello.set_time_us(absl::ToUnixMicros(clock_.Now() + absl::Hours(1)));
  site_.SetHello(hello);
  Restart();
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  const absl::Time started = absl::FromUnixMicros(absl::ToUnixMicros(clock_.Now()));
  site_.Change(Key(id), [&](agent::v1::AttemptStatus* status) {
    status->set_phase(agent::v1::ATTEMPT_PHASE_RUNNING);
    status->set_started_us(absl::ToUnixMicros(started + absl::Hours(1)));  // as the site sees it
  });
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  EXPECT_EQ(Row(id).started, started);
}

TEST_F(SiteDispatcherTest, AWaitingJobShowsWhatItsSchedulerSaysNow) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  const auto says = [&](const std::string& reason, absl::Duration starts_in) {
    site_.Change(Key(id), [&](agent::v1::AttemptStatus* status) {
      status->set_reason(reason);
      status->set_expected_start_us(absl::ToUnixMicros(clock_.Now() + starts_in));
    });
    return WaitUntil([&] {
      Turns(1);
      return absl::StrContains(Row(id).waiting, reason);
    });
  };
  ASSERT_TRUE(says("nodes are busy (Resources)", absl::Hours(1)));
  EXPECT_THAT(Row(id).waiting, HasSubstr("expected to start about"));
  ASSERT_TRUE(says("others come first (Priority)", absl::Hours(2)));
  EXPECT_THAT(Kinds(id), Not(Contains("note"))) << "a change of mind is no event";
  site_.Run(Key(id));
  ASSERT_TRUE(Reaches(id, JobState::kRunning));
  EXPECT_EQ(Row(id).waiting, "") << "what it waited for is over";
}

TEST_F(SiteDispatcherTest, ARetryStaysAwayFromTheNodesThatFailedIt) {
  agent::v1::HelloResponse hello;
  hello.set_scheduler("slurm");
  agent::v1::Partition* partition = hello.mutable_slurm()->add_partitions();
  partition->set_name("main");
  partition->set_is_default(true);
  partition->set_nodes(3);
  site_.SetHello(hello);
  Restart();
  const JobId id = Submit();
  for (const char* bad : {"n1", "n2", "n3"}) {
    ASSERT_TRUE(Reaches(id, JobState::kPending));
    site_.Change(Key(id), [&](agent::v1::AttemptStatus* status) {
      status->set_phase(agent::v1::ATTEMPT_PHASE_ENDED);
      status->set_cause(agent::v1::END_CAUSE_NODE_FAILED);
      status->add_bad_nodes(bad);
    });
    ASSERT_TRUE(Reaches(id, JobState::kQueued));
    EXPECT_THAT(Row(id).record.reason, HasSubstr(absl::StrCat("away from ", bad)));
    Advance(absl::Minutes(10));
  }
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  EXPECT_THAT(store_->GetAttempt(AttemptKey(id, 1))->bad_nodes, ElementsAre("n1"));
  const auto excluded = [&](int attempt) {
    const agent::v1::SlurmSettings slurm = site_.attempts().at(AttemptKey(id, attempt).text()).request.slurm();
    return std::vector<std::string>(slurm.exclude_nodes().begin(), slurm.exclude_nodes().end());
  };
  EXPECT_THAT(excluded(1), IsEmpty());
  EXPECT_THAT(excluded(2), ElementsAre("n1"));
  EXPECT_THAT(excluded(3), ElementsAre("n2", "n1"));
  EXPECT_THAT(excluded(4), ElementsAre("n3", "n2")) << "one node has to be left";
}

TEST_F(SiteDispatcherTest, OldSpoolsAreRemovedAndForeignOnesLeft) {
  const JobId id = Submit();
  ASSERT_TRUE(Reaches(id, JobState::kPending));
  site_.Run(Key(id));
  site_.Exit(Key(id), 0);
  ASSERT_TRUE(Reaches(id, JobState::kSucceeded));
  site_.Run("ffffffffffffffff-1");
  Advance(absl::Hours(24 * 6));
  EXPECT_EQ(site_.attempts().size(), 2u);
  Advance(absl::Hours(24 * 2));
  Advance(absl::Hours(2));
  EXPECT_THAT(site_.attempts(), ElementsAre(::testing::Key("ffffffffffffffff-1")));
}

}  // namespace
}  // namespace itwin::server
