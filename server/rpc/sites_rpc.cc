#include "server/rpc/sites_rpc.h"

#include <utility>

#include "common/grpc_status.h"
#include "common/version.h"

namespace itwin::server {
namespace {
constexpr int kApi = 1;  // see GetVersionResponse
}

grpc::Status SitesRpc::ListSites(grpc::ServerContext* context, const v1::ListSitesRequest* request,
                                 v1::ListSitesResponse* response) {
  absl::StatusOr<Caller> caller = authenticator_.Authenticate(*context);
  if (!caller.ok()) return ToGrpc(caller.status());
  for (v1::Site& site : sites_.ListSites()) *response->add_sites() = std::move(site);
  return grpc::Status::OK;
}

grpc::Status SitesRpc::GetVersion(grpc::ServerContext* context, const v1::GetVersionRequest* request,
                                  v1::GetVersionResponse* response) {
  absl::StatusOr<Caller> caller = authenticator_.Authenticate(*context);
  if (!caller.ok()) return ToGrpc(caller.status());
  response->set_version(kVersion);
  response->set_api(kApi);
  response->set_started_us(absl::ToUnixMicros(started_));
  return grpc::Status::OK;
}

}  // namespace itwin::server
