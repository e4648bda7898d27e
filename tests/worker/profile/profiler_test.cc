#include "agent/worker/profile/profiler.h"

#include <chrono>
#include <map>
#include <numeric>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "agent/worker/profile/thread_stacks.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/training/ranks.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::RunRanksOrThrow;
using Json = nlohmann::json;

void Burn(double seconds) {
  const double until = SteadySeconds() + seconds;
  while (SteadySeconds() < until) {
  }
}

double In(const StepSummary& summary, Activity activity) {
  return summary.seconds_in[static_cast<size_t>(activity)];
}

TEST(Profiler, EveryMomentOfAStepHasOneActivity) {
  Profiler profiler;
  for (int step = 0; step < 5; ++step) {
    profiler.BeginStep();
    Burn(0.001);
    profiler.Enter(Activity::kForward);
    Burn(0.002);
    profiler.Enter(Activity::kBackward);
    Burn(0.003);
    profiler.Enter(Activity::kOptimizer);
    Burn(0.002);
    profiler.Move(Activity::kOptimizer, Activity::kCommunication, 0.001);
    profiler.EndStep(8);
  }
  const StepSummary epoch = profiler.TakeEpoch();
  EXPECT_EQ(epoch.steps, 5);
  EXPECT_EQ(epoch.samples, 40);
  EXPECT_GE(In(epoch, Activity::kDataWait), 0.005);
  EXPECT_GE(In(epoch, Activity::kForward), 0.010);
  EXPECT_GE(In(epoch, Activity::kBackward), 0.015);
  EXPECT_GE(In(epoch, Activity::kOptimizer), 0.005);
  EXPECT_DOUBLE_EQ(In(epoch, Activity::kCommunication), 0.005);
  double sum = 0;
  for (const Activity activity : {Activity::kDataWait, Activity::kForward, Activity::kBackward,
                            Activity::kCommunication, Activity::kOptimizer}) {
    sum += In(epoch, activity);
  }
  EXPECT_NEAR(sum, epoch.seconds, 1e-9);
  EXPECT_GE(epoch.p50, 0.008);
  EXPECT_LE(epoch.p50, epoch.p90);
  EXPECT_LE(epoch.p99, epoch.longest);
  EXPECT_EQ(profiler.TakeEpoch().steps, 0) << "a new epoch begins at zero";
  EXPECT_EQ(profiler.whole_run().steps, 5);
}

TEST(Profiler, SeriesOfAnEpoch) {
  RunRanksOrThrow(2, [](Communicator&, Communicator& control) {
    CollectiveLog log("gradients");
    Profiler profiler({&log});
    profiler.BeginStep();
    log.Begin("all-reduce", 1'000'000);
    Burn(0.001);
    log.End();
    profiler.EndStep(4);
    const MetricSink::Values list = profiler.EpochValues(profiler.TakeEpoch(), control);
    const std::map<std::string, double> values(list.begin(), list.end());
    EXPECT_GT(values.at("perf/step_p50_s"), 0.001);
    EXPECT_GT(values.at("perf/rss_bytes"), 1e6);
    EXPECT_GE(values.at("perf/rss_peak_bytes"), values.at("perf/rss_bytes") / 2);
    EXPECT_LE(values.at("perf/comm_bytes_per_second"), 1e9);
    EXPECT_GT(values.at("perf/comm_bytes_per_second"), 1e6);
  });
}

TEST(CollectiveLog, SaysWhatIsUnderWay) {
  CollectiveLog log("gradients");
  EXPECT_EQ(log.Describe(), "gradients: nothing under way, 0 done");
  log.Begin("all-reduce", 25'000'000);
  EXPECT_THAT(log.Describe(), HasSubstr("gradients: in all-reduce number 1 of 25000.0 kB for 0.0 s"));
  log.End();
  EXPECT_EQ(log.counts().finished, 1);
  EXPECT_TRUE(log.TakeEvents().empty()) << "nobody asked for events";
  log.Record(true);
  log.Begin("barrier", 0);
  log.End();
  EXPECT_EQ(log.TakeEvents().size(), 1u);
  // A message is two ranks' own: it takes time and is seen, and does not count.
  EXPECT_FALSE(log.under_way());
  log.Begin("receive", 3000, CollectiveLog::Kind::kMessage);
  EXPECT_TRUE(log.under_way());
  EXPECT_THAT(log.Describe(), HasSubstr("gradients: in receive of 3.0 kB for 0.0 s"));
  log.End();
  EXPECT_EQ(log.counts().started, 2);
  EXPECT_EQ(log.counts().finished, 2);
  EXPECT_EQ(log.counts().bytes, 25'000'000 + 3000);
}

TEST(Trace, AllRanksOnOneClock) {
  constexpr int kRanks = 3;
  std::string file;
  RunRanksOrThrow(kRanks, [&](Communicator&, Communicator& control) {
    const int rank = control.rank();
    CollectiveLog log("gradients");
    Profiler profiler({&log});
    log.Record(true);
    profiler.trace().Start(2);
    for (int step = 0; step < 3; ++step) {
      profiler.BeginStep();
      profiler.Enter(Activity::kForward);
      Burn(0.0005);
      log.Begin("all-reduce", 64);
      log.End();
      profiler.EndStep(1);
    }
    EXPECT_FALSE(profiler.trace().active());
    const double offset = ClockOffset(control);
    // All ranks are threads of one process here: they share the clock already.
    EXPECT_LT(std::abs(offset), 0.05);
    const std::string mine = GatherTrace(
        {{"training", profiler.trace().Take()}, {"gradients", log.TakeEvents()}}, "n1", 100.0 * rank,
        control);
    EXPECT_EQ(mine.empty(), rank != 0);
    if (rank == 0) file = mine;
  });
  const Json trace = Json::parse(file);
  std::map<std::string, int> count;
  std::map<int, double> first;
  for (const Json& event : trace["traceEvents"]) {
    if (event["ph"] != "X") continue;
    ++count[event["name"]];
    EXPECT_GE(event["dur"], 0);
    const int rank = event["pid"];
    if (!first.contains(rank)) first[rank] = event["ts"];
  }
  EXPECT_EQ(count["step"], 2 * kRanks) << "the third step was not asked for";
  EXPECT_EQ(count["forward"], 2 * kRanks);
  EXPECT_EQ(count["all-reduce"], 3 * kRanks);
  EXPECT_EQ(first.size(), 3u);
  EXPECT_NEAR(first[2] - first[0], 200e6, 10e6) << "the offset is not applied";
}

void WaitInside(std::atomic<bool>* there, std::atomic<bool>* leave) {
  *there = true;
  while (!*leave) std::this_thread::yield();
}

TEST(ThreadStacks, NamesTheThreadsAndWhereTheyAre) {
  const testing::Scratch scratch;
  std::atomic<bool> there = false, leave = false;
  std::thread thread([&] { WaitInside(&there, &leave); });
  while (!there) std::this_thread::yield();
  std::FILE* file = std::fopen((scratch / "stacks").c_str(), "w");
  WriteThreadStacks(fileno(file));
  std::fclose(file);
  leave = true;
  thread.join();
  const std::string text = scratch.Read("stacks");
  EXPECT_THAT(text, HasSubstr("thread "));
  EXPECT_THAT(text, HasSubstr("profile_profiler_test")) << "no frame of this program";
}

}  // namespace
}  // namespace itwin::worker
