#include "server/dispatch/plan_placement.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace itwin::server {
namespace {

bool Eligible(const PlacementRequest& request, const SiteOffer& offer) {
  if (!request.bound_site.empty()) return offer.name == request.bound_site;
  return request.site.empty() || request.site == "any" || offer.name == request.site;
}

std::string WhyNot(const PlacementRequest& request, const SiteOffer& offer) {
  if (!offer.known) return "";
  if (offer.slots > 0 && request.ranks > offer.slots) {
    return absl::StrCat("it asks for ", request.ranks, " ranks (nodes × ranks_per_node), but site ", offer.name, " has ",
                        offer.slots, offer.slots == 1 ? " slot" : " slots");
  }
  if (request.train && !offer.trains) {
    return absl::StrCat("site ", offer.name, " has no itwin-worker to train with; install it there, or name another site");
  }
  return "";
}

}  // namespace

std::optional<size_t> ChooseSite(const PlacementRequest& request, absl::Span<const SiteOffer> offers) {
  std::optional<size_t> best;
  for (size_t i = 0; i < offers.size(); ++i) {
    const SiteOffer& offer = offers[i];
    if (!offer.ready || !Eligible(request, offer) || !WhyNot(request, offer).empty()) continue;
    // A scheduler of its own has room as far as we know.
    const auto room = [](const SiteOffer& o) { return o.slots == 0 ? 1 << 30 : o.free_slots; };
    if (!best || room(offer) > room(offers[*best])) best = i;
  }
  return best;
}

std::string WhyImpossible(const PlacementRequest& request, absl::Span<const SiteOffer> offers) {
  std::string first;
  bool any = false;
  for (const SiteOffer& offer : offers) {
    if (!Eligible(request, offer)) continue;
    any = true;
    const std::string why = WhyNot(request, offer);
    if (why.empty()) return "";
    if (first.empty()) first = why;
  }
  if (!any) {
    return absl::StrCat("site '", request.bound_site.empty() ? request.site : request.bound_site,
                        "' is not configured any more; see `itwin sites`");
  }
  return first;
}

}  // namespace itwin::server
