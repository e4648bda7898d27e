#include "server/rpc/sites_rpc.h"

#include <deque>
#include <functional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "common/grpc_status.h"
#include "common/status_macros.h"
#include "common/version.h"

namespace itwin::server {
namespace {

constexpr int kApi = 1;  // see GetVersionResponse
constexpr size_t kMaxProgressWaiting = 1000;  // of one call; a survey tells a few dozen things and, while it sends, a percent each

absl::StatusOr<Caller> Admin(Authenticator* authenticator, const grpc::ServerContextBase& context) {
  ITWIN_ASSIGN_OR_RETURN(Caller caller, authenticator->Authenticate(context));
  if (!caller.admin) {
    return absl::PermissionDeniedError(
        "sites are changed with an administrator's token; the gateway's operator makes one: itwin-gateway token add NAME --admin");
  }
  return caller;
}

// Runs `work` on the pool and writes what it tells. The work may be ahead of the network; a caller that went away is noticed by
// the next word of the work.
class ProgressReactor : public grpc::ServerWriteReactor<v1::SiteProgress> {
 public:
  using Work = std::function<absl::Status(const SiteAdmin::OnProgress&)>;
  ProgressReactor(TaskPool* pool, std::function<absl::Status()> allowed, Work work) : allowed_(std::move(allowed)), work_(std::move(work)) {
    pool->Post([this] { Run(); });
  }

  void OnWriteDone(bool ok) override {
    Advance([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      writing_ = false;
      if (!ok) gone_ = true;
      waiting_.pop_front();
    });
  }
  void OnCancel() override {
    Advance([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { gone_ = true; });
  }
  void OnDone() override { delete this; }

 private:
  void Run() {
    absl::Status status = allowed_();
    if (status.ok()) {
      status = work_([this](const v1::SiteProgress& progress) {
        bool taken = false;
        Advance([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
          taken = !gone_ && waiting_.size() < kMaxProgressWaiting;
          if (taken) waiting_.push_back(progress);
        });
        return taken;
      });
    }
    Advance([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
      result_ = std::move(status);
      ended_ = true;
    });
  }

  // Changes something and does what follows from it. After Finish the reactor may be gone: that comes last, without the lock.
  template <typename Change>
  void Advance(const Change& change) {
    grpc::Status result;
    {
      absl::MutexLock lock(&mu_);
      change();
      if (writing_ || finished_) return;
      if (gone_) waiting_.clear();
      if (!waiting_.empty()) {
        writing_ = true;
        StartWrite(&waiting_.front());  // a deque's elements stay where they are
        return;
      }
      if (!ended_) return;
      finished_ = true;
      result = ToGrpc(result_);
    }
    Finish(result);
  }

  const std::function<absl::Status()> allowed_;
  const Work work_;
  absl::Mutex mu_;
  std::deque<v1::SiteProgress> waiting_ ABSL_GUARDED_BY(mu_);  // the first is being written while writing_
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool gone_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status result_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

grpc::Status SitesRpc::ListSites(grpc::ServerContext* context, const v1::ListSitesRequest* request,
                                 v1::ListSitesResponse* response) {
  absl::StatusOr<Caller> caller = parts_.authenticator->Authenticate(*context);
  if (!caller.ok()) return ToGrpc(caller.status());
  for (v1::Site& site : parts_.sites->ListSites()) *response->add_sites() = std::move(site);
  return grpc::Status::OK;
}

grpc::Status SitesRpc::GetSite(grpc::ServerContext* context, const v1::GetSiteRequest* request, v1::Site* response) {
  absl::StatusOr<Caller> caller = parts_.authenticator->Authenticate(*context);
  if (!caller.ok()) return ToGrpc(caller.status());
  absl::StatusOr<v1::Site> site = parts_.admin->GetSite(request->name());
  if (!site.ok()) return ToGrpc(site.status());
  *response = *std::move(site);
  if (!caller->admin) response->clear_document();  // paths of the gateway's machine
  return grpc::Status::OK;
}

grpc::ServerWriteReactor<v1::SiteProgress>* SitesRpc::AddSite(grpc::CallbackServerContext* context,
                                                              const v1::AddSiteRequest* request) {
  return new ProgressReactor(
      parts_.surveys, [this, context] { return Admin(parts_.authenticator, *context).status(); },
      [this, request = *request](const SiteAdmin::OnProgress& progress) { return parts_.admin->AddSite(request, progress); });
}

grpc::ServerWriteReactor<v1::SiteProgress>* SitesRpc::DoctorSite(grpc::CallbackServerContext* context,
                                                                 const v1::DoctorSiteRequest* request) {
  return new ProgressReactor(
      parts_.surveys, [this, context] { return Admin(parts_.authenticator, *context).status(); },
      [this, request = *request](const SiteAdmin::OnProgress& progress) { return parts_.admin->DoctorSite(request, progress); });
}

grpc::Status SitesRpc::PauseSite(grpc::ServerContext* context, const v1::PauseSiteRequest* request, v1::Site* response) {
  absl::StatusOr<Caller> caller = Admin(parts_.authenticator, *context);
  if (!caller.ok()) return ToGrpc(caller.status());
  absl::StatusOr<v1::Site> site = parts_.admin->PauseSite(request->name(), caller->name, request->reason());
  if (!site.ok()) return ToGrpc(site.status());
  *response = *std::move(site);
  return grpc::Status::OK;
}

grpc::Status SitesRpc::ResumeSite(grpc::ServerContext* context, const v1::ResumeSiteRequest* request, v1::Site* response) {
  absl::StatusOr<Caller> caller = Admin(parts_.authenticator, *context);
  if (!caller.ok()) return ToGrpc(caller.status());
  absl::StatusOr<v1::Site> site = parts_.admin->ResumeSite(request->name());
  if (!site.ok()) return ToGrpc(site.status());
  *response = *std::move(site);
  return grpc::Status::OK;
}

grpc::Status SitesRpc::RemoveSite(grpc::ServerContext* context, const v1::RemoveSiteRequest* request,
                                  v1::RemoveSiteResponse* response) {
  absl::StatusOr<Caller> caller = Admin(parts_.authenticator, *context);
  if (!caller.ok()) return ToGrpc(caller.status());
  return ToGrpc(parts_.admin->RemoveSite(request->name()));
}

grpc::Status SitesRpc::GetVersion(grpc::ServerContext* context, const v1::GetVersionRequest* request,
                                  v1::GetVersionResponse* response) {
  absl::StatusOr<Caller> caller = parts_.authenticator->Authenticate(*context);
  if (!caller.ok()) return ToGrpc(caller.status());
  response->set_version(kVersion);
  response->set_api(kApi);
  response->set_started_us(absl::ToUnixMicros(started_));
  return grpc::Status::OK;
}

}  // namespace itwin::server
