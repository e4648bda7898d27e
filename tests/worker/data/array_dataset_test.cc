// Data from files to samples: sources, transforms against closed forms, and the wind example's
// published baselines.
#include <cmath>
#include <cstdlib>
#include <map>
#include <span>

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/data/dataset.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Scratch;
using testing::UserErrorOf;

std::vector<int64_t> All(const Dataset& data, Split split) {
  std::vector<int64_t> indices(static_cast<size_t>(data.size(split)));
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int64_t>(i);
  return indices;
}

Batch Whole(const Dataset& data, Split split) { return data.Gather(split, All(data, split)); }

std::vector<float> Floats(const at::Tensor& tensor) {
  EXPECT_EQ(tensor.scalar_type(), at::kFloat);
  EXPECT_TRUE(tensor.is_contiguous());
  return {tensor.data_ptr<float>(), tensor.data_ptr<float>() + tensor.numel()};
}

std::vector<int64_t> Longs(const at::Tensor& tensor) {
  EXPECT_EQ(tensor.scalar_type(), at::kLong);
  return {tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel()};
}

std::unique_ptr<Dataset> Open(const DataSpec& spec, const Scratch& scratch) {
  return OpenDataset(spec, 1, scratch.path());
}

DataSpec Npy(std::vector<Transform> transforms = {}, SplitSpec split = {}) {
  DataSpec spec;
  spec.source = NpyFiles{"x.npy", "y.npy"};
  spec.transforms = std::move(transforms);
  spec.split = split;
  return spec;
}

class ArrayDatasetTest : public ::testing::Test {
 protected:
  // x: [samples, channels, 4, 4], y: [samples] classes; series: [20, 2].
  void SetUp() override {
    scratch_.Python(R"(
import numpy as np
np.save('x.npy', np.arange(6 * 2 * 4 * 4, dtype='f8').reshape(6, 2, 4, 4))
np.save('y.npy', np.array([0, 1, 2, 0, 1, 2], 'u1'))
np.save('series.npy', np.arange(40, dtype='f4').reshape(20, 2))
np.savez('all.npz', images=np.arange(12, dtype='u1').reshape(3, 4), labels=np.array([1., 2., 3.]), extra=np.arange(3), other=np.arange(7), lone=np.float32(3))
)");
  }
  const Scratch scratch_;
};

TEST_F(ArrayDatasetTest, GathersInTheOrderAskedFor) {
  const auto data = Open(Npy({}, {.test = IndexRange{4, 6}}), scratch_);
  EXPECT_EQ(data->size(Split::kTrain), 4);
  EXPECT_EQ(data->size(Split::kValidation), 0);
  EXPECT_EQ(data->size(Split::kTest), 2);
  EXPECT_EQ(data->classes(), 3);
  EXPECT_THAT(data->sample_shapes().at("input"), ElementsAre(2, 4, 4));
  EXPECT_THAT(data->sample_shapes().at("target"), IsEmpty());
  const Batch batch = data->Gather(Split::kTest, {1, 0, 1});
  EXPECT_THAT(Longs(batch.at("target")), ElementsAre(2, 1, 2));
  EXPECT_EQ(Floats(batch.at("input")).front(), 5 * 32);
  EXPECT_THROW(data->Gather(Split::kTest, {2}), WorkerError);
}

TEST_F(ArrayDatasetTest, NpzArraysKeepTheirNamesBesideInputAndTarget) {
  DataSpec spec;
  spec.source = NpzFile{"all.npz"};
  spec.input = "images";
  spec.target = "labels";
  const auto data = Open(spec, scratch_);
  const Batch batch = Whole(*data, Split::kTrain);
  EXPECT_EQ(batch.size(), 3u);  // "other" and "lone" are not per sample
  EXPECT_THAT(Floats(batch.at("target")), ElementsAre(1, 2, 3));
  EXPECT_THAT(Longs(batch.at("extra")), ElementsAre(0, 1, 2));
  EXPECT_EQ(Floats(batch.at("input"))[11], 11);
  EXPECT_EQ(data->classes(), 0);

  spec.target = "label";
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("did you mean \"labels\""));
  spec.target = "other";
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }),
              AllOf(HasSubstr("[3, 4]"), HasSubstr("[7]")));
}

TEST_F(ArrayDatasetTest, StandardizesPerChannelByTheTrainingSplitAlone) {
  const auto data = Open(Npy({Standardize{}}, {.test = IndexRange{4, 6}}), scratch_);
  const at::Tensor train = Whole(*data, Split::kTrain).at("input");
  for (int64_t channel = 0; channel < 2; ++channel) {
    EXPECT_NEAR(train.select(1, channel).mean().item<double>(), 0, 1e-6);
    EXPECT_NEAR(train.select(1, channel).std(/*unbiased=*/false).item<double>(), 1, 1e-6);
  }
  const nlohmann::json record = data->preprocessing();
  const nlohmann::json& statistics = record["transforms"][0]["standardize"]["input"];
  EXPECT_DOUBLE_EQ(statistics["mean"][0].get<double>(),
                   48 + 7.5);  // samples 0..3, values 32 s + 0..15
  EXPECT_DOUBLE_EQ(statistics["mean"][1].get<double>(), 48 + 16 + 7.5);
  const double deviation = std::sqrt(32 * 32 * 1.25 + (16 * 16 - 1) / 12.0);
  EXPECT_NEAR(statistics["deviation"][0].get<double>(), deviation, 1e-9);
  const at::Tensor test = Whole(*data, Split::kTest).at("input");
  EXPECT_NEAR(test[0][0][0][0].item<double>(), (4 * 32 - 55.5) / deviation, 1e-6);
  EXPECT_EQ(record["arrays"]["input"], (std::vector<int>{2, 4, 4}));
}

TEST_F(ArrayDatasetTest, BytesAreScaledWhenTheyAreRead) {
  DataSpec spec;
  spec.source = NpzFile{"all.npz"};
  spec.input = "images";
  spec.target = "labels";
  spec.transforms = {Scale{{"images"}, 2, 1}, Standardize{{"images"}}, Scale{{"images"}, 10, 5}};
  const at::Tensor input = Whole(*Open(spec, scratch_), Split::kTrain).at("input");
  // Columns 0, 4, 8 and so on: mean in the middle, deviation sqrt(32/3), whatever the first scale.
  const float step = static_cast<float>(10 * 4 / std::sqrt(32.0 / 3));
  EXPECT_NEAR(input[0][0].item<float>(), 5 - step, 1e-5);
  EXPECT_NEAR(input[1][3].item<float>(), 5, 1e-5);
  EXPECT_NEAR(input[2][1].item<float>(), 5 + step, 1e-5);
}

TEST_F(ArrayDatasetTest, ConstantColumnsDoNotBecomeNan) {
  scratch_.Write("c.csv", "a,b,y\n1,5,0\n2,5,1\n3,5,0\n");
  DataSpec spec;
  spec.source = CsvFile{"c.csv", {"a", "b"}, {"y"}, true};
  spec.transforms = {Standardize{}};
  const at::Tensor input = Whole(*Open(spec, scratch_), Split::kTrain).at("input");
  EXPECT_THAT(Floats(input.select(1, 1).contiguous()), ElementsAre(0, 0, 0));
  EXPECT_NEAR(input[2][0].item<float>(), std::sqrt(1.5), 1e-6);
}

TEST_F(ArrayDatasetTest, CropsAndCoarsens) {
  DataSpec spec = Npy({Crop{{4, 2}}, Coarsen{2, {"bilinear", "bicubic"}}});
  spec.source = NpyFiles{"x.npy", ""};
  const auto data = Open(spec, scratch_);
  const Batch batch = Whole(*data, Split::kTrain);
  EXPECT_THAT(batch.at("target").sizes().vec(), ElementsAre(6, 2, 4, 2));
  EXPECT_THAT(batch.at("input").sizes().vec(), ElementsAre(6, 2, 2, 1));
  EXPECT_THAT(Floats(batch.at("input")[0][0].contiguous()),
              ElementsAre(2.5, 10.5));  // of 0 1 4 5 and of 8 9 12 13
  EXPECT_THAT(data->baselines(), ElementsAre("bilinear", "bicubic"));
  const auto predictions = data->BaselinePredictions(batch);
  EXPECT_EQ(predictions.at("bicubic").sizes(), batch.at("target").sizes());
  // Half-way cells of 2.5 and 10.5, edges repeated: 2.5, 4.5, 8.5, 10.5.
  EXPECT_THAT(Floats(predictions.at("bilinear")[0][0].select(1, 0).contiguous()),
              ElementsAre(2.5, 4.5, 8.5, 10.5));
}

TEST_F(ArrayDatasetTest, CutsSeriesIntoWindowsByTheirTargets) {
  DataSpec spec;
  spec.source = NpyFiles{"series.npy", ""};
  spec.transforms = {Window{3, 2}};
  spec.split = {.test = IndexRange{15, 20}};
  const auto data = Open(spec, scratch_);
  // The first target is step 3 - 1 + 2 = 4; training targets are steps 4..14.
  EXPECT_EQ(data->size(Split::kTrain), 11);
  EXPECT_EQ(data->size(Split::kTest), 5);
  EXPECT_THAT(data->sample_shapes().at("input"), ElementsAre(3, 2));
  EXPECT_THAT(data->sample_shapes().at("target"), ElementsAre(2));
  const Batch batch = data->Gather(Split::kTest, {0, 4});
  EXPECT_THAT(Floats(batch.at("target")), ElementsAre(30, 31, 38, 39));
  EXPECT_THAT(Floats(batch.at("input")[0]),
              ElementsAre(22, 23, 24, 25, 26, 27));  // steps 11, 12, 13

  spec.transforms = {Standardize{}, Window{3, 2}};
  const auto standardized = Open(spec, scratch_);
  const at::Tensor mean = Whole(*standardized, Split::kTrain).at("target");
  EXPECT_NEAR(mean[0][0].item<float>(), (8 - 14) / std::sqrt(4 * (15 * 15 - 1) / 12.0),
              1e-5);  // steps 0..14

  spec.transforms = {Window{3, 2}, Standardize{{"input"}}};  // per feature, not per step
  EXPECT_EQ(
      Open(spec, scratch_)->preprocessing()["transforms"][1]["standardize"]["input"]["mean"].size(),
      2u);

  spec.transforms = {Window{19, 2}};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }),
              HasSubstr("does not fit into the 20 steps"));
  spec.transforms = {Window{15, 2}};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("target in the train split"));
}

TEST_F(ArrayDatasetTest, FillsMissingCells) {
  scratch_.Python(R"(
import numpy as np
x = np.arange(2 * 1 * 2 * 2, dtype='f4').reshape(2, 1, 2, 2)
x[0, 0, 0, 1] = np.nan
np.save('nan.npy', x)
x[1] = np.nan
np.save('all_nan.npy', x)
np.save('t.npy', np.zeros(2, 'f4'))
)");
  DataSpec spec;
  spec.source = NpyFiles{"nan.npy", "t.npy"};
  spec.transforms = {FillMissing{}};
  EXPECT_EQ(Whole(*Open(spec, scratch_), Split::kTrain).at("input")[0][0][0][1].item<float>(),
            5.0f / 3);
  spec.transforms = {FillMissing{-7}};
  EXPECT_EQ(Whole(*Open(spec, scratch_), Split::kTrain).at("input")[0][0][0][1].item<float>(), -7);
  spec.source = NpyFiles{"all_nan.npy", "t.npy"};
  EXPECT_TRUE(Whole(*Open(spec, scratch_), Split::kTrain).at("input")[1].eq(-7).all().item<bool>());
  spec.transforms = {FillMissing{}};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }),
              AllOf(HasSubstr("sample 1"), HasSubstr("{value: 0}")));
}

TEST_F(ArrayDatasetTest, MissingCellsAreRefusedWhateverTheSource) {
  scratch_.Python(R"(
import numpy as np
x = np.arange(6 * 2 * 4 * 4, dtype='f4').reshape(6, 2, 4, 4)
x[3, 1, 2, 0] = x[5, 0, 0, 0] = np.nan
np.save('nan.npy', x)
x.tofile('nan.raw')
y = np.arange(6, dtype='f8')
y[4] = np.nan
np.savez('nan.npz', input=np.ones((6, 3), 'f4'), target=y, unused=np.full(6, np.nan))
series = np.arange(40, dtype='f4').reshape(20, 2)
series[17, 1] = np.nan
np.save('gap.npy', series)
)");
  scratch_.Write("nan.csv", "a,b,y\n1,5,0\n2,nan,1\n3,5,0\n");
  const auto error = [&](DataSpec spec) { return UserErrorOf([&] { Open(spec, scratch_); }); };
  DataSpec spec;
  spec.source = NpyFiles{"nan.npy", "y.npy"};
  EXPECT_THAT(error(spec), AllOf(HasSubstr("array \"input\" has 2 missing cells (NaN), the first at [3, 1, 2, 0]"),
                                 HasSubstr("add the transform fill_missing: {} (before standardize)")));
  spec.transforms = {Standardize{}};
  EXPECT_THAT(error(spec), HasSubstr("2 missing cells"));
  spec.split.train = IndexRange{0, 3};
  EXPECT_EQ(error(spec), "") << "no split has those samples";
  spec.split.test = IndexRange{4, 6};
  EXPECT_THAT(error(spec), HasSubstr("1 missing cell (NaN), the first at [5, 0, 0, 0]"));
  spec = {};
  spec.source = RawFiles{{"nan.raw", "float32", {2, 4, 4}}, {"nan.raw", "float32", {2, 4, 4}}};
  EXPECT_THAT(error(spec), HasSubstr("2 missing cells"));
  spec.source = NpzFile{"nan.npz"};
  EXPECT_THAT(error(spec), HasSubstr("array \"target\" has 1 missing cell (NaN), the first at [4]"));
  spec.all_as_test = true;
  EXPECT_EQ(error(spec), "") << "a prediction does not look at its target";
  spec = {};
  spec.source = CsvFile{"nan.csv", {"a", "b"}, {"y"}, true};
  EXPECT_THAT(error(spec), HasSubstr("the first at [1, 1]"));
  spec.source = NpyFiles{"gap.npy", ""};
  spec.transforms = {Window{3, 2}, Standardize{}};
  EXPECT_THAT(error(spec), HasSubstr("1 missing cell (NaN), the first at [17, 1]"))
      << "once, though it is in three windows";
  spec.split.train = IndexRange{0, 17};
  EXPECT_EQ(error(spec), "");
}

TEST_F(ArrayDatasetTest, InfiniteCellsAreRefusedBeforeTheFirstStep) {
  scratch_.Python(R"(
import numpy as np
x = np.arange(6 * 2 * 4 * 4, dtype='f4').reshape(6, 2, 4, 4)
x[2, 0, 0, 1], x[4, 1, 3, 3] = np.inf, -np.inf
np.save('inf.npy', x)
np.save('t.npy', np.array([0, 1, 2, 3, 4, np.inf]))
)");
  DataSpec spec;
  spec.source = NpyFiles{"inf.npy", "y.npy"};
  for (const std::vector<Transform>& chain : std::vector<std::vector<Transform>>{{}, {Standardize{}}, {FillMissing{}, Scale{{}, 2, 1}}}) {
    spec.transforms = chain;
    EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }),
                AllOf(HasSubstr("array \"input\" has 2 infinite cells, the first at [2, 0, 0, 1]"), HasSubstr("clip")));
  }
  spec.transforms = {Clip{.arrays = {}, .min = 0, .max = 50}, Standardize{}};
  EXPECT_EQ(UserErrorOf([&] { Open(spec, scratch_); }), "");
  spec.source = NpyFiles{"x.npy", "t.npy"};
  spec.transforms = {};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("array \"target\" has 1 infinite cell, the first at [5]"));

  // Each rank looks through a part; all say the same.
  scratch_.Python("import numpy as np\nx = np.zeros((20000, 2), 'f4')\nx[100, 1] = x[19000, 0] = np.nan\n"
                  "np.save('long.npy', x)\nnp.save('long_t.npy', np.zeros(20000, 'f4'))");
  spec.source = NpyFiles{"long.npy", "long_t.npy"};
  std::vector<std::vector<std::vector<double>>> parts(3);
  for (int rank = 0; rank < 3; ++rank) {
    UserErrorOf([&] {
      OpenDataset(spec, 1, scratch_.path(), {.rank = rank, .ranks = 3, .ranks_on_node = 3, .sum = [&](std::span<double> v) {
                                               parts[rank].emplace_back(v.begin(), v.end());
                                             }});
    });
  }
  size_t call = 0;
  EXPECT_THAT(UserErrorOf([&] {
                OpenDataset(spec, 1, scratch_.path(), {.rank = 2, .ranks = 3, .ranks_on_node = 3, .sum = [&](std::span<double> v) {
                                                         std::fill(v.begin(), v.end(), 0.0);
                                                         for (const auto& of_rank : parts) {
                                                           for (size_t i = 0; i < v.size(); ++i) v[i] += of_rank[call][i];
                                                         }
                                                         ++call;
                                                       }});
              }),
              HasSubstr("2 missing cells (NaN), the first at [100, 1]"));
}

TEST_F(ArrayDatasetTest, ArraysOfAnArchiveOfAnotherKindMatterOnlyWhereTheyAreUsed) {
  scratch_.Python(R"(
import numpy as np
np.savez('names.npz', input=np.ones((3, 2), 'f4'), target=np.array([1, 0, 70000], 'u4'), names=np.array(['a', 'b', 'c']))
)");
  DataSpec spec;
  spec.source = NpzFile{"names.npz"};
  EXPECT_THAT(Longs(Whole(*Open(spec, scratch_), Split::kTrain).at("target")), ElementsAre(1, 0, 70000));
  spec.target = "names";
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("'<U1' is not supported"));
}

TEST_F(ArrayDatasetTest, NotesThatWindowsAndDrawnSplitsShareSteps) {
  std::vector<std::string> notes;
  DataSpec spec;
  spec.source = NpyFiles{"series.npy", ""};
  spec.transforms = {Window{3, 2}};
  const auto open = [&](int rank) {
    notes.clear();
    return OpenDataset(spec, 1, scratch_.path(),
                       {.rank = rank, .note = [&](const std::string& note) { notes.push_back(note); }});
  };
  spec.split = {.test = IndexRange{15, 20}};
  open(0);
  EXPECT_THAT(notes, IsEmpty());
  spec.split = {.validation_fraction = 0.25};
  const auto drawn = open(0);
  EXPECT_THAT(notes, ElementsAre(AllOf(HasSubstr("train.data.split.validation_fraction"), HasSubstr("train: \"0..15\""))));
  EXPECT_EQ(drawn->size(Split::kTrain) + drawn->size(Split::kValidation), 16) << "no other numbers";
  spec.split = {.test_fraction = 0.25, .by_hash = true};
  open(0);
  EXPECT_THAT(notes, ElementsAre(HasSubstr("train.data.split.test_fraction")));
  open(1);
  EXPECT_THAT(notes, IsEmpty()) << "one rank tells";
  spec.transforms = {};
  spec.source = NpyFiles{"series.npy", "series.npy"};
  open(0);
  EXPECT_THAT(notes, IsEmpty());
}

TEST_F(ArrayDatasetTest, Reshapes) {
  const auto data = Open(Npy({Standardize{}, Reshape{"input", {-1, 8}}}), scratch_);
  EXPECT_THAT(data->sample_shapes().at("input"), ElementsAre(4, 8));
  EXPECT_THAT(UserErrorOf([&] {
                Open(Npy({Reshape{"input", {3, 11}}}), scratch_);
              }),
              AllOf(HasSubstr("[3, 11]"), HasSubstr("[2, 4, 4]")));
  EXPECT_THAT(UserErrorOf([&] {
                Open(Npy({Reshape{"input", {-1, 7}}}), scratch_);
              }),
              HasSubstr("does not hold"));
}

TEST_F(ArrayDatasetTest, NamesTheTransformThatCannotWork) {
  const auto error = [&](std::vector<Transform> transforms) {
    return UserErrorOf([&] { Open(Npy(std::move(transforms)), scratch_); });
  };
  EXPECT_THAT(error({Standardize{{"imput"}}}),
              AllOf(HasSubstr("train.data.transforms[0].standardize.arrays"),
                    HasSubstr("did you mean \"input\"")));
  EXPECT_THAT(error({Standardize{{"target"}}}), HasSubstr("class numbers"));
  EXPECT_THAT(error({Scale{}, Crop{{5, 2}}}),
              AllOf(HasSubstr("transforms[1].crop"), HasSubstr("[5, 2]"), HasSubstr("[2, 4, 4]")));
  EXPECT_THAT(error({Coarsen{3, {}}}),
              AllOf(HasSubstr("factor: 3 does not divide"), HasSubstr("[3, 3]")));
  EXPECT_THAT(error({Coarsen{1, {}}}), HasSubstr("at least 2"));
  EXPECT_THAT(error({Coarsen{2, {"bilinaer"}}}), HasSubstr("did you mean \"bilinear\""));
  EXPECT_THAT(error({Coarsen{2, {"bilinear"}}, Standardize{}}), HasSubstr("put it before coarsen"));
}

TEST_F(ArrayDatasetTest, SyntheticDataComeFromTheSeedAndCanBeLearnt) {
  DataSpec spec;
  spec.source = SyntheticData{500, {3, 4}, {2}, 0};
  const auto a = OpenDataset(spec, 5, {}), b = OpenDataset(spec, 5, {}),
             c = OpenDataset(spec, 6, {});
  const Batch batch = Whole(*a, Split::kTrain);
  EXPECT_TRUE(at::equal(batch.at("input"), Whole(*b, Split::kTrain).at("input")));
  EXPECT_FALSE(at::equal(batch.at("input"), Whole(*c, Split::kTrain).at("input")));
  EXPECT_NEAR(batch.at("input").mean().item<double>(), 0, 0.05);
  EXPECT_NEAR(batch.at("input").std().item<double>(), 1, 0.05);
  // The target is a linear map of the input: least squares leaves nothing.
  const at::Tensor x = batch.at("input").flatten(1).to(at::kDouble),
                   y = batch.at("target").to(at::kDouble);
  const at::Tensor map = at::linalg_solve(x.t().mm(x), x.t().mm(y));
  EXPECT_LT((x.mm(map) - y).abs().max().item<double>(), 1e-4);

  spec.source = SyntheticData{500, {12}, {}, 5};
  const auto classes = OpenDataset(spec, 5, {});
  EXPECT_EQ(classes->classes(), 5);
  EXPECT_EQ(Whole(*classes, Split::kTrain).at("target").dim(), 1);

  spec.source = SyntheticData{int64_t{1} << 50, {12}, {}, 5};
  EXPECT_THAT(UserErrorOf([&] { OpenDataset(spec, 5, {}); }),
              HasSubstr("train.data.synthetic: needs"));
  spec.source = SyntheticData{0, {12}, {}, 5};
  EXPECT_THAT(UserErrorOf([&] { OpenDataset(spec, 5, {}); }), HasSubstr("samples"));
}

TEST_F(ArrayDatasetTest, IdxTestFilesAreTheTestSplit) {
  const auto idx = [](int samples, char value) {
    return std::string({0, 0, 8, 3, 0, 0, 0, static_cast<char>(samples), 0, 0, 0, 2, 0, 0, 0, 2}) +
           std::string(static_cast<size_t>(samples) * 4, value);
  };
  const auto labels = [](const std::string& values) {
    return std::string({0, 0, 8, 1, 0, 0, 0, static_cast<char>(values.size())}) + values;
  };
  scratch_.Write("xi", idx(5, '\x33'));
  scratch_.Write("yi", labels(std::string("\0\1\2\3\4", 5)));
  scratch_.Write("xt", idx(2, '\xff'));
  scratch_.Write("yt", labels(std::string("\7\1", 2)));
  DataSpec spec;
  spec.source = IdxFiles{"xi", "yi", "xt", "yt"};
  spec.split.validation = IndexRange{3, 5};
  const auto data = Open(spec, scratch_);
  EXPECT_EQ(data->size(Split::kTrain), 3);
  EXPECT_EQ(data->size(Split::kValidation), 2);
  EXPECT_EQ(data->size(Split::kTest), 2);
  EXPECT_EQ(data->classes(), 8);
  const Batch test = Whole(*data, Split::kTest);
  EXPECT_THAT(test.at("input").sizes().vec(), ElementsAre(2, 1, 2, 2));
  EXPECT_THAT(Floats(test.at("input")), ::testing::Each(1.0f));
  EXPECT_THAT(Longs(test.at("target")), ElementsAre(7, 1));
  EXPECT_FLOAT_EQ(Floats(Whole(*data, Split::kValidation).at("input"))[0], 0.2f);
  spec.source = IdxFiles{"xi", "yt", "", ""};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }),
              AllOf(HasSubstr("[5, 1, 2, 2]"), HasSubstr("[2]")));
}

TEST_F(ArrayDatasetTest, NetcdfNeedsAnInputAndATarget) {
  scratch_.Python(R"(
import numpy as np
from scipy.io import netcdf_file
with netcdf_file('a.nc', 'w') as f:
    f.createDimension('time', 6)
    f.createDimension('lat', 4)
    for name in 'UV':
        v = f.createVariable(name, 'f4', ('time', 'lat'))
        v[:] = np.arange(24).reshape(6, 4) + (100 if name == 'V' else 0)
        v.missing_value = np.float32(23)
)");
  DataSpec spec;
  spec.source = NetcdfFile{"a.nc"};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("coarsen or window"));
  spec.input = "U";
  spec.target = "V";
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }),
              AllOf(HasSubstr("array \"input\" has 1 missing cell (NaN), the first at [5, 0, 3]"),
                    HasSubstr("fill_missing")));
  spec.transforms = {FillMissing{}};
  const Batch batch = Whole(*Open(spec, scratch_), Split::kTrain);
  EXPECT_EQ(batch.at("input")[5][0][3].item<float>(), 21);  // the mean of 20, 21, 22
  EXPECT_EQ(batch.at("target")[5][0][3].item<float>(), 123);
}

TEST(WindData, BaselinesAreThePublishedOnes) {
  const std::filesystem::path file = "/usr/share/ferret-vis/data/monthly_navy_winds.cdf";
  if (!std::filesystem::exists(file)) GTEST_SKIP() << "Debian's ferret-datasets is not installed";
  DataSpec spec;
  spec.source = NetcdfFile{"site:" + file.string()};
  spec.variables = {"UWND", "VWND"};
  spec.split = {.train = IndexRange{0, 108}, .test = IndexRange{108, 132}};
  spec.transforms = {Crop{{72, 144}}, Standardize{}, Coarsen{4, {"bilinear", "bicubic"}}};
  const auto data = OpenDataset(spec, 0, std::filesystem::temp_directory_path());
  const Batch test = Whole(*data, Split::kTest);
  EXPECT_THAT(test.at("input").sizes().vec(), ElementsAre(24, 2, 18, 36));
  const auto rmse = [&](const char* name) {
    return std::sqrt(
        at::mse_loss(data->BaselinePredictions(test).at(name), test.at("target")).item<double>());
  };
  EXPECT_NEAR(rmse("bilinear"), 0.3419, 5e-5);
  EXPECT_NEAR(rmse("bicubic"), 0.2921, 5e-5);
}

// A field [time 30, channels 2, 4, 6] in NetCDF with a monthly axis, in two files, with some cells
// missing in the second month.
class StreamedData : public ::testing::Test {
 protected:
  void SetUp() override {
    scratch_.Python(R"(
import numpy as np
from scipy.io import netcdf_file
random = np.random.RandomState(3)
values = {v: (5 + 3 * c + random.randn(30, 4, 6)).astype('f4') for c, v in enumerate('UV')}
values['U'][1, 0, :2] = -99
for name, first, last in (('a.nc', 0, 17), ('b.nc', 17, 30)):
    with netcdf_file(name, 'w') as f:
        for dimension, size in (('time', last - first), ('lat', 4), ('lon', 6)):
            f.createDimension(dimension, size)
        t = f.createVariable('time', 'f8', ('time',))
        t[:] = [(30.4375 * i) for i in range(first, last)]
        t.units = 'days since 1982-01-10'
        for v in 'UV':
            x = f.createVariable(v, 'f4', ('time', 'lat', 'lon'))
            x.missing_value = np.float32(-99)
            x[:] = values[v][first:last]
)");
  }
  DataSpec Spec(std::vector<Transform> transforms, const std::string& load) const {
    DataSpec spec;
    spec.source = NetcdfFile{"a.nc"};
    spec.more_files = {"b.nc"};
    spec.variables = {"U", "V"};
    spec.split = {.test = IndexRange{22, 30}};
    spec.transforms = std::move(transforms);
    spec.load = load;
    return spec;
  }
  const Scratch scratch_;
};

TEST_F(StreamedData, EqualsWhatIsReadAtOnce) {
  const std::vector<std::vector<Transform>> chains = {
      {FillMissing{}, Standardize{}, Crop{{4, 4}}, Coarsen{.factor = 2, .baselines = {"bilinear"}}},
      {FillMissing{.value = 1.5}, Clip{.arrays = {}, .min = 0.5, .max = 9}, Log{.arrays = {}, .add = 1},
       Standardize{}, Window{.length = 3, .horizon = 2}, Reshape{"target", {48}}},
      {FillMissing{}, Window{.length = 2, .horizon = 1}, Standardize{}, Scale{{"target"}, 2, 1},
       Crop{{3}}},
  };
  for (const auto& chain : chains) {
    const auto memory = Open(Spec(chain, "memory"), scratch_);
    const auto stream = Open(Spec(chain, "stream"), scratch_);
    EXPECT_EQ(memory->sample_shapes(), stream->sample_shapes());
    EXPECT_EQ(memory->preprocessing(), stream->preprocessing());
    for (const Split split : {Split::kTrain, Split::kTest}) {
      ASSERT_EQ(memory->size(split), stream->size(split));
      const Batch a = Whole(*memory, split), b = Whole(*stream, split);
      for (const auto& [name, values] : a) EXPECT_TRUE(values.equal(b.at(name))) << name;
    }
    const Batch some = stream->Gather(Split::kTrain, {7, 2, 7});
    const Batch whole = Whole(*memory, Split::kTrain);
    EXPECT_TRUE(some.at("input").equal(whole.at("input").index_select(0, at::tensor({7, 2, 7}))));
  }
}

TEST_F(StreamedData, MissingCellsAreFoundWhenTheyAreRead) {
  const std::vector<Transform> chain = {Coarsen{.factor = 2, .baselines = {}}};
  EXPECT_THAT(UserErrorOf([&] { Open(Spec(chain, "memory"), scratch_); }), HasSubstr("fill_missing"));
  const auto stream = Open(Spec(chain, "stream"), scratch_);
  stream->Gather(Split::kTrain, {0, 2});
  EXPECT_THAT(UserErrorOf([&] { stream->Gather(Split::kTrain, {1}); }), HasSubstr("fill_missing"));
}

TEST_F(StreamedData, InfiniteCellsAreFoundWhenTheyAreRead) {
  scratch_.Python(R"(
import numpy as np
from scipy.io import netcdf_file
with netcdf_file('inf.nc', 'w') as f:
    f.createDimension('time', 5)
    f.createDimension('x', 2)
    for name in 'UV':
        f.createVariable(name, 'f4', ('time', 'x'))[:] = np.ones((5, 2))
    f.variables['U'][3, 1] = np.inf
)");
  DataSpec spec;
  spec.source = NetcdfFile{"inf.nc"};
  spec.input = "U";
  spec.target = "V";
  spec.load = "memory";
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("1 infinite cell, the first at [3, 0, 1]"));
  spec.load = "stream";
  const auto stream = Open(spec, scratch_);
  stream->Gather(Split::kTrain, {0, 2});
  EXPECT_THAT(UserErrorOf([&] { stream->Gather(Split::kTrain, {4, 3}); }),
              AllOf(HasSubstr("array \"input\""), HasSubstr("1 infinite cell, the first at [3, 0, 1]")));
  spec.transforms = {Standardize{}};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("1 infinite cell, the first at [3, 0, 1]"))
      << "the statistics have read them all";
}

// A year of months, then half a year left out, then another year.
class GapInTime : public ::testing::Test {
 protected:
  void SetUp() override {
    scratch_.Python(R"(
import numpy as np, zarr
from scipy.io import netcdf_file
months = [i for i in range(30) if i < 12 or i >= 18]
days = [30.4375 * i for i in months]
with netcdf_file('a.nc', 'w') as f:
    f.createDimension('time', 24)
    f.createDimension('x', 2)
    f.createVariable('U', 'f4', ('time', 'x'))[:] = np.arange(48).reshape(24, 2)
    t = f.createVariable('time', 'f8', ('time',))
    t[:] = days
    t.units = 'days since 1982-01-10'
with netcdf_file('bad.nc', 'w') as f:
    f.createDimension('time', 24)
    f.createDimension('x', 2)
    f.createVariable('U', 'f4', ('time', 'x'))[:] = np.arange(48).reshape(24, 2)
    t = f.createVariable('time', 'f8', ('time',))
    t[:] = days
    t.units = 'fortnights since 1982-01-10'
root = zarr.open_group('s.zarr', mode='w', **({'zarr_format': 2} if int(zarr.__version__.split('.')[0]) > 2 else {}))
def put(name, values, dimensions, **attributes):
    array = root.create_dataset(name, shape=values.shape, dtype=values.dtype, chunks=(5,) * values.ndim)
    array[...] = values
    array.attrs.update(_ARRAY_DIMENSIONS=dimensions, **attributes)
put('U', np.arange(48, dtype='f4').reshape(24, 2), ['time', 'x'])
put('time', np.array(days), ['time'], units='days since 1982-01-10')
)");
    nc_.source = NetcdfFile{"a.nc"};
    nc_.split = {.test = IndexRange{20, 24}};
    nc_.transforms = {Window{.length = 2, .horizon = 1}};
    zarr_ = nc_;
    zarr_.source = ZarrStore{.path = "s.zarr", .input = "U"};
  }
  std::unique_ptr<Dataset> OpenAndNote(const DataSpec& spec) {
    notes_.clear();
    return OpenDataset(spec, 1, scratch_.path(), {.note = [this](const std::string& note) { notes_.push_back(note); }});
  }
  const Scratch scratch_;
  DataSpec nc_, zarr_;
  std::vector<std::string> notes_;
};

TEST_F(GapInTime, NoWindowRunsAcrossIt) {
  for (DataSpec spec : {nc_, zarr_}) {
    for (const char* load : {"memory", "stream"}) {
      spec.load = load;
      const auto data = OpenAndNote(spec);
      // Targets 2..19 but for 12 and 13, whose windows begin before the gap.
      EXPECT_EQ(data->size(Split::kTrain), 16);
      EXPECT_EQ(data->size(Split::kTest), 4);
      const at::Tensor input = Whole(*data, Split::kTrain).at("input");
      EXPECT_EQ(input[9].flatten()[0].item<float>(), 18);
      EXPECT_EQ(input[10].flatten()[0].item<float>(), 24) << "step 12, the first behind the gap";
      EXPECT_THAT(notes_, ElementsAre(AllOf(HasSubstr("train.data.transforms[0].window: 2 of 22 windows"),
                                            HasSubstr("between steps 11 and 12"), HasSubstr("left out"))));
    }
  }
  nc_.all_as_test = true;
  EXPECT_EQ(OpenAndNote(nc_)->size(Split::kTest), 20);
  nc_.all_as_test = false;
  nc_.split = {.test = IndexRange{12, 14}};
  EXPECT_THAT(UserErrorOf([&] { OpenAndNote(nc_); }), AllOf(HasSubstr("the test split"), HasSubstr("gap")));
}

TEST_F(GapInTime, IsNoMatterWithoutWindowsAndNotedWhereItCannotBeTold) {
  nc_.transforms = {};
  nc_.input = nc_.target = "U";
  EXPECT_EQ(OpenAndNote(nc_)->size(Split::kTrain), 20);
  EXPECT_THAT(notes_, IsEmpty());
  nc_.source = NetcdfFile{"bad.nc"};
  nc_.input = nc_.target = "";
  nc_.transforms = {Window{.length = 2, .horizon = 1}};
  EXPECT_EQ(OpenAndNote(nc_)->size(Split::kTrain), 18);
  EXPECT_THAT(notes_, ElementsAre(AllOf(HasSubstr("fortnights since"), HasSubstr("not known"))));
}

TEST_F(GapInTime, ZarrStoresAreSplitByTime) {
  zarr_.transforms = {};
  zarr_.source = ZarrStore{.path = "s.zarr", .input = "U", .target = "U", .target_named = true};
  zarr_.split = {};
  zarr_.split.train_time = "1982-01..1983-08";
  zarr_.split.test_time = "1983-09..1984";
  const auto data = OpenAndNote(zarr_);
  EXPECT_EQ(data->size(Split::kTrain), 14);
  EXPECT_EQ(data->size(Split::kTest), 10);
  std::filesystem::remove(scratch_ / "s.zarr/time/.zarray");
  EXPECT_THAT(UserErrorOf([&] { OpenAndNote(zarr_); }),
              AllOf(HasSubstr("train.data.split.train"), HasSubstr("no time axis")));
}

TEST(ZarrData, StreamedOrNotAndAsNumPyGivesTheSameSamples) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np, zarr
x = np.random.default_rng(3).normal(size=(30, 2, 4, 6)).astype('f4')
x[7, 1, 2, 3] = np.nan
y = (np.arange(30) % 4).astype('i2')
root = zarr.open_group('s.zarr', mode='w', **({'zarr_format': 2} if int(zarr.__version__.split('.')[0]) > 2 else {}))
root.create_dataset('model/field', shape=x.shape, dtype=x.dtype, chunks=(4, 1, 3, 6), fill_value=float('nan'))[...] = x
root.create_dataset('label', shape=y.shape, dtype=y.dtype, chunks=(7,))[...] = y
np.save('x.npy', np.nan_to_num(x, nan=-5.0))
np.save('y.npy', y)
)");
  DataSpec spec;
  spec.split = {.test = IndexRange{22, 30}};
  spec.transforms = {FillMissing{.value = -5}, Standardize{}, Crop{{4, 4}}};
  DataSpec plain = spec;
  plain.source = NpyFiles{"x.npy", "y.npy"};
  const auto expected = Open(plain, scratch);
  EXPECT_EQ(expected->classes(), 4);
  spec.source = ZarrStore{.path = "s.zarr", .input = "model/field", .target = "label", .target_named = true};
  for (const std::string load : {"memory", "stream", "auto"}) {
    spec.load = load;
    const auto data = Open(spec, scratch);
    EXPECT_EQ(data->classes(), 4);
    EXPECT_EQ(data->sample_shapes(), expected->sample_shapes());
    for (const Split split : {Split::kTrain, Split::kTest}) {
      const Batch a = Whole(*expected, split), b = Whole(*data, split);
      EXPECT_TRUE(a.at("input").equal(b.at("input"))) << load;
      EXPECT_TRUE(a.at("target").equal(b.at("target"))) << load;
    }
  }
  spec.transforms = {};
  spec.load = "memory";
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch); }), HasSubstr("add the transform fill_missing"));
  spec.source = ZarrStore{.path = "x.npy"};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch); }), HasSubstr("train.data.zarr.path: \"x.npy\" is a file; it must be a directory"));
}

TEST_F(StreamedData, StatisticsHaveTheSameBitsForAnyNumberOfRanks) {
  DataSpec spec;
  spec.source = SyntheticData{.samples = 20000, .input_shape = {5}, .target_shape = {1}};
  spec.transforms = {Scale{{}, 3, 1000}, Standardize{}};
  const nlohmann::json alone = OpenDataset(spec, 1, scratch_.path())->preprocessing();
  for (const int ranks : {2, 3, 8}) {
    std::vector<nlohmann::json> found(static_cast<size_t>(ranks));
    // Each rank's part is recorded in a first round and handed out as the sum in a second.
    std::vector<std::vector<std::vector<double>>> parts(static_cast<size_t>(ranks));
    for (int rank = 0; rank < ranks; ++rank) {
      OpenDataset(spec, 1, scratch_.path(),
                  {.rank = rank, .ranks = ranks, .ranks_on_node = 1, .sum = [&](std::span<double> v) {
                     parts[rank].emplace_back(v.begin(), v.end());
                   }});
    }
    size_t call = 0;
    const auto data = OpenDataset(
        spec, 1, scratch_.path(),
        {.rank = 0, .ranks = ranks, .ranks_on_node = 1, .sum = [&](std::span<double> v) {
           std::fill(v.begin(), v.end(), 0.0);
           for (const auto& of_rank : parts) {
             for (size_t i = 0; i < v.size(); ++i) v[i] += of_rank[call][i];
           }
           ++call;
         }});
    EXPECT_EQ(data->preprocessing(), alone) << ranks << " ranks";
    EXPECT_GT(call, 0u);
  }
}

TEST_F(StreamedData, SplitsByTime) {
  DataSpec spec = Spec({FillMissing{}, Coarsen{.factor = 2, .baselines = {}}}, "memory");
  spec.split = {};
  spec.split.train_time = "1982..1983-06";
  spec.split.test_time = "1984-01..1984-06";
  const auto data = Open(spec, scratch_);
  EXPECT_EQ(data->size(Split::kTrain), 18);
  EXPECT_EQ(data->size(Split::kTest), 6);
  spec.split.test_time = "1983-05..1984";
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("shares sample"));
  DataSpec untimed = Npy();
  untimed.split.train_time = "1982..1983";
  EXPECT_NE(UserErrorOf([&] { Open(untimed, scratch_); }), "");
}

TEST_F(StreamedData, AllSamplesInOrderForAPredictionWithTheTrainingsStatistics) {
  const std::vector<Transform> chain = {FillMissing{}, Standardize{}, Window{.length = 2, .horizon = 1}};
  const auto training = Open(Spec(chain, "memory"), scratch_);
  DataSpec spec = Spec(chain, "memory");
  spec.split = {};  // other statistics, were they this data's own
  spec.all_as_test = true;
  spec.statistics = training->preprocessing();
  const auto data = Open(spec, scratch_);
  EXPECT_EQ(data->size(Split::kTest), 28);
  EXPECT_TRUE(data->Gather(Split::kTest, {0, 1}).at("input").equal(
      training->Gather(Split::kTrain, {0, 1}).at("input")));
  spec.transforms = {FillMissing{}, Window{.length = 2, .horizon = 1}, Standardize{}};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("must be those of the training"));
}

TEST_F(StreamedData, FilesAreCopiedOncePerNode) {
  DataSpec spec = Spec({FillMissing{}, Coarsen{.factor = 2, .baselines = {}}}, "stream");
  spec.cache_on_node = true;
  unsetenv("SLURM_TMPDIR");
  unsetenv("TMPDIR");
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("SLURM_TMPDIR"));
  const auto disk = scratch_ / "disk";
  setenv("SLURM_TMPDIR", disk.c_str(), 1);
  const auto first = Open(spec, scratch_);
  std::map<std::string, std::filesystem::file_time_type> copies;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(disk)) {
    if (entry.path().extension() == ".nc") copies[entry.path()] = entry.last_write_time();
  }
  EXPECT_EQ(copies.size(), 2u);
  const auto second = Open(spec, scratch_);
  for (const auto& [path, time] : copies) EXPECT_EQ(std::filesystem::last_write_time(path), time);
  EXPECT_TRUE(Whole(*first, Split::kTest).at("input").equal(Whole(*second, Split::kTest).at("input")));
  // A source that has changed is another file.
  scratch_.Python("open('b.nc', 'ab').write(b'x' * 4)");
  EXPECT_EQ(Open(spec, scratch_)->size(Split::kTest), 8);
  int64_t files = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(disk)) {
    files += entry.path().extension() == ".nc" ? 1 : 0;
  }
  EXPECT_EQ(files, 3);
  unsetenv("SLURM_TMPDIR");
}

TEST_F(ArrayDatasetTest, SafetensorsAndRawArrays) {
  scratch_.Python(R"(
import json, struct
import numpy as np
x, y = np.arange(12, dtype='f4').reshape(6, 2), np.arange(6, dtype='i8') % 3
header = json.dumps({'input': {'dtype': 'F32', 'shape': [6, 2], 'data_offsets': [0, 48]},
                     'target': {'dtype': 'I64', 'shape': [6], 'data_offsets': [48, 96]}}).encode()
open('a.safetensors', 'wb').write(struct.pack('<Q', len(header)) + header + x.tobytes() + y.tobytes())
x.tofile('x.raw')
y.tofile('y.raw')
)");
  DataSpec tensors;
  tensors.source = SafetensorsFile{"a.safetensors"};
  tensors.more_files = {"a.safetensors"};
  DataSpec raw;
  raw.source = RawFiles{{"x.raw", "float32", {2}}, {"y.raw", "int64", {}}};
  const auto a = Open(tensors, scratch_), b = Open(raw, scratch_);
  EXPECT_EQ(a->size(Split::kTrain), 12);
  EXPECT_EQ(b->size(Split::kTrain), 6);
  EXPECT_EQ(a->classes(), 3);
  EXPECT_TRUE(a->Gather(Split::kTrain, {8, 1}).at("input").equal(
      b->Gather(Split::kTrain, {2, 1}).at("input")));
  EXPECT_THAT(Longs(b->Gather(Split::kTrain, {5, 1}).at("target")), ElementsAre(2, 1));
  scratch_.Write("cut.safetensors", scratch_.Read("a.safetensors").substr(0, 100));
  tensors.source = SafetensorsFile{"cut.safetensors"};
  EXPECT_THAT(UserErrorOf([&] { Open(tensors, scratch_); }), HasSubstr("not a sound safetensors"));
}

TEST_F(ArrayDatasetTest, LogAndClip) {
  DataSpec spec = Npy({Clip{.arrays = {}, .min = std::nullopt, .max = 3}, Log{.arrays = {}, .add = 1}});
  const std::vector<float> values = Floats(Open(spec, scratch_)->Gather(Split::kTrain, {0}).at("input"));
  EXPECT_FLOAT_EQ(values[2], std::log(3.0f));
  EXPECT_FLOAT_EQ(values[9], std::log(4.0f));
  spec.transforms = {Log{}};
  EXPECT_THAT(UserErrorOf([&] { Open(spec, scratch_); }), HasSubstr("is not above 0 and has no logarithm"));
}

}  // namespace
}  // namespace itwin::worker
