// The communicator over MPI, by ranks that are processes: each test starts this program under
// mpirun, which then runs the suites that are disabled otherwise.
#include "agent/worker/dist/mpi_communicator.h"

#include <cmath>
#include <cstring>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/dist/mpi_ring.h"
#include "agent/worker/error.h"
#include "tests/testing/program.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/dist/communicator_suite.h"

namespace itwin::worker {
namespace {

using testing::CheckCollectives;
using testing::CheckSplit;
using ::testing::HasSubstr;

// Buffers that are cut into parts, the parts into segments, both unevenly. Sums of small whole
// numbers are exact in any order.
template <typename T>
void CheckLong(Communicator& c, int64_t count) {
  const int n = c.size();
  const auto of = [](int rank, int64_t i) { return static_cast<T>((rank + 1) * (i % 13)); };
  std::vector<T> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[i] = of(c.rank(), i);
  c.AllReduce(BufferOf(std::span(values)), Reduction::kSum)->Wait();
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i)
    wrong += values[i] != static_cast<T>(n * (n + 1) / 2 * (i % 13));
  EXPECT_EQ(wrong, 0) << "all-reduce of " << count;

  for (int64_t i = 0; i < count; ++i) values[i] = of((c.rank() + static_cast<int>(i % 3)) % n, i);
  c.AllReduce(BufferOf(std::span(values)), Reduction::kMax)->Wait();
  for (int64_t i = 0; i < count; ++i) wrong += values[i] != of(n - 1, i);
  EXPECT_EQ(wrong, 0) << "maximum of " << count;

  std::vector<T> all(static_cast<size_t>(n * count)), mine(static_cast<size_t>(count));
  for (int64_t i = 0; i < n * count; ++i) all[i] = of(c.rank(), i);
  const std::vector<T> before = all;
  c.ReduceScatter(BufferOf(std::span(all)), BufferOf(std::span(mine)), Reduction::kSum)->Wait();
  for (int64_t i = 0; i < count; ++i)
    wrong += mine[i] != static_cast<T>(n * (n + 1) / 2 * ((c.rank() * count + i) % 13));
  EXPECT_EQ(wrong, 0) << "reduce-scatter of " << count;
  EXPECT_EQ(all, before);

  for (const bool in_place : {false, true}) {
    std::fill(all.begin(), all.end(), T(-1));
    const std::span<T> own = std::span(all).subspan(c.rank() * count, count);
    for (int64_t i = 0; i < count; ++i) (in_place ? own[i] : mine[i]) = of(c.rank(), i);
    c.AllGather(in_place ? BufferOf(own) : BufferOf(std::span(mine)), BufferOf(std::span(all)))
        ->Wait();
    for (int64_t i = 0; i < n * count; ++i)
      wrong += all[i] != of(static_cast<int>(i / count), i % count);
    EXPECT_EQ(wrong, 0) << "all-gather of " << count << ", in place: " << in_place;
  }
}

// Roundings depend on the order: all ranks must still have the same bits, and the same again.
void CheckSameBits(Communicator& c, ElementType type) {
  constexpr int64_t kCount = 500'003;
  std::vector<float> first;
  for (int turn = 0; turn < 2; ++turn) {
    std::vector<float> values(kCount);
    for (int64_t i = 0; i < kCount; ++i)
      values[i] = std::sin(static_cast<float>(i * (c.rank() + 2)));
    Buffer buffer = BufferOf(std::span(values));
    if (type != ElementType::kFloat32) {  // the same memory, as twice as many halves
      for (float& v : values) {
        const uint16_t halves[2] = {ToBfloat16(v), ToBfloat16(-v / 3)};
        std::memcpy(&v, halves, sizeof(v));
      }
      buffer = {values.data(), 2 * kCount, type};
    }
    c.AllReduce(buffer, Reduction::kSum)->Wait();
    std::vector<char> all(values.size() * sizeof(float) * c.size());
    const std::span bytes(reinterpret_cast<char*>(values.data()), values.size() * sizeof(float));
    c.AllGather(BufferOf(bytes), BufferOf(std::span(all)))->Wait();
    for (int r = 0; r < c.size(); ++r)
      EXPECT_EQ(std::memcmp(bytes.data(), all.data() + r * bytes.size(), bytes.size()), 0) << r;
    if (turn == 0) first = values;
    EXPECT_EQ(std::memcmp(first.data(), values.data(), bytes.size()), 0);
  }
}

TEST(MpiRank, DISABLED_KeepsTheContract) {
  MpiWorld world;
  ASSERT_EQ(world.size(), std::atoi(std::getenv("ITWIN_TEST_RANKS")));
  for (const bool threaded : {true, false}) {
    const auto c = threaded ? world.MakeThreaded() : world.MakeDirect();
    CheckCollectives(*c);
    CheckSplit(*c);
    for (const int64_t count : {1, 40'000, 100'003, 400'003}) {
      CheckLong<float>(*c, count);
      CheckLong<double>(*c, count);
      CheckLong<int64_t>(*c, count);
    }
    CheckSameBits(*c, ElementType::kFloat32);
    CheckSameBits(*c, ElementType::kBfloat16);
  }
}

TEST(MpiRank, DISABLED_SaysWhatGoesRoundTheRing) {
  MpiWorld world;
  const MpiRing ring(MPI_COMM_WORLD);
  const int64_t enough = world.size() * (int64_t{64} << 10);
  std::printf("rank %d: long %d short %d\n", world.rank(), ring.Serves(enough),
              ring.Serves(enough - 1));
}

class MpiCommunicator : public ::testing::Test {
 protected:
  int Run(int ranks, const std::string& suite, const std::string& collectives) {
    const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
    itwin::testing::Program program(
        {"mpirun", "-n", std::to_string(ranks), "--oversubscribe", self,
         "--gtest_also_run_disabled_tests", "--gtest_filter=MpiRank." + suite},
        {{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
         {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
         {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"},
         {"ITWIN_TEST_RANKS", std::to_string(ranks)},
         {"ITWIN_COLLECTIVES", collectives}},
        scratch_ / "log");
    const int code = program.Wait(std::chrono::seconds(100));
    output_ = program.Output();
    return code;
  }
  testing::Scratch scratch_;
  std::string output_;
};

TEST_F(MpiCommunicator, KeepsTheContractByTheCollectivesOfMpi) {
  for (const int ranks : {1, 2, 3}) EXPECT_EQ(Run(ranks, "DISABLED_Keeps*", "mpi"), 0) << output_;
}

TEST_F(MpiCommunicator, KeepsTheContractRoundTheRing) {
  for (const int ranks : {1, 2, 3, 4, 5})
    EXPECT_EQ(Run(ranks, "DISABLED_Keeps*", "ring"), 0) << output_;
}

TEST_F(MpiCommunicator, TakesTheRingForLongBuffersOfSeveralNodesOrWhereItIsTold) {
  // Ranks here share a node.
  for (const auto& [ranks, collectives, line] : {std::tuple{3, "", "long 0 short 0"},
                                                 {3, "auto", "long 0 short 0"},
                                                 {3, "mpi", "long 0 short 0"},
                                                 {3, "ring", "long 1 short 0"},
                                                 {2, "ring", "long 1 short 0"}}) {
    ASSERT_EQ(Run(ranks, "DISABLED_Says*", collectives), 0) << output_;
    for (int rank = 0; rank < ranks; ++rank)
      EXPECT_THAT(output_, HasSubstr("rank " + std::to_string(rank) + ": " + line)) << collectives;
  }
  EXPECT_NE(Run(3, "DISABLED_Says*", "fast"), 0);
  EXPECT_THAT(output_, HasSubstr("ITWIN_COLLECTIVES is \"fast\"; known: auto, mpi, ring"));
}

}  // namespace
}  // namespace itwin::worker
