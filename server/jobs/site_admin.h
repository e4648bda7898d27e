#pragma once

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "itwin/v1/sites.pb.h"

namespace itwin::server {

// What an administrator can do with the gateway's sites while it runs. Thread-safe. Adding and examining a site wait for it:
// they belong into threads of their own.
class SiteAdmin {
 public:
  virtual ~SiteAdmin() = default;

  // Told as things happen; false: nobody listens any more, so the call ends with kCancelled.
  using OnProgress = std::function<bool(const v1::SiteProgress&)>;

  // kNotFound naming the nearest name. With its document.
  virtual absl::StatusOr<v1::Site> GetSite(const std::string& name) = 0;
  // As sites.proto says. After an error nothing is kept and no agent of ours is left running.
  virtual absl::Status AddSite(const v1::AddSiteRequest& request, const OnProgress& on_progress) = 0;
  // OK also when checks failed: they have been told.
  virtual absl::Status DoctorSite(const v1::DoctorSiteRequest& request, const OnProgress& on_progress) = 0;
  virtual absl::StatusOr<v1::Site> PauseSite(const std::string& name, const std::string& actor, const std::string& reason) = 0;
  virtual absl::StatusOr<v1::Site> ResumeSite(const std::string& name) = 0;
  virtual absl::Status RemoveSite(const std::string& name) = 0;
};

}  // namespace itwin::server
