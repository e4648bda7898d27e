#include "agent/worker/training/sampler.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace itwin::worker {
namespace {

// SplitMix64: own code, because the standard library's distributions differ between
// implementations.
class Generator {
 public:
  explicit Generator(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  // Uniform in [0, bound), without bias.
  uint64_t Below(uint64_t bound) {
    const uint64_t reject_above = ~uint64_t{0} - (~uint64_t{0} % bound + 1) % bound;
    while (true) {
      const uint64_t value = Next();
      if (value <= reject_above) return value % bound;
    }
  }

 private:
  uint64_t state_;
};

}  // namespace

uint64_t MixSeed(uint64_t seed, uint64_t stream) {
  Generator generator(seed);
  const uint64_t mixed = generator.Next();
  return Generator(mixed ^ (stream * 0xd1342543de82ef95ULL)).Next();
}

Slice SliceOf(int64_t count, int rank, int ranks) {
  const int64_t each = count / ranks, more = count % ranks;
  const int64_t first = rank * each + std::min<int64_t>(rank, more);
  return {first, first + each + (rank < more ? 1 : 0)};
}

EpochOrder::EpochOrder(int64_t samples, int64_t batch, uint64_t seed, int64_t epoch)
    : batch_(batch), order_(samples) {
  std::iota(order_.begin(), order_.end(), 0);
  Generator generator(MixSeed(seed, static_cast<uint64_t>(epoch)));
  for (int64_t i = samples - 1; i > 0; --i) {
    std::swap(order_[i], order_[generator.Below(static_cast<uint64_t>(i) + 1)]);
  }
}

int64_t EpochOrder::batches() const {
  return (static_cast<int64_t>(order_.size()) + batch_ - 1) / batch_;
}

int64_t EpochOrder::size(int64_t g) const {
  return std::min<int64_t>(batch_, static_cast<int64_t>(order_.size()) - g * batch_);
}

std::span<const int64_t> EpochOrder::OfRank(int64_t g, int rank, int ranks) const {
  const Slice slice = SliceOf(size(g), rank, ranks);
  return std::span(order_).subspan(static_cast<size_t>(g * batch_ + slice.first),
                                   static_cast<size_t>(slice.size()));
}

}  // namespace itwin::worker
