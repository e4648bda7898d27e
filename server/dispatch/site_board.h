#pragma once

#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/dispatch/plan_placement.h"
#include "server/jobs/site_directory.h"

namespace itwin::server {

// How every configured site is: written by the sites' loops, read by users' calls and by placement. Thread-safe.
class SiteBoard : public SiteDirectory {
 public:
  // In the order of the configuration; all of them CONNECTING.
  explicit SiteBoard(const std::vector<std::string>& names);

  std::vector<v1::Site> ListSites() const override;
  bool Exists(absl::string_view name) const override;
  std::string WhyImpossible(const v1::JobSpec& spec) const override;
  std::vector<SiteOffer> Offers() const;

  // Replaces what is known of `site.name()`. `offer.name` must be the same.
  void Update(const v1::Site& site, const SiteOffer& offer);

 private:
  struct Entry {
    v1::Site site;
    SiteOffer offer;
  };
  mutable absl::Mutex mu_;
  std::vector<Entry> entries_ ABSL_GUARDED_BY(mu_);
};

}  // namespace itwin::server
