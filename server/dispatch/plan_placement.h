#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "itwin/agent/v1/agent.pb.h"
#include "itwin/v1/spec.pb.h"
#include "server/dispatch/site_settings.h"

// Where a job goes: pure, but that a site's WorkerOperators are asked once. A site that is named, or the one that left the checkpoint to go on from, is the only
// choice; otherwise, of the ready sites that can run the job at all (slots, partition limits, GPUs, what the site allows), one
// that has room at once before one where it would wait, then the one with the fewest jobs waiting, then the one with the most room.
namespace itwin::server {

// A site as placement sees it.
struct SiteOffer {
  std::string name;
  bool ready = false;
  bool known = false;   // it has answered since the start of the gateway: the rest is filled in
  int slots = 0;        // 0: the site's scheduler decides
  int free_slots = 0;   // may be negative: work ahead of it
  bool trains = false;  // a worker is installed
  int waiting = 0;      // attempts of ours that are with its scheduler and have not started
  std::optional<agent::v1::SlurmFacts> slurm = {};  // of a site with SLURM
  SiteSettings settings = {};
};

struct PlacementRequest {
  std::string site;        // a name, "any" or ""
  std::string bound_site;  // holds what it goes on from; "" for none
  int ranks = 1;
  bool train = false;
  std::string image = {};  // JobSpec.image
  v1::Resources resources = {};
  std::vector<std::string> operators = {};  // of the model archive: "aten::add.Tensor"
};

// Index into `offers`; nothing when no fitting site is ready now.
std::optional<size_t> ChooseSite(const PlacementRequest& request, absl::Span<const SiteOffer> offers);

// Why no site will ever run it, as a sentence with the next step; empty when one may. Sites that have not
// answered yet count as fitting.
std::string WhyImpossible(const PlacementRequest& request, absl::Span<const SiteOffer> offers);

}  // namespace itwin::server
