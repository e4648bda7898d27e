#pragma once

#include <memory>

#include "absl/time/time.h"
#include "client/cli/output/output.h"

namespace itwin::cli {

// A block of lines at the bottom of the terminal, drawn again in place; asks the width each time, and knows how many rows
// the old drawing takes now when the terminal became narrower.
std::unique_ptr<WatchView> MakeLiveView(const Terminal& terminal);
// One line per change; progress at most every ten seconds or once per epoch.
std::unique_ptr<WatchView> MakePlainView(const Terminal& terminal);

}  // namespace itwin::cli
