#pragma once

#include "absl/time/time.h"
#include "itwin/v1/sites.grpc.pb.h"
#include "server/jobs/site_directory.h"
#include "server/rpc/authenticator.h"

namespace itwin::server {

// itwin.v1.Sites, from memory.
class SitesRpc : public v1::Sites::Service {
 public:
  // Both must outlive the server.
  SitesRpc(const SiteDirectory* sites, Authenticator* authenticator, absl::Time started)
      : sites_(*sites), authenticator_(*authenticator), started_(started) {}
  grpc::Status ListSites(grpc::ServerContext* context, const v1::ListSitesRequest* request,
                         v1::ListSitesResponse* response) override;
  grpc::Status GetVersion(grpc::ServerContext* context, const v1::GetVersionRequest* request,
                          v1::GetVersionResponse* response) override;

 private:
  const SiteDirectory& sites_;
  Authenticator& authenticator_;
  const absl::Time started_;
};

}  // namespace itwin::server
