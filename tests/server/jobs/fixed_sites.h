#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "server/jobs/site_directory.h"

namespace itwin::server::testing {

// Sites that are always READY.
class FixedSites : public SiteDirectory {
 public:
  explicit FixedSites(std::vector<std::string> names) : names_(std::move(names)) {}
  std::vector<v1::Site> ListSites() const override {
    std::vector<v1::Site> out;
    for (const std::string& name : names_) {
      out.emplace_back().set_name(name);
      out.back().set_state(v1::SITE_STATE_READY);
    }
    return out;
  }
  bool Exists(absl::string_view name) const override {
    return std::any_of(names_.begin(), names_.end(), [&](const std::string& n) { return n == name; });
  }
  std::string WhyImpossible(const v1::JobSpec&, const std::vector<std::string>& operators) const override {
    return operators.empty() ? impossible : lacks;
  }

  std::string impossible;  // what WhyImpossible answers
  std::string lacks;       // and for a model archive

 private:
  const std::vector<std::string> names_;
};

}  // namespace itwin::server::testing
