// The services as a client sees them, in this process.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <thread>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "common/sha256.h"
#include "common/version.h"
#include "server/rpc/artifacts_rpc.h"
#include "server/rpc/jobs_rpc.h"
#include "server/rpc/limits.h"
#include "server/rpc/sites_rpc.h"
#include "tests/server/jobs/fixed_sites.h"
#include "tests/testing/server_fixture.h"
#include "tests/testing/wait.h"

namespace itwin::server {
namespace {

using itwin::testing::TempDirectory;
using itwin::testing::WaitUntil;
using testing::Event;
using testing::FixedSites;
using testing::LogBatch;
using testing::MetricsBatch;
using testing::OpenBlobs;
using testing::OpenStore;
using testing::RunningJob;
using ::testing::HasSubstr;

constexpr char kToken[] = "token-of-ada";

// Tells three steps, then ends as it is told to; a survey waits for `go` after its first step.
class FakeSiteAdmin : public SiteAdmin {
 public:
  absl::StatusOr<v1::Site> GetSite(const std::string& name) override {
    v1::Site site;
    site.set_name(name);
    site.set_document("name: vega");
    return site;
  }
  absl::Status AddSite(const v1::AddSiteRequest& request, const OnProgress& on_progress) override {
    ++surveys;
    for (int i = 0; i < 3; ++i) {
      v1::SiteProgress progress;
      progress.set_step(absl::StrCat("step ", i));
      if (!on_progress(progress)) {
        gone.Notify();
        return absl::CancelledError("nobody listens");
      }
      if (i == 0) go.WaitForNotificationWithTimeout(absl::Seconds(30));
    }
    return absl::FailedPreconditionError(absl::StrCat("refused: ", request.document()));
  }
  absl::Status DoctorSite(const v1::DoctorSiteRequest&, const OnProgress&) override { return absl::OkStatus(); }
  absl::StatusOr<v1::Site> PauseSite(const std::string& name, const std::string& actor, const std::string& reason) override {
    v1::Site site;
    site.set_name(name);
    site.set_reason(absl::StrCat(actor, ": ", reason));
    return site;
  }
  absl::StatusOr<v1::Site> ResumeSite(const std::string& name) override { return GetSite(name); }
  absl::Status RemoveSite(const std::string&) override { return absl::FailedPreconditionError("2 jobs"); }

  absl::Notification go, gone;
  std::atomic<int> surveys{0};
};

class ServicesTest : public ::testing::Test {
 protected:
  ServicesTest() {
    for (const auto& [name, text, role] : {std::tuple{"ada", kToken, TokenRole::kUser}, {"bob", "token-of-bob", TokenRole::kUser},
                                           {"root", "token-of-root", TokenRole::kAdmin}}) {
      TokenRow token;
      token.name = name;
      token.sha256 = Sha256Hex(text);
      token.role = role;
      ITWIN_CHECK(store_->AddToken(token).ok());
    }
    store_->AddListener(&hub_);
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(kMaxReceiveMessageBytes);
    builder.RegisterService(&jobs_rpc_);
    builder.RegisterService(&artifacts_rpc_);
    builder.RegisterService(&sites_rpc_);
    server_ = builder.BuildAndStart();
    channel_ = server_->InProcessChannel({});
    jobs_ = v1::Jobs::NewStub(channel_);
    artifacts_ = v1::Artifacts::NewStub(channel_);
    sites_stub_ = v1::Sites::NewStub(channel_);
  }
  ~ServicesTest() override {
    hub_.Close();
    server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(10));
    server_->Wait();
    store_->RemoveListener(&hub_);
  }

  static std::unique_ptr<grpc::ClientContext> Context(const std::string& token = kToken) {
    auto context = std::make_unique<grpc::ClientContext>();
    context->AddMetadata("authorization", "Bearer " + token);
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    return context;
  }
  static v1::SubmitJobRequest Request(const std::string& id) {
    v1::SubmitJobRequest request;
    request.set_request_id(id);
    request.mutable_spec()->mutable_command()->add_argv("true");
    return request;
  }
  void Emit(const JobRow& job, int64_t offset, double value) {
    SpoolBatch batch = MetricsBatch({job.id, 1}, offset, offset + 1);
    batch.points.push_back({"x", {offset}, {offset}, {value}});
    ITWIN_CHECK(store_->CommitSpool({batch}).ok());
  }
  void Succeed(const JobRow& job) {
    ITWIN_CHECK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1)).ok());
    ITWIN_CHECK(store_->AppendEvent(job.id, Event(EventKind::kSucceeded, 1)).ok());
  }
  static v1::WatchJobRequest WatchAll(const JobRow& job) {
    v1::WatchJobRequest request;
    request.set_job(job.id.text());
    request.set_points(true);
    request.set_logs(true);
    return request;
  }
  // Sends bytes [offset, end) of an artifact.
  grpc::Status Upload(const std::string& sha256, const std::string& bytes, size_t offset, size_t end,
                      v1::UploadArtifactResponse* response) {
    auto context = Context();
    auto writer = artifacts_->UploadArtifact(context.get(), response);
    v1::UploadArtifactRequest request;
    request.set_sha256(sha256);
    request.set_size_bytes(static_cast<int64_t>(bytes.size()));
    request.set_offset(static_cast<int64_t>(offset));
    do {
      const size_t chunk = std::min<size_t>(end - offset, 300'000);
      request.set_data(bytes.substr(offset, chunk));
      offset += chunk;
      if (!writer->Write(request)) break;
      request.Clear();
    } while (offset < end);
    writer->WritesDone();
    return writer->Finish();
  }

  TempDirectory directory_;
  std::unique_ptr<SqliteJobStore> store_ = OpenStore(directory_ / "itwin.db");
  std::unique_ptr<BlobStore> blobs_ = OpenBlobs(directory_.path());
  FixedSites sites_{{"local", "vega"}};
  SystemClock clock_;
  EventHub hub_{{.max_watchers = kMaxWatchers}, &clock_};
  JobService service_{store_.get(), blobs_.get(), &sites_};
  TokenAuthenticator authenticator_{store_.get(), absl::ZeroDuration()};
  TaskPool feeders_{2}, files_{2};
  JobsRpc jobs_rpc_{{&service_, store_.get(), &hub_, &authenticator_, &feeders_}};
  ArtifactsRpc artifacts_rpc_{{blobs_.get(), &authenticator_, &files_}};
  FakeSiteAdmin site_admin_;
  TaskPool surveys_{2};
  SitesRpc sites_rpc_{{&sites_, &site_admin_, &authenticator_, &surveys_}, absl::Now()};
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Jobs::Stub> jobs_;
  std::unique_ptr<v1::Artifacts::Stub> artifacts_;
  std::unique_ptr<v1::Sites::Stub> sites_stub_;
};

TEST_F(ServicesTest, EveryCallNeedsAToken) {
  const auto expect_refused = [](const grpc::Status& status) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << status.error_message();
    EXPECT_THAT(status.error_message(), ::testing::AnyOf(HasSubstr("authorization: Bearer"), HasSubstr("ask an admin")));
  };
  ASSERT_OK(store_->RevokeToken("bob"));
  for (const char* token : {"", "wrong", "token-of-bob"}) {
    v1::ListSitesResponse sites;
    v1::SubmitJobResponse submitted;
    v1::StatArtifactsResponse stat;
    v1::UploadArtifactResponse uploaded;
    v1::ValidateJobResponse validated;
    expect_refused(sites_stub_->ListSites(Context(token).get(), {}, &sites));
    expect_refused(jobs_->SubmitJob(Context(token).get(), Request("r"), &submitted));
    expect_refused(jobs_->ValidateJob(Context(token).get(), {}, &validated));
    expect_refused(artifacts_->StatArtifacts(Context(token).get(), {}, &stat));
    auto context = Context(token);
    v1::WatchJobRequest watch;
    expect_refused(jobs_->WatchJob(context.get(), watch)->Finish());
    context = Context(token);
    expect_refused(artifacts_->DownloadArtifact(context.get(), {})->Finish());
    context = Context(token);
    expect_refused(artifacts_->UploadArtifact(context.get(), &uploaded)->Finish());
  }
  grpc::ClientContext bare;
  v1::GetVersionResponse version;
  expect_refused(sites_stub_->GetVersion(&bare, {}, &version));
  EXPECT_TRUE(sites_stub_->GetVersion(Context().get(), {}, &version).ok());
  EXPECT_EQ(version.version(), kVersion);
}

TEST_F(ServicesTest, SubmitsGetsListsAndCancels) {
  v1::SubmitJobResponse submitted;
  ASSERT_TRUE(jobs_->SubmitJob(Context().get(), Request("r"), &submitted).ok());
  EXPECT_EQ(submitted.job().owner(), "ada");
  v1::GetJobRequest get;
  get.set_job(submitted.job().id().substr(0, 10));
  v1::Job job;
  ASSERT_TRUE(jobs_->GetJob(Context().get(), get, &job).ok());
  EXPECT_EQ(job.spec().command().argv(0), "true");
  EXPECT_EQ(jobs_->GetJob(Context("token-of-bob").get(), get, &job).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_TRUE(jobs_->GetJob(Context("token-of-root").get(), get, &job).ok());
  v1::ListJobsResponse list;
  ASSERT_TRUE(jobs_->ListJobs(Context().get(), {}, &list).ok());
  EXPECT_EQ(list.jobs_size(), 1);
  v1::CancelJobRequest cancel;
  cancel.set_job(job.id());
  ASSERT_TRUE(jobs_->CancelJob(Context().get(), cancel, &job).ok());
  EXPECT_EQ(job.state(), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(jobs_->CancelJob(Context().get(), cancel, &job).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  v1::ListSitesResponse sites;
  ASSERT_TRUE(sites_stub_->ListSites(Context().get(), {}, &sites).ok());
  EXPECT_EQ(sites.sites_size(), 2);
}

TEST_F(ServicesTest, HugeSpecsAreRefusedBeforeTheyAreRead) {
  auto request = Request("huge");
  request.mutable_spec()->mutable_command()->add_argv(std::string(100 << 20, 'x'));
  v1::SubmitJobResponse response;
  EXPECT_EQ(jobs_->SubmitJob(Context().get(), request, &response).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  // Above the limit of a spec, below that of a message: our own words.
  request = Request("large");
  request.mutable_spec()->mutable_command()->add_argv(std::string((1 << 20) + 1000, 'x'));
  const grpc::Status status = jobs_->SubmitJob(Context().get(), request, &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
}

TEST_F(ServicesTest, WatchDeliversACommittedPointWithinMilliseconds) {
  const JobRow job = RunningJob(*store_, "r");
  auto context = Context();
  auto reader = jobs_->WatchJob(context.get(), WatchAll(job));
  v1::JobUpdate update;
  ASSERT_TRUE(reader->Read(&update));
  EXPECT_EQ(update.job().state(), v1::JOB_STATE_RUNNING);
  std::vector<absl::Duration> delays;
  int offset = 0;
  for (int i = 0; i < 200; ++i) {
    // Bursts: some commits fall into the time in which the watcher is being fed, and must not be forgotten.
    for (int burst = i % 4; burst > 0; --burst, ++offset) Emit(job, offset, -1);
    Emit(job, offset++, i);
    const absl::Time committed = absl::Now();
    bool got = false;
    while (!got && reader->Read(&update)) {
      for (const auto& block : update.blocks()) got |= block.values(block.values_size() - 1) == i;
    }
    ASSERT_TRUE(got);
    delays.push_back(absl::Now() - committed);
  }
  std::sort(delays.begin(), delays.end());
  EXPECT_LT(delays[delays.size() / 2], absl::Milliseconds(50)) << absl::FormatDuration(delays[delays.size() / 2]);
  Succeed(job);
  v1::Job last;
  while (reader->Read(&update)) {
    if (update.has_job()) last = update.job();
  }
  EXPECT_EQ(last.state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(ServicesTest, ABrokenWatchGoesOnWithItsCursor) {
  const JobRow job = RunningJob(*store_, "r");
  std::thread writer([&] {
    for (int i = 0; i < 400; ++i) Emit(job, i, i);
    Succeed(job);
  });
  absl::Cleanup join = [&] { writer.join(); };
  std::vector<double> values;
  v1::WatchJobRequest request = WatchAll(job);
  bool finished = false;
  for (int connection = 0; !finished && connection < 500; ++connection) {
    auto context = Context();
    auto reader = jobs_->WatchJob(context.get(), request);
    v1::JobUpdate update;
    for (int i = 0; i < 3 && reader->Read(&update); ++i) {
      for (const auto& block : update.blocks()) values.insert(values.end(), block.values().begin(), block.values().end());
      *request.mutable_cursor() = update.cursor();
    }
    if (connection % 2 == 0) context->TryCancel();
    while (connection % 2 == 1 && reader->Read(&update)) {
      for (const auto& block : update.blocks()) values.insert(values.end(), block.values().begin(), block.values().end());
      *request.mutable_cursor() = update.cursor();
      if (values.size() % 5 == 0) context->TryCancel();
    }
    finished = reader->Finish().ok();
  }
  ASSERT_TRUE(finished);
  ASSERT_EQ(values.size(), 400u);
  for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i], static_cast<double>(i));
}

TEST_F(ServicesTest, ASlowWatcherLosesNothingAndHoldsNobodyUp) {
  const JobRow job = RunningJob(*store_, "r");
  auto slow_context = Context();
  auto slow = jobs_->WatchJob(slow_context.get(), WatchAll(job));
  // It reads nothing while 300,000 points and 2 MB of log are committed, and another watcher sees them all.
  auto context = Context();
  auto quick = jobs_->WatchJob(context.get(), WatchAll(job));
  std::thread writer([&] {
    for (int64_t i = 0; i < 300; ++i) {
      SpoolBatch batch = MetricsBatch({job.id, 1}, i, i + 1);
      PointColumns columns{"x", {}, {}, {}};
      for (int p = 0; p < 1000; ++p) {
        columns.steps.push_back(i);
        columns.times_us.push_back(i);
        columns.values.push_back(static_cast<double>(i * 1000 + p));
      }
      batch.points.push_back(std::move(columns));
      ITWIN_CHECK(store_->CommitSpool({batch, LogBatch({job.id, 1}, i * 7000, std::string(7000, 'l'))}).ok());
    }
    Succeed(job);
  });
  const auto read_all = [](grpc::ClientReader<v1::JobUpdate>& reader) {
    v1::JobUpdate update;
    size_t points = 0, log = 0;
    while (reader.Read(&update)) {
      for (const auto& block : update.blocks()) {
        for (const double value : block.values()) EXPECT_EQ(value, static_cast<double>(points++));
      }
      log += update.stdout_data().size();
    }
    EXPECT_TRUE(reader.Finish().ok());
    EXPECT_EQ(points, 300'000u);
    EXPECT_EQ(log, 2'100'000u);
  };
  read_all(*quick);
  writer.join();
  read_all(*slow);
}

TEST_F(ServicesTest, AThousandWatchersSeeTheEnd) {
  constexpr int kWatchers = 1000;
  const JobRow job = RunningJob(*store_, "r");
  struct Watcher : grpc::ClientReadReactor<v1::JobUpdate> {
    void OnReadDone(bool ok) override {
      if (!ok) return;
      ++*updates;
      for (const auto& block : update.blocks()) points += block.values_size();
      StartRead(&update);
    }
    void OnDone(const grpc::Status& s) override {
      status = s;
      done.Notify();
    }
    grpc::ClientContext context;
    v1::WatchJobRequest request;
    v1::JobUpdate update;
    int points = 0;
    grpc::Status status;
    absl::Notification done;
    std::atomic<int>* updates = nullptr;
  };
  std::atomic<int> updates = 0;
  std::vector<std::unique_ptr<Watcher>> watchers;
  for (int i = 0; i < kWatchers; ++i) {
    auto& watcher = *watchers.emplace_back(std::make_unique<Watcher>());
    watcher.updates = &updates;
    watcher.request = WatchAll(job);
    watcher.context.AddMetadata("authorization", absl::StrCat("Bearer ", kToken));
    jobs_->async()->WatchJob(&watcher.context, &watcher.request, &watcher);
    watcher.StartRead(&watcher.update);
    watcher.StartCall();
  }
  ASSERT_TRUE(WaitUntil([&] { return updates >= kWatchers; }));
  EXPECT_EQ(hub_.watchers(), kWatchers);
  for (int i = 0; i < 20; ++i) Emit(job, i, i);
  Succeed(job);
  for (const auto& watcher : watchers) {
    ASSERT_TRUE(watcher->done.WaitForNotificationWithTimeout(absl::Seconds(30)));
    EXPECT_TRUE(watcher->status.ok()) << watcher->status.error_message();
    EXPECT_EQ(watcher->points, 20);
  }
  EXPECT_TRUE(WaitUntil([&] { return hub_.watchers() == 0; }));
}

TEST_F(ServicesTest, WatchersWhoLeaveAreForgottenAndTheRestIsToldWhenTheGatewayStops) {
  const JobRow job = RunningJob(*store_, "r");
  v1::JobUpdate update;
  auto gone_context = Context();
  auto gone = jobs_->WatchJob(gone_context.get(), WatchAll(job));
  ASSERT_TRUE(gone->Read(&update));
  auto context = Context();
  auto stays = jobs_->WatchJob(context.get(), WatchAll(job));
  ASSERT_TRUE(stays->Read(&update));
  EXPECT_EQ(hub_.watchers(), 2);
  gone_context->TryCancel();
  EXPECT_EQ(gone->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(WaitUntil([&] { return hub_.watchers() == 1; }));
  hub_.Close();
  while (stays->Read(&update)) {
  }
  const grpc::Status status = stays->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("last cursor"));
}

TEST_F(ServicesTest, ArtifactsGoUpInPiecesAndComeBack) {
  std::string bytes(2'500'000, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 31 >> 3);
  const std::string hash = Sha256Hex(bytes);
  v1::UploadArtifactResponse uploaded;
  const grpc::Status part = Upload(hash, bytes, 0, 1'000'000, &uploaded);
  EXPECT_EQ(part.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  v1::StatArtifactsRequest stat;
  stat.add_sha256(hash);
  stat.add_sha256(Sha256Hex("other"));
  v1::StatArtifactsResponse known;
  ASSERT_TRUE(artifacts_->StatArtifacts(Context().get(), stat, &known).ok());
  EXPECT_EQ(known.artifacts(0).received_bytes(), 1'000'000);
  EXPECT_EQ(known.artifacts(1).received_bytes(), 0);
  v1::DownloadArtifactRequest download;
  download.set_sha256(hash);
  {
    auto context = Context();
    EXPECT_EQ(artifacts_->DownloadArtifact(context.get(), download)->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
  }
  ASSERT_TRUE(Upload(hash, bytes, 1'000'000, bytes.size(), &uploaded).ok());
  EXPECT_EQ(uploaded.size_bytes(), 2'500'000);
  for (const int64_t offset : {0, 1'500'000, 2'500'000}) {
    auto context = Context();
    download.set_offset(offset);
    auto reader = artifacts_->DownloadArtifact(context.get(), download);
    v1::DownloadArtifactResponse response;
    std::string got;
    int64_t size = 0;
    while (reader->Read(&response)) {
      got += response.data();
      size = std::max(size, response.size_bytes());
    }
    EXPECT_TRUE(reader->Finish().ok());
    EXPECT_EQ(got, bytes.substr(static_cast<size_t>(offset)));
    EXPECT_EQ(size, 2'500'000);
  }
  // Bytes that do not fit their name leave nothing.
  v1::UploadArtifactResponse refused;
  EXPECT_EQ(Upload(Sha256Hex("right"), "wrong", 0, 5, &refused).error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_EQ(Upload("../../x", "wrong", 0, 5, &refused).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ServicesTest, AnUploadThatBreaksOffKeepsWhatArrived) {
  const std::string bytes(1'000'000, 'b');
  const std::string hash = Sha256Hex(bytes);
  {
    auto context = Context();
    v1::UploadArtifactResponse response;
    auto writer = artifacts_->UploadArtifact(context.get(), &response);
    v1::UploadArtifactRequest request;
    request.set_sha256(hash);
    request.set_size_bytes(1'000'000);
    request.set_data(bytes.substr(0, 400'000));
    ASSERT_TRUE(writer->Write(request));
    ASSERT_TRUE(WaitUntil([&] { return blobs_->StatBlob(hash)->received_bytes == 400'000; }));
    context->TryCancel();
    EXPECT_FALSE(writer->Finish().ok());
  }
  v1::UploadArtifactResponse response;
  grpc::Status status;
  // The server may need a moment to see that the first call has gone.
  ASSERT_TRUE(WaitUntil([&] {
    status = Upload(hash, bytes, 400'000, bytes.size(), &response);
    return status.error_code() != grpc::StatusCode::ABORTED;
  }));
  EXPECT_TRUE(status.ok()) << status.error_message();
}

TEST_F(ServicesTest, SitesAreChangedByAdministratorsAlone) {
  v1::Site site;
  v1::GetSiteRequest get;
  get.set_name("vega");
  EXPECT_TRUE(sites_stub_->GetSite(Context().get(), get, &site).ok());
  EXPECT_EQ(site.document(), "");  // what lies on the gateway's machine is not for everybody
  EXPECT_TRUE(sites_stub_->GetSite(Context("token-of-root").get(), get, &site).ok());
  EXPECT_EQ(site.document(), "name: vega");
  v1::PauseSiteRequest pause;
  pause.set_name("vega");
  pause.set_reason("work on the cooling");
  const grpc::Status refused = sites_stub_->PauseSite(Context().get(), pause, &site);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_THAT(refused.error_message(), HasSubstr("itwin-gateway token add"));
  EXPECT_TRUE(sites_stub_->PauseSite(Context("token-of-root").get(), pause, &site).ok());
  EXPECT_EQ(site.reason(), "root: work on the cooling");
  v1::RemoveSiteResponse removed;
  EXPECT_EQ(sites_stub_->RemoveSite(Context().get(), {}, &removed).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(sites_stub_->RemoveSite(Context("token-of-root").get(), {}, &removed).error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(sites_stub_->ResumeSite(Context().get(), {}, &site).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  auto context = Context();
  auto reader = sites_stub_->AddSite(context.get(), {});
  v1::SiteProgress progress;
  EXPECT_FALSE(reader->Read(&progress));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(site_admin_.surveys, 0);
}

TEST_F(ServicesTest, ASurveyTellsEachStepAndThenItsEnd) {
  auto context = Context("token-of-root");
  v1::AddSiteRequest request;
  request.set_document("d");
  auto reader = sites_stub_->AddSite(context.get(), request);
  v1::SiteProgress progress;
  ASSERT_TRUE(reader->Read(&progress));  // while the survey goes on
  EXPECT_EQ(progress.step(), "step 0");
  site_admin_.go.Notify();
  ASSERT_TRUE(reader->Read(&progress));
  ASSERT_TRUE(reader->Read(&progress));
  EXPECT_EQ(progress.step(), "step 2");
  EXPECT_FALSE(reader->Read(&progress));
  const grpc::Status end = reader->Finish();
  EXPECT_EQ(end.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(end.error_message(), "refused: d");
}

TEST_F(ServicesTest, ASurveyEndsWhenItsCallerHasGone) {
  {
    auto context = Context("token-of-root");
    auto reader = sites_stub_->AddSite(context.get(), {});
    v1::SiteProgress progress;
    ASSERT_TRUE(reader->Read(&progress));
    context->TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  // The server hears of it a moment later than we do: then the next word finds nobody.
  site_admin_.go.Notify();
  EXPECT_TRUE(WaitUntil([&] { return site_admin_.gone.HasBeenNotified() || site_admin_.surveys == 1; }));
}

}  // namespace
}  // namespace itwin::server
