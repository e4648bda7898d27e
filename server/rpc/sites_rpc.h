#pragma once

#include "absl/time/time.h"
#include "itwin/v1/sites.grpc.pb.h"
#include "server/jobs/site_admin.h"
#include "server/jobs/site_directory.h"
#include "server/rpc/authenticator.h"
#include "server/rpc/task_pool.h"

namespace itwin::server {

// itwin.v1.Sites. What is only looked at comes from memory; adding and examining a site are callback reactors whose work runs on
// `surveys`.
class SitesRpc : public v1::Sites::WithCallbackMethod_AddSite<v1::Sites::WithCallbackMethod_DoctorSite<v1::Sites::Service>> {
 public:
  struct Parts {  // all must outlive the server
    const SiteDirectory* sites;
    SiteAdmin* admin;
    Authenticator* authenticator;
    TaskPool* surveys;
  };
  SitesRpc(const Parts& parts, absl::Time started) : parts_(parts), started_(started) {}

  grpc::Status ListSites(grpc::ServerContext* context, const v1::ListSitesRequest* request,
                         v1::ListSitesResponse* response) override;
  grpc::Status GetSite(grpc::ServerContext* context, const v1::GetSiteRequest* request, v1::Site* response) override;
  grpc::ServerWriteReactor<v1::SiteProgress>* AddSite(grpc::CallbackServerContext* context,
                                                      const v1::AddSiteRequest* request) override;
  grpc::ServerWriteReactor<v1::SiteProgress>* DoctorSite(grpc::CallbackServerContext* context,
                                                         const v1::DoctorSiteRequest* request) override;
  grpc::Status PauseSite(grpc::ServerContext* context, const v1::PauseSiteRequest* request, v1::Site* response) override;
  grpc::Status ResumeSite(grpc::ServerContext* context, const v1::ResumeSiteRequest* request, v1::Site* response) override;
  grpc::Status RemoveSite(grpc::ServerContext* context, const v1::RemoveSiteRequest* request,
                          v1::RemoveSiteResponse* response) override;
  grpc::Status GetVersion(grpc::ServerContext* context, const v1::GetVersionRequest* request,
                          v1::GetVersionResponse* response) override;

 private:
  const Parts parts_;
  const absl::Time started_;
};

}  // namespace itwin::server
