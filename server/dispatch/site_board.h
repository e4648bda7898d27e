#pragma once

#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/dispatch/plan_placement.h"
#include "server/jobs/site_directory.h"

namespace itwin::server {

// How every site is: written by the sites' loops, read by users' calls and by placement. Sites come and go while the
// gateway runs. Thread-safe.
class SiteBoard : public SiteDirectory {
 public:
  // In this order; all of them CONNECTING.
  explicit SiteBoard(const std::vector<std::string>& names = {});

  // The newest stands last. A name that is there is left as it is.
  void Add(const std::string& name, const SiteSettings& settings = {});
  void Remove(absl::string_view name);

  std::vector<v1::Site> ListSites() const override;
  bool Exists(absl::string_view name) const override;
  std::string WhyImpossible(const v1::JobSpec& spec, const std::vector<std::string>& operators) const override;
  std::vector<SiteOffer> Offers() const;

  // Replaces what is known of `site.name()`; a site that was removed stays away. `offer.name` must be the same.
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
