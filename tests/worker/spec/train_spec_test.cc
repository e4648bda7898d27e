#include "agent/worker/spec/train_spec.h"

#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::itwin::worker::testing::Scratch;
using ::itwin::worker::testing::UserErrorOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Json = nlohmann::json;

Json SmallJob() {
  return Json::parse(R"({"name": "n", "train": {"model": {"builtin": "mlp"},
      "data": {"synthetic": {"samples": "10", "input_shape": ["2"]}}}})");
}
// The small job with `text` merged into its train part.
Json WithTrain(const std::string& text) {
  Json job = SmallJob();
  job["train"].merge_patch(Json::parse(text));
  return job;
}
std::string ErrorOf(const Json& job) {
  return UserErrorOf([&] { ParseSpec(job); });
}

TEST(TrainSpec, FillsEveryDefault) {
  const TrainSpec spec = ParseSpec(SmallJob());
  EXPECT_EQ(spec.name, "n");
  EXPECT_EQ(spec.batch, 32);
  EXPECT_EQ(spec.epochs, 1);
  EXPECT_EQ(spec.validate_every, 1);
  EXPECT_EQ(spec.checkpoint.keep, 2);
  EXPECT_TRUE(spec.stop_on_nan);
  EXPECT_TRUE(spec.ddp.overlap);
  EXPECT_EQ(spec.ddp.bucket_mb, 25);
  EXPECT_EQ(spec.ddp.first_bucket_mb, 1);
  EXPECT_EQ(std::get<Adam>(spec.optimizer).lr, 1e-3);
  EXPECT_EQ(spec.resources.ranks_per_node, 1);
}

TEST(TrainSpec, ReadsProtobufJson) {
  const TrainSpec spec = ParseSpec(WithTrain(R"({
      "optimizer": {"adamw": {"lr": 0.01}}, "batch": 12, "steps": "400", "seed": "18446744073709551615",
      "stop_on_nan": false, "ddp": {"overlap": false}, "loss": "mse", "metrics": ["rmse"],
      "checkpoint": {"every_epochs": 3, "keep": 5}, "clip_norm": 1.5})"));
  EXPECT_EQ(std::get<AdamW>(spec.optimizer).lr, 0.01);
  EXPECT_EQ(std::get<AdamW>(spec.optimizer).weight_decay, 1e-2);
  EXPECT_EQ(spec.steps, 400);
  EXPECT_EQ(spec.seed, 18446744073709551615ull);
  EXPECT_FALSE(spec.stop_on_nan);
  EXPECT_FALSE(spec.ddp.overlap);
  EXPECT_THAT(spec.metrics, ElementsAre("rmse"));
  EXPECT_EQ(spec.checkpoint.every_epochs, 3);
  EXPECT_EQ(spec.clip_norm, 1.5);

  Json job = SmallJob();
  job["resources"] = Json::parse(R"({"nodes": 2, "ranks_per_node": 4, "time": "1800s"})");
  EXPECT_EQ(ParseSpec(job).resources.time_seconds, 1800);
}

TEST(TrainSpec, LeavesToTheGatewayWhatIsItsOwn) {
  Json job = SmallJob();
  job.merge_patch(Json::parse(R"({"site": "vega", "image": "a.sif", "env": {"A": "b"}, "labels": {"k": "v"}, "retry": {"app": 1}, "inputs": []})"));
  EXPECT_EQ(ParseSpec(job).name, "n");
}

TEST(TrainSpec, ReadsFeatures) {
  const TrainSpec spec = ParseSpec(WithTrain(R"({
      "optimizer": {"lars": {"trust": 0.01}}, "clip_value": 0.5, "loss": "cross_entropy", "top_k": 3,
      "schedule": {"multi_step": {"milestones": ["3", "7"], "gamma": 0.5}, "unit": "epoch", "warmup_steps": "20"},
      "parameter_groups": [{"match": ["*.bias"], "weight_decay": 0}, {"match": ["encoder"], "freeze": true}],
      "loss_options": {"label_smoothing": 0.1, "class_weights": [1, 0.5]}})"));
  EXPECT_EQ(std::get<Lars>(spec.optimizer).trust, 0.01);
  EXPECT_EQ(spec.clip_value, 0.5);
  EXPECT_EQ(spec.top_k, 3);
  EXPECT_THAT(std::get<MultiStepSchedule>(spec.schedule.kind).milestones, ElementsAre(3, 7));
  EXPECT_TRUE(spec.schedule.epochs);
  EXPECT_EQ(spec.schedule.warmup_steps, 20);
  ASSERT_EQ(spec.parameter_groups.size(), 2u);
  EXPECT_EQ(spec.parameter_groups[0].weight_decay, 0.0);
  EXPECT_FALSE(spec.parameter_groups[0].lr);
  EXPECT_TRUE(spec.parameter_groups[1].freeze);
  EXPECT_THAT(spec.loss_options.class_weights, ElementsAre(1, 0.5));
  EXPECT_FALSE(spec.gpu.given);
  const GpuSpec gpu = ParseSpec(WithTrain(R"({"gpu": {"graphs": true}})")).gpu;
  EXPECT_TRUE(gpu.given && gpu.tf32 && gpu.graphs && !gpu.channels_last);
  EXPECT_FALSE(ParseSpec(WithTrain(R"({"gpu": {"tf32": false}})")).gpu.tf32);
  EXPECT_EQ(std::get<PlateauSchedule>(
                ParseSpec(WithTrain(R"({"schedule": {"plateau": {"direction": "max"}}})"))
                    .schedule.kind)
                .metric,
            "validation/loss");
}

TEST(TrainSpec, ReadsAZarrStore) {
  const TrainSpec spec = ParseSpec(WithTrain(
      R"({"data": {"synthetic": null, "zarr": {"path": "site:/d/s.zarr", "input": "group/t2m"}, "load": "stream"}})"));
  const auto& store = std::get<ZarrStore>(spec.data.source);
  EXPECT_EQ(store.path, "site:/d/s.zarr");
  EXPECT_EQ(store.input, "group/t2m");
  EXPECT_EQ(store.target, "target");
  EXPECT_FALSE(store.target_named);
  EXPECT_THAT(ErrorOf(WithTrain(R"({"data": {"synthetic": null, "zarr": {}}})")), HasSubstr("train.data.zarr.path is missing"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"data": {"synthetic": null, "zarr": {"path": "s"}, "cache": "node"}})")),
              HasSubstr("train.data.cache is for files"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"data": {"synthetic": null, "zarr": {"path": "s"}, "more_files": ["t"]}})")),
              HasSubstr("train.data.more_files belongs to"));
}

TEST(TrainSpec, ResolvesDirectories) {
  const Scratch scratch;
  std::filesystem::create_directory(scratch / "store");
  scratch.Write("file", "x");
  EXPECT_EQ(ResolveDirectory("store", scratch.path(), "f"), scratch / "store");
  EXPECT_EQ(ResolveDirectory("site:" + (scratch / "store").string(), "/", "f"), scratch / "store");
  EXPECT_THAT(UserErrorOf([&] { ResolveDirectory("file", scratch.path(), "f"); }), HasSubstr("is a file; it must be a directory"));
  EXPECT_THAT(UserErrorOf([&] { ResolveDirectory("none", scratch.path(), "f"); }), HasSubstr("there is no directory \"none\""));
  EXPECT_THAT(UserErrorOf([&] { ResolveFile("store", scratch.path(), "f"); }), HasSubstr("is a directory; it must be a file"));
}

TEST(TrainSpec, ReadsLbfgsAndRefusesWhatItCannot) {
  const TrainSpec spec = ParseSpec(WithTrain(R"({"optimizer": {"lbfgs": {"max_iter": 8, "strong_wolfe": true}},
      "parameter_groups": [{"match": ["a"], "freeze": true}]})"));
  EXPECT_EQ(std::get<Lbfgs>(spec.optimizer).max_eval, 10);
  EXPECT_EQ(std::get<Lbfgs>(spec.optimizer).history, 10);
  EXPECT_TRUE(std::get<Lbfgs>(spec.optimizer).strong_wolfe);
  const std::pair<const char*, const char*> refused[] = {
      {R"("strategy": "zero1")", "train.strategy does not go with the optimizer lbfgs, which works with single and ddp"},
      {R"("local_sgd": {"every": 3})", "train.local_sgd does not go with the optimizer lbfgs"},
      {R"("precision": "fp16")", "train.precision does not go with the optimizer lbfgs"},
      {R"("clip_norm": 1)", "train.clip_norm does not go with the optimizer lbfgs"},
      {R"("clip_value": 1)", "train.clip_value does not go with the optimizer lbfgs"},
      {R"("parameter_groups": [{"match": ["a"], "weight_decay": 0}])", "train.parameter_groups does not go with"}};
  for (const auto& [setting, problem] : refused) {
    EXPECT_THAT(ErrorOf(WithTrain(R"({"optimizer": {"lbfgs": {}}, )" + std::string(setting) + "}")), HasSubstr(problem));
  }
  EXPECT_THAT(ErrorOf(WithTrain(R"({"optimizer": {"lbfgs": {"history": 0}}})")),
              HasSubstr("train.optimizer.lbfgs.history is 0; it must be at least 1"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"model": {"builtin": null, "torchscript": "m.pt"}, "phases": [
                  {"name": "g", "match": ["g"], "optimizer": {"lbfgs": {}}}]})")),
              HasSubstr("train.phases[0].optimizer is lbfgs"));
}

TEST(TrainSpec, RefusesFeaturesThatDoNotGoTogether) {
  EXPECT_THAT(ErrorOf(WithTrain(R"({"schedule": {"one_cycle": {}, "warmup_steps": 5}})")),
              HasSubstr("train.schedule.warmup_steps does not go with one_cycle"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"schedule": {"unit": "hour"}})")),
              HasSubstr("train.schedule.unit is \"hour\"; known: step, epoch"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"loss": "mse", "loss_options": {"delta": 2}})")),
              HasSubstr("train.loss_options.delta belongs to the loss huber; this job's is mse"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"gpu": {"graph": true}})")), HasSubstr("train.gpu.graph"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"loss": "quantile"})")),
              HasSubstr("train.loss_options.quantiles is missing"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"parameter_groups": [{"lr": 0.1}]})")),
              HasSubstr("train.parameter_groups[0].match is missing"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"optimizer": {"lars": {"nesterov": true, "momentum": 0}}})")),
              HasSubstr("train.optimizer.lars.nesterov needs a momentum above 0"));
}

TEST(TrainSpec, ReadsStrategySettings) {
  const TrainSpec plain = ParseSpec(SmallJob());
  EXPECT_EQ(plain.accumulate, 1);
  EXPECT_EQ(plain.check_every, 200);
  EXPECT_EQ(plain.zero.bucket_mb, 16);
  const TrainSpec spec = ParseSpec(WithTrain(R"({"strategy": "horovod", "accumulate": 4,
      "check_every": 0, "horovod": {"fusion_mb": 8, "cycle_ms": 2.5, "adasum": true},
      "zero": {"bucket_mb": 2, "overlap": false}, "ddp": {"compression": "bf16"}})"));
  EXPECT_EQ(spec.accumulate, 4);
  EXPECT_EQ(spec.check_every, 0);
  EXPECT_EQ(spec.horovod.fusion_mb, 8);
  EXPECT_EQ(spec.horovod.cycle_ms, 2.5);
  EXPECT_TRUE(spec.horovod.adasum);
  EXPECT_EQ(spec.zero.bucket_mb, 2);
  EXPECT_FALSE(spec.zero.overlap);
  EXPECT_EQ(spec.ddp.compression, "bf16");
  EXPECT_EQ(ParseSpec(WithTrain(R"({"local_sgd": {"every": 8}})")).local_sgd.every, 8);
}

TEST(TrainSpec, ReadsDataAndTransforms) {
  Json job = SmallJob();
  job["train"]["data"] = Json::parse(R"({"netcdf": "winds.cdf", "variables": ["UWND", "VWND"],
      "split": {"train": "0..108", "test": "108..132"},
      "transforms": [{"crop": {"sizes": ["72", "144"]}}, {"fill_missing": {}}, {"standardize": {}},
                     {"coarsen": {"factor": 4, "baselines": ["bilinear", "bicubic"]}}]})");
  const DataSpec data = ParseSpec(job).data;
  EXPECT_EQ(std::get<NetcdfFile>(data.source).path, "winds.cdf");
  EXPECT_EQ(data.split.train->last, 108);
  EXPECT_EQ(data.split.test->first, 108);
  EXPECT_FALSE(data.split.validation);
  ASSERT_EQ(data.transforms.size(), 4u);
  EXPECT_THAT(std::get<Crop>(data.transforms[0]).sizes, ElementsAre(72, 144));
  EXPECT_EQ(std::get<Coarsen>(data.transforms[3]).factor, 4);
}

TEST(TrainSpec, ReadsDataSourcesSplitsByTimePredictionAndProfile) {
  Json job = SmallJob();
  job["train"]["data"] = Json::parse(R"({"hdf5": {"path": "a.h5", "target": "labels"}, "more_files": ["b.h5"],
      "load": "stream", "cache": "node", "split": {"train": "1982-01..1990-12", "test_fraction": 0.1, "by_hash": true},
      "transforms": [{"log": {"arrays": ["input"], "add": 1}}, {"clip": {"max": 3}}]})");
  job["train"]["predict"] = Json::parse(R"({"weights": "w.safetensors", "split": "test", "format": "netcdf"})");
  job["train"]["profile"] = Json::parse(R"({"trace_steps": 7, "hang_timeout": "90s"})");
  const TrainSpec spec = ParseSpec(job);
  const auto& file = std::get<Hdf5File>(spec.data.source);
  EXPECT_EQ(file.input, "input");
  EXPECT_EQ(file.target, "labels");
  EXPECT_TRUE(file.target_named);
  EXPECT_THAT(spec.data.more_files, ElementsAre("b.h5"));
  EXPECT_EQ(spec.data.load, "stream");
  EXPECT_TRUE(spec.data.cache_on_node);
  EXPECT_FALSE(spec.data.split.train);
  EXPECT_EQ(spec.data.split.train_time, "1982-01..1990-12");
  EXPECT_TRUE(spec.data.split.by_hash);
  EXPECT_EQ(std::get<Log>(spec.data.transforms[0]).add, 1);
  EXPECT_EQ(std::get<Clip>(spec.data.transforms[1]).max, 3);
  EXPECT_EQ(spec.predict->format, "netcdf");
  EXPECT_EQ(spec.profile.at_step, 10);
  EXPECT_EQ(spec.profile.hang_timeout_seconds, 90);
  EXPECT_FALSE(ParseSpec(SmallJob()).predict);

  EXPECT_THAT(ErrorOf(WithTrain(R"({"predict": {"split": "some"}})")), HasSubstr("train.predict.split"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"profile": {"hang_timeout": "0s"}})")),
              HasSubstr("train.profile.hang_timeout"));
  job["train"]["data"] = Json::parse(R"({"npz": "a.npz", "load": "stream"})");
  EXPECT_THAT(ErrorOf(job), HasSubstr("train.data.load"));
  job["train"]["data"] = Json::parse(R"({"raw": {"input": {"path": "x", "type": "float32", "shape": ["0"]}}})");
  EXPECT_THAT(ErrorOf(job), HasSubstr("train.data.raw.input.shape"));
  job["train"]["data"] = Json::parse(R"({"npz": "a.npz", "transforms": [{"clip": {"min": 2, "max": 1}}]})");
  EXPECT_THAT(ErrorOf(job), HasSubstr("transforms[0].clip.min"));
}

TEST(TrainSpec, NamesTheBadField) {
  EXPECT_THAT(ErrorOf(WithTrain(R"({"epoch": 3})")), HasSubstr("train.epoch is not a known field"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"optimizer": {"adam": {"lr": "fast"}}})")),
              HasSubstr("train.optimizer.adam.lr is the string \"fast\"; it must be a number"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"optimizer": {"adam": {"lr": 0}}})")),
              HasSubstr("train.optimizer.adam.lr"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"optimizer": {"adam": {}, "sgd": {}}})")), HasSubstr("both"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"batch": -1})")), HasSubstr("train.batch is -1"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"batch": 1.5})")), HasSubstr("an integer"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"strategy": "zero4"})")),
              HasSubstr("known: single, ddp, horovod, zero1, zero2, zero3"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"ddp": {"compression": "fp8"}})")),
              HasSubstr("train.ddp.compression is \"fp8\"; known: none, fp16, bf16"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"strategy": "zero2", "local_sgd": {"every": 4}})")),
              HasSubstr("train.local_sgd belongs to strategy ddp"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"model": null})")), HasSubstr("train.model is missing"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"data": {"split": {"train": "5..2"}}})")),
              HasSubstr("train.data.split.train"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"data": {"split": {"train": "0-5"}}})")), HasSubstr("0..108"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"data": {"transforms": [{"coarsen": {"factor": 1}}]}})")),
              HasSubstr("train.data.transforms[0].coarsen.factor"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"optimizer": {"sgd": {"nesterov": true}}})")),
              HasSubstr("momentum"));
  EXPECT_THAT(ErrorOf(Json::parse(R"({"name": "x"})")), HasSubstr("train is missing"));
  EXPECT_THAT(ErrorOf(Json::parse("[]")), HasSubstr("must be an object"));
  Json job = SmallJob();
  job["resources"] = Json::parse(R"({"time": "1h"})");
  EXPECT_THAT(ErrorOf(job), HasSubstr("resources.time"));
}

// A batch of 2^63 - 1 once trained no step at all, and reported success.
TEST(TrainSpec, KnowsTheLimitsOfBatchAndAccumulate) {
  EXPECT_EQ(ParseSpec(WithTrain(R"({"batch": 2147483647, "accumulate": 1000000})")).accumulate, 1000000);
  EXPECT_THAT(ErrorOf(WithTrain(R"({"batch": "9223372036854775807"})")),
              HasSubstr("train.batch is 9223372036854775807; it must be at most 2147483647"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"batch": 2147483647, "accumulate": 2000000000})")),
              HasSubstr("train.accumulate is 2000000000; it must be at most 1000000"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"batch": 8, "accumulate": 9})")),
              HasSubstr("train.accumulate is 9; it must be at most 8, the samples of the batch"));
  EXPECT_THAT(ErrorOf(WithTrain(R"({"accumulate": 33})")), HasSubstr("at most 32, the samples of the batch"));
}

TEST(ResolveFile, StaysInsideTheWorkingDirectoryAndReadsSiteFilesInPlace) {
  const Scratch work, site;
  work.Write("a.bin", "");
  site.Write("b.bin", "");
  EXPECT_EQ(ResolveFile("a.bin", work.path(), "f"), work / "a.bin");
  EXPECT_EQ(ResolveFile("site:" + (site / "b.bin").string(), work.path(), "f"), site / "b.bin");
  EXPECT_THAT(UserErrorOf([&] { ResolveFile("../a.bin", work.path(), "train.data.npz"); }),
              HasSubstr("train.data.npz"));
  EXPECT_THAT(UserErrorOf([&] { ResolveFile("none", work.path(), "train.data.npz"); }),
              HasSubstr("there is no file \"none\""));
  EXPECT_THAT(UserErrorOf([&] { ResolveFile("site:b", work.path(), "f"); }), HasSubstr("absolute"));
}

}  // namespace
}  // namespace itwin::worker
