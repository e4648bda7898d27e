#include "itwin/client.h"

#include <gmock/gmock.h>

#include <thread>

#include "common/files.h"
#include "common/sha256.h"
#include "common/spec/spec_document.h"
#include "tests/client/fake_gateway.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::client {
namespace {

using ::itwin::testing::FakeGateway;
using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kJob[] = "0123456789abcdef";

class ClientTest : public ::testing::Test {
 protected:
  // Ten updates, the last with the job's end; each carries its number as a point.
  void ScriptWatch() {
    gateway_->AddJob(kJob);
    for (int i = 1; i <= 10; ++i) {
      v1::JobUpdate& update = gateway_->AddUpdate(kJob);
      v1::PointBlock* block = update.add_blocks();
      block->add_values(i);
      if (i == 1 || i == 10) {
        *update.mutable_job() = gateway_->jobs[kJob];
        if (i == 10) update.mutable_job()->set_state(v1::JOB_STATE_SUCCEEDED);
      }
    }
  }
  std::vector<int> Seen(absl::StatusOr<v1::Job>* job, WatchOptions options = {}, int stop_at = 100) {
    std::vector<int> seen;
    *job = client_.Watch("0123", options, [&](const v1::JobUpdate& update) {
      seen.push_back(static_cast<int>(update.blocks(0).values(0)));
      return seen.back() != stop_at;
    });
    return seen;
  }

  std::shared_ptr<FakeGateway> gateway_ = std::make_shared<FakeGateway>();
  Client client_{gateway_};
};

TEST_F(ClientTest, WatchGoesOnWhereTheStreamBroke) {
  ScriptWatch();
  for (int first = 0; first < 10; ++first) {
    gateway_->cuts = {first, 0, 1};
    std::vector<std::string> reconnects;
    WatchOptions options;
    options.on_reconnect = [&](const absl::Status& why, absl::Duration) { reconnects.emplace_back(why.message()); };
    absl::StatusOr<v1::Job> job;
    EXPECT_THAT(Seen(&job, options), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)) << first;
    ASSERT_OK(job);
    EXPECT_EQ(job->state(), v1::JOB_STATE_SUCCEEDED);
    EXPECT_FALSE(reconnects.empty());
  }
  // Once the job is known, it is asked for by its whole id.
  EXPECT_EQ(gateway_->watches.back().job(), kJob);
}

TEST_F(ClientTest, WatchResumesFromACursorAndEndsWhenTheCallerSaysSo) {
  ScriptWatch();
  absl::StatusOr<v1::Job> job;
  EXPECT_THAT(Seen(&job, {}, 3), ElementsAre(1, 2, 3));
  ASSERT_OK(job);
  EXPECT_EQ(job->state(), v1::JOB_STATE_RUNNING);
  WatchOptions options;
  options.cursor.set_event_sequence(8);
  EXPECT_THAT(Seen(&job, options), ElementsAre(9, 10));
}

TEST_F(ClientTest, WatchGoesOnWhenTheGatewayClosesTheStreamEarly) {
  ScriptWatch();
  v1::JobUpdate last = gateway_->updates[kJob].back();
  gateway_->updates[kJob].pop_back();
  WatchOptions options;
  options.on_reconnect = [&](const absl::Status&, absl::Duration) {
    if (gateway_->updates[kJob].size() < 10) gateway_->updates[kJob].push_back(last);  // the job ends now
  };
  absl::StatusOr<v1::Job> job;
  EXPECT_THAT(Seen(&job, options), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10));
  EXPECT_OK(job);
}

TEST_F(ClientTest, WatchReturnsErrorsThatWillNotGoAway) {
  absl::StatusOr<v1::Job> job;
  Seen(&job);
  EXPECT_THAT(job, StatusIs(absl::StatusCode::kNotFound, HasSubstr("no job '0123'")));
  EXPECT_EQ(gateway_->watches.size(), 1u);
  ScriptWatch();
  gateway_->faults = {absl::UnauthenticatedError("token revoked")};
  Seen(&job);
  EXPECT_THAT(job, StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("revoked")));
}

TEST_F(ClientTest, WatchGivesUpWhenToldTo) {
  ScriptWatch();
  gateway_->faults.assign(1'000, absl::UnavailableError("down"));
  WatchOptions options;
  options.give_up_after = absl::Milliseconds(300);
  absl::StatusOr<v1::Job> job;
  Seen(&job, options);
  EXPECT_THAT(job, StatusIs(absl::StatusCode::kUnavailable, HasSubstr("down")));
}

TEST_F(ClientTest, WatchTakesAQuietStreamForWhatItIs) {
  ScriptWatch();
  // The stream's deadline passes twice without news; the gateway answers in between, so nothing is lost.
  gateway_->faults = {absl::DeadlineExceededError("2 min"), absl::OkStatus(), absl::DeadlineExceededError("2 min"), absl::OkStatus()};
  int reconnects = 0;
  WatchOptions options;
  options.give_up_after = absl::Milliseconds(1'000);
  options.on_reconnect = [&](const absl::Status&, absl::Duration) { ++reconnects; };
  absl::StatusOr<v1::Job> job;
  EXPECT_THAT(Seen(&job, options), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10));
  EXPECT_EQ(reconnects, 0);
  // Nobody answers: that is a lost connection.
  gateway_->faults = {absl::DeadlineExceededError("2 min"), absl::UnavailableError("dead")};
  Seen(&job, options);
  EXPECT_EQ(reconnects, 1);
}

TEST_F(ClientTest, WatchCanBeStoppedFromAnotherThread) {
  ScriptWatch();
  gateway_->faults.assign(100'000, absl::UnavailableError("down"));
  std::stop_source source;
  WatchOptions options;
  options.stop = source.get_token();
  std::jthread stopper;
  options.on_reconnect = [&](const absl::Status&, absl::Duration) {
    if (!stopper.joinable()) stopper = std::jthread([&source] { source.request_stop(); });
  };
  absl::StatusOr<v1::Job> job;
  Seen(&job, options);
  EXPECT_THAT(job, StatusIs(absl::StatusCode::kCancelled, HasSubstr("stopped")));
}

TEST_F(ClientTest, SubmitSendsFilesThenTheJob) {
  TempDirectory directory;
  ASSERT_OK(WriteFileAtomically(directory / "data.npz", "numbers"));
  const v1::JobSpec spec = ParseSpecDocument("train: {model: {builtin: mlp}, loss: mse, data: {npz: data.npz}}", {}).value();
  std::vector<TransferProgress::Phase> phases;
  absl::StatusOr<v1::SubmitJobResponse> response = client_.Submit(
      spec, {.base_directory = directory.path(),
             .request_id = "my-request",
             .progress = [&](const TransferProgress& progress) { phases.push_back(progress.phase); }});
  ASSERT_OK(response);
  EXPECT_THAT(phases, ElementsAre(TransferProgress::Phase::kHashing, TransferProgress::Phase::kUploading));
  const v1::JobSpec& sent = gateway_->last_submit.spec();
  EXPECT_EQ(gateway_->last_submit.request_id(), "my-request");
  EXPECT_EQ(sent.train().data().npz(), "data.npz");
  ASSERT_EQ(sent.inputs_size(), 1);
  EXPECT_EQ(gateway_->artifacts[sent.inputs(0).sha256()], "numbers");
  EXPECT_FALSE(response->existed());
  response = client_.Submit(spec, {.base_directory = directory.path(), .request_id = "my-request"});
  EXPECT_TRUE(response->existed());
  ASSERT_OK(client_.Submit(spec, {.base_directory = directory.path()}));
  EXPECT_EQ(gateway_->last_submit.request_id().size(), 32u);
}

TEST_F(ClientTest, SubmitRefusesAWrongSpecWithoutAskingTheGateway) {
  v1::JobSpec spec;
  spec.mutable_train()->set_epochs(-1);
  EXPECT_THAT(client_.Submit(spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("train.epochs: -1 is out of range")));
  EXPECT_EQ(gateway_->calls, 0);
}

TEST_F(ClientTest, SubmitTurnsHashesIntoInputs) {
  const std::string hash = Sha256Hex("known");
  gateway_->artifacts[hash] = "known";
  const v1::JobSpec spec = ParseSpecDocument("train: {model: {builtin: mlp}, loss: mse, data: {npz: 'sha256:" + hash + "'}}", {}).value();
  ASSERT_OK(client_.Submit(spec));
  ASSERT_EQ(gateway_->last_submit.spec().inputs_size(), 1);
  EXPECT_EQ(gateway_->last_submit.spec().inputs(0).sha256(), hash);
}

TEST_F(ClientTest, PagesThroughJobsEventsAndPoints) {
  for (int i = 0; i < 5; ++i) gateway_->AddJob(absl::StrCat("000000000000000", i));
  v1::ListJobsRequest request;
  request.set_page_size(2);
  JobPager pager = client_.List(request);
  std::vector<std::string> ids;
  gateway_->faults = {absl::OkStatus(), absl::UnavailableError("once")};
  int errors = 0;
  while (!pager.done()) {
    absl::StatusOr<std::vector<v1::Job>> page = pager.Next();
    if (!page.ok()) {
      ++errors;
      continue;
    }
    for (const v1::Job& job : *page) ids.push_back(job.id().substr(15));
  }
  EXPECT_THAT(ids, ElementsAre("4", "3", "2", "1", "0"));
  EXPECT_EQ(errors, 1);

  for (int i = 1; i <= 5; ++i) gateway_->events["0000000000000001"].emplace_back().set_sequence(i);
  EXPECT_EQ(client_.Events("0000000000000001")->size(), 5u);

  for (int i = 0; i < 3; ++i) {
    v1::PointBlock& block = gateway_->points["0000000000000001"].emplace_back();
    block.add_values(i);
    block.add_steps(i);
    block.add_times_us(i);
  }
  std::vector<double> values;
  absl::StatusOr<int64_t> cursor = client_.Points("0000000000000001", {}, 1, [&](const v1::PointBlock& block) {
    values.push_back(block.values(0));
    return absl::OkStatus();
  });
  EXPECT_THAT(values, ElementsAre(1, 2));
  EXPECT_EQ(cursor.value(), 3);
}

TEST_F(ClientTest, RefusesOutputsThatWouldLeaveTheDirectory) {
  TempDirectory directory;
  gateway_->AddJob(kJob, v1::JOB_STATE_SUCCEEDED);
  for (const char* path : {"../escape", "/etc/x", "a/../../b", "", "a\nb"}) {
    gateway_->outputs[kJob].clear();
    gateway_->AddOutput(kJob, path, "x");
    EXPECT_THAT(client_.DownloadInto(client_.Outputs(kJob)->at(0), directory / "results"),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("no safe path"))) << path;
  }
  gateway_->outputs[kJob].clear();
  gateway_->AddOutput(kJob, "plots/a.txt", "x");
  EXPECT_EQ(client_.DownloadInto(client_.Outputs(kJob)->at(0), directory / "results").value(), directory / "results/plots/a.txt");
}

}  // namespace
}  // namespace itwin::client
