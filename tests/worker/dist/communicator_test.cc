#include "agent/worker/dist/communicator.h"

#include <cmath>

#include <gtest/gtest.h>

#include "agent/worker/dist/half.h"
#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/error.h"
#include "tests/worker/dist/communicator_suite.h"
#include "tests/worker/training/ranks.h"

namespace itwin::worker {
namespace {

using testing::CheckCollectives;
using testing::CheckSplit;
using testing::RunRanks;
using testing::RunRanksOrThrow;

TEST(Communicator, OneRankIsTheIdentity) {
  SelfCommunicator self;
  CheckCollectives(self);
  CheckSplit(self);
}

TEST(Communicator, HalvesRoundToNearestEvenAsTheFormatsSay) {
  for (int bits = 0; bits < 0x10000; ++bits) {  // there and back is the identity
    const auto half = static_cast<uint16_t>(bits);
    const float wide = FromFloat16(half), brain = FromBfloat16(half);
    EXPECT_TRUE(std::isnan(wide) || ToFloat16(wide) == half) << bits;
    EXPECT_TRUE(std::isnan(brain) || ToBfloat16(brain) == half) << bits;
  }
  EXPECT_EQ(FromFloat16(0x3c00), 1.0f);
  EXPECT_EQ(FromFloat16(0x0001), std::ldexp(1.0f, -24));
  EXPECT_EQ(FromFloat16(ToFloat16(1.0f + std::ldexp(1.0f, -11))), 1.0f);  // a tie goes to even
  EXPECT_EQ(FromFloat16(ToFloat16(1.0f + 3 * std::ldexp(1.0f, -11))), 1.0f + 4 * std::ldexp(1.0f, -11));
  EXPECT_EQ(FromBfloat16(ToBfloat16(1.0f + std::ldexp(1.0f, -8))), 1.0f);
  EXPECT_EQ(FromFloat16(ToFloat16(1e9f)), 65504.0f);
  EXPECT_TRUE(std::isinf(FromFloat16(ToFloat16(-INFINITY))));
  EXPECT_TRUE(std::isnan(FromFloat16(ToFloat16(NAN))));
  EXPECT_TRUE(std::isnan(FromBfloat16(ToBfloat16(NAN))));
}

TEST(Communicator, RanksAsThreadsAgree) {
  for (int size : {1, 2, 3, 4}) {
    RunRanksOrThrow(size, [](Communicator& gradients, Communicator& control) {
      for (int round = 0; round < 20; ++round) {
        CheckCollectives(gradients);
        CheckCollectives(control);
      }
      CheckSplit(control);
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
