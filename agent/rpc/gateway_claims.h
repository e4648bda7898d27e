#pragma once

#include <map>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "common/clock.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// Which gateway acts under a gateway id. Gateways with ids of their own share a spool, for job ids are random; two with the
// same id (a copied data directory) would act on the same attempts, so the one that is there keeps the other out.
//
// The claim is `<root>/gateways/<id>.json`, kept up by Hello. It ends when nobody has said hello for kGone: then the
// copy may take over, as a standby does. Time is measured by this agent's clock alone, and an agent that starts gives a claim it
// finds the whole time again. Thread-safe.
class GatewayClaims {
 public:
  // Four hellos (agent.proto) may be missed.
  static constexpr absl::Duration kGone = absl::Minutes(2);

  GatewayClaims(std::string root, Clock* clock);

  // kFailedPrecondition, saying who is there and what to do: another place holds the claim.
  absl::Status Greet(const v1::HelloRequest& request);

 private:
  struct Claim {
    std::string place;
    std::string label;
    absl::Time heard;
  };
  std::string PathOf(const std::string& id) const;

  const std::string root_;
  Clock* const clock_;
  absl::Mutex mu_;
  std::map<std::string, Claim> claims_ ABSL_GUARDED_BY(mu_);  // those read or made so far
};

}  // namespace itwin::agent
