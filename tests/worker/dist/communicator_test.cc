#include "agent/worker/dist/communicator.h"

#include <gtest/gtest.h>

#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/error.h"
#include "tests/worker/training/ranks.h"

namespace itwin::worker {
namespace {

using testing::RunRanks;
using testing::RunRanksOrThrow;

// What every communicator must do; the program tests run it over MPI as --self-test.
void CheckCollectives(Communicator& c) {
  std::vector<float> floats = {1.0f + static_cast<float>(c.rank()), 2.0f};
  c.AllReduce(BufferOf(std::span(floats)), Reduction::kSum)->Wait();
  const int n = c.size();
  EXPECT_EQ(floats, (std::vector<float>{static_cast<float>(n * (n + 1) / 2),
                                        2.0f * static_cast<float>(n)}));
  std::vector<int64_t> most = {c.rank(), -c.rank()};
  c.AllReduce(BufferOf(std::span(most)), Reduction::kMax)->Wait();
  EXPECT_EQ(most, (std::vector<int64_t>{n - 1, 0}));
  double from_last = c.rank();
  c.Broadcast(BufferOf(std::span(&from_last, 1)), n - 1)->Wait();
  EXPECT_EQ(from_last, n - 1);
  int64_t mine = 10 * c.rank();
  std::vector<int64_t> all(n);
  c.AllGather(BufferOf(std::span(&mine, 1)), BufferOf(std::span(all)))->Wait();
  for (int r = 0; r < n; ++r) EXPECT_EQ(all[r], 10 * r);
  c.Barrier()->Wait();
  EXPECT_EQ(BroadcastText(c, c.rank() == 0 ? "hello" : "", 0), "hello");
  EXPECT_EQ(BroadcastText(c, "", 0), "");
}

TEST(Communicator, OneRankIsTheIdentity) {
  SelfCommunicator self;
  CheckCollectives(self);
}

TEST(Communicator, RanksAsThreadsAgree) {
  for (int size : {1, 2, 3, 4}) {
    RunRanksOrThrow(size, [](Communicator& gradients, Communicator& control) {
      for (int round = 0; round < 20; ++round) {
        CheckCollectives(gradients);
        CheckCollectives(control);
      }
    });
  }
}

TEST(Communicator, RankThatFailsLetsTheOthersOut) {
  const auto errors = RunRanks(3, [](Communicator& gradients, Communicator&) {
    if (gradients.rank() == 1) throw AppError("mine");
    gradients.Barrier()->Wait();
  });
  for (const auto& error : errors) EXPECT_TRUE(error);
}

TEST(Communicator, DifferentCollectivesAreAnError) {
  const auto errors = RunRanks(2, [](Communicator& gradients, Communicator&) {
    std::vector<double> values(gradients.rank() + 1);
    gradients.AllReduce(BufferOf(std::span(values)), Reduction::kSum)->Wait();
  });
  EXPECT_TRUE(errors[0]);
  EXPECT_TRUE(errors[1]);
}

}  // namespace
}  // namespace itwin::worker
