#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/grpc_status.h"
#include "itwin/v1/artifacts.grpc.pb.h"
#include "itwin/v1/jobs.grpc.pb.h"
#include "itwin/v1/sites.grpc.pb.h"
#include "tests/client/fake_gateway.h"

namespace itwin::testing {

// A FakeGateway on a real port with TLS and a token, that can be stopped and started again on the same port.
class GatewayServer {
 public:
  GatewayServer(FakeGateway* fake, std::string key_pem, std::string certificate_pem, std::string token)
      : jobs_(this, fake), artifacts_(this, fake), sites_(this, fake), token_(std::move(token)) {
    grpc::SslServerCredentialsOptions options;
    options.pem_key_cert_pairs.push_back({std::move(key_pem), std::move(certificate_pem)});
    credentials_ = grpc::SslServerCredentials(options);
    Start();
  }
  ~GatewayServer() { Stop(); }

  void Start() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(absl::StrCat("localhost:", port_), credentials_, &port_);
    builder.RegisterService(&jobs_);
    builder.RegisterService(&artifacts_);
    builder.RegisterService(&sites_);
    server_ = builder.BuildAndStart();
    ITWIN_CHECK(server_ != nullptr && port_ != 0);
  }
  void Stop() {
    if (server_) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
  }
  std::string endpoint() const { return absl::StrCat("localhost:", port_); }

 private:
  grpc::Status Authenticate(const grpc::ServerContext* context) const {
    const auto [first, last] = context->client_metadata().equal_range("authorization");
    for (auto it = first; it != last; ++it) {
      if (std::string(it->second.data(), it->second.size()) == "Bearer " + token_) return grpc::Status::OK;
    }
    return {grpc::StatusCode::UNAUTHENTICATED, "the token is not known"};
  }
  template <typename Response>
  grpc::Status Reply(const grpc::ServerContext* context, const std::function<absl::StatusOr<Response>()>& call,
                     Response* response) const {
    if (grpc::Status status = Authenticate(context); !status.ok()) return status;
    absl::StatusOr<Response> result = call();
    if (!result.ok()) return ToGrpc(result.status());
    *response = *std::move(result);
    return grpc::Status::OK;
  }

  struct Jobs : v1::Jobs::Service {
    Jobs(GatewayServer* the_server, FakeGateway* the_fake) : server(the_server), fake(the_fake) {}
    grpc::Status SubmitJob(grpc::ServerContext* c, const v1::SubmitJobRequest* q, v1::SubmitJobResponse* r) override {
      return server->Reply<v1::SubmitJobResponse>(c, [&] { return fake->SubmitJob(*q); }, r);
    }
    grpc::Status GetJob(grpc::ServerContext* c, const v1::GetJobRequest* q, v1::Job* r) override {
      return server->Reply<v1::Job>(c, [&] { return fake->GetJob(*q); }, r);
    }
    grpc::Status ListOutputs(grpc::ServerContext* c, const v1::ListOutputsRequest* q, v1::ListOutputsResponse* r) override {
      return server->Reply<v1::ListOutputsResponse>(c, [&] { return fake->ListOutputs(*q); }, r);
    }
    grpc::Status WatchJob(grpc::ServerContext* c, const v1::WatchJobRequest* q, grpc::ServerWriter<v1::JobUpdate>* w) override {
      if (grpc::Status status = server->Authenticate(c); !status.ok()) return status;
      return ToGrpc(fake->WatchJob(*q, {}, [&](const v1::JobUpdate& update) { return w->Write(update); }));
    }
    GatewayServer* server;
    FakeGateway* fake;
  };
  struct Artifacts : v1::Artifacts::Service {
    Artifacts(GatewayServer* the_server, FakeGateway* the_fake) : server(the_server), fake(the_fake) {}
    grpc::Status StatArtifacts(grpc::ServerContext* c, const v1::StatArtifactsRequest* q, v1::StatArtifactsResponse* r) override {
      return server->Reply<v1::StatArtifactsResponse>(c, [&] { return fake->StatArtifacts(*q); }, r);
    }
    grpc::Status UploadArtifact(grpc::ServerContext* c, grpc::ServerReader<v1::UploadArtifactRequest>* reader,
                                v1::UploadArtifactResponse* r) override {
      return server->Reply<v1::UploadArtifactResponse>(c, [&] {
        return fake->UploadArtifact([&]() -> absl::StatusOr<std::optional<v1::UploadArtifactRequest>> {
          v1::UploadArtifactRequest request;
          if (!reader->Read(&request)) return std::nullopt;
          return request;
        });
      }, r);
    }
    grpc::Status DownloadArtifact(grpc::ServerContext* c, const v1::DownloadArtifactRequest* q,
                                  grpc::ServerWriter<v1::DownloadArtifactResponse>* w) override {
      if (grpc::Status status = server->Authenticate(c); !status.ok()) return status;
      return ToGrpc(fake->DownloadArtifact(*q, [&](const v1::DownloadArtifactResponse& response) {
        return w->Write(response) ? absl::OkStatus() : absl::CancelledError("gone");
      }));
    }
    GatewayServer* server;
    FakeGateway* fake;
  };
  struct Sites : v1::Sites::Service {
    Sites(GatewayServer* the_server, FakeGateway* the_fake) : server(the_server), fake(the_fake) {}
    grpc::Status GetVersion(grpc::ServerContext* c, const v1::GetVersionRequest* q, v1::GetVersionResponse* r) override {
      return server->Reply<v1::GetVersionResponse>(c, [&] { return fake->GetVersion(*q); }, r);
    }
    GatewayServer* server;
    FakeGateway* fake;
  };

  Jobs jobs_;
  Artifacts artifacts_;
  Sites sites_;
  const std::string token_;
  std::shared_ptr<grpc::ServerCredentials> credentials_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace itwin::testing
