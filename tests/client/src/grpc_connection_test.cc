// The library against a real gRPC server with TLS and tokens that goes away and comes back.
#include <gmock/gmock.h>

#include <atomic>
#include <thread>

#include "common/files.h"
#include "common/sha256.h"
#include "common/spec/spec_document.h"
#include "itwin/client.h"
#include "server/certificates.h"
#include "tests/client/gateway_server.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::client {
namespace {

using ::itwin::testing::FakeGateway;
using ::itwin::testing::GatewayServer;
using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kJob[] = "0123456789abcdef";

class GrpcConnectionTest : public ::testing::Test {
 protected:
  GrpcConnectionTest() {
    const server::KeyAndCertificate authority = server::MakeAuthority("test", absl::Now()).value();
    const server::KeyAndCertificate certificate =
        server::IssueServerCertificate(authority, {"localhost", "127.0.0.1"}, absl::Now()).value();
    EXPECT_OK(WriteFileAtomically(directory_ / "ca.pem", authority.certificate_pem));
    const server::KeyAndCertificate other = server::MakeAuthority("other", absl::Now()).value();
    EXPECT_OK(WriteFileAtomically(directory_ / "other.pem", other.certificate_pem));
    server_ = std::make_unique<GatewayServer>(&fake_, certificate.key_pem, certificate.certificate_pem, "good-token");
  }
  ConnectOptions Options() {
    return {.endpoint = server_->endpoint(),
            .ca_file = directory_ / "ca.pem",
            .token = "good-token",
            .call_deadline = absl::Seconds(5),
            .retry_for = absl::Milliseconds(200)};
  }
  Client Make(const ConnectOptions& options) { return Client(MakeConnection(options).value()); }

  TempDirectory directory_;
  FakeGateway fake_;
  std::unique_ptr<GatewayServer> server_;
};

TEST_F(GrpcConnectionTest, SpeaksTlsWithAToken) {
  EXPECT_EQ(Make(Options()).Version()->version(), "0.1.0");
}

TEST_F(GrpcConnectionTest, SaysWhatIsWrongWithTheConnection) {
  ConnectOptions options = Options();
  options.token = "bad-token";
  EXPECT_THAT(Make(options).Version(), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("check ITWIN_TOKEN_FILE")));
  options = Options();
  options.ca_file = directory_ / "other.pem";
  EXPECT_THAT(Make(options).Version(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("its certificate does not fit")));
  options = Options();
  options.server_name = "elsewhere";
  EXPECT_THAT(Make(options).Version(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("its certificate does not fit")));
  options = Options();
  options.insecure = true;  // plain text to a TLS port
  EXPECT_THAT(Make(options).Version(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("cannot reach the gateway at localhost:")));
  server_->Stop();
  EXPECT_THAT(Make(Options()).Version(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("is it running")));
}

TEST_F(GrpcConnectionTest, PassesErrorsOfTheGatewayOn) {
  EXPECT_THAT(Make(Options()).Get("beef"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("no job 'beef'")));
  EXPECT_THAT(Make(Options()).Sites(), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("may be older than this client")));
}

TEST_F(GrpcConnectionTest, RepeatsCallsUntilTheGatewayIsBack) {
  ConnectOptions options = Options();
  options.retry_for = absl::Seconds(20);
  fake_.faults = {absl::UnavailableError("a moment"), absl::UnavailableError("a moment")};
  int told = 0;
  options.on_retry = [&](const absl::Status&, absl::Duration) {
    if (++told == 3) server_->Start();
  };
  Client client = Make(options);
  EXPECT_OK(client.Version());
  EXPECT_EQ(told, 2);
  server_->Stop();
  EXPECT_OK(client.Version());
  EXPECT_GE(told, 3);
}

TEST_F(GrpcConnectionTest, WatchSurvivesARestartOfTheGateway) {
  fake_.AddJob(kJob);
  for (int i = 1; i <= 50; ++i) {
    v1::JobUpdate& update = fake_.AddUpdate(kJob);
    update.add_blocks()->add_values(i);
    *update.mutable_job() = fake_.jobs[kJob];
    if (i == 50) update.mutable_job()->set_state(v1::JOB_STATE_FAILED);
  }
  fake_.cuts = {10, 10, 10};
  std::vector<double> seen;
  int restarts = 0;
  WatchOptions options;
  options.on_reconnect = [&](const absl::Status&, absl::Duration) {
    ++restarts;
    server_->Stop();
    server_->Start();
  };
  absl::StatusOr<v1::Job> job = Make(Options()).Watch(kJob, options, [&](const v1::JobUpdate& update) {
    seen.push_back(update.blocks(0).values(0));
    return true;
  });
  ASSERT_OK(job);
  EXPECT_EQ(job->state(), v1::JOB_STATE_FAILED);
  ASSERT_EQ(seen.size(), 50u);
  for (int i = 0; i < 50; ++i) EXPECT_EQ(seen[static_cast<size_t>(i)], i + 1);
  EXPECT_GE(restarts, 3);
}

TEST_F(GrpcConnectionTest, WatchEndsWhenTheCallerHasEnough) {
  fake_.AddJob(kJob);
  for (int i = 1; i <= 1'000; ++i) *fake_.AddUpdate(kJob).mutable_job() = fake_.jobs[kJob];
  int seen = 0;
  EXPECT_OK(Make(Options()).Watch(kJob, {}, [&](const v1::JobUpdate&) { return ++seen < 5; }));
  EXPECT_EQ(seen, 5);
}

TEST_F(GrpcConnectionTest, UploadsAndDownloadsAcrossBrokenStreams) {
  std::string bytes(3'000'000, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 7 + i / 1000);
  ASSERT_OK(WriteFileAtomically(directory_ / "d.npz", bytes));
  fake_.cuts = {1, 2};
  const v1::JobSpec spec = ParseSpecDocument("train: {model: {builtin: mlp}, loss: mse, data: {npz: d.npz}}", {}).value();
  ASSERT_OK(Make(Options()).Submit(spec, {.base_directory = directory_.path()}));
  EXPECT_EQ(fake_.artifacts[Sha256Hex(bytes)], bytes);
  EXPECT_EQ(fake_.upload_offsets.size(), 3u);

  fake_.AddJob(kJob, v1::JOB_STATE_SUCCEEDED);
  fake_.AddOutput(kJob, "out.bin", bytes);
  fake_.chunk_bytes = 500'000;
  fake_.cuts = {2, 1};
  Client client = Make(Options());
  ASSERT_OK(client.DownloadInto(client.Outputs(kJob)->at(0), directory_ / "results"));
  EXPECT_EQ(ReadFile(directory_ / "results/out.bin").value(), bytes);
  EXPECT_EQ(fake_.download_offsets.size(), 3u);
}

TEST_F(GrpcConnectionTest, IsUsableFromManyThreads) {
  fake_.AddJob(kJob);
  Client client = Make(Options());
  std::atomic<int> good = 0;
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 8; ++i) {
      threads.emplace_back([&] {
        for (int j = 0; j < 50; ++j) good += client.Get(kJob).ok();
      });
    }
  }
  EXPECT_EQ(good, 400);
}

}  // namespace
}  // namespace itwin::client
