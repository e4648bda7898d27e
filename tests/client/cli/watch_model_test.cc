#include "client/cli/watch_model.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <map>

namespace itwin::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

v1::JobUpdate Update(v1::JobState state) {
  v1::JobUpdate update;
  v1::Job* job = update.mutable_job();
  job->set_id("7f3c0a1b2c3d4e5f");
  job->set_name("wind");
  job->set_state(state);
  job->set_site("vega");
  job->set_ranks(8);
  job->set_attempt(1);
  return update;
}

v1::JobUpdate Running() {
  v1::JobUpdate update = Update(v1::JOB_STATE_RUNNING);
  v1::Progress* progress = update.mutable_job()->mutable_progress();
  progress->set_step(372);
  progress->set_steps(1200);
  progress->set_epoch(12);
  progress->set_epochs(40);
  progress->set_samples_per_second(412);
  progress->set_seconds_left(130);
  v1::PointBlock* loss = update.add_blocks();
  loss->set_series("train/loss");
  for (double v : {0.8, 0.4, 0.2, 0.0521}) loss->add_values(v);
  v1::PointBlock* rmse = update.add_blocks();
  rmse->set_series("test/rmse");
  rmse->add_values(0.2373);
  v1::PointBlock* cpu = update.add_blocks();
  cpu->set_series("node/n1/cpu_percent");
  cpu->add_values(87.2);
  return update;
}

TEST(WatchModel, DrawsThePictureOfTheDesign) {
  WatchModel model;
  model.Add(Update(v1::JOB_STATE_QUEUED));
  model.Add(Running());
  EXPECT_THAT(model.Lines(100, Glyphs{true}),
              ElementsAre("job 7f3c0a1b  wind  QUEUED → RUNNING on vega (8 ranks)",
                          "epoch 12/40 ━━━━━━━━╸─────────────────── 31 %  ETA 2m10s  412 samples/s",
                          "train/loss 0.0521 █▄▂▁  test/rmse 0.2373  cpu 87 %"));
}

TEST(WatchModel, AddsTheNodesUp) {
  WatchModel model;
  v1::JobUpdate update = Running();
  for (const auto& [series, value] : std::map<std::string, double>{
           {"node/n2/cpu_percent", 12.8}, {"node/n1/memory_bytes", 1073741824.0}, {"node/n2/memory_bytes", 3221225472.0}}) {
    v1::PointBlock* block = update.add_blocks();
    block->set_series(series);
    block->add_values(value);
  }
  model.Add(update);
  EXPECT_THAT(model.Lines(140, Glyphs{true}).back(), ::testing::HasSubstr("cpu 50 %  memory 4.0 GiB  of 2 nodes"));
}

TEST(WatchModel, FitsAnyWidth) {
  WatchModel model;
  v1::JobUpdate update = Running();
  update.mutable_job()->set_name("名前 with a very long name that does not fit anywhere at all");
  for (int i = 0; i < 30; ++i) {
    v1::PointBlock* block = update.add_blocks();
    block->set_series("test/metric" + std::to_string(i));
    block->add_values(i);
  }
  model.Add(update);
  for (bool unicode : {true, false}) {
    for (int width = 1; width < 140; ++width) {
      const std::vector<std::string> lines = model.Lines(width, Glyphs{unicode});
      EXPECT_LE(lines.size(), 6u);
      for (const std::string& line : lines) EXPECT_LE(DisplayWidth(line), width) << line;
    }
  }
  for (const std::string& line : model.Lines(80, Glyphs{false})) {
    EXPECT_THAT(line, Not(HasSubstr("━")));
  }
}

TEST(WatchModel, ShowsTheReasonWhileItMatters) {
  WatchModel model;
  v1::JobUpdate update = Update(v1::JOB_STATE_PENDING);
  update.mutable_job()->set_reason("waits for\x1b[2J nodes");
  model.Add(update);
  EXPECT_THAT(model.Lines(80, Glyphs{true}), ElementsAre(HasSubstr("PENDING on vega"), "  waits for?[2J nodes"));
  EXPECT_THAT(model.ProgressText(), IsEmpty());
}

TEST(WatchModel, SumsUpInPlainText) {
  WatchModel model;
  model.Add(Running());
  EXPECT_EQ(model.ProgressText(), "epoch 12/40, step 372/1200 (31 %), 412 samples/s, ETA 2m10s");
  EXPECT_EQ(model.MetricsText(), "train/loss 0.0521  test/rmse 0.2373");
}

TEST(WatchModel, StaysSmall) {
  WatchModel model;
  for (int i = 0; i < 10'000; ++i) {
    v1::JobUpdate update;
    v1::PointBlock* block = update.add_blocks();
    block->set_series("train/loss");
    block->add_values(i);
    v1::PointBlock* other = update.add_blocks();
    other->set_series("series" + std::to_string(i));
    other->add_values(i);
    model.Add(update);
  }
  EXPECT_LE(model.History("train/loss").size(), 256u);
  EXPECT_GE(model.History("train/loss").size(), 64u);
  EXPECT_THAT(model.History("series9999"), IsEmpty());
  // still in order, averaged
  EXPECT_TRUE(std::is_sorted(model.History("train/loss").begin(), model.History("train/loss").end()));
}

TEST(WatchModel, IsFullAtSuccess) {
  WatchModel model;
  model.Add(Update(v1::JOB_STATE_RUNNING));
  EXPECT_EQ(model.Fraction(), 0);
  model.Add(Update(v1::JOB_STATE_SUCCEEDED));
  EXPECT_EQ(model.Fraction(), 1);
}

}  // namespace
}  // namespace itwin::cli
