#include "agent/worker/training/training_loop.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <mutex>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/error.h"
#include "agent/worker/training/precision.h"
#include "agent/worker/training/weights.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/training/ranks.h"
#include "tests/worker/training/recording.h"
#include "tests/worker/training/tiny_model.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::Recording;
using testing::RunRanks;
using testing::RunRanksOrThrow;
using testing::Scratch;
using testing::TinyDataset;
using testing::TinyModel;
using ::testing::UnorderedElementsAreArray;

// Keeps every point.
class RecordingSink : public MetricSink {
 public:
  void Write(int64_t step, const Values& values) override {
    for (const auto& [name, value] : values) points[name].emplace_back(step, value);
  }
  void Write(const Progress& p) override { progress.push_back(p); }
  void Flush() override {}
  std::map<std::string, std::vector<std::pair<int64_t, double>>> points;
  std::vector<Progress> progress;
};

TrainSpec Spec() {
  TrainSpec spec;
  spec.batch = 8;
  spec.epochs = 3;
  spec.optimizer = Sgd{.lr = 0.1, .momentum = 0.9};
  spec.seed = 11;
  return spec;
}

// One run on some ranks; what rank 0 saw, and every rank's parameters at the end.
struct Training {
  TrainSpec spec = Spec();
  TinyModel::Options model{};
  int ranks = 1;
  std::filesystem::path checkpoints{};
  std::filesystem::path resume{};
  std::filesystem::path stop_file{};
  std::optional<double> deadline{};
  bool as_on_device = false;
  bool record_steps = false;

  RecordingSink sink{};
  std::vector<NamedTensors> parameters{};
  std::vector<NamedTensors> buffers{};
  std::vector<TrainingOutcome> outcomes{};
  std::vector<std::string> printed{};
  std::vector<std::exception_ptr> errors{};
  std::vector<Recording::Log> recordings{};

  void Go(const Dataset& dataset) {
    parameters.resize(ranks);
    buffers.resize(ranks);
    outcomes.resize(ranks);
    recordings.resize(ranks);
    InProcessGroup saving(ranks);
    errors = RunRanks(ranks, [&](Communicator& gradients, Communicator& control) {
      const int rank = control.rank();
      InProcessCommunicator background(saving, rank);
      TinyModel::Options mine = model;
      mine.start += 0.1 * rank;
      if (rank != model.corrupt_rank) mine.corrupt_step = -1;
      TinyModel tiny(mine);
      NullMetricSink drop;
      CheckpointStore store(checkpoints, spec.checkpoint.keep, control, &background);
      StopRequest stop(rank == 0 ? stop_file : "", deadline);
      TrainingLoop loop({.spec = spec,
                         .dataset = dataset,
                         .model = tiny,
                         .gradients = gradients,
                         .control = control,
                         .metrics = rank == 0 ? static_cast<MetricSink&>(sink) : drop,
                         .checkpoints = store,
                         .stop = stop,
                         .print =
                             [&](const std::string& line) {
                               if (rank == 0) printed.push_back(line);
                             },
                         .spec_sha256 = "spec",
                         .make_graph = record_steps ? StepGraph::Make([log = &recordings[rank]] {
                           return std::make_unique<Recording>(*log);
                         })
                                                    : nullptr,
                         .as_on_device = as_on_device});
      if (!resume.empty())
        loop.Resume(LoadNewestCheckpoint({resume}, control, [](const std::string&) {}));
      outcomes[rank] = loop.Run();
      for (const auto& [name, tensor] : tiny.parameters())
        parameters[rank].emplace_back(name, tensor.detach().clone());
      for (const auto& [name, tensor] : tiny.buffers())
        buffers[rank].emplace_back(name, tensor.clone());
    });
  }
  void GoOrThrow(const Dataset& dataset) {
    Go(dataset);
    for (const auto& error : errors) {
      if (error) std::rethrow_exception(error);
    }
  }
};

double LargestDifference(const NamedTensors& a, const NamedTensors& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    worst = std::max(worst, a[i].second.sub(b[i].second).abs().max().item<double>());
  }
  return worst;
}
bool SameBits(const NamedTensors& a, const NamedTensors& b) {
  if (a.size() != b.size() || a.empty()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!a[i].second.equal(b[i].second)) return false;
  }
  return true;
}
WorkerError ErrorOf(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const WorkerError& e) {
    return e;
  }
  ADD_FAILURE() << "nothing was thrown";
  return AppError("");
}

TEST(TrainingLoop, RanksEqualOneProcessWithTheLargeBatch) {
  // 43 samples in batches of 8: the last batch has 3, so with 4 ranks one has none.
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  Training one{.checkpoints = scratch / "one"};
  one.GoOrThrow(dataset);
  const TinyModel start;
  EXPECT_GT(LargestDifference(one.parameters[0], TinyModel().parameters()), 0.01);
  for (int ranks : {2, 3, 4}) {
    Training many{.ranks = ranks, .checkpoints = scratch / std::to_string(ranks)};
    many.GoOrThrow(dataset);
    EXPECT_LT(LargestDifference(one.parameters[0], many.parameters[0]), 1e-12) << ranks << " ranks";
    for (int r = 1; r < ranks; ++r) EXPECT_TRUE(SameBits(many.parameters[0], many.parameters[r]));
    for (const char* name :
         {"test/rmse", "validation/rmse", "train/loss_epoch", "test/ratio_to_zero"}) {
      EXPECT_NEAR(one.outcomes[0].metrics.at(name), many.outcomes[0].metrics.at(name), 1e-12)
          << name;
    }
    EXPECT_EQ(many.sink.points["train/loss"].size(), 18u);
    for (size_t i = 0; i < 18; ++i) {
      EXPECT_NEAR(one.sink.points["train/loss"][i].second, many.sink.points["train/loss"][i].second,
                  1e-12);
    }
  }
}

TEST(TrainingLoop, BatchesSmallerThanTheRanks) {
  const Scratch scratch;
  const TinyDataset dataset(5, 0, 1);
  Training one{.checkpoints = scratch / "one"}, many{.ranks = 4, .checkpoints = scratch / "many"};
  one.spec.batch = many.spec.batch = 2;
  one.GoOrThrow(dataset);
  many.GoOrThrow(dataset);
  EXPECT_LT(LargestDifference(one.parameters[0], many.parameters[0]), 1e-12);
}

TEST(TrainingLoop, EachEpochTouchesEachSampleOnceAndEvaluationNeverPads) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 7);
  Training run{.ranks = 3, .checkpoints = scratch / "c"};
  run.spec.epochs = 1;
  run.GoOrThrow(dataset);
  for (const auto& [split, size] :
       {std::pair{Split::kTrain, 43}, std::pair{Split::kValidation, 5}}) {
    std::vector<int64_t> all(size);
    for (int i = 0; i < size; ++i) all[i] = i;
    EXPECT_THAT(dataset.Seen(split), UnorderedElementsAreArray(all));
  }
}

TEST(TrainingLoop, OverlapAndBucketSizesDoNotChangeTheBits) {
  const Scratch scratch;
  const TinyDataset dataset(43, 0, 0);
  Training a{.ranks = 3, .checkpoints = scratch / "a"}, b{.ranks = 3, .checkpoints = scratch / "b"},
      c{.ranks = 3, .checkpoints = scratch / "c"};
  b.spec.ddp.overlap = false;
  c.spec.ddp.first_bucket_mb = c.spec.ddp.bucket_mb = 1e-6;
  for (Training* run : {&a, &b, &c}) run->GoOrThrow(dataset);
  EXPECT_TRUE(SameBits(a.parameters[0], b.parameters[0]));
  EXPECT_TRUE(SameBits(a.parameters[0], c.parameters[0]));
  EXPECT_EQ(a.outcomes[0].weights_sha256, b.outcomes[0].weights_sha256);
}

TEST(TrainingLoop, UnusedParametersAreNamedAndDoNotBlock) {
  const Scratch scratch;
  const TinyDataset dataset(20, 0, 0);
  Training run{.model = {.unused = true}, .ranks = 2, .checkpoints = scratch / "c"};
  run.GoOrThrow(dataset);
  EXPECT_THAT(run.printed, ::testing::Contains(HasSubstr("no gradient in the first step: unused")));
}

TEST(TrainingLoop, ClippingEqualsOneProcess) {
  const Scratch scratch;
  const TinyDataset dataset(43, 0, 0);
  Training one{.checkpoints = scratch / "1"}, many{.ranks = 3, .checkpoints = scratch / "3"},
      off{.checkpoints = scratch / "off"};
  one.spec.clip_norm = many.spec.clip_norm = 0.05;
  for (Training* run : {&one, &many, &off}) run->GoOrThrow(dataset);
  EXPECT_LT(LargestDifference(one.parameters[0], many.parameters[0]), 1e-12);
  EXPECT_GT(LargestDifference(one.parameters[0], off.parameters[0]), 1e-3);
}

TEST(TrainingLoop, AccumulationIsTheSameStepInParts) {
  const Scratch scratch;
  const TinyDataset dataset(43, 0, 0);
  Training one{.checkpoints = scratch / "1"};
  one.GoOrThrow(dataset);
  for (int ranks : {1, 3}) {
    Training parts{.ranks = ranks, .checkpoints = scratch / ("p" + std::to_string(ranks))};
    parts.spec.accumulate = 3;
    parts.GoOrThrow(dataset);
    EXPECT_LT(LargestDifference(one.parameters[0], parts.parameters[0]), 1e-12) << ranks;
    EXPECT_NEAR(one.sink.points["train/loss"].back().second,
                parts.sink.points["train/loss"].back().second, 1e-12);
  }
}

TEST(TrainingLoop, ParametersThatDivergeAreFoundAtTheCheckAndNameTheRank) {
  const Scratch scratch;
  const TinyDataset dataset(43, 0, 0);
  Training run{.model = {.corrupt_rank = 2, .corrupt_step = 2}, .ranks = 3,
               .checkpoints = scratch / "c"};
  run.spec.check_every = 4;
  run.Go(dataset);
  for (const auto& error : run.errors) {
    const WorkerError e = ErrorOf(error);
    EXPECT_THAT(e.what(), HasSubstr("parameters of rank 2 are not those of the other ranks"));
    EXPECT_EQ(e.step, 4);
    EXPECT_EQ(e.rank, 2);
  }
  EXPECT_FALSE(std::filesystem::exists(scratch / "c" / "step-4"));
}

TEST(TrainingLoop, StopsAtTheStepLimitAndCountsWholeEpochs) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  Training run{.ranks = 2, .checkpoints = scratch / "c"};
  run.spec.epochs = 100;
  run.spec.steps = 8;  // 6 steps an epoch
  run.GoOrThrow(dataset);
  EXPECT_EQ(run.outcomes[0].steps, 8);
  EXPECT_EQ(run.outcomes[0].epochs, 1);
  EXPECT_EQ(run.sink.progress.back().steps, 8);
  EXPECT_TRUE(run.outcomes[0].metrics.contains("test/rmse"));
}

TEST(TrainingLoop, ScoresTheTestSplitDuringTrainingWhenThereIsNoValidation) {
  const Scratch scratch;
  const TinyDataset dataset(16, 0, 6);
  Training run{.checkpoints = scratch / "c"};
  run.spec.epochs = 4;
  run.spec.validate_every = 2;
  run.GoOrThrow(dataset);
  ASSERT_EQ(run.sink.points["test/rmse"].size(), 2u);  // after epoch 2, and at the end
  const auto& metrics = run.outcomes[0].metrics;
  EXPECT_NEAR(metrics.at("test/rmse") * metrics.at("test/rmse"), metrics.at("test/mse"), 1e-12);
  EXPECT_NEAR(metrics.at("test/ratio_to_zero"),
              metrics.at("test/rmse") / metrics.at("test/zero_rmse"), 1e-12);
}

TEST(TrainingLoop, LossThatIsNotFiniteNamesStepAndRankOnEveryRankAndKeepsTheCheckpoint) {
  const Scratch scratch;
  TinyDataset dataset(40, 0, 0);
  Training run{.ranks = 3, .checkpoints = scratch / "c"};
  run.spec.checkpoint.every_epochs = 1;
  run.Go(dataset);
  ASSERT_FALSE(run.errors[0]);

  dataset.broken_sample = 17;
  const EpochOrder order(40, 8, run.spec.seed, 0);
  int64_t step = -1;
  int rank = -1;
  for (int64_t g = 0; g < order.batches(); ++g) {
    for (int r = 0; r < 3; ++r) {
      const auto mine = order.OfRank(g, r, 3);
      if (std::find(mine.begin(), mine.end(), 17) != mine.end()) step = g + 1, rank = r;
    }
  }
  Training broken{.ranks = 3, .checkpoints = scratch / "d"};
  broken.Go(dataset);
  for (const auto& error : broken.errors) {
    const WorkerError e = ErrorOf(error);
    EXPECT_EQ(e.failure, FailureClass::kApp);
    EXPECT_EQ(e.step, step);
    EXPECT_EQ(e.rank, rank);
    EXPECT_THAT(e.what(), HasSubstr("on rank " + std::to_string(rank)));
  }
  Training ignored{.ranks = 3, .checkpoints = scratch / "e"};
  ignored.spec.stop_on_nan = false;
  ignored.Go(dataset);
  EXPECT_THAT(ErrorOf(ignored.errors[0]).what(), HasSubstr("weights are not finite"));
}

TEST(TrainingLoop, GoesOnFromAnyStepBitForBit) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  for (int ranks : {1, 2, 3}) {
    const std::string name = std::to_string(ranks);
    Training whole{.model = {.dropout = ranks == 1 ? 0.3 : 0.0},
                   .ranks = ranks,
                   .checkpoints = scratch / ("w" + name)};
    whole.spec.optimizer = AdamW{.lr = 0.01};
    whole.GoOrThrow(dataset);
    for (int64_t at : {1, 6, 10, 17}) {
      const std::filesystem::path directory = scratch / (name + "-" + std::to_string(at));
      Training first{
          .spec = whole.spec, .model = whole.model, .ranks = ranks, .checkpoints = directory};
      first.spec.steps = at;
      first.GoOrThrow(dataset);
      Training second{.spec = whole.spec,
                      .model = whole.model,
                      .ranks = ranks,
                      .checkpoints = directory,
                      .resume = directory};
      second.GoOrThrow(dataset);
      EXPECT_TRUE(SameBits(whole.parameters[0], second.parameters[0]))
          << ranks << " ranks, from step " << at;
      EXPECT_EQ(whole.outcomes[0].weights_sha256, second.outcomes[0].weights_sha256);
      EXPECT_EQ(second.sink.points["train/loss"].front().first, at + 1);
      EXPECT_EQ(whole.sink.points["train/loss_epoch"].back(),
                second.sink.points["train/loss_epoch"].back());
      if (at % 6 ==
          0) {  // buffers are averaged at the end of an epoch, also of one that the step limit cut
        EXPECT_TRUE(SameBits(whole.buffers[0], second.buffers[0]));
      }
    }
  }
}

TEST(TrainingLoop, GoesOnAtAnotherNumberOfRanks) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  Training whole{.checkpoints = scratch / "w"};
  whole.GoOrThrow(dataset);
  for (const auto& [before, after] : {std::pair{3, 2}, {2, 1}, {1, 3}}) {
    const std::filesystem::path directory = scratch / ("c" + std::to_string(before));
    Training first{.ranks = before, .checkpoints = directory};
    first.spec.steps = 9;
    first.GoOrThrow(dataset);
    Training second{.ranks = after, .checkpoints = directory, .resume = directory};
    second.GoOrThrow(dataset);
    EXPECT_LT(LargestDifference(whole.parameters[0], second.parameters[0]), 1e-12)
        << before << " ranks, then " << after;
    EXPECT_EQ(second.sink.points["train/loss"].front().first, 10);
  }
}

TEST(TrainingLoop, GoesOnWithAnotherStrategyAndNumberOfRanks) {
  const Scratch scratch;
  struct Part {
    std::string strategy;
    int ranks;
  };
  const auto with = [&](const Part& part, const std::string& name, const std::string& resume = "") {
    Training run{.ranks = part.ranks, .checkpoints = scratch / name};
    if (!resume.empty()) run.resume = scratch / resume;
    run.spec.optimizer = AdamW{.lr = 0.02, .eps = 1e-3};
    run.spec.strategy = part.strategy;
    run.spec.ddp = {.bucket_mb = 1e-4, .first_bucket_mb = 1e-4};
    run.spec.zero.bucket_mb = 1e-4;
    return run;
  };
  Training whole = with({"", 1}, "whole");
  whole.GoOrThrow(TinyDataset(43, 5, 6));
  int number = 0;
  for (const auto& [before, after] : std::vector<std::pair<Part, Part>>{{{"ddp", 2}, {"zero1", 3}},
                                                                        {{"ddp", 2}, {"zero2", 3}},
                                                                        {{"ddp", 2}, {"zero3", 3}},
                                                                        {{"zero1", 3}, {"ddp", 2}},
                                                                        {{"zero2", 3}, {"ddp", 2}},
                                                                        {{"zero3", 3}, {"ddp", 2}},
                                                                        {{"zero3", 2}, {"zero1", 3}}}) {
    SCOPED_TRACE(before.strategy + ", then " + after.strategy);
    const std::string name = std::to_string(number++);
    const TinyDataset dataset(43, 5, 6);
    Training first = with(before, name + "a"), second = with(after, name + "b", name + "a");
    first.spec.steps = 9;  // in the second epoch of three
    first.GoOrThrow(dataset);
    EXPECT_GT(LargestDifference(whole.parameters[0], first.parameters[0]), 1e-3);
    second.GoOrThrow(dataset);
    EXPECT_LT(LargestDifference(whole.parameters[0], second.parameters[0]), 1e-12);
    for (const NamedTensors& of_rank : second.parameters) EXPECT_TRUE(SameBits(second.parameters[0], of_rank));
    EXPECT_EQ(second.sink.points["train/loss"].front().first, 10);
    for (size_t i = 0; i < second.sink.points["train/loss"].size(); ++i) {
      EXPECT_NEAR(second.sink.points["train/loss"][i].second, whole.sink.points["train/loss"][9 + i].second, 1e-12);
    }
    std::map<int64_t, int> seen;
    for (const int64_t sample : dataset.Seen(Split::kTrain)) ++seen[sample];
    EXPECT_EQ(seen.size(), 43u);
    for (const auto& [sample, times] : seen) EXPECT_EQ(times, 3) << "sample " << sample;
  }
}

TEST(TrainingLoop, RefusesACheckpointOfAnotherSpec) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  Training first{.checkpoints = scratch / "c"};
  first.GoOrThrow(dataset);
  SelfCommunicator self;
  CheckpointContents contents =
      LoadNewestCheckpoint({scratch / "c"}, self, [](const std::string&) {});
  TinyModel model;
  RecordingSink sink;
  CheckpointStore store(scratch / "c", 2, self);
  StopRequest stop("", std::nullopt);
  const TrainSpec spec = Spec();
  TrainingLoop loop({.spec = spec,
                     .dataset = dataset,
                     .model = model,
                     .gradients = self,
                     .control = self,
                     .metrics = sink,
                     .checkpoints = store,
                     .stop = stop,
                     .print = [](const std::string&) {},
                     .spec_sha256 = "another"});
  EXPECT_THROW(loop.Resume(contents), WorkerError);
}

TEST(TrainingLoop, StopFileSavesAndTheNextAttemptEndsAsIfNothingHadBeen) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  Training whole{.ranks = 2, .checkpoints = scratch / "w"};
  whole.GoOrThrow(dataset);
  Training first{.ranks = 2, .checkpoints = scratch / "c", .stop_file = scratch.Write("stop", "")};
  first.GoOrThrow(dataset);
  for (const TrainingOutcome& outcome : first.outcomes) EXPECT_TRUE(outcome.saved);
  EXPECT_EQ(first.outcomes[0].steps, 1);
  EXPECT_THAT(first.outcomes[0].message, HasSubstr("the stop file appeared; saved at step 1"));
  Training second{.ranks = 2, .checkpoints = scratch / "c", .resume = scratch / "c"};
  second.GoOrThrow(dataset);
  EXPECT_TRUE(SameBits(whole.parameters[0], second.parameters[0]));
  EXPECT_TRUE(SameBits(whole.buffers[0], second.buffers[0]));
  EXPECT_FALSE(second.outcomes[0].saved);
}

TEST(TrainingLoop, SavesWhenTheDeadlineIsNear) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  Training run{.ranks = 2, .checkpoints = scratch / "c", .deadline = Now() + 3};
  run.GoOrThrow(dataset);
  EXPECT_TRUE(run.outcomes[0].saved);
  EXPECT_THAT(run.outcomes[0].message, HasSubstr("wall-time limit"));
}

TEST(TrainingLoop, KeepsTheNewestCheckpoints) {
  const Scratch scratch;
  const TinyDataset dataset(43, 0, 0);
  Training run{.checkpoints = scratch / "c"};
  run.spec.checkpoint = {.every_epochs = 1, .keep = 2};
  run.spec.epochs = 5;
  run.GoOrThrow(dataset);
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(scratch / "c")) {
    names.push_back(entry.path().filename());
  }
  EXPECT_THAT(names, ::testing::UnorderedElementsAre("step-24", "step-30"));
}

TEST(TrainingLoop, WeightsThatDifferAtTheEndOfAnEpochNameTheRankThatIsNotAsMost) {
  const TinyDataset dataset(16, 0, 0);
  for (const int rank : {0, 2}) {
    Scratch scratch;
    Training run{.model = {.corrupt_rank = rank, .corrupt_step = 2}, .ranks = 3, .checkpoints = scratch / "c"};
    run.spec.check_every = 0;
    run.Go(dataset);
    for (const auto& error : run.errors) {
      const WorkerError e = ErrorOf(error);
      EXPECT_THAT(e.what(), HasSubstr("the parameters of rank " + std::to_string(rank) + " are not those of"));
      EXPECT_EQ(e.rank, rank);
      EXPECT_EQ(e.step, 2);
    }
  }
}

TEST(TrainingLoop, BatchesFromTheThreadAreTheSame) {
  const TinyDataset dataset(43, 0, 0);
  const EpochOrder order(43, 8, 1, 0), next(43, 8, 1, 1);
  BatchSource direct(dataset, 1, 2), threaded(dataset, 1, 2);
  threaded.UseThread();
  for (const auto& [epoch, first] :
       {std::pair{&order, 0}, std::pair{&next, 2}, std::pair{&order, 5}}) {
    direct.Start(*epoch, first);
    threaded.Start(*epoch, first);
    for (int64_t g = first; g < epoch->batches() - (epoch == &next ? 2 : 0); ++g) {
      const BatchSource::Item a = direct.Next(), b = threaded.Next();
      EXPECT_EQ(a.local_samples, b.local_samples);
      EXPECT_TRUE(a.batch.at("input").equal(b.batch.at("input")));
    }
  }
  EXPECT_TRUE(threaded.threaded());
  EXPECT_FALSE(direct.threaded());
}

// ---- features -------------------------------------------------------------------------------------

TEST(TrainingLoop, TheScheduleGivesEachStepItsRate) {
  const Scratch scratch;
  const TinyDataset dataset(24, 0, 6);
  Training run{.checkpoints = scratch / "c"};
  run.spec.optimizer = Sgd{.lr = 0.5};
  run.spec.epochs = 4;  // of 3 steps
  run.spec.schedule = {.kind = PolynomialSchedule{}, .warmup_steps = 4, .warmup_start = 0};
  run.GoOrThrow(dataset);
  const auto& rates = run.sink.points["train/learning_rate"];
  ASSERT_EQ(rates.size(), 4u);
  EXPECT_NEAR(rates[0].second, 0.5 * 2 / 4, 1e-12);       // of step 2, the third
  EXPECT_NEAR(rates[1].second, 0.5 * (1 - 1.0 / 8), 1e-12);
  EXPECT_NEAR(rates[3].second, 0.5 * (1 - 7.0 / 8), 1e-12);
}

TEST(TrainingLoop, RanksAgreeWithEveryFeatureOn) {
  const Scratch scratch;
  const TinyDataset dataset(43, 9, 6);
  const auto with = [&](int ranks) {
    Training run{.ranks = ranks, .checkpoints = scratch / std::to_string(ranks)};
    run.spec.optimizer = Lamb{.lr = 0.05};
    run.spec.clip_norm = 0.5;
    run.spec.clip_value = 0.05;
    run.spec.ema = 0.9;
    run.spec.best = BestSpec{};
    run.spec.schedule = {.kind = PlateauSchedule{.factor = 0.5, .patience = 0, .threshold = 0.2}};
    run.spec.parameter_groups = {{.match = {"*.bias"}, .weight_decay = 0}, {.match = {"first"}, .lr = 0.02}};
    run.spec.validate_every_steps = 4;
    run.GoOrThrow(dataset);
    return run;
  };
  Training one = with(1);
  for (int ranks : {2, 3, 4}) {
    const Training many = with(ranks);
    EXPECT_LT(LargestDifference(one.parameters[0], many.parameters[0]), 1e-11) << ranks;
    for (int r = 1; r < ranks; ++r) EXPECT_TRUE(SameBits(many.parameters[0], many.parameters[r]));
    for (const char* name : {"test/rmse", "validation/loss", "train/learning_rate", "train/best_step"})
      EXPECT_NEAR(one.outcomes[0].metrics.at(name), many.outcomes[0].metrics.at(name), 1e-11) << name;
  }
  EXPECT_LT(one.outcomes[0].metrics.at("train/learning_rate"), 0.05);  // the plateau has acted
  std::vector<int64_t> steps;
  for (const auto& [step, value] : one.sink.points["validation/loss"]) steps.push_back(step);
  EXPECT_THAT(steps, ::testing::IsSupersetOf({4, 6, 8, 12, 16, 18}));
}

TEST(TrainingLoop, LbfgsOnRanksEqualsOneProcessAndGoesOnBitForBit) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  for (const bool strong_wolfe : {false, true}) {
    const auto with = [&](const std::string& name, int ranks, const std::string& resume = "") {
      Training run{.ranks = ranks, .checkpoints = scratch / name};
      if (!resume.empty()) run.resume = scratch / resume;
      run.spec.optimizer = Lbfgs{.lr = 0.5, .max_iter = 4, .max_eval = 5, .history = 3, .strong_wolfe = strong_wolfe};
      run.spec.accumulate = 2;
      run.spec.check_every = 1;
      run.spec.epochs = 2;
      return run;
    };
    const std::string search = strong_wolfe ? "wolfe" : "plain";
    Training one = with(search + "1", 1);
    one.GoOrThrow(dataset);
    EXPECT_EQ(one.sink.points["train/evaluations"].size(), 12u);
    EXPECT_GE(one.sink.points["train/evaluations"].back().second, strong_wolfe ? 5 : 4);
    EXPECT_LT(one.outcomes[0].metrics.at("train/loss_epoch"), 0.2 * one.sink.points["train/loss"].front().second);
    for (const int ranks : {2, 4}) {
      SCOPED_TRACE(search + ", " + std::to_string(ranks) + " ranks");
      const std::string name = search + std::to_string(ranks);
      Training many = with(name, ranks);
      many.GoOrThrow(dataset);
      EXPECT_LT(LargestDifference(one.parameters[0], many.parameters[0]), 1e-9);
      EXPECT_EQ(one.sink.points["train/evaluations"], many.sink.points["train/evaluations"]);
      for (int r = 1; r < ranks; ++r) EXPECT_TRUE(SameBits(many.parameters[0], many.parameters[r]));
      Training device = with(name + "-device", ranks);
      device.as_on_device = true;
      device.GoOrThrow(dataset);
      EXPECT_LT(LargestDifference(one.parameters[0], device.parameters[0]), 1e-9);
      for (int r = 1; r < ranks; ++r) EXPECT_TRUE(SameBits(device.parameters[0], device.parameters[r]));
      Training first = with(name + "-part", ranks);
      first.spec.steps = 5;
      first.GoOrThrow(dataset);
      Training second = with(name + "-rest", ranks, name + "-part"), alone = with(name + "-alone", 1, name + "-part");
      second.GoOrThrow(dataset);
      alone.GoOrThrow(dataset);
      EXPECT_TRUE(SameBits(many.parameters[0], second.parameters[0]));
      EXPECT_LT(LargestDifference(one.parameters[0], alone.parameters[0]), 1e-9);
    }
  }
}

TEST(TrainingLoop, LbfgsThatMeetsALossThatIsNotFiniteSaysSo) {
  const Scratch scratch;
  TinyDataset dataset(40, 0, 0);
  dataset.broken_sample = 17;
  Training run{.ranks = 2, .checkpoints = scratch / "c"};
  run.spec.optimizer = Lbfgs{.strong_wolfe = true};
  run.Go(dataset);
  for (const auto& error : run.errors) EXPECT_THAT(ErrorOf(error).what(), HasSubstr("the loss is not finite at step"));
}

TEST(TrainingLoop, FeaturesGoOnFromACheckpoint) {
  const Scratch scratch;
  const TinyDataset dataset(24, 6, 6);
  const auto spec = [](Training& run) {
    run.spec.ema = 0.8;
    run.spec.best = BestSpec{.maximize = true};
    run.spec.early_stopping = EarlyStoppingSpec{.patience = 50};
    run.spec.schedule = {.kind = PlateauSchedule{.factor = 0.5, .patience = 0, .threshold = 0.5}};
    run.spec.epochs = 6;
  };
  Training whole{.checkpoints = scratch / "whole"};
  spec(whole);
  whole.GoOrThrow(dataset);
  Training first{.checkpoints = scratch / "part"};
  spec(first);
  first.spec.checkpoint = {.every_epochs = 1, .keep = 10};
  first.GoOrThrow(dataset);
  Training second{.ranks = 2, .checkpoints = scratch / "rest", .resume = scratch / "part" / "step-9"};
  spec(second);
  second.GoOrThrow(dataset);
  EXPECT_EQ(whole.outcomes[0].metrics.at("train/learning_rate"), second.outcomes[0].metrics.at("train/learning_rate"));
  EXPECT_EQ(whole.outcomes[0].metrics.at("train/best_step"), 3);
  EXPECT_EQ(second.outcomes[0].metrics.at("train/best_step"), 3);
  EXPECT_LT(LargestDifference(whole.parameters[0], second.parameters[0]), 1e-12);
}

TEST(TrainingLoop, TheAverageOfTheWeightsIsGivenBack) {
  const Scratch scratch;
  const TinyDataset dataset(8, 0, 6);
  Training plain{.checkpoints = scratch / "plain"}, averaged{.checkpoints = scratch / "averaged"};
  plain.spec.epochs = averaged.spec.epochs = 1;
  averaged.spec.ema = 0.999;
  plain.GoOrThrow(dataset);
  averaged.GoOrThrow(dataset);
  TinyModel start;
  const NamedTensors initial = start.parameters();
  for (size_t i = 0; i < initial.size(); ++i) {  // one step: 2/11 of the first weights, 9/11 of the last
    const at::Tensor expected = initial[i].second.detach().lerp(plain.parameters[0][i].second, 9.0 / 11);
    EXPECT_TRUE(averaged.parameters[0][i].second.allclose(expected, 1e-12, 1e-12)) << initial[i].first;
  }
  EXPECT_NE(plain.outcomes[0].metrics.at("test/rmse"), averaged.outcomes[0].metrics.at("test/rmse"));
  EXPECT_NE(plain.outcomes[0].weights_sha256, averaged.outcomes[0].weights_sha256);
}

TEST(TrainingLoop, StopsEarlyOnAllRanks) {
  const Scratch scratch;
  const TinyDataset dataset(24, 5, 6);
  Training run{.ranks = 3, .checkpoints = scratch / "c"};
  run.spec.epochs = 50;
  run.spec.optimizer = Sgd{.lr = 1e-9};
  run.spec.early_stopping = EarlyStoppingSpec{.patience = 2, .min_delta = 0.01};
  run.GoOrThrow(dataset);
  for (const TrainingOutcome& outcome : run.outcomes) {
    EXPECT_EQ(outcome.epochs, 3);  // the first is the best, two more do not improve
    EXPECT_FALSE(outcome.saved);
  }
  EXPECT_THAT(run.printed, ::testing::Contains(HasSubstr("stopped early at step 9: validation/loss")));
  EXPECT_TRUE(run.outcomes[0].metrics.contains("test/rmse"));
}

TEST(TrainingLoop, TheBestWeightsAreTheModelOrBesideIt) {
  const Scratch scratch;
  const TinyDataset dataset(24, 5, 6);
  Training best{.ranks = 2, .checkpoints = scratch / "best"}, kept{.checkpoints = scratch / "kept"};
  // The loss falls, so the highest is that of the first evaluation.
  best.spec.best = BestSpec{.maximize = true};
  kept.spec.best = BestSpec{.maximize = true, .export_best = false};
  best.GoOrThrow(dataset);
  kept.GoOrThrow(dataset);
  ASSERT_EQ(best.outcomes[0].metrics.at("train/best_step"), 3);
  Training three{.checkpoints = scratch / "three"}, all{.checkpoints = scratch / "all"};
  three.spec.steps = 3;
  three.GoOrThrow(dataset);
  all.GoOrThrow(dataset);
  EXPECT_LT(LargestDifference(best.parameters[0], three.parameters[0]), 1e-12);
  EXPECT_TRUE(SameBits(best.parameters[0], best.parameters[1]));
  EXPECT_NEAR(best.outcomes[0].metrics.at("test/rmse"), three.outcomes[0].metrics.at("test/rmse"), 1e-12);
  EXPECT_TRUE(best.outcomes[0].best.empty());
  EXPECT_TRUE(SameBits(kept.parameters[0], all.parameters[0]));
  ASSERT_EQ(kept.outcomes[0].best.size(), 5u);  // with the buffer
  EXPECT_LT(kept.outcomes[0].best[0].second.sub(three.parameters[0][0].second).abs().max().item<double>(), 1e-12);
}

// Known before the first step: a wrong name once lost the whole run at its first evaluation, or its end.
TEST(TrainingLoop, WhatIsWatchedMustBeEvaluated) {
  const Scratch scratch;
  Training run{.checkpoints = scratch / "c"};
  run.spec.early_stopping = EarlyStoppingSpec{};
  run.Go(TinyDataset(24, 0, 6));
  EXPECT_THAT(ErrorOf(run.errors[0]).what(), HasSubstr("train.early_stopping: needs a validation split"));
  const std::pair<const char*, std::function<void(TrainSpec&, const std::string&)>> fields[] = {
      {"train.early_stopping.metric", [](TrainSpec& s, const std::string& metric) { s.early_stopping = EarlyStoppingSpec{.metric = metric}; }},
      {"train.best.metric", [](TrainSpec& s, const std::string& metric) { s.best = BestSpec{.metric = metric}; }},
      {"train.schedule.plateau.metric",
       [](TrainSpec& s, const std::string& metric) { s.schedule.kind = PlateauSchedule{.metric = metric}; }}};
  for (const auto& [field, watch] : fields) {
    for (const int ranks : {1, 3}) {
      SCOPED_TRACE(field);
      Training wrong{.ranks = ranks, .checkpoints = scratch / "wrong"};
      wrong.spec.validate_every = 3;
      watch(wrong.spec, "validation/rmsee");
      const TinyDataset dataset(24, 4, 6);
      wrong.Go(dataset);
      for (const auto& error : wrong.errors) {
        EXPECT_EQ(ErrorOf(error).failure, FailureClass::kUser);
        EXPECT_THAT(ErrorOf(error).what(),
                    ::testing::AllOf(HasSubstr(std::string(field) + ": the evaluation has no validation/rmsee; did you mean \"validation/rmse\"?"),
                                     HasSubstr("(it has validation/loss, validation/mse, validation/rmse, validation/samples_seen)")));
      }
      EXPECT_TRUE(dataset.Seen(Split::kTrain).empty());
      EXPECT_TRUE(wrong.sink.points["train/loss"].empty());
      // What is of the test split alone is no metric of validation.
      watch(wrong.spec, "validation/ratio_to_zero");
      wrong.Go(dataset);
      EXPECT_THAT(ErrorOf(wrong.errors[0]).what(), HasSubstr("has no validation/ratio_to_zero"));
      Training right{.ranks = ranks, .checkpoints = scratch / (std::string(field) + std::to_string(ranks))};
      watch(right.spec, "validation/rmse");
      right.GoOrThrow(dataset);
    }
  }
}

TEST(TrainingLoop, LookingForTheNamesChangesNoBit) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  for (const char* strategy : {"", "zero3"}) {
    Training plain{.model = {.dropout = 0.3}, .ranks = *strategy ? 2 : 1, .checkpoints = scratch / (std::string("p") + strategy)};
    if (*strategy) plain.model.dropout = 0;  // ranks are threads here, with one generator
    plain.spec.strategy = strategy;
    Training watching{.spec = plain.spec, .model = plain.model, .ranks = plain.ranks, .checkpoints = scratch / (std::string("w") + strategy)};
    watching.spec.early_stopping = EarlyStoppingSpec{.metric = "validation/rmse", .patience = 100};
    plain.GoOrThrow(dataset);
    watching.GoOrThrow(dataset);
    EXPECT_TRUE(SameBits(plain.parameters[0], watching.parameters[0])) << strategy;
  }
}

TEST(TrainingLoop, AnEvaluationWithoutANumberIsNoImprovementAndNeverTheBest) {
  const Scratch scratch;
  const TinyDataset dataset(24, 6, 6);  // 3 steps an epoch
  Training three{.checkpoints = scratch / "three"};
  three.spec.steps = 3;
  three.GoOrThrow(dataset);
  for (const int ranks : {1, 2}) {
    Training run{.model = {.nan_from = 6}, .ranks = ranks, .checkpoints = scratch / std::to_string(ranks)};
    run.spec.epochs = 20;
    run.spec.best = BestSpec{.maximize = true};
    run.spec.early_stopping = EarlyStoppingSpec{.patience = 2};
    run.GoOrThrow(dataset);
    EXPECT_EQ(run.outcomes[0].steps, 9);  // those of steps 6 and 9 are none
    EXPECT_EQ(run.outcomes[0].metrics.at("train/best_step"), 3);
    EXPECT_LT(LargestDifference(run.parameters[0], three.parameters[0]), 1e-12);
    EXPECT_THAT(run.printed, ::testing::Contains(HasSubstr("step 6: validation/loss is not finite (nan), which counts as no improvement")));
    EXPECT_THAT(run.printed, ::testing::Contains(HasSubstr("stopped early at step 9: validation/loss has not improved in 2 evaluations; the best was")));
  }
  Training never{.model = {.nan_from = 0}, .checkpoints = scratch / "never"}, beside{.model = {.nan_from = 0}, .checkpoints = scratch / "beside"};
  never.spec.epochs = 20;
  never.spec.best = BestSpec{};
  never.spec.early_stopping = EarlyStoppingSpec{.patience = 3};
  beside.spec.best = BestSpec{.export_best = false};
  never.GoOrThrow(dataset);
  beside.GoOrThrow(dataset);
  EXPECT_EQ(never.outcomes[0].steps, 9);
  EXPECT_THAT(never.printed, ::testing::Contains(HasSubstr("stopped early at step 9: validation/loss has not been finite in 3 evaluations")));
  EXPECT_FALSE(never.outcomes[0].metrics.contains("train/best_step"));
  EXPECT_TRUE(beside.outcomes[0].best.empty());
  for (const Training* run : {&never, &beside})
    EXPECT_THAT(run->printed, ::testing::Contains(HasSubstr("validation/loss was finite in no evaluation, so there are no best weights")));
}

TEST(TrainingLoop, WhatIsWatchedMayChangeOnTheWay) {
  const Scratch scratch;
  const TinyDataset dataset(24, 6, 6);
  Training whole{.checkpoints = scratch / "whole"};
  whole.spec.epochs = 6;
  whole.GoOrThrow(dataset);
  // From without to with, to another metric, and to without.
  Training first{.checkpoints = scratch / "c"};
  first.spec.epochs = 6;
  first.spec.steps = 6;
  first.GoOrThrow(dataset);
  Training second{.checkpoints = scratch / "c", .resume = scratch / "c"};
  second.spec.epochs = 6;
  second.spec.steps = 12;
  second.spec.best = BestSpec{.maximize = true};
  second.spec.early_stopping = EarlyStoppingSpec{.patience = 50};
  second.GoOrThrow(dataset);
  EXPECT_EQ(second.outcomes[0].metrics.at("train/best_step"), 9);  // of those that it has seen
  Training third{.checkpoints = scratch / "d", .resume = scratch / "c"};
  third.spec.epochs = 6;
  third.spec.steps = 15;
  third.spec.best = BestSpec{.metric = "validation/mse", .maximize = true};
  third.GoOrThrow(dataset);
  EXPECT_EQ(third.outcomes[0].metrics.at("train/best_step"), 15);  // not 9, which was another metric's
  Training same{.checkpoints = scratch / "s", .resume = scratch / "c"};
  same.spec.epochs = 6;
  same.spec.best = BestSpec{.maximize = true};
  same.GoOrThrow(dataset);
  EXPECT_EQ(same.outcomes[0].metrics.at("train/best_step"), 9);
  Training last{.checkpoints = scratch / "e", .resume = scratch / "d"};
  last.spec.epochs = 6;
  last.GoOrThrow(dataset);
  EXPECT_TRUE(SameBits(whole.parameters[0], last.parameters[0]));
}

TEST(TrainingLoop, MorePatienceLetsAStoppedRunGoOn) {
  const Scratch scratch;
  const TinyDataset dataset(24, 6, 6);
  const auto with = [&](int64_t patience, const std::string& metric, bool resume) {
    Training run{.checkpoints = scratch / (std::to_string(patience) + metric.substr(11)), .resume = resume ? scratch / "1loss" : ""};
    run.spec.epochs = 6;
    run.spec.optimizer = Sgd{.lr = 1e-9};
    run.spec.early_stopping = EarlyStoppingSpec{.metric = metric, .patience = static_cast<int>(patience), .min_delta = 0.01};
    run.GoOrThrow(dataset);
    return run.outcomes[0].steps;
  };
  EXPECT_EQ(with(1, "validation/loss", false), 6);
  EXPECT_EQ(with(1, "validation/loss", true), 6);
  EXPECT_EQ(with(9, "validation/loss", true), 18);
  EXPECT_EQ(with(2, "validation/rmse", true), 15);  // three evaluations of its own
}

TEST(TrainingLoop, TheHashHasWhatChangesTheNumbers) {
  using Json = nlohmann::json;
  const Json job = {{"train", {{"batch", 8}, {"loss", "mse"}, {"schedule", {{"cosine", Json::object()}}}, {"validate_every", 2}}}};
  const auto hash = [](Json changed, const char* key, const Json& value) {
    changed["train"][key] = value;
    return HashSpec(changed);
  };
  const std::string plain = HashSpec(job);
  EXPECT_EQ(hash(job, "best", {{"metric", "validation/rmse"}}), plain);
  EXPECT_EQ(hash(job, "early_stopping", {{"patience", 3}}), plain);
  EXPECT_EQ(hash(job, "validate_every", 3), plain);
  EXPECT_EQ(hash(job, "epochs", 3), plain);
  EXPECT_NE(hash(job, "batch", 9), plain);
  EXPECT_NE(hash(job, "validate_every_steps", 9), plain);  // it averages batch norm's buffers, and the ranks' weights with local_sgd
  Json watching = job;
  watching["train"]["schedule"] = {{"plateau", {{"patience", 2}}}};
  EXPECT_NE(hash(job, "schedule", watching["train"]["schedule"]), plain);
  EXPECT_NE(hash(watching, "schedule", {{"plateau", {{"patience", 3}}}}), HashSpec(watching));
  EXPECT_NE(hash(watching, "validate_every", 3), HashSpec(watching));  // when the rate may fall
  EXPECT_EQ(hash(watching, "best", Json::object()), HashSpec(watching));
  watching["train"].erase("validate_every");
  EXPECT_EQ(hash(watching, "validate_every", 1), HashSpec(watching));  // the default
  EXPECT_EQ(hash(watching, "validate_every", 0), HashSpec(watching));
}

TEST(TrainingLoop, NoStepAtAllIsNoSuccess) {
  const Scratch scratch;
  Training run{.checkpoints = scratch / "c"};
  run.Go(TinyDataset(0, 0, 0));
  EXPECT_THAT(ErrorOf(run.errors[0]).what(), HasSubstr("not one training step was done"));
  // A run that was done when it was gone on from only evaluates.
  const TinyDataset dataset(24, 0, 6);
  Training done{.checkpoints = scratch / "d"};
  done.GoOrThrow(dataset);
  Training again{.checkpoints = scratch / "d", .resume = scratch / "d"};
  again.GoOrThrow(dataset);
  EXPECT_EQ(again.outcomes[0].steps, 9);
  EXPECT_EQ(again.outcomes[0].samples, 0);
}

TEST(TrainingLoop, TheLossScaleChangesNoBitAndSkipsWhatOverflows) {
  try {
    RequirePrecision(Precision::kFloat16);
  } catch (const WorkerError& error) {
    GTEST_SKIP() << error.what();  // LibTorch 1.13 has no fp16 autocast on CPUs
  }
  // float64 is left alone by autocast, so the scale is alone here; it is a power of two.
  const Scratch scratch;
  const TinyDataset dataset(24, 0, 6);
  Training plain{.checkpoints = scratch / "plain"}, scaled{.ranks = 1, .checkpoints = scratch / "scaled"};
  scaled.spec.precision = Precision::kFloat16;
  plain.spec.clip_norm = scaled.spec.clip_norm = 0.01;
  plain.GoOrThrow(dataset);
  scaled.GoOrThrow(dataset);
  EXPECT_TRUE(SameBits(plain.parameters[0], scaled.parameters[0]));
  EXPECT_EQ(scaled.outcomes[0].metrics.at("train/skipped_steps"), 0);

  Training overflowing{.ranks = 2, .checkpoints = scratch / "overflowing"};
  overflowing.spec.precision = Precision::kFloat16;
  overflowing.spec.loss_scale = {.initial = std::ldexp(1.0, 1023), .window = 1000, .hysteresis = 1};
  overflowing.spec.epochs = 200;
  overflowing.GoOrThrow(dataset);
  const double skipped = overflowing.outcomes[0].metrics.at("train/skipped_steps");
  EXPECT_GT(skipped, 400);  // the squares of the gradients must be finite, too
  EXPECT_LT(skipped, 560);
  EXPECT_EQ(overflowing.outcomes[0].steps, 600);
  EXPECT_TRUE(SameBits(overflowing.parameters[0], overflowing.parameters[1]));
  EXPECT_GT(LargestDifference(overflowing.parameters[0], TinyModel().parameters()), 0.01);
}

TEST(TrainingLoop, FrozenParametersStay) {
  const Scratch scratch;
  Training run{.checkpoints = scratch / "c"};
  run.spec.parameter_groups = {{.match = {"first.*"}, .freeze = true}};
  run.GoOrThrow(TinyDataset(24, 0, 6));
  const auto initial = TinyModel().parameters();
  EXPECT_TRUE(run.parameters[0][0].second.equal(initial[0].second));
  EXPECT_FALSE(run.parameters[0][2].second.equal(initial[2].second));
}

// ---- What a GPU's loop does otherwise, on the CPU: figures are tensors that are read when the next step
// is under way, and optimiser and clipping are LibTorch's operators.

TEST(TrainingLoop, AsOnADeviceTheNumbersAreTheSame) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  int n = 0;
  const auto expect_same = [&](const std::string& what, int ranks, const std::function<void(TrainSpec&)>& change) {
    const std::string name = std::to_string(++n);
    Training host{.ranks = ranks, .checkpoints = scratch / ("h" + name)};
    Training device{.ranks = ranks, .checkpoints = scratch / ("d" + name), .as_on_device = true};
    for (Training* run : {&host, &device}) {
      run->spec.strategy = ranks > 1 ? "ddp" : "";
      change(run->spec);
      run->GoOrThrow(dataset);
    }
    EXPECT_LT(LargestDifference(host.parameters[0], device.parameters[0]), 1e-12) << what;
    EXPECT_GT(LargestDifference(host.parameters[0], TinyModel().parameters()), 0.01) << what;
    for (int r = 1; r < ranks; ++r) EXPECT_TRUE(SameBits(device.parameters[0], device.parameters[r])) << what;
    const auto& expected = host.sink.points["train/loss"];
    const auto& points = device.sink.points["train/loss"];
    ASSERT_EQ(points.size(), expected.size()) << what;
    for (size_t i = 0; i < points.size(); ++i) {
      EXPECT_EQ(points[i].first, expected[i].first) << what;
      EXPECT_NEAR(points[i].second, expected[i].second, 1e-12) << what << " step " << points[i].first;
    }
    for (const char* metric : {"train/loss_epoch", "validation/rmse", "test/rmse"})
      EXPECT_NEAR(device.outcomes[0].metrics.at(metric), host.outcomes[0].metrics.at(metric), 1e-12) << what << metric;
  };
  const auto nothing = [](TrainSpec&) {};
  expect_same("single", 1, nothing);
  expect_same("ddp", 3, nothing);  // with 43 samples one of four ranks has none in the last batch
  expect_same("ddp, a rank without samples", 4, nothing);
  expect_same("zero1", 3, [](TrainSpec& s) { s.strategy = "zero1"; });
  expect_same("zero2", 3, [](TrainSpec& s) { s.strategy = "zero2", s.accumulate = 2; });
  expect_same("local_sgd", 3, [](TrainSpec& s) { s.local_sgd.every = 3; });
  expect_same("clip_norm", 3, [](TrainSpec& s) { s.clip_norm = 0.05; });
  expect_same("clip_norm, sharded", 3, [](TrainSpec& s) { s.clip_norm = 0.05, s.strategy = "zero1"; });
  expect_same("clip_value", 2, [](TrainSpec& s) { s.clip_value = 0.001; });
  expect_same("accumulate", 2, [](TrainSpec& s) { s.accumulate = 3; });
  expect_same("validation within epochs", 2, [](TrainSpec& s) { s.validate_every_steps = 2; });
  expect_same("ema", 2, [](TrainSpec& s) { s.ema = 0.9; });
  expect_same("lamb", 2, [](TrainSpec& s) { s.optimizer = Lamb{.lr = 0.05}; });
}

TEST(TrainingLoop, AsOnADeviceALossThatIsNotFiniteIsOfItsStepAndRank) {
  const Scratch scratch;
  TinyDataset dataset(43, 0, 0);
  dataset.broken_sample = 20;
  std::vector<WorkerError> errors;
  for (const bool as_on_device : {false, true}) {
    Training run{.ranks = 3, .checkpoints = scratch / (as_on_device ? "d" : "h"), .as_on_device = as_on_device};
    run.Go(dataset);
    errors.push_back(ErrorOf(run.errors[0]));
    EXPECT_EQ(ErrorOf(run.errors[2]).rank, errors.back().rank);
  }
  EXPECT_THAT(errors[1].what(), HasSubstr("the loss is not finite at step"));
  EXPECT_STREQ(errors[1].what(), errors[0].what());
  EXPECT_EQ(errors[1].step, errors[0].step);
  EXPECT_EQ(errors[1].rank, errors[0].rank);
}

TEST(TrainingLoop, AsOnADeviceAStopIsActedUponAndTheNextAttemptEqualsTheWholeRun) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);
  Training whole{.ranks = 2, .checkpoints = scratch / "whole", .as_on_device = true};
  whole.GoOrThrow(dataset);
  std::ofstream(scratch / "stop") << "";
  Training first{.ranks = 2, .checkpoints = scratch / "c", .stop_file = scratch / "stop", .as_on_device = true};
  first.GoOrThrow(dataset);
  EXPECT_TRUE(first.outcomes[0].saved);
  EXPECT_TRUE(first.outcomes[1].saved);
  EXPECT_LE(first.outcomes[0].steps, 2);  // asked in step 1, known when step 2 is under way
  EXPECT_EQ(first.sink.points["train/loss"].size(), static_cast<size_t>(first.outcomes[0].steps));
  EXPECT_EQ(first.sink.points["perf/samples_per_second"].size(), 1u) << "in the midst of an epoch, too";
  EXPECT_EQ(first.sink.points["perf/step_p50_s"].size(), 1u);
  std::filesystem::remove(scratch / "stop");
  Training second{.ranks = 2, .checkpoints = scratch / "c", .resume = scratch / "c", .as_on_device = true};
  second.GoOrThrow(dataset);
  EXPECT_TRUE(SameBits(second.parameters[0], whole.parameters[0]));
  EXPECT_EQ(second.outcomes[0].metrics.at("train/loss_epoch"), whole.outcomes[0].metrics.at("train/loss_epoch"));
}

TEST(TrainingLoop, RecordedStepsGiveTheSameNumbers) {
  const Scratch scratch;
  const TinyDataset dataset(43, 5, 6);  // an epoch's last batch has another shape
  for (const int ranks : {1, 2}) {
    Training plain{.ranks = ranks, .checkpoints = scratch / ("p" + std::to_string(ranks)), .as_on_device = true};
    Training recorded{.ranks = ranks,
                      .checkpoints = scratch / ("r" + std::to_string(ranks)),
                      .as_on_device = true,
                      .record_steps = true};
    recorded.spec.ddp.overlap = false;
    for (Training* run : {&plain, &recorded}) run->GoOrThrow(dataset);
    EXPECT_LT(LargestDifference(plain.parameters[0], recorded.parameters[0]), 1e-12) << ranks;
    EXPECT_EQ(recorded.recordings[0].recorded, 1);
    EXPECT_GT(recorded.recordings[0].replayed, 8);
    EXPECT_LT(recorded.recordings[0].replayed, 18);  // the warm-up and the odd batches run as they are
    EXPECT_EQ(recorded.sink.points["train/loss"].size(), 18u);
  }
}

}  // namespace
}  // namespace itwin::worker
