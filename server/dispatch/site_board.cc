#include "server/dispatch/site_board.h"

#include <algorithm>

namespace itwin::server {

SiteBoard::SiteBoard(const std::vector<std::string>& names) {
  for (const std::string& name : names) Add(name);
}

void SiteBoard::Add(const std::string& name, const SiteSettings& settings) {
  absl::MutexLock lock(&mu_);
  for (const Entry& entry : entries_) {
    if (entry.offer.name == name) return;
  }
  Entry& entry = entries_.emplace_back();
  entry.site.set_name(name);
  entry.site.set_state(v1::SITE_STATE_CONNECTING);
  entry.site.set_reason("not connected yet");
  entry.offer.name = name;
  entry.offer.settings = settings;
}

void SiteBoard::Remove(absl::string_view name) {
  absl::MutexLock lock(&mu_);
  entries_.erase(std::remove_if(entries_.begin(), entries_.end(), [&](const Entry& entry) { return entry.offer.name == name; }),
                 entries_.end());
}

std::vector<v1::Site> SiteBoard::ListSites() const {
  absl::ReaderMutexLock lock(&mu_);
  std::vector<v1::Site> out;
  for (const Entry& entry : entries_) out.push_back(entry.site);
  return out;
}

bool SiteBoard::Exists(absl::string_view name) const {
  absl::ReaderMutexLock lock(&mu_);
  for (const Entry& entry : entries_) {
    if (entry.offer.name == name) return true;
  }
  return false;
}

std::string SiteBoard::WhyImpossible(const v1::JobSpec& spec, const std::vector<std::string>& operators) const {
  PlacementRequest request;
  request.site = spec.site();
  request.ranks = std::max(1, spec.resources().nodes()) * std::max(1, spec.resources().ranks_per_node());
  request.train = spec.has_train();
  request.image = spec.image();
  request.resources = spec.resources();
  request.operators = operators;
  return itwin::server::WhyImpossible(request, Offers());
}

std::vector<SiteOffer> SiteBoard::Offers() const {
  absl::ReaderMutexLock lock(&mu_);
  std::vector<SiteOffer> out;
  for (const Entry& entry : entries_) out.push_back(entry.offer);
  return out;
}

void SiteBoard::Update(const v1::Site& site, const SiteOffer& offer) {
  absl::MutexLock lock(&mu_);
  for (Entry& entry : entries_) {
    if (entry.offer.name != offer.name) continue;
    entry.site = site;
    entry.offer = offer;
  }
}

}  // namespace itwin::server
