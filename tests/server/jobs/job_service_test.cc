#include "server/jobs/job_service.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/server/jobs/fixed_sites.h"
#include "tests/testing/server_fixture.h"

namespace itwin::server {
namespace {

using itwin::testing::StatusIs;
using itwin::testing::TempDirectory;
using testing::Event;
using testing::FixedSites;
using testing::OpenBlobs;
using testing::OpenStore;
using testing::RunningJob;
using ::testing::_;
using ::testing::AllOf;
using ::testing::HasSubstr;

class JobServiceTest : public ::testing::Test {
 protected:
  v1::SubmitJobRequest Request(const std::string& id) {
    v1::SubmitJobRequest request;
    request.set_request_id(id);
    request.mutable_spec()->set_name("hello");
    request.mutable_spec()->mutable_command()->add_argv("true");
    return request;
  }
  template <typename Message>
  Message Naming(const std::string& job) {
    Message message;
    message.set_job(job);
    return message;
  }

  TempDirectory directory_;
  std::unique_ptr<SqliteJobStore> store_ = OpenStore(directory_ / "itwin.db");
  std::unique_ptr<BlobStore> blobs_ = OpenBlobs(directory_.path());
  FixedSites sites_{{"local", "vega"}};
  JobService service_{store_.get(), blobs_.get(), &sites_};
  const Caller ada_{"ada", false}, bob_{"bob", false}, admin_{"root", true};
};

TEST_F(JobServiceTest, SubmitChecksEverythingAndNamesTheField) {
  EXPECT_THAT(service_.Submit(ada_, Request("")), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("request_id")));
  EXPECT_THAT(service_.Submit(ada_, Request("a b")), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("request_id")));
  EXPECT_THAT(service_.Submit(ada_, Request(std::string(129, 'x'))), StatusIs(absl::StatusCode::kInvalidArgument, _));
  auto request = Request("r");
  request.mutable_spec()->set_site("vga");
  EXPECT_THAT(service_.Submit(ada_, request),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("site"), HasSubstr("vega"))));
  request = Request("r");
  request.mutable_spec()->mutable_command()->clear_argv();
  EXPECT_THAT(service_.Submit(ada_, request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("argv")));
  request = Request("r");
  request.clear_spec();
  EXPECT_THAT(service_.Submit(ada_, request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("spec")));
  EXPECT_EQ(*store_->CountLive(), 0);

  request = Request("r");
  request.mutable_spec()->clear_name();
  const auto done = service_.Submit(ada_, request);
  ASSERT_OK(done);
  EXPECT_EQ(done->job().name(), "unnamed");
  EXPECT_EQ(done->job().owner(), "ada");
  EXPECT_EQ(done->job().state(), v1::JOB_STATE_QUEUED);
  EXPECT_TRUE(service_.Submit(ada_, request)->existed());
}

TEST_F(JobServiceTest, WhatNoSiteCanRunIsRefusedButNotWhatWasAccepted) {
  const auto accepted = service_.Submit(ada_, Request("before"));
  ASSERT_OK(accepted);
  sites_.impossible = "it asks for 64 ranks, but site local has 4 slots";
  EXPECT_THAT(service_.Submit(ada_, Request("after")),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("resources"), HasSubstr("64 ranks"))));
  const auto again = service_.Submit(ada_, Request("before"));
  ASSERT_OK(again);
  EXPECT_TRUE(again->existed());
  EXPECT_EQ(again->job().id(), accepted->job().id());
  auto other = Request("before");
  other.mutable_spec()->set_name("other");
  EXPECT_THAT(service_.Submit(ada_, other), StatusIs(absl::StatusCode::kAlreadyExists, _));
}

TEST_F(JobServiceTest, InputsMustHaveArrived) {
  auto request = Request("r");
  auto* input = request.mutable_spec()->add_inputs();
  input->set_path("data.bin");
  const std::string hash = Sha256Hex("data");
  input->set_sha256(hash);
  EXPECT_THAT(service_.Submit(ada_, request),
              StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr("data.bin"), HasSubstr(hash))));
  input->set_path("../data.bin");
  EXPECT_THAT(service_.Submit(ada_, request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("inputs")));
  input->set_path("data.bin");
  ASSERT_OK(blobs_->PutText("data"));
  EXPECT_OK(service_.Submit(ada_, request));
}

TEST_F(JobServiceTest, ArtifactReferencesBecomeInputs) {
  const std::string hash = *blobs_->PutText("data");
  auto request = Request("r");
  request.mutable_spec()->mutable_command()->add_files("sha256:" + hash);
  const auto done = service_.Submit(ada_, request);
  ASSERT_OK(done);
  const auto job = service_.Get(ada_, Naming<v1::GetJobRequest>(done->job().id()));
  ASSERT_OK(job);
  ASSERT_EQ(job->spec().inputs_size(), 1);
  EXPECT_EQ(job->spec().inputs(0).sha256(), hash);
}

TEST_F(JobServiceTest, ValidateReadsDocuments) {
  v1::ValidateJobRequest request;
  request.set_document("name: x\ncommand: {argv: [echo, hi], files: [tool.sh]}\n");
  request.add_overrides("name=y");
  const auto good = service_.Validate(request);
  ASSERT_OK(good);
  EXPECT_EQ(good->spec().name(), "y");
  ASSERT_EQ(good->files_size(), 1);
  EXPECT_EQ(good->files(0).value(), "tool.sh");
  request.set_document("nmae: x\n");
  EXPECT_THAT(service_.Validate(request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("name")));
  request.mutable_spec()->set_name("x");
  EXPECT_THAT(service_.Validate(request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("overrides")));
}

TEST_F(JobServiceTest, JobsAreTheirOwnersAndAdmins) {
  const std::string id = service_.Submit(ada_, Request("r"))->job().id();
  EXPECT_THAT(service_.Get(bob_, Naming<v1::GetJobRequest>(id)), StatusIs(absl::StatusCode::kPermissionDenied, _));
  EXPECT_THAT(service_.Get(bob_, Naming<v1::GetJobRequest>(id.substr(0, 8))), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(service_.Cancel(bob_, Naming<v1::CancelJobRequest>(id)), StatusIs(absl::StatusCode::kPermissionDenied, _));
  EXPECT_THAT(service_.ReadLog(bob_, Naming<v1::ReadLogRequest>(id)), StatusIs(absl::StatusCode::kPermissionDenied, _));
  EXPECT_EQ(service_.List(bob_, {})->jobs_size(), 0);
  EXPECT_EQ(service_.List(ada_, {})->jobs_size(), 1);
  EXPECT_EQ(service_.List(admin_, {})->jobs_size(), 1);
  EXPECT_OK(service_.Get(admin_, Naming<v1::GetJobRequest>(id.substr(0, 8))));
  EXPECT_OK(service_.Get(ada_, Naming<v1::GetJobRequest>(id.substr(0, 8))));
}

TEST_F(JobServiceTest, TracesRunningTrainingJobsOneAtATime) {
  const auto ask = [&](const std::string& id, int64_t steps) {
    auto request = Naming<v1::TraceJobRequest>(id);
    request.set_steps(steps);
    return service_.Trace(ada_, request);
  };
  const JobRow command = RunningJob(*store_, "command");
  EXPECT_THAT(ask(command.id.text(), 5), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("does not train")));
  NewJob job = testing::MakeJob("train");
  job.spec.mutable_train()->mutable_model()->set_builtin("mlp");
  const JobRow running = RunningJob(*store_, job);
  const std::string id = running.id.text();
  EXPECT_THAT(ask(id, -1), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("steps: -1 is not 1 to 10000")));
  EXPECT_THAT(service_.Trace(bob_, Naming<v1::TraceJobRequest>(id)), StatusIs(absl::StatusCode::kPermissionDenied, _));
  const auto asked = ask(id, 0);
  ASSERT_OK(asked);
  EXPECT_EQ(asked->output(), "trace-1.json");
  EXPECT_EQ(store_->GetJob(running.id)->record.trace_steps, 20);
  EXPECT_EQ(store_->ListEvents(running.id, 0, 100)->back().event.actor, "user:ada");
  // A call repeated for want of its answer asks for nothing more.
  const auto again = ask(id, 20);
  ASSERT_OK(again);
  EXPECT_EQ(again->output(), "trace-1.json");
  EXPECT_EQ(again->job().version(), asked->job().version());
  EXPECT_THAT(ask(id, 7), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("is being traced for 20 steps")));
  ASSERT_OK(store_->AppendEvent(running.id, Event(EventKind::kTraced, 1)));
  EXPECT_EQ(ask(id, 7)->output(), "trace-2.json");
  ASSERT_OK(store_->AppendEvent(running.id, Event(EventKind::kEnded, 1)));
  EXPECT_THAT(ask(id, 7), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("is COLLECTING: only a RUNNING job")));
}

TEST_F(JobServiceTest, CancelEndsAQueuedJobAtOnceAndAsksForOthers) {
  const std::string id = service_.Submit(ada_, Request("r"))->job().id();
  auto cancel = Naming<v1::CancelJobRequest>(id);
  cancel.set_reason("wrong data");
  const auto cancelled = service_.Cancel(ada_, cancel);
  ASSERT_OK(cancelled);
  EXPECT_EQ(cancelled->state(), v1::JOB_STATE_CANCELLED);
  EXPECT_THAT(service_.Cancel(ada_, cancel), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("CANCELLED")));
  const auto events = service_.ListEvents(ada_, Naming<v1::ListEventsRequest>(id));
  ASSERT_EQ(events->events_size(), 3);
  EXPECT_THAT(events->events(1).message(), HasSubstr("wrong data"));
  EXPECT_EQ(events->events(1).actor(), "user:ada");

  const JobRow running = RunningJob(*store_, "r2");
  const auto asked = service_.Cancel(ada_, Naming<v1::CancelJobRequest>(running.id.text()));
  ASSERT_OK(asked);
  EXPECT_EQ(asked->state(), v1::JOB_STATE_RUNNING);
  EXPECT_TRUE(asked->cancel_requested());
  EXPECT_OK(service_.Cancel(ada_, Naming<v1::CancelJobRequest>(running.id.text())));  // again: the same answer
  EXPECT_EQ(store_->ListEvents(running.id, 0, 100)->size(), 6u);
}

TEST_F(JobServiceTest, RetryMakesANewJobFromTheNewestCheckpoint) {
  const JobRow job = RunningJob(*store_, "r");
  auto retry = Naming<v1::RetryJobRequest>(job.id.text());
  retry.set_request_id("again");
  EXPECT_THAT(service_.Retry(ada_, retry), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("RUNNING")));
  AttemptUpdate saved;
  saved.checkpoint = true;
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1), saved));
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kFailed, 1)));
  const auto made = service_.Retry(ada_, retry);
  ASSERT_OK(made);
  EXPECT_FALSE(made->existed());
  EXPECT_NE(made->job().id(), job.id.text());
  EXPECT_EQ(made->job().retry_of(), job.id.text());
  const auto row = store_->GetJob(*JobId::Parse(made->job().id()));
  EXPECT_EQ(row->resume, AttemptKey(job.id, 1));
  EXPECT_EQ(row->requested_site, "local");
  EXPECT_TRUE(service_.Retry(ada_, retry)->existed());
  retry.set_fresh(true);
  EXPECT_THAT(service_.Retry(ada_, retry), StatusIs(absl::StatusCode::kAlreadyExists, _));
  retry.set_request_id("fresh");
  const auto fresh = service_.Retry(ada_, retry);
  ASSERT_OK(fresh);
  EXPECT_EQ(store_->GetJob(*JobId::Parse(fresh->job().id()))->resume, std::nullopt);

  const JobRow good = RunningJob(*store_, "g");
  ASSERT_OK(store_->AppendEvent(good.id, Event(EventKind::kEnded, 1)));
  ASSERT_OK(store_->AppendEvent(good.id, Event(EventKind::kSucceeded, 1)));
  auto again = Naming<v1::RetryJobRequest>(good.id.text());
  again.set_request_id("x");
  EXPECT_THAT(service_.Retry(ada_, again), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("SUCCEEDED")));
}

TEST_F(JobServiceTest, LimitsAreChecked) {
  const std::string id = RunningJob(*store_, "r").id.text();
  auto points = Naming<v1::ListPointsRequest>(id);
  points.set_limit(100'000);
  EXPECT_OK(service_.ListPoints(ada_, points));
  points.set_limit(100'001);
  EXPECT_THAT(service_.ListPoints(ada_, points), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("limit")));
  auto series = Naming<v1::QuerySeriesRequest>(id);
  series.set_buckets(10'001);
  EXPECT_THAT(service_.QuerySeries(ada_, series), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("buckets")));
  v1::ListJobsRequest list;
  list.set_page_size(1001);
  EXPECT_THAT(service_.List(ada_, list), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("page_size")));
  list.set_page_size(0);
  list.add_states(static_cast<v1::JobState>(77));
  EXPECT_THAT(service_.List(ada_, list), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("77")));
  auto log = Naming<v1::ReadLogRequest>(id);
  log.set_limit((1 << 20) + 1);
  EXPECT_THAT(service_.ReadLog(ada_, log), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("limit")));
}

}  // namespace
}  // namespace itwin::server
