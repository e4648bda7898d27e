#include <grpcpp/grpcpp.h>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/src/retry.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "itwin/client.h"
#include "itwin/connect.h"
#include "itwin/connection.h"
#include "itwin/v1/artifacts.grpc.pb.h"
#include "itwin/v1/jobs.grpc.pb.h"
#include "itwin/v1/sites.grpc.pb.h"

namespace itwin::client {
namespace {

constexpr int kMaxMessageBytes = 64 << 20;  // a page of jobs or points is far below
// The channel's own pace; ours is in RetryLoop.
constexpr int kReconnectMinMs = 100;
constexpr int kReconnectMaxMs = 1'000;
constexpr int kHandshakeLimitMs = 10'000;  // gRPC takes its "minimum reconnect back-off" for this, too
// A stream is opened anew after this, from its cursor or offset: so a dead peer is noticed.
constexpr absl::Duration kWatchStreamLimit = absl::Minutes(2);
constexpr absl::Duration kTransferStreamLimit = absl::Minutes(10);
constexpr absl::Duration kSurveyStreamLimit = absl::Minutes(30);  // adding a site sends it programs and runs a job there

bool IsLocal(absl::string_view endpoint) {
  for (absl::string_view prefix : {"unix:", "localhost:", "127.", "[::1]:"}) {
    if (absl::StartsWith(endpoint, prefix)) return true;
  }
  return false;
}

class GrpcConnection : public Connection {
 public:
  GrpcConnection(const ConnectOptions& options, const std::shared_ptr<grpc::Channel>& channel)
      : options_(options),
        channel_(channel),
        jobs_(v1::Jobs::NewStub(channel)),
        artifacts_(v1::Artifacts::NewStub(channel)),
        sites_(v1::Sites::NewStub(channel)) {}

  absl::StatusOr<v1::ValidateJobResponse> ValidateJob(const v1::ValidateJobRequest& request) override {
    return Unary<v1::ValidateJobResponse>(jobs_.get(), &v1::Jobs::Stub::ValidateJob, request);
  }
  absl::StatusOr<v1::SubmitJobResponse> SubmitJob(const v1::SubmitJobRequest& request) override {
    return Unary<v1::SubmitJobResponse>(jobs_.get(), &v1::Jobs::Stub::SubmitJob, request, HasId(request));
  }
  absl::StatusOr<v1::Job> GetJob(const v1::GetJobRequest& request) override {
    return Unary<v1::Job>(jobs_.get(), &v1::Jobs::Stub::GetJob, request);
  }
  absl::StatusOr<v1::ListJobsResponse> ListJobs(const v1::ListJobsRequest& request) override {
    return Unary<v1::ListJobsResponse>(jobs_.get(), &v1::Jobs::Stub::ListJobs, request);
  }
  absl::StatusOr<v1::Job> CancelJob(const v1::CancelJobRequest& request) override {
    return Unary<v1::Job>(jobs_.get(), &v1::Jobs::Stub::CancelJob, request);
  }
  absl::StatusOr<v1::TraceJobResponse> TraceJob(const v1::TraceJobRequest& request) override {
    return Unary<v1::TraceJobResponse>(jobs_.get(), &v1::Jobs::Stub::TraceJob, request);
  }
  absl::StatusOr<v1::SubmitJobResponse> RetryJob(const v1::RetryJobRequest& request) override {
    return Unary<v1::SubmitJobResponse>(jobs_.get(), &v1::Jobs::Stub::RetryJob, request, HasId(request));
  }
  absl::StatusOr<v1::ListEventsResponse> ListEvents(const v1::ListEventsRequest& request) override {
    return Unary<v1::ListEventsResponse>(jobs_.get(), &v1::Jobs::Stub::ListEvents, request);
  }
  absl::StatusOr<v1::ListPointsResponse> ListPoints(const v1::ListPointsRequest& request) override {
    return Unary<v1::ListPointsResponse>(jobs_.get(), &v1::Jobs::Stub::ListPoints, request);
  }
  absl::StatusOr<v1::QuerySeriesResponse> QuerySeries(const v1::QuerySeriesRequest& request) override {
    return Unary<v1::QuerySeriesResponse>(jobs_.get(), &v1::Jobs::Stub::QuerySeries, request);
  }
  absl::StatusOr<v1::ReadLogResponse> ReadLog(const v1::ReadLogRequest& request) override {
    return Unary<v1::ReadLogResponse>(jobs_.get(), &v1::Jobs::Stub::ReadLog, request);
  }
  absl::StatusOr<v1::ListOutputsResponse> ListOutputs(const v1::ListOutputsRequest& request) override {
    return Unary<v1::ListOutputsResponse>(jobs_.get(), &v1::Jobs::Stub::ListOutputs, request);
  }
  absl::StatusOr<v1::StatArtifactsResponse> StatArtifacts(const v1::StatArtifactsRequest& request) override {
    return Unary<v1::StatArtifactsResponse>(artifacts_.get(), &v1::Artifacts::Stub::StatArtifacts, request);
  }
  absl::StatusOr<v1::ListSitesResponse> ListSites(const v1::ListSitesRequest& request) override {
    return Unary<v1::ListSitesResponse>(sites_.get(), &v1::Sites::Stub::ListSites, request);
  }
  absl::StatusOr<v1::Site> GetSite(const v1::GetSiteRequest& request) override {
    return Unary<v1::Site>(sites_.get(), &v1::Sites::Stub::GetSite, request);
  }
  absl::StatusOr<v1::Site> PauseSite(const v1::PauseSiteRequest& request) override {
    return Unary<v1::Site>(sites_.get(), &v1::Sites::Stub::PauseSite, request);
  }
  absl::StatusOr<v1::Site> ResumeSite(const v1::ResumeSiteRequest& request) override {
    return Unary<v1::Site>(sites_.get(), &v1::Sites::Stub::ResumeSite, request);
  }
  absl::StatusOr<v1::RemoveSiteResponse> RemoveSite(const v1::RemoveSiteRequest& request) override {
    return Unary<v1::RemoveSiteResponse>(sites_.get(), &v1::Sites::Stub::RemoveSite, request, Idempotency::kNotIdempotent);
  }
  absl::Status AddSite(const v1::AddSiteRequest& request, const std::function<bool(const v1::SiteProgress&)>& on_progress) override {
    grpc::ClientContext context;
    Prepare(&context, kSurveyStreamLimit);
    return ReadProgress(&context, sites_->AddSite(&context, request), on_progress);
  }
  absl::Status DoctorSite(const v1::DoctorSiteRequest& request,
                          const std::function<bool(const v1::SiteProgress&)>& on_progress) override {
    grpc::ClientContext context;
    Prepare(&context, kSurveyStreamLimit);
    return ReadProgress(&context, sites_->DoctorSite(&context, request), on_progress);
  }
  absl::StatusOr<v1::GetVersionResponse> GetVersion(const v1::GetVersionRequest& request) override {
    return Unary<v1::GetVersionResponse>(sites_.get(), &v1::Sites::Stub::GetVersion, request);
  }

  absl::Status WatchJob(const v1::WatchJobRequest& request, const std::stop_token& stop,
                        const std::function<bool(const v1::JobUpdate&)>& on_update) override {
    grpc::ClientContext context;
    Prepare(&context, kWatchStreamLimit);
    std::stop_callback cancel(stop, [&context] { context.TryCancel(); });
    std::unique_ptr<grpc::ClientReader<v1::JobUpdate>> reader = jobs_->WatchJob(&context, request);
    v1::JobUpdate update;
    while (reader->Read(&update)) {
      if (!on_update(update)) {
        context.TryCancel();
        reader->Finish();
        return absl::OkStatus();
      }
      update.Clear();
    }
    return Explained(FromGrpc(reader->Finish()));
  }

  absl::StatusOr<v1::UploadArtifactResponse> UploadArtifact(
      const std::function<absl::StatusOr<std::optional<v1::UploadArtifactRequest>>()>& next) override {
    grpc::ClientContext context;
    Prepare(&context, kTransferStreamLimit);
    v1::UploadArtifactResponse response;
    std::unique_ptr<grpc::ClientWriter<v1::UploadArtifactRequest>> writer =
        artifacts_->UploadArtifact(&context, &response);
    while (true) {
      absl::StatusOr<std::optional<v1::UploadArtifactRequest>> request = next();
      if (!request.ok()) {
        context.TryCancel();
        writer->Finish();
        return request.status();
      }
      if (!request->has_value()) break;
      if (!writer->Write(**request)) break;  // Finish says why
    }
    writer->WritesDone();
    ITWIN_RETURN_IF_ERROR(Explained(FromGrpc(writer->Finish())));
    return response;
  }

  absl::Status DownloadArtifact(const v1::DownloadArtifactRequest& request,
                                const std::function<absl::Status(const v1::DownloadArtifactResponse&)>& sink) override {
    grpc::ClientContext context;
    Prepare(&context, kTransferStreamLimit);
    std::unique_ptr<grpc::ClientReader<v1::DownloadArtifactResponse>> reader =
        artifacts_->DownloadArtifact(&context, request);
    v1::DownloadArtifactResponse response;
    while (reader->Read(&response)) {
      if (absl::Status status = sink(response); !status.ok()) {
        context.TryCancel();
        reader->Finish();
        return status;
      }
    }
    return Explained(FromGrpc(reader->Finish()));
  }

 private:
  absl::Status ReadProgress(grpc::ClientContext* context, std::unique_ptr<grpc::ClientReader<v1::SiteProgress>> reader,
                            const std::function<bool(const v1::SiteProgress&)>& on_progress) const {
    v1::SiteProgress progress;
    bool stopped = false;
    while (reader->Read(&progress)) {
      if (!stopped && !on_progress(progress)) {
        stopped = true;
        context->TryCancel();
      }
      progress.Clear();
    }
    const absl::Status status = Explained(FromGrpc(reader->Finish()));
    return stopped ? absl::CancelledError("stopped") : status;
  }

  template <typename Request>
  static Idempotency HasId(const Request& request) {
    return request.request_id().empty() ? Idempotency::kNotIdempotent : Idempotency::kIdempotent;
  }

  void Prepare(grpc::ClientContext* context, absl::Duration limit) const {
    AwaitReconnection();
    context->set_deadline(absl::ToChronoTime(absl::Now() + limit));
    // Over TLS the token is in the call credentials of the channel.
    if (options_.insecure) context->AddMetadata("authorization", absl::StrCat("Bearer ", options_.token));
  }

  // gRPC without threads of ours moves only while somebody is inside it: a broken channel would not even finish a
  // handshake between our tries. A channel that never was connected does so in its first call.
  void AwaitReconnection() const {
    const grpc_connectivity_state state = channel_->GetState(/*try_to_connect=*/true);
    if (state != GRPC_CHANNEL_TRANSIENT_FAILURE && state != GRPC_CHANNEL_CONNECTING) return;
    const absl::Duration patience =
        std::min(options_.retry_for, absl::Milliseconds(kReconnectMaxMs) + absl::Milliseconds(500));
    channel_->WaitForConnected(absl::ToChronoTime(absl::Now() + patience));
  }

  template <typename Response, typename Stub, typename Method, typename Request>
  absl::StatusOr<Response> Unary(Stub* stub, Method method, const Request& request,
                                 Idempotency idempotency = Idempotency::kIdempotent) {
    Response response;
    RetryPolicy policy;
    policy.give_up_after = options_.retry_for;
    const absl::Status status =
        RetryLoop(policy, idempotency, SystemPacing(), options_.on_retry, [&] {
          grpc::ClientContext context;
          Prepare(&context, options_.call_deadline);
          response.Clear();
          return Explained(FromGrpc((stub->*method)(&context, request, &response)));
        });
    if (!status.ok()) return status;
    return response;
  }

  // gRPC's words plus what to do.
  absl::Status Explained(const absl::Status& status) const {
    if (status.code() == absl::StatusCode::kUnavailable) {
      const std::string text(status.message());
      const char* hint = "is it running, and is the endpoint right?";
      if (absl::StrContains(text, "andshake failed") || absl::StrContains(text, "peer certificate")) {
        hint = "its certificate does not fit; check ca_file, and that the endpoint's host (or server_name) is a name in it";
      } else if (options_.insecure && absl::StrContains(text, "Socket closed")) {
        hint = "it may expect TLS; leave `insecure` out";
      }
      return absl::UnavailableError(
          absl::StrCat("cannot reach the gateway at ", options_.endpoint, " (", text, "); ", hint));
    }
    if (status.code() == absl::StatusCode::kUnauthenticated) {
      return absl::UnauthenticatedError(
          absl::StrCat(status.message(), "; check ITWIN_TOKEN_FILE or token_file in the configuration"));
    }
    if (status.code() == absl::StatusCode::kUnimplemented) {
      return absl::UnimplementedError(absl::StrCat("the gateway at ", options_.endpoint,
                                                   " does not know this call (", status.message(),
                                                   "); it may be older than this client"));
    }
    return status;
  }

  const ConnectOptions options_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::Jobs::Stub> jobs_;
  const std::unique_ptr<v1::Artifacts::Stub> artifacts_;
  const std::unique_ptr<v1::Sites::Stub> sites_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<Connection>> MakeConnection(const ConnectOptions& resolved) {
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  if (resolved.insecure) {
    if (!IsLocal(resolved.endpoint)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "plain text to ", resolved.endpoint,
          " would show your token to the network; leave `insecure` out (it is for this machine only)"));
    }
    credentials = grpc::InsecureChannelCredentials();
  } else {
    grpc::SslCredentialsOptions ssl;
    if (!resolved.ca_file.empty()) {
      absl::StatusOr<std::string> pem = ReadFile(resolved.ca_file, 1 << 20);
      if (!pem.ok()) {
        return absl::Status(pem.status().code(), absl::StrCat("CA file: ", pem.status().message(),
                                                              "; set ITWIN_CA_FILE to the gateway's CA certificate"));
      }
      if (!absl::StrContains(*pem, "-----BEGIN CERTIFICATE-----")) {
        return absl::InvalidArgumentError(
            absl::StrCat("CA file: ", resolved.ca_file, " holds no PEM certificate; it begins -----BEGIN CERTIFICATE-----"));
      }
      ssl.pem_root_certs = *std::move(pem);
    }
    credentials = grpc::CompositeChannelCredentials(grpc::SslCredentials(ssl),
                                                    grpc::AccessTokenCredentials(resolved.token));
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kReconnectMinMs);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kHandshakeLimitMs);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kReconnectMaxMs);
  if (!resolved.server_name.empty() && !resolved.insecure) arguments.SetSslTargetNameOverride(resolved.server_name);
  return std::make_shared<GrpcConnection>(resolved,
                                          grpc::CreateCustomChannel(resolved.endpoint, credentials, arguments));
}

absl::StatusOr<Client> Connect(ConnectOptions options) {
  ITWIN_ASSIGN_OR_RETURN(ConnectOptions resolved, ResolveOptions(std::move(options), ProcessEnvironment()));
  ITWIN_ASSIGN_OR_RETURN(std::shared_ptr<Connection> connection, MakeConnection(resolved));
  return Client(std::move(connection));
}

}  // namespace itwin::client
