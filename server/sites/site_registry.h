#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "common/clock.h"
#include "server/artifacts/blob_store.h"
#include "server/dispatch/site_board.h"
#include "server/dispatch/site_dispatcher.h"
#include "server/jobs/site_admin.h"
#include "server/sites/releases.h"
#include "server/sites/site_file.h"
#include "server/store/job_store.h"
#include "server/tunnel/tunnel.h"

namespace itwin::server {

class SiteSurvey;

// The gateway's sites while it runs: one dispatcher and one tunnel each. Those of gateway.yaml and the embedded one come with
// Open; those that an administrator added lie as `<directory>/<name>.yaml` and are found again by the next Open, as is the word
// that a site is paused (`<name>.paused`). Thread-safe after Start.
class SiteRegistry : public SiteAdmin {
 public:
  struct Options {
    std::string directory;  // there already
    std::string gateway_id;
    std::string gateway_place = {};  // as in HelloRequest
    std::string gateway_label = {};
    // Every pool belongs to one site.
    int call_threads = 4;
    int transfer_threads = 3;
  };
  struct Dependencies {  // all outlive it
    JobStore* store;
    BlobStore* blobs;
    SiteBoard* board;
    Clock* clock;
    GatewayPrograms* programs;
  };
  SiteRegistry(Options options, Dependencies dependencies);
  ~SiteRegistry() override;  // stops

  // These sites, then the kept ones. A kept file that cannot be read is logged and left alone; a name that is taken twice, too.
  absl::Status Open(std::vector<SiteFile> configured);
  void Start();
  // Ends the surveys under way, and lets none begin.
  void EndSurveys();
  // Jobs go on at their sites. Idempotent.
  void Stop();

  absl::StatusOr<v1::Site> GetSite(const std::string& name) override;
  absl::Status AddSite(const v1::AddSiteRequest& request, const OnProgress& on_progress) override;
  absl::Status DoctorSite(const v1::DoctorSiteRequest& request, const OnProgress& on_progress) override;
  absl::StatusOr<v1::Site> PauseSite(const std::string& name, const std::string& actor, const std::string& reason) override;
  absl::StatusOr<v1::Site> ResumeSite(const std::string& name) override;
  absl::Status RemoveSite(const std::string& name) override;

 private:
  struct LiveSite {
    SiteFile file;
    std::string document;  // "": of gateway.yaml
    std::unique_ptr<Tunnel> tunnel;
    std::unique_ptr<AgentRenewal> renewal;
    std::unique_ptr<SiteDispatcher> dispatcher;
    bool kept() const { return !document.empty(); }
  };

  std::string FileOf(const std::string& name, const char* ending) const;
  // Not started yet. The board has it.
  absl::StatusOr<std::unique_ptr<LiveSite>> Make(SiteFile file, std::string document);
  // Ends its loop and connection.
  static void End(LiveSite* site);
  void ChooseAdopter() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::StatusOr<LiveSite*> Find(const std::string& name) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  v1::Site Shown(const std::string& name) const;
  // Runs it where EndSurveys finds it.
  absl::Status Run(SiteSurvey* survey);
  absl::Status AddChecked(const v1::AddSiteRequest& request, SiteFile site, const OnProgress& on_progress);

  const Options options_;
  const Dependencies dependencies_;

  absl::Mutex mu_;
  bool started_ ABSL_GUARDED_BY(mu_) = false;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  std::map<std::string, std::unique_ptr<LiveSite>> sites_ ABSL_GUARDED_BY(mu_);
  std::set<std::string> changing_ ABSL_GUARDED_BY(mu_);  // being added or removed
  std::set<SiteSurvey*> surveys_ ABSL_GUARDED_BY(mu_);
  std::string adopter_ ABSL_GUARDED_BY(mu_);             // answers for jobs that name a site nobody has
};

}  // namespace itwin::server
