// Buffers that travel through host memory, with the CPU as the device: the bytes, the order and the
// thread are the same as with a GPU, only streams have nothing to order.
#include "agent/worker/device/staged_communicator.h"

#include <gtest/gtest.h>

#include "agent/worker/dist/in_process_communicator.h"
#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/error.h"
#include "tests/worker/dist/communicator_suite.h"
#include "tests/worker/training/ranks.h"

namespace itwin::worker {
namespace {

using testing::CheckCollectives;
using testing::CheckSplit;
using testing::Flagged;
using testing::RunRanks;

// `ranks` threads with a staged communicator each.
std::vector<std::exception_ptr> RunStaged(int ranks, const std::function<void(Communicator&)>& rank_main) {
  InProcessGroup group(ranks);
  return RunRanks(ranks, [&](Communicator&, Communicator& control) {
    StagedCommunicator staged(std::make_unique<InProcessCommunicator>(group, control.rank()), at::kCPU);
    try {
      rank_main(staged);
    } catch (...) {
      group.Fail();
      throw;
    }
  });
}
void ExpectNothingThrown(const std::vector<std::exception_ptr>& errors) {
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

TEST(StagedCommunicator, DoesWhatEveryCommunicatorDoes) {
  for (const bool on_device : {true, false}) {
    StagedCommunicator self(std::make_unique<SelfCommunicator>(), at::kCPU);
    CheckCollectives(self, on_device);
    for (const int ranks : {2, 3, 4}) {
      ExpectNothingThrown(RunStaged(ranks, [&](Communicator& c) {
        for (int round = 0; round < 10; ++round) CheckCollectives(c, on_device);
        CheckSplit(c, on_device);
      }));
    }
  }
}

TEST(StagedCommunicator, SeveralAtOnceEndInTheirOrderAndLeaveWhatIsOnlyRead) {
  ExpectNothingThrown(RunStaged(3, [](Communicator& c) {
    std::vector<std::vector<float>> buckets;
    std::vector<std::unique_ptr<Work>> work;
    for (int b = 0; b < 8; ++b) buckets.emplace_back(1000 + b, static_cast<float>(b + c.rank()));
    for (auto& bucket : buckets)
      work.push_back(c.AllReduce(Flagged(BufferOf(std::span(bucket)), true), Reduction::kSum));
    for (size_t b = buckets.size(); b-- > 0;) work[b]->Wait();
    for (int b = 0; b < 8; ++b) EXPECT_EQ(buckets[b], std::vector<float>(1000 + b, 3.0f * static_cast<float>(b) + 3));
    std::vector<double> all(6, c.rank()), mine(2, -1);
    c.ReduceScatter(Flagged(BufferOf(std::span(all)), true), Flagged(BufferOf(std::span(mine)), true), Reduction::kSum)->Wait();
    EXPECT_EQ(all, std::vector<double>(6, c.rank()));
    EXPECT_EQ(mine, std::vector<double>(2, 3.0));
  }));
}

TEST(StagedCommunicator, WhatTheRanksMeetIsThrownWhereItIsWaitedFor) {
  const auto errors = RunStaged(2, [](Communicator& c) {
    if (c.rank() == 1) throw AppError("this rank fails");
    float value = 1;
    c.AllReduce(Flagged(BufferOf(std::span(&value, 1)), true), Reduction::kSum)->Wait();
  });
  for (const std::exception_ptr& error : errors) EXPECT_THROW(std::rethrow_exception(error), WorkerError);
}

}  // namespace
}  // namespace itwin::worker
