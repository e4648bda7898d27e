// Which samples a step takes: a pure function of (seed, epoch, step, rank), so that every epoch
// touches each sample exactly once, at any number of ranks, and a run can go on anywhere.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace itwin::worker {

struct Slice {  // half-open
  int64_t first = 0;
  int64_t last = 0;
  int64_t size() const { return last - first; }
};

// The part of `count` things that is `rank`'s: contiguous, sizes differ by at most one, the first
// ranks have more.
Slice SliceOf(int64_t count, int rank, int ranks);

// The order of one epoch. Global batch g is elements [g * batch, (g + 1) * batch) of a permutation
// of all samples; the last may be smaller. A rank takes its slice of each.
class EpochOrder {
 public:
  EpochOrder(int64_t samples, int64_t batch, uint64_t seed, int64_t epoch);

  int64_t batches() const;
  // Samples in global batch g.
  int64_t size(int64_t g) const;
  // This rank's part of it; may be empty.
  std::span<const int64_t> OfRank(int64_t g, int rank, int ranks) const;

 private:
  const int64_t batch_;
  std::vector<int64_t> order_;
};

// A well-mixed 64-bit value of two: for seeds of epochs and ranks.
uint64_t MixSeed(uint64_t seed, uint64_t stream);

}  // namespace itwin::worker
