#include "agent/worker/dist/communicator.h"

#include <cmath>

#include <gtest/gtest.h>

#include "agent/worker/dist/half.h"
#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/error.h"
#include "tests/worker/training/ranks.h"

namespace itwin::worker {
namespace {

using testing::RunRanks;
using testing::RunRanksOrThrow;

void CheckHalves(Communicator& c) {
  const int n = c.size();
  for (const ElementType type : {ElementType::kFloat16, ElementType::kBfloat16}) {
    const bool brain = type == ElementType::kBfloat16;
    const auto to = [&](float x) { return brain ? ToBfloat16(x) : ToFloat16(x); };
    const auto from = [&](uint16_t x) { return brain ? FromBfloat16(x) : FromFloat16(x); };
    std::vector<uint16_t> halves = {to(0.5f), to(static_cast<float>(c.rank()) - 1)};
    c.AllReduce({halves.data(), 2, type}, Reduction::kSum)->Wait();
    EXPECT_EQ(from(halves[0]), 0.5f * static_cast<float>(n));
    EXPECT_EQ(from(halves[1]), static_cast<float>(n * (n - 1)) / 2 - static_cast<float>(n));
    halves = {to(static_cast<float>(-c.rank())), to(static_cast<float>(c.rank()))};
    c.AllReduce({halves.data(), 2, type}, Reduction::kMax)->Wait();
    EXPECT_EQ(from(halves[0]), 0.0f);
    EXPECT_EQ(from(halves[1]), static_cast<float>(n - 1));
  }
}

// Round a ring, two messages each, which must arrive in order.
void CheckMessages(Communicator& c) {
  const int next = (c.rank() + 1) % c.size(), before = (c.rank() + c.size() - 1) % c.size();
  std::vector<int64_t> first(1000, c.rank()), second(3, 10 + c.rank()), got(1000), more(3);
  std::vector<std::unique_ptr<Work>> work;
  if (c.size() > 1) {
    work.push_back(c.Recv(BufferOf(std::span(got)), before));
    work.push_back(c.Recv(BufferOf(std::span(more)), before));
  }
  work.push_back(c.Send(BufferOf(std::span(first)), next));
  work.push_back(c.Send(BufferOf(std::span(second)), next));
  if (c.size() == 1) {
    work.push_back(c.Recv(BufferOf(std::span(got)), before));
    work.push_back(c.Recv(BufferOf(std::span(more)), before));
  }
  for (auto& w : work) w->Wait();
  EXPECT_EQ(got, std::vector<int64_t>(1000, before));
  EXPECT_EQ(more, std::vector<int64_t>(3, 10 + before));
}

// Odd and even ranks, in reverse order.
void CheckSplit(Communicator& c) {
  const std::unique_ptr<Communicator> part = c.Split(c.rank() % 2, -c.rank());
  const int size = (c.size() + 1 - c.rank() % 2) / 2;
  EXPECT_EQ(part->size(), size);
  EXPECT_EQ(part->rank(), size - 1 - c.rank() / 2);
  int64_t sum = c.rank();
  part->AllReduce(BufferOf(std::span(&sum, 1)), Reduction::kSum)->Wait();
  int64_t expected = 0;
  for (int r = c.rank() % 2; r < c.size(); r += 2) expected += r;
  EXPECT_EQ(sum, expected);
  CheckMessages(*part);
}

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
  std::vector<int64_t> in_place(static_cast<size_t>(n), -1);
  in_place[c.rank()] = 7 * c.rank();
  c.AllGather(BufferOf(std::span(in_place).subspan(c.rank(), 1)), BufferOf(std::span(in_place)))
      ->Wait();
  for (int r = 0; r < n; ++r) EXPECT_EQ(in_place[r], 7 * r);
  std::vector<double> parts(2 * static_cast<size_t>(n)), part(2);
  for (int r = 0; r < n; ++r) parts[2 * r] = parts[2 * r + 1] = 100.0 * r + c.rank();
  c.ReduceScatter(BufferOf(std::span(parts)), BufferOf(std::span(part)), Reduction::kSum)->Wait();
  const double sum = 100.0 * c.rank() * n + n * (n - 1) / 2.0;
  EXPECT_EQ(part, (std::vector<double>{sum, sum}));
  c.Barrier()->Wait();
  CheckHalves(c);
  CheckMessages(c);
  EXPECT_EQ(BroadcastText(c, c.rank() == 0 ? "hello" : "", 0), "hello");
  EXPECT_EQ(BroadcastText(c, "", 0), "");
}

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
