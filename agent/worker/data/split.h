// Which samples belong to training, validation and test. Free of LibTorch.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "agent/worker/data/dataset.h"

namespace itwin::worker {

// Sample indices per split (indexed by Split), each sorted.
using SplitIndices = std::array<std::vector<int64_t>, 3>;

inline const char* SplitName(Split split) {
  constexpr const char* kNames[] = {"train", "validation", "test"};
  return kNames[static_cast<int>(split)];
}

// Ranges as named; "train" is by default all that is named nowhere else. Fractions are taken from
// the training range, drawn by `seed` alone. With `separate_test`, the data bring test samples of
// their own: then naming a test split is an error. Throws UserError for a range beyond `samples`,
// ranges that overlap, fractions outside [0, 1) and a split that was asked for and is empty.
SplitIndices DrawSplits(const SplitSpec& spec, int64_t samples, bool separate_test, uint64_t seed);

}  // namespace itwin::worker
