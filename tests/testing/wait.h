#pragma once

#include <functional>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace itwin::testing {

// For what another process does and no event can be had of: looks again every few milliseconds until the
// predicate holds or the deadline is over. Returns whether it held.
inline bool WaitUntil(const std::function<bool()>& predicate, absl::Duration limit = absl::Seconds(20)) {
  const absl::Time deadline = absl::Now() + limit;
  while (!predicate()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

// A deadline that nothing meets unless it is broken.
inline absl::Time Soon() { return absl::Now() + absl::Minutes(2); }

}  // namespace itwin::testing
