#include "agent/worker/training/step_graph.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/error.h"
#include "tests/worker/training/recording.h"

namespace itwin::worker {
namespace {

using testing::Recording;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

Batch Of(double value, int64_t samples = 4) { return {{"input", at::full({samples, 2}, value)}}; }

// Sums the batch, and counts how often the passes ran and how often a replay did.
struct Fixture {
  int passes = 0;
  Recording::Log log;
  std::vector<std::string> said;
  StepGraph graph{[this](const Batch& batch) {
                    ++passes;
                    return batch.at("input").sum();
                  },
                  [this] { return std::make_unique<Recording>(log); },
                  [this] { return [this, then = passes] { passes = then; }; }, [this] { ++quiet; },
                  [this](const std::string& line) { said.push_back(line); }};
  int quiet = 0;
  double Run(const Batch& batch) { return graph.Run(batch).item<double>(); }
};

TEST(StepGraph, RecordsOnceTheShapesHaveStayedAndReplaysWithNewNumbers) {
  Fixture f;
  for (int step = 1; step <= 3; ++step) {
    EXPECT_EQ(f.Run(Of(step)), 8.0 * step);
    EXPECT_FALSE(f.graph.recorded());
  }
  EXPECT_EQ(f.Run(Of(4)), 32);
  EXPECT_TRUE(f.graph.recorded());
  EXPECT_EQ(f.quiet, 1);
  EXPECT_EQ(f.Run(Of(5)), 40);
  EXPECT_EQ(f.log.recorded, 1);
  EXPECT_EQ(f.log.replayed, 2);
  EXPECT_EQ(f.Run(Of(1, 3)), 6) << "a batch of another shape runs as it is";
  EXPECT_EQ(f.log.replayed, 2);
  EXPECT_EQ(f.Run(Of(7)), 56);
  EXPECT_EQ(f.log.replayed, 3);
  EXPECT_TRUE(f.said.empty());
}

TEST(StepGraph, ShapesThatChangeAreNotRecorded) {
  Fixture f;
  for (int step = 0; step < 12; ++step) f.Run(Of(1, 1 + step % 3));
  EXPECT_EQ(f.log.recorded, 0);
  EXPECT_EQ(f.passes, 12);
}

TEST(StepGraph, WhatCannotBeRecordedRunsAsItIsAndIsSaidOnce) {
  Fixture f;
  f.log.refuse = "operation not permitted when stream is capturing\nmore";
  for (int step = 1; step <= 8; ++step) EXPECT_EQ(f.Run(Of(step)), 8.0 * step);
  EXPECT_EQ(f.log.replayed, 0);
  EXPECT_EQ(f.log.recorded, 0);
  EXPECT_EQ(f.passes, 8) << "what the rehearsal did is undone";
  EXPECT_THAT(f.said, ElementsAre(HasSubstr("cannot be recorded as a CUDA graph (operation not permitted when stream is capturing); its")));
}

TEST(StepGraph, ARecordingThatBreaksEndsTheJob) {
  Fixture f;
  f.log.break_down = "operation not permitted";
  for (int step = 1; step <= 3; ++step) f.Run(Of(step));
  EXPECT_THAT([&] { f.Run(Of(4)); }, ::testing::ThrowsMessage<WorkerError>(HasSubstr("set train.gpu.graphs: false")));
}

TEST(StepGraph, TheUsersErrorsStayTheirs) {
  int steps = 0;
  Recording::Log log;
  StepGraph graph(
      [&](const Batch&) -> at::Tensor {
        if (++steps > 3) throw UserError("the loss is none");
        return at::zeros({});
      },
      [&] { return std::make_unique<Recording>(log); }, [] { return [] {}; }, [] {}, [](const std::string&) { FAIL(); });
  log.run_when_recording = true;
  for (int step = 0; step < 3; ++step) graph.Run(Of(1));
  EXPECT_THROW(graph.Run(Of(1)), WorkerError);
}

}  // namespace
}  // namespace itwin::worker
