// Texts of different length from every rank to every rank.
#pragma once

#include <string>
#include <vector>

#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// Every rank calls it; each gets all texts, in rank order.
std::vector<std::string> GatherTexts(Communicator& communicator, const std::string& mine);

}  // namespace itwin::worker
