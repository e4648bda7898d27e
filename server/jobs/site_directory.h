#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "itwin/v1/sites.pb.h"
#include "itwin/v1/spec.pb.h"

namespace itwin::server {

// The sites this gateway is configured with and how they are. Thread-safe; answers from memory.
class SiteDirectory {
 public:
  virtual ~SiteDirectory() = default;
  // In the order of the configuration.
  virtual std::vector<v1::Site> ListSites() const = 0;
  virtual bool Exists(absl::string_view name) const = 0;
  // Why no site will ever run this job, as a sentence with the next step; empty when one may. `operators`: of its model
  // archive, "aten::add.Tensor".
  virtual std::string WhyImpossible(const v1::JobSpec& spec, const std::vector<std::string>& operators) const = 0;
};

}  // namespace itwin::server
