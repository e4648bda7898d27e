#include "agent/worker/profile/hang_detector.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <optional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::Scratch;

RankSign Sign(int rank, int64_t step, int64_t collectives, double age) {
  return {.rank = rank,
          .host = "n" + std::to_string(rank),
          .step = step,
          .collectives = collectives,
          .age_seconds = age,
          .communicators = {"gradients: in all-reduce number 7"}};
}

TEST(JudgeHang, BlamesWhoDoesNotRunThenWhoIsBehind) {
  // Rank 2 does not run; rank 1 is behind, but runs.
  HangVerdict verdict =
      JudgeHang({Sign(0, 9, 30, 0), Sign(1, 8, 20, 1), Sign(2, 9, 29, 70)}, {}, 60, 10);
  EXPECT_EQ(verdict.rank, 2);
  EXPECT_EQ(verdict.host, "n2");
  EXPECT_THAT(verdict.message, HasSubstr("no step for 60 s: rank 2 on n2 has not been running for 70 s"));
  EXPECT_THAT(verdict.message, HasSubstr("all-reduce number 7"));

  verdict = JudgeHang({Sign(0, 9, 30, 0), Sign(1, 8, 40, 1), Sign(2, 9, 30, 2)}, {}, 60, 10);
  EXPECT_EQ(verdict.rank, 1) << "fewer steps count before collectives";
  verdict = JudgeHang({Sign(0, 9, 30, 0), Sign(1, 9, 29, 1), Sign(2, 9, 30, 2)}, {}, 60, 10);
  EXPECT_EQ(verdict.rank, 1);
  EXPECT_THAT(verdict.message, HasSubstr("is behind the others (step 9, 29 collectives started; "));
}

TEST(JudgeHang, NamesNobodyWithoutEvidence) {
  const HangVerdict verdict = JudgeHang({Sign(0, 9, 30, 0), Sign(1, 9, 30, 1)}, {}, 60, 10);
  EXPECT_EQ(verdict.rank, -1);
  EXPECT_THAT(verdict.message, HasSubstr("none is behind the others"));
  EXPECT_EQ(JudgeHang({Sign(0, 9, 30, 0)}, {1}, 60, 10).rank, 1);
  EXPECT_THAT(JudgeHang({Sign(0, 9, 30, 0)}, {1}, 60, 10).message, HasSubstr("no sign at all"));
}

TEST(JudgeHang, BlamesWhoComputesWhileTheOthersWait) {
  RankSign waits = Sign(0, 9, 30, 0), computes = Sign(1, 9, 30, 1);
  waits.waits = true;
  HangVerdict verdict = JudgeHang({waits, computes, waits}, {}, 60, 10);
  EXPECT_EQ(verdict.rank, 1);
  EXPECT_THAT(verdict.message, HasSubstr("rank 1 on n1 waits for no other rank, and 2 wait for it"));
  EXPECT_EQ(JudgeHang({waits, waits}, {}, 60, 10).rank, -1);
  EXPECT_EQ(JudgeHang({computes, computes}, {}, 60, 10).rank, -1);
}

// Waits for `done`, spinning lightly.
bool Eventually(const std::function<bool()>& done) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!done()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::yield();
  }
  return true;
}

class Job {
 public:
  explicit Job(const std::filesystem::path& directory, double timeout) {
    for (int rank = 0; rank < 2; ++rank) {
      detectors_[rank].emplace(HangDetector::Options{
          .directory = directory,
          .rank = rank,
          .ranks = 2,
          .host = "n" + std::to_string(rank),
          .timeout_seconds = timeout,
          .collectives = [rank] { return rank == 0 ? 5 : 4; },
          .communicators = [] { return std::vector<std::string>{"gradients: idle"}; },
          .give_up =
              [this, rank](const WorkerError& error) {
                std::lock_guard lock(mutex_);
                errors_[rank] = error;
                ++given_up_;
              }});
    }
  }
  HangDetector& operator[](int rank) { return *detectors_[rank]; }
  int given_up() const { return given_up_; }
  std::optional<WorkerError> error(int rank) {
    std::lock_guard lock(mutex_);
    return errors_[rank];
  }

 private:
  std::mutex mutex_;
  std::optional<WorkerError> errors_[2];
  std::atomic<int> given_up_ = 0;
  std::optional<HangDetector> detectors_[2];
};

TEST(HangDetector, EveryRankFindsTheSameLaggard) {
  const Scratch scratch;
  {
    Job job(scratch / "ranks", 0.5);
    job[0].Beat(3);
    job[1].Beat(3);
    ASSERT_TRUE(Eventually([&] { return job.given_up() == 2; }));
    for (int rank = 0; rank < 2; ++rank) {
      const WorkerError error = *job.error(rank);
      EXPECT_EQ(error.failure, FailureClass::kInfra);
      EXPECT_EQ(error.rank, 1) << error.what();
      EXPECT_EQ(error.host, "n1");
      EXPECT_EQ(error.step, 3);
    }
  }
  EXPECT_FALSE(std::filesystem::exists(scratch / "ranks")) << "signs were left";
}

TEST(HangDetector, ARunThatGoesOnIsLeftAlone) {
  const Scratch scratch;
  Job job(scratch / "ranks", 3);
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(6);
  for (int64_t step = 1; std::chrono::steady_clock::now() < until; ++step) {
    job[0].Beat(step);
    job[1].Beat(step);
    std::this_thread::yield();
  }
  EXPECT_EQ(job.given_up(), 0);
}

}  // namespace
}  // namespace itwin::worker
