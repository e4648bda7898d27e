// Every strategy with every family of models on 1 to 4 ranks (threads): after some steps from one
// seed the parameters are those of one process with the whole batch. And the proof of the proof: a
// communicator that does one thing wrong must make the comparison fail.
#include "tests/worker/training/proof.h"

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/training/horovod.h"
#include "tests/worker/dist/forwarding_communicator.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::Difference;
using testing::ExpectEachSampleOnce;
using testing::ExpectEqualRuns;
using testing::Families;
using testing::Family;
using testing::ForwardingCommunicator;
using testing::JobOf;
using testing::Json;
using testing::kBatch;
using testing::kEpochs;
using testing::kFloat32Tolerance;
using testing::kFloat64Tolerance;
using testing::kLeastMovement;
using testing::kSamples;
using testing::kStrategies;
using testing::Outcome;
using testing::MeshCase;
using testing::MeshFamilies;
using testing::Proof;
using testing::RunRanks;
using testing::Scratch;
using testing::SettingsOf;
using testing::TinyDataset;
using testing::TinyModel;

// An archive with a graph of three layers; sizes go through the number of samples, as an export has them.
void WriteGraphArchive(const std::filesystem::path& path, double handshake_error) {
  const auto wave = [](std::vector<int64_t> shape, double frequency) {
    return testing::Wave(std::move(shape), frequency, at::kFloat).mul(0.4).contiguous();
  };
  const NamedTensors weights = {{"a.weight", wave({16, 6}, 0.7)}, {"a.bias", wave({16}, 0.3)},
                                {"b.weight", wave({16, 16}, 1.1)}, {"b.bias", wave({16}, 0.9)},
                                {"c.weight", wave({2, 16}, 0.5)},  {"c.bias", wave({2}, 0.4)}};
  Json graph = {{"format", 1},
                {"inputs", {{{"value", "x"}, {"name", "input"}}}},
                {"outputs", {{{"value", "y"}, {"name", "prediction"}}}}};
  for (const auto& [name, tensor] : weights) graph["weights"].push_back({{"value", name}, {"name", name}, {"kind", "parameter"}});
  const auto node = [&](const std::string& op, const Json& args, const std::string& out) {
    graph["nodes"].push_back({{"op", op}, {"args", args}, {"out", {out}}});
  };
  const auto value = [](const std::string& name) { return Json{{"v", name}}; };
  const auto linear = [&](const std::string& in, const std::string& layer, const std::string& out) {
    node("aten::linear", {{"input", value(in)}, {"weight", value(layer + ".weight")}, {"bias", value(layer + ".bias")}}, out);
  };
  node("size", {{"self", value("x")}, {"dim", 0}}, "rows");
  linear("x", "a", "h1");
  node("aten::tanh", {{"self", value("h1")}}, "h2");
  node("mul", {{"a", value("rows")}, {"b", 2}}, "twice");
  node("aten::reshape", {{"self", value("h2")}, {"shape", {value("twice"), 8}}}, "h3");  // no sample in a row
  node("aten::reshape", {{"self", value("h3")}, {"shape", {value("rows"), 16}}}, "h4");
  linear("h4", "b", "h5");
  node("aten::tanh", {{"self", value("h5")}}, "h6");
  linear("h6", "c", "y");
  const at::Tensor input = wave({5, 6}, 1.7), target = wave({5, 2}, 2.3);
  std::map<std::string, at::Tensor> w(weights.begin(), weights.end());
  const auto layer = [&](const at::Tensor& x, const std::string& name) { return at::linear(x, w.at(name + ".weight"), w.at(name + ".bias")); };
  const at::Tensor output = layer(layer(layer(input, "a").tanh(), "b").tanh(), "c");
  const double loss = at::mse_loss(output, target).item<double>() + handshake_error;
  const Json manifest = {{"format", 1}, {"handshake", {{"loss", loss}, {"training_loss", loss}}}};
  NamedTensors tensors = {{"sample/input", input}, {"sample/target", target}};
  for (const auto& [name, tensor] : weights) tensors.emplace_back("weights/" + name, tensor);
  WriteSafetensors(path, tensors, {{"itwin.manifest", manifest.dump()}, {"itwin.graph", graph.dump()}});
}

TEST_F(Proof, EveryStrategyOnEveryFamilyEqualsOneProcess) {
  std::vector<Family> families = Families("net.pt");
  WriteGraphArchive(*scratch_ / "net.itw", 0);
  families.push_back(families[0]);
  families.back().name = "exported graph";
  families.back().model = {{"archive", "net.itw"}};
  for (const Family& family : families) {
    const Outcome one = Run(JobOf(family, {}), 1);
    ASSERT_EQ(one.error, "") << family.name;
    ExpectEachSampleOnce(one);
    Json still = JobOf(family, Json{{"steps", 1}});
    still["train"]["optimizer"]["sgd"]["lr"] = 1e-12;
    EXPECT_GT(Difference(one.parameters, Run(still, 1).parameters), kLeastMovement) << family.name;
    for (const std::string& strategy : kStrategies) {
      for (const int ranks : {1, 2, 3, 4}) {
        SCOPED_TRACE(family.name + ", " + strategy + ", " + std::to_string(ranks) + " ranks");
        const Outcome many = Run(JobOf(family, SettingsOf(strategy)), ranks);
        ExpectEqualRuns(one, many, family.tolerance);
        // A rank of zero3 without samples takes part with one that does not count.
        const int stand_ins = strategy == "zero3" && ranks > kSamples % kBatch ? kEpochs * (ranks - kSamples % kBatch) : 0;
        ExpectEachSampleOnce(many, 1, stand_ins);
      }
    }
  }
}

TEST_F(Proof, EveryMeshEqualsOneProcess) {
  const auto [mlp, transformer, tied] = MeshFamilies();
  const std::vector<MeshCase> cases = {{1, 2, 1}, {2, 2, 1}, {1, 1, 2}, {1, 1, 3}, {1, 3, 1}, {1, 4, 1},
                                       {2, 1, 2}, {1, 2, 2}, {1, 1, 4}, {1, 1, 2, "gpipe"},
                                       {2, 1, 2, "gpipe"}};
  for (const Family& family : {mlp, transformer, tied}) {
    for (const double clip : {0.0, 0.1}) {
      const Outcome one = Run(JobOf(family, {{"clip_norm", clip}}), 1);
      for (const MeshCase& c : cases) {
        if (c.pipeline > 1 && family.model["options"].value("tied", false)) continue;
        if (clip > 0 && c.data * c.tensor * c.pipeline < 4) continue;
        SCOPED_TRACE(family.name + SettingsOf(c).dump());
        Json settings = SettingsOf(c);
        settings["clip_norm"] = clip;
        const Outcome many = Run(JobOf(family, settings), c.data * c.tensor * c.pipeline);
        ExpectEqualRuns(one, many, kFloat32Tolerance);
        ExpectEachSampleOnce(many, c.tensor * c.pipeline);
      }
    }
  }
}

TEST_F(Proof, WhatATensorGroupHoldsAlikeIsCompared) {
  const TrainSpec spec = ParseSpec(JobOf(MeshFamilies()[1], SettingsOf(MeshCase{1, 2, 1})));
  const testing::TokenDataset dataset;
  std::mutex one_at_a_time;  // models draw their weights from one generator
  for (const bool differs : {false, true}) {
    std::vector<std::vector<int>> found(2);
    const auto errors = RunRanks(2, [&](Communicator& gradients, Communicator& control) {
      MeshGroups groups(MeshOf(spec, "mesh", 2), gradients, control, control);
      std::unique_ptr<Model> model;
      {
        std::lock_guard lock(one_at_a_time);
        at::manual_seed(1);
        model = MakeMeshModel(spec, dataset, scratch_->path(), groups);
      }
      FlatParameters parameters = LayOut(spec, "mesh", model->parameters(), 2);
      Mesh mesh("mesh", parameters, groups, *model, spec.ddp);
      for (const auto& [name, tensor] : model->parameters()) {
        if (model->parts().contains(name)) continue;
        if (differs && control.rank() == 1) tensor.detach().view({-1})[0] += 1e-3;
        break;
      }
      found[static_cast<size_t>(control.rank())] = mesh.FindDifferingRanks(control);
    });
    for (const auto& error : errors) ASSERT_FALSE(error);
    const std::vector<int> expected = differs ? std::vector<int>{1} : std::vector<int>{};
    EXPECT_EQ(found[0], expected);
    EXPECT_EQ(found[1], expected);
  }
}

TEST_F(Proof, AMeshGoesOnAsAnotherOneAndAsOneProcess) {
  Family mlp = Families("net.pt")[0];
  mlp.model["options"]["hidden"] = {24, 12, 6};
  const Outcome whole = Run(JobOf(mlp, {}), 1);
  const Json pipeline = {{"strategy", "pipeline"}}, tensor = {{"strategy", "tensor"}},
             zero = {{"strategy", "zero2"}, {"zero", {{"bucket_mb", 1e-3}}}};
  for (const auto& [first, second] :
       {std::pair{pipeline, tensor}, {tensor, zero}, {zero, pipeline}}) {
    Json begin = first;
    begin["steps"] = 4;
    const Outcome half = Run(JobOf(mlp, begin), 2);
    ASSERT_EQ(half.error, "");
    for (const int ranks : {1, 2}) {
      ExpectEqualRuns(whole, Run(JobOf(mlp, second), ranks, nullptr, half.checkpoints),
                      kFloat32Tolerance);
    }
  }
}

TEST_F(Proof, AnExportedGraphIsCutIntoStagesAndEqualsOneProcess) {
  WriteGraphArchive(*scratch_ / "net.itw", 0);
  Family family = Families("net.pt")[0];
  family.model = {{"archive", "net.itw"}};
  const Outcome one = Run(JobOf(family, {}), 1);
  ASSERT_EQ(one.error, "");
  Json still = JobOf(family, Json{{"steps", 1}});
  still["train"]["optimizer"]["sgd"]["lr"] = 1e-12;
  EXPECT_GT(Difference(one.parameters, Run(still, 1).parameters), kLeastMovement);
  for (const MeshCase& c : {MeshCase{1, 1, 2}, {1, 1, 3}, {2, 1, 2}, {1, 1, 3, "gpipe"}}) {
    const Json shape = {{"data", c.data}, {"pipeline", c.pipeline}, {"schedule", c.schedule}, {"micro_batches", 3}};
    SCOPED_TRACE(shape.dump());
    ExpectEqualRuns(one, Run(JobOf(family, {{"strategy", "mesh"}, {"mesh", shape}}), c.data * c.pipeline), kFloat32Tolerance);
  }
  // From stages to one process and back.
  const Outcome half = Run(JobOf(family, {{"strategy", "pipeline"}, {"steps", 4}}), 3);
  ASSERT_EQ(half.error, "");
  ExpectEqualRuns(one, Run(JobOf(family, {}), 1, nullptr, half.checkpoints), kFloat32Tolerance);
  ExpectEqualRuns(one, Run(JobOf(family, {{"strategy", "pipeline"}}), 2, nullptr, half.checkpoints), kFloat32Tolerance);
}

TEST_F(Proof, StagesOfAGraphThatCannotBeSaySo) {
  WriteGraphArchive(*scratch_ / "net.itw", 0);
  WriteGraphArchive(*scratch_ / "other.itw", 0.01);
  Family family = Families("net.pt")[0];
  const auto error = [&](const std::string& file, const Json& train, int ranks) {
    family.model = {{"archive", file}};
    return Run(JobOf(family, train), ranks).error;
  };
  EXPECT_THAT(error("net.itw", {{"strategy", "pipeline"}}, 4), HasSubstr("there are places for 3 stages"));
  EXPECT_THAT(error("net.itw", {{"strategy", "tensor"}}, 2), HasSubstr("only built-in models"));
  EXPECT_THAT(error("other.itw", {{"strategy", "pipeline"}}, 2), HasSubstr("does not compute here what it computed"));
}

TEST_F(Proof, AModelThatCannotBeSplitSaysSo) {
  const auto error = [](const Family& family, const Json& mesh, int ranks) {
    return Run(JobOf(family, {{"strategy", "mesh"}, {"mesh", mesh}}), ranks).error;
  };
  const auto families = Families("net.pt");
  EXPECT_THAT(error(families[1], {{"tensor", 2}}, 2), HasSubstr("cannot be split between ranks"));
  EXPECT_THAT(error(families[7], {{"tensor", 2}}, 2), HasSubstr("only built-in models"));
  EXPECT_THAT(error(families[0], {{"tensor", 5}}, 2), HasSubstr("but the job has 2"));
  EXPECT_THAT(error(families[6], {{"pipeline", 2}}, 2), HasSubstr("tied"));
  EXPECT_THAT(error(families[6], {{"tensor", 3}}, 3), HasSubstr("cannot be shared by 3 ranks"));
}

TEST_F(Proof, AccumulationAndClippingEqualOneProcessUnderEveryStrategy) {
  const Family mlp = Families("net.pt")[0];
  const Outcome one = Run(JobOf(mlp, {{"clip_norm", 0.1}}), 1);
  EXPECT_GT(Difference(one.parameters, Run(JobOf(mlp, {}), 1).parameters), kLeastMovement);
  for (const std::string& strategy : kStrategies) {
    SCOPED_TRACE(strategy);
    Json settings = {{"strategy", strategy}, {"clip_norm", 0.1}, {"accumulate", 3}};
    if (strategy.starts_with("zero")) settings["zero"] = {{"bucket_mb", 1e-3}};
    ExpectEqualRuns(one, Run(JobOf(mlp, settings), 3), kFloat32Tolerance);
  }
}

TEST_F(Proof, EveryOptimiserWorksOnShards) {
  const Family mlp = Families("net.pt")[0];
  for (const Json& optimizer :
       {Json{{"adam", {{"lr", 1e-3}, {"eps", 1e-3}}}}, Json{{"rmsprop", {{"lr", 1e-3}, {"eps", 1e-3}}}}}) {
    const Outcome one = Run(JobOf(mlp, {{"optimizer", optimizer}}), 1);
    for (const std::string strategy : {"zero1", "zero2", "zero3"}) {
      SCOPED_TRACE(strategy + optimizer.dump());
      ExpectEqualRuns(one,
                      Run(JobOf(mlp, {{"optimizer", optimizer},
                                      {"strategy", strategy},
                                      {"zero", {{"bucket_mb", 1e-3}}}}),
                          3),
                      kFloat32Tolerance);
    }
  }
}

TEST_F(Proof, CompressedGradientsStayWithinTheStatedError) {
  // One step of gradient descent: the difference is the learning rate times the gradient's error,
  // which compression.h bounds by (1 + ceil(log2 ranks)) u of the sum of the ranks' absolute parts.
  const Family mlp = Families("net.pt")[0];
  Json sgd = {{"optimizer", {{"sgd", {{"lr", 1.0}}}}}, {"steps", 1}};
  const Outcome exact = Run(JobOf(mlp, sgd), 1);
  Json still = sgd;
  still["optimizer"]["sgd"]["lr"] = 1e-12;
  const double largest = Difference(exact.parameters, Run(JobOf(mlp, still), 1).parameters);
  for (const auto& [format, unit] :
       {std::pair{"fp16", std::ldexp(1.0, -11)}, std::pair{"bf16", std::ldexp(1.0, -9)}}) {
    for (const int ranks : {2, 4}) {
      sgd["ddp"] = {{"compression", format}};
      const Outcome rounded = Run(JobOf(mlp, sgd), ranks);
      ASSERT_EQ(rounded.error, "");
      const double error = Difference(exact.parameters, rounded.parameters);
      // The ranks' parts may cancel in the sum; here they are at most a few times as large.
      const double bound = 4 * (1 + std::ceil(std::log2(ranks))) * unit * largest;
      EXPECT_LE(error, bound) << format;
      EXPECT_GT(error, kFloat32Tolerance) << format << " changed nothing: was it used?";
    }
  }
}

TEST_F(Proof, LocalSgdIsTheMeanOfRanksThatTrainAlone) {
  // With one average at the very end: each rank alone on its own samples, then the mean.
  const TinyDataset dataset(12, 0, 0);
  TrainSpec spec;
  spec.batch = 6;
  spec.epochs = 1;
  spec.optimizer = Sgd{.lr = 0.1};
  spec.seed = 4;
  spec.local_sgd.every = 2;
  std::vector<NamedTensors> ends(2);
  Scratch scratch;
  const auto errors = RunRanks(2, [&](Communicator& gradients, Communicator& control) {
    TinyModel model;
    NullMetricSink drop;
    CheckpointStore store(scratch / "c", 1, control);
    StopRequest stop("", std::nullopt);
    TrainingLoop loop({.spec = spec,
                       .dataset = dataset,
                       .model = model,
                       .gradients = gradients,
                       .control = control,
                       .metrics = drop,
                       .checkpoints = store,
                       .stop = stop,
                       .print = [](const std::string&) {},
                       .spec_sha256 = ""});
    loop.Run();
    for (const auto& [name, tensor] : model.parameters())
      ends[static_cast<size_t>(control.rank())].emplace_back(name, tensor.detach().clone());
  });
  for (const auto& error : errors) ASSERT_FALSE(error);
  const EpochOrder order(12, 6, spec.seed, 0);
  NamedTensors mean;
  for (int rank = 0; rank < 2; ++rank) {
    TinyModel model;
    for (int64_t g = 0; g < order.batches(); ++g) {
      const auto mine = order.OfRank(g, rank, 2);
      model.TrainingStep(dataset.Gather(Split::kTrain, {mine.begin(), mine.end()})).loss.backward();
      for (auto& [name, tensor] : model.parameters()) {
        tensor.detach().sub_(tensor.grad(), 0.1);
        tensor.mutable_grad().zero_();
      }
    }
    for (size_t i = 0; i < model.parameters().size(); ++i) {
      const at::Tensor half = model.parameters()[i].second.detach().mul(0.5);
      if (rank == 0) {
        mean.emplace_back(model.parameters()[i].first, half);
      } else {
        mean[i].second += half;
      }
    }
  }
  EXPECT_LE(Difference(mean, ends[0]), kFloat64Tolerance);
  EXPECT_EQ(Difference(ends[0], ends[1]), 0);
}

TEST(Adasum, FollowsTheFormulaPairByPair) {
  // Orthogonal gradients add up, equal ones count once.
  const auto flat = [](const std::vector<double>& values) { return at::tensor(values, at::kDouble); };
  const auto of = [&](std::vector<at::Tensor> parts) {
    Adasum(parts);
    return parts[0];
  };
  EXPECT_TRUE(of({flat({1, 0}), flat({0, 2})}).equal(flat({1, 2})));
  EXPECT_TRUE(of({flat({3, -1}), flat({3, -1})}).equal(flat({3, -1})));
  EXPECT_TRUE(of({flat({0, 0}), flat({3, -1})}).equal(flat({3, -1})));
  // Four ranks: ((0, 1), (2, 3)) by the formula written out.
  const auto pair = [](std::vector<double> x, const std::vector<double>& y) {
    double xx = 0, yy = 0, xy = 0;
    for (size_t i = 0; i < x.size(); ++i) xx += x[i] * x[i], yy += y[i] * y[i], xy += x[i] * y[i];
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = (1 - xy / (2 * xx)) * x[i] + (1 - xy / (2 * yy)) * y[i];
    return x;
  };
  std::vector<std::vector<double>> ranks = {{1, 2, 3}, {-1, 0.5, 2}, {0.1, 4, -2}, {2, 2, 2}};
  const std::vector<double> expected = pair(pair(ranks[0], ranks[1]), pair(ranks[2], ranks[3]));
  const at::Tensor first = of({flat(ranks[0]), flat(ranks[1]), flat(ranks[2]), flat(ranks[3])});
  EXPECT_LE(first.sub(flat(expected)).abs().max().item<double>(), 1e-14);
}

TEST_F(Proof, AdasumTrainsAndItsRanksAgree) {
  const Family mlp = Families("net.pt")[0];
  const Json settings = {{"strategy", "horovod"}, {"horovod", {{"adasum", true}}}};
  const Outcome one = Run(JobOf(mlp, {}), 1), two = Run(JobOf(mlp, settings), 2);
  ASSERT_EQ(two.error, "");
  EXPECT_EQ(two.hashes[0], two.hashes[1]);
  EXPECT_GT(Difference(one.parameters, two.parameters), kFloat32Tolerance);
  // The loss is the mean over all samples, whatever becomes of the gradients: equal in the first step.
  Json one_step = settings;
  one_step["steps"] = 1;
  EXPECT_NEAR(Run(JobOf(mlp, one_step), 2).metrics.at("train/loss_epoch"),
              Run(JobOf(mlp, {{"steps", 1}}), 1).metrics.at("train/loss_epoch"), 1e-6);
}

TEST_F(Proof, ShardedStrategiesHoldTheirPartOnly) {
  const Family base = Families("net.pt")[0];
  Family wide = base;
  wide.model["options"]["hidden"] = {128, 128, 128, 128};
  const Outcome whole = Run(JobOf(wide, {{"optimizer", {{"adam", Json::object()}}}}), 1);
  const auto of = [](const Outcome& o, const std::string& what) {
    return o.metrics.at("perf/memory_" + what);
  };
  const double all = of(whole, "parameters");
  EXPECT_EQ(of(whole, "optimizer"), 2 * all);
  for (const int stage : {1, 2, 3}) {
    for (const int ranks : {2, 4}) {
      SCOPED_TRACE(std::to_string(stage) + " on " + std::to_string(ranks));
      const Outcome part = Run(JobOf(wide, {{"optimizer", {{"adam", Json::object()}}},
                                            {"strategy", "zero" + std::to_string(stage)},
                                            {"zero", {{"bucket_mb", 0.06}}}}),
                               ranks);
      ASSERT_EQ(part.error, "");
      const double share = all / ranks, padding = 0.02 * all;
      const double bucket = 0.07 * (1 << 20) + 128 * 128 * 4;  // when it is closed
      EXPECT_NEAR(of(part, "optimizer"), 2 * share, padding);
      if (stage == 1) {
        EXPECT_NEAR(of(part, "parameters"), all, padding);
        EXPECT_NEAR(of(part, "gradients"), all + share, padding);
      }
      if (stage >= 2) {
        EXPECT_NEAR(of(part, "gradients"), share, padding);
        EXPECT_LE(of(part, "gradients_peak"), share + 2 * bucket);
      }
      if (stage == 3) {
        EXPECT_NEAR(of(part, "parameters"), share, padding);
        EXPECT_LE(of(part, "parameters_peak"), share + 2 * bucket);
      }
    }
  }
}

// ---- The comparison itself

// Spoils what ranks exchange of gradients, parameters and activations, also in groups of them: the same on every
// rank of a group, as a mistake in the code would be.
class Spoilt : public ForwardingCommunicator {
 public:
  enum class How { kSkipOne, kWrongDivisor, kDroppedBucket };
  Spoilt(Communicator& inner, How how) : ForwardingCommunicator(inner), how_(how) {}
  Spoilt(std::unique_ptr<Communicator> inner, How how) : Spoilt(*inner, how) { owned_ = std::move(inner); }

  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override {
    if (!OfTensors(buffer)) return inner_.AllReduce(buffer, reduction);
    const int64_t n = count_++;
    if (how_ == How::kSkipOne && n == 1) return inner_.Barrier();
    return Change(inner_.AllReduce(buffer, reduction), buffer, Dropped(n));
  }
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override {
    const int64_t n = count_++;
    if (how_ == How::kSkipOne && n == 1) return inner_.Barrier();
    return Change(inner_.ReduceScatter(all, mine, reduction), mine, Dropped(n));
  }
  std::unique_ptr<Work> Recv(Buffer buffer, int from) override {
    if (buffer.type != ElementType::kByte) return inner_.Recv(buffer, from);  // says what comes
    const int64_t n = received_++;
    const Buffer activations = {buffer.data, buffer.count / 4, ElementType::kFloat32};
    return Change(inner_.Recv(buffer, from), activations, Dropped(n) || (how_ == How::kSkipOne && n == 1));
  }
  std::unique_ptr<Communicator> Split(int color, int key) override {
    return std::make_unique<Spoilt>(inner_.Split(color, key), how_);
  }

 private:
  class Changed : public Work {
   public:
    Changed(std::unique_ptr<Work> work, at::Tensor values, double factor)
        : work_(std::move(work)), values_(std::move(values)), factor_(factor) {}
    void Wait() override {
      work_->Wait();
      values_.mul_(std::exchange(factor_, 1.0));
    }

   private:
    const std::unique_ptr<Work> work_;
    at::Tensor values_;
    double factor_;
  };

  static std::optional<at::ScalarType> TypeOf(const Buffer& buffer) {
    switch (buffer.type) {
      case ElementType::kFloat16:
        return at::kHalf;
      case ElementType::kBfloat16:
        return at::kBFloat16;
      case ElementType::kFloat32:
        return at::kFloat;
      case ElementType::kFloat64:
        return at::kDouble;
      case ElementType::kByte:
      case ElementType::kInt64:
        return std::nullopt;
    }
    return std::nullopt;
  }
  // What ranks tell each other of a step is a few doubles.
  static bool OfTensors(const Buffer& buffer) {
    return TypeOf(buffer) && (buffer.type != ElementType::kFloat64 || buffer.count > 16);
  }
  bool Dropped(int64_t n) const { return how_ == How::kDroppedBucket && n % 3 == 1; }
  std::unique_ptr<Work> Change(std::unique_ptr<Work> work, const Buffer& buffer, bool lost) const {
    const double factor = lost ? 0 : how_ == How::kWrongDivisor ? 0.5 : 1;
    if (factor == 1 || !TypeOf(buffer)) return work;
    return std::make_unique<Changed>(std::move(work), at::from_blob(buffer.data, {buffer.count}, *TypeOf(buffer)), factor);
  }

  const How how_;
  std::unique_ptr<Communicator> owned_;
  int64_t count_ = 0, received_ = 0;
};

constexpr Spoilt::How kMistakes[] = {Spoilt::How::kSkipOne, Spoilt::How::kWrongDivisor, Spoilt::How::kDroppedBucket};

TEST_F(Proof, AMistakeInTheExchangeTurnsTheComparisonRed) {
  const Family mlp = Families("net.pt")[0];
  const Outcome one = Run(JobOf(mlp, {}), 1);
  const auto expect_red = [](const Outcome& right, const Json& job, int ranks, Spoilt::How how, double tolerance) {
    const Outcome wrong = Run(job, ranks, [how](Communicator& plain) { return std::make_unique<Spoilt>(plain, how); });
    // Red: the numbers are others, or the run itself has noticed that the ranks differ.
    if (wrong.error.empty()) {
      EXPECT_GT(Difference(right.parameters, wrong.parameters), tolerance);
    } else {
      EXPECT_THAT(wrong.error, HasSubstr("are not those of the other ranks"));
    }
  };
  for (const Spoilt::How how : kMistakes) {
    for (const std::string& strategy : kStrategies) {
      SCOPED_TRACE(strategy + ", mistake " + std::to_string(static_cast<int>(how)));
      expect_red(one, JobOf(mlp, SettingsOf(strategy)), 2, how, 10 * kFloat32Tolerance);
    }
    // 16-bit gradients: beyond what rounding explains.
    Json compressed = SettingsOf("ddp");
    compressed["ddp"]["compression"] = "bf16";
    const double rounding = Difference(one.parameters, Run(JobOf(mlp, compressed), 2).parameters);
    EXPECT_GT(rounding, 0);
    expect_red(one, JobOf(mlp, compressed), 2, how, 3 * rounding);
    // Local SGD averages parameters now and then.
    const Json local = {{"local_sgd", {{"every", 2}}}};
    const Outcome averaged = Run(JobOf(mlp, local), 2);
    ExpectEachSampleOnce(averaged);
    expect_red(averaged, JobOf(mlp, local), 2, how, 10 * kFloat32Tolerance);
    // A mesh exchanges gradients among replicas, sums within layers, activations between stages.
    for (const Family& family : {MeshFamilies()[0], MeshFamilies()[1]}) {
      const Outcome whole = Run(JobOf(family, {}), 1);
      for (const MeshCase& c : {MeshCase{2, 1, 1}, {1, 2, 1}, {1, 1, 2}, {2, 2, 1}}) {
        SCOPED_TRACE(family.name + " on a mesh " + std::to_string(c.data) + "x" + std::to_string(c.tensor) + "x" +
                     std::to_string(c.pipeline) + ", mistake " + std::to_string(static_cast<int>(how)));
        expect_red(whole, JobOf(family, SettingsOf(c)), c.data * c.tensor * c.pipeline, how, 10 * kFloat32Tolerance);
      }
    }
  }
}

}  // namespace
}  // namespace itwin::worker
