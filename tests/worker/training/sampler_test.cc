#include "agent/worker/training/sampler.h"

#include <algorithm>

#include <gtest/gtest.h>

namespace itwin::worker {
namespace {

TEST(SliceOf, CutsWithoutGapsAndGivesTheFirstRanksMore) {
  for (int64_t count : {0, 1, 5, 7, 8, 100}) {
    for (int ranks : {1, 2, 3, 4, 7}) {
      int64_t at = 0;
      for (int r = 0; r < ranks; ++r) {
        const Slice slice = SliceOf(count, r, ranks);
        EXPECT_EQ(slice.first, at);
        EXPECT_LE(slice.size(), SliceOf(count, 0, ranks).size());
        EXPECT_GE(slice.size(), SliceOf(count, 0, ranks).size() - 1);
        at = slice.last;
      }
      EXPECT_EQ(at, count);
    }
  }
}

TEST(EpochOrder, TouchesEachSampleOnceAtAnyNumberOfRanks) {
  for (int64_t samples : {1, 6, 103}) {
    for (int64_t batch : {1, 4, 200}) {
      const EpochOrder order(samples, batch, /*seed=*/7, /*epoch=*/3);
      std::vector<int64_t> one_rank;
      for (int ranks : {1, 2, 3, 4}) {
        std::vector<int64_t> seen;
        for (int64_t g = 0; g < order.batches(); ++g) {
          for (int r = 0; r < ranks; ++r) {
            for (int64_t i : order.OfRank(g, r, ranks)) seen.push_back(i);
          }
        }
        if (ranks == 1) one_rank = seen;
        EXPECT_EQ(seen, one_rank) << "the global batches depend on the number of ranks";
        std::sort(seen.begin(), seen.end());
        for (int64_t i = 0; i < samples; ++i) EXPECT_EQ(seen[i], i);
        EXPECT_EQ(static_cast<int64_t>(seen.size()), samples);
      }
    }
  }
}

TEST(EpochOrder, DependsOnSeedAndEpochAlone) {
  const auto first = [](uint64_t seed, int64_t epoch) {
    const EpochOrder order(1000, 1000, seed, epoch);
    const auto span = order.OfRank(0, 0, 1);
    return std::vector<int64_t>(span.begin(), span.end());
  };
  EXPECT_EQ(first(1, 2), first(1, 2));
  EXPECT_NE(first(1, 2), first(1, 3));
  EXPECT_NE(first(1, 2), first(2, 2));
  // Written down: a checkpoint of one version must mean the same order in the next.
  const EpochOrder order(8, 8, 42, 0);
  const auto span = order.OfRank(0, 0, 1);
  EXPECT_EQ(std::vector<int64_t>(span.begin(), span.end()),
            (std::vector<int64_t>{4, 3, 2, 1, 0, 5, 7, 6}));
}

TEST(EpochOrder, EveryPlaceIsEquallyLikely) {
  int counts[5] = {};
  for (int epoch = 0; epoch < 5000; ++epoch)
    ++counts[EpochOrder(5, 5, 1, epoch).OfRank(0, 0, 1)[0]];
  for (int count : counts) EXPECT_NEAR(count, 1000, 150);
}

}  // namespace
}  // namespace itwin::worker
