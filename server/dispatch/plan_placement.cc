#include "server/dispatch/plan_placement.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/spec/nearest_name.h"

namespace itwin::server {
namespace {

constexpr size_t kNamedOperators = 12;

bool Eligible(const PlacementRequest& request, const SiteOffer& offer) {
  if (!request.bound_site.empty()) return offer.name == request.bound_site;
  return request.site.empty() || request.site == "any" || offer.name == request.site;
}

bool HasSlurm(const SiteOffer& offer) { return offer.slurm.has_value() || offer.settings.scheduler == "slurm"; }

// The operators that the site's LibTorch does not have, in words.
std::string WhyNotComputed(const std::vector<std::string>& operators, const SiteOffer& offer) {
  if (operators.empty() || offer.settings.worker_operators == nullptr) return "";
  const WorkerOperators::Missing missing = offer.settings.worker_operators->WhatLacks(operators);
  if (missing.names.empty()) return "";
  return absl::StrCat("the LibTorch of site ", offer.name, " (", missing.libtorch, ") does not have ",
                      ListNames(missing.names, kNamedOperators),
                      "; hand the model over from a PyTorch of that version, write it without them, or name another site");
}

std::string WhyNot(const PlacementRequest& request, const SiteOffer& offer) {
  if (HasSlurm(offer)) {
    // What the site's own file says holds also before it has answered.
    const auto plan = PlanForSlurm(offer.name, offer.settings, offer.slurm ? &*offer.slurm : nullptr, request.resources);
    if (!plan.ok()) return std::string(plan.status().message());
  } else if (const auto field = SlurmOnlyField(request.resources); field && (offer.known || !offer.settings.scheduler.empty())) {
    return absl::StrCat("site ", offer.name, " has no SLURM, so resources.", *field, " means nothing there; leave it out, or name a site with SLURM");
  }
  if (const auto line = ContainerLine(offer.name, offer.settings, request.image); !line.ok()) return std::string(line.status().message());
  if (std::string why = WhyNotComputed(request.operators, offer); !why.empty()) return why;
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

// Greater is better.
struct Rank {
  bool counts_gpus;  // or none are asked for
  bool at_once;
  int waiting;  // fewer is better
  int room;
  bool operator>(const Rank& other) const {
    if (counts_gpus != other.counts_gpus) return counts_gpus;
    if (at_once != other.at_once) return at_once;
    if (waiting != other.waiting) return waiting < other.waiting;
    return room > other.room;
  }
};

Rank RankOf(const PlacementRequest& request, const SiteOffer& offer) {
  // A scheduler of its own has room as far as we know, until jobs of ours wait there.
  const bool gpus = request.resources.gpus_per_node() == 0 || HasSlurm(offer);
  if (offer.slots == 0) return {gpus, offer.waiting == 0, offer.waiting, 1 << 30};
  return {gpus, offer.free_slots >= request.ranks, 0, offer.free_slots};
}

}  // namespace

std::optional<size_t> ChooseSite(const PlacementRequest& request, absl::Span<const SiteOffer> offers) {
  std::optional<size_t> best;
  for (size_t i = 0; i < offers.size(); ++i) {
    const SiteOffer& offer = offers[i];
    if (!offer.ready || !Eligible(request, offer) || !WhyNot(request, offer).empty()) continue;
    if (!best || RankOf(request, offer) > RankOf(request, offers[*best])) best = i;
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
  if (!any && request.bound_site.empty() && (request.site.empty() || request.site == "any")) {
    return "the gateway has no site to run jobs on; an administrator adds one with: itwin site add FILE";
  }
  if (!any) {
    return absl::StrCat("site '", request.bound_site.empty() ? request.site : request.bound_site,
                        "' is not configured any more; see `itwin sites`");
  }
  return first;
}

}  // namespace itwin::server
