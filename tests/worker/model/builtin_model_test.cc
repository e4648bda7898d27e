#include "agent/worker/model/builtin_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/checkpoint/state_dict.h"
#include "agent/worker/model/torchscript_export.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/model/fixed_dataset.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using testing::Descend;
using testing::FixedDataset;
using ::testing::HasSubstr;
using testing::Scratch;
using testing::UserErrorOf;

TrainSpec SpecOf(const std::string& name, const std::string& loss,
                 nlohmann::json options = nlohmann::json::object()) {
  TrainSpec spec;
  spec.model.builtin = name;
  spec.model.options = std::move(options);
  spec.loss = loss;
  spec.seed = 3;
  return spec;
}

// A task for each network, with small options.
struct Task {
  std::string network;
  nlohmann::json options;
  std::vector<int64_t> input, target;
  int64_t classes;
  double rate;
};

std::vector<Task> Tasks() {
  return {
      Task{"mlp", {{"hidden", {16, 16}}}, {3, 4}, {2, 5}, 0, 0.1},
      Task{"mlp", {{"hidden", nlohmann::json::array()}}, {6}, {}, 0, 0.1},
      Task{"mlp", {{"dropout", 0.2}}, {12}, {}, 4, 0.1},
      Task{
          "cnn", {{"channels", {4, 8}}, {"hidden", 16}, {"dropout", 0}}, {1, 12, 12}, {}, 5, 0.1},
      Task{"cnn", {{"channels", {4}}, {"hidden", 16}}, {2, 6, 7}, {3}, 0, 0.05},
      Task{"resnet18", {{"width", 4}}, {3, 16, 16}, {}, 3, 0.02},
      Task{"resnet18",
           {{"width", 4}, {"small_images", false}, {"channels", 2}, {"classes", 3}},
           {2, 64, 64},
           {},
           3,
           0.02},
      Task{"unet", {{"base", 4}, {"depth", 2}}, {2, 8, 12}, {1, 8, 12}, 0, 0.1},
      Task{"transformer", {{"width", 16}, {"heads", 2}, {"dropout", 0.1}}, {6}, {6}, 5, 0.5},
      Task{"transformer", {{"layers", 1}, {"width", 16}, {"tied", false}}, {6}, {}, 5, 0.5},
      Task{"unet", {{"base", 4}, {"depth", 1}}, {2, 8, 6}, {8, 6}, 3, 0.1},
      Task{"lstm", {{"hidden", 8}, {"layers", 2}}, {5, 3}, {2}, 0, 0.3},
      Task{"lstm", {{"hidden", 8}}, {5}, {}, 0, 0.3},
      Task{"lstm", {{"hidden", 8}}, {5, 2, 3}, {2, 3}, 0, 0.3},
      Task{"downscale", {{"hidden", {8, 8}}}, {2, 4, 6}, {2, 16, 24}, 0, 0.2},
      Task{"downscale",
           {{"hidden", {8}}, {"position_channels", 0}, {"conserve", false}, {"factor", 2}},
           {1, 4, 6},
           {1, 8, 12},
           0,
           0.05}};
}

FixedDataset DataFor(const Task& task, int64_t samples = 8) {
  at::manual_seed(11);
  std::vector<int64_t> input = task.input, target = task.target;
  input.insert(input.begin(), samples);
  target.insert(target.begin(), samples);
  const at::Tensor x = task.network == "transformer" ? at::randint(task.classes, input, at::kLong)  // tokens
                                                     : at::randn(input);
  const at::Tensor y =
      task.classes == 0 ? at::randn(target) : at::randint(task.classes, target, at::kLong);
  if (task.classes > 0) y.flatten()[0] = task.classes - 1;
  if (task.network ==
      "downscale") {  // smooth fields: noise below the resolution could not be predicted
    const at::Tensor smooth =
        at::upsample_bilinear2d(x, at::IntArrayRef(target).slice(2), false) * 3;
    return FixedDataset(at::avg_pool2d(smooth, target[2] / input[2]), smooth);
  }
  return FixedDataset(x, y);
}

class BuiltinNetworks : public ::testing::TestWithParam<Task> {
 protected:
  std::string loss() const { return GetParam().classes > 0 ? "cross_entropy" : "mse"; }
};

TEST_P(BuiltinNetworks, Learns) {
  const FixedDataset data = DataFor(GetParam());
  const auto model = MakeModel(SpecOf(GetParam().network, loss(), GetParam().options), data, {});
  const at::Tensor prediction = model->Predict(data.all().at("input"));
  EXPECT_EQ(prediction.size(0), 8);
  EXPECT_FALSE(prediction.requires_grad());
  if (GetParam().classes == 0) {
    EXPECT_EQ(prediction.numel(), data.all().at("target").numel());
  } else {
    EXPECT_EQ(prediction.size(1), GetParam().classes);
  }
  const auto [before, after] = Descend(model.get(), data.all(), 20, GetParam().rate);
  EXPECT_LT(after, before * 0.95) << GetParam().network;
}

TEST_P(BuiltinNetworks, IsTheSameForTheSameSeed) {
  const FixedDataset data = DataFor(GetParam());
  const TrainSpec spec = SpecOf(GetParam().network, loss(), GetParam().options);
  at::manual_seed(99);  // what other code has drawn must not matter
  const auto first = MakeModel(spec, data, {});
  at::manual_seed(1);
  const auto second = MakeModel(spec, data, {});
  TrainSpec other_spec = spec;
  other_spec.seed = 4;
  const auto other = MakeModel(other_spec, data, {});
  const auto a = first->parameters(), b = second->parameters(), c = other->parameters();
  ASSERT_EQ(a.size(), b.size());
  bool differs = false;
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].first, b[i].first);
    EXPECT_TRUE(at::equal(a[i].second, b[i].second)) << a[i].first;
    differs = differs || !at::equal(a[i].second, c[i].second);
  }
  EXPECT_TRUE(differs);
}

TEST_P(BuiltinNetworks, EveryParameterGetsAGradient) {
  const FixedDataset data = DataFor(GetParam());
  const auto model = MakeModel(SpecOf(GetParam().network, loss(), GetParam().options), data, {});
  model->Train(true);
  model->TrainingStep(data.all()).loss.backward();
  for (const auto& [name, parameter] : model->parameters())
    EXPECT_TRUE(parameter.grad().defined()) << name;
}

INSTANTIATE_TEST_SUITE_P(All, BuiltinNetworks, ::testing::ValuesIn(Tasks()), [](const auto& task) {
  return task.param.network + std::to_string(task.index);
});

TEST(BuiltinModel, NamesAreThoseOfAStateDictionary) {
  const FixedDataset data(at::zeros({2, 3, 16, 16}), at::zeros({2}, at::kLong));
  std::vector<std::string> names;
  const auto resnet = MakeModel(SpecOf("resnet18", "cross_entropy", {{"width", 2}}), data, {});
  for (const auto& [name, tensor] : resnet->parameters()) names.push_back(name);
  EXPECT_EQ(names.size(), 62u);  // as torchvision's
  EXPECT_THAT(names, Contains("layer2.0.downsample.0.weight"));
  EXPECT_THAT(names, Contains("fc.bias"));
  names.clear();
  for (const auto& [name, tensor] : resnet->buffers()) names.push_back(name);
  EXPECT_THAT(names, Contains("layer1.0.bn1.running_mean"));
}

TEST(BuiltinModel, DownscaleKeepsTheMeanOfEachCoarseCell) {
  at::manual_seed(0);
  const at::Tensor coarse = at::randn({2, 2, 3, 5});
  const FixedDataset data(coarse, at::zeros({2, 2, 12, 20}));
  const auto model = MakeModel(SpecOf("downscale", "mse"), data, {});
  EXPECT_LT((at::avg_pool2d(model->Predict(coarse), 4) - coarse).abs().max().item<double>(), 1e-5);
  const auto free = MakeModel(SpecOf("downscale", "mse", {{"conserve", false}}), data, {});
  EXPECT_GT((at::avg_pool2d(free->Predict(coarse), 4) - coarse).abs().max().item<double>(), 1e-3);
}

// The first layer is computed in two parts; together they are the convolution of the concatenation.
TEST(BuiltinModel, DownscaleIsTheNetworkThatItsDescriptionSays) {
  at::manual_seed(0);
  const at::Tensor coarse = at::randn({3, 2, 3, 5});
  const FixedDataset data(coarse, at::zeros({3, 2, 12, 20}));
  const auto model = MakeModel(SpecOf("downscale", "mse", {{"conserve", false}}), data, {});
  std::map<std::string, at::Tensor> w;
  for (const auto& [name, tensor] : model->parameters()) w[name] = tensor.detach();
  const at::Tensor smooth = at::upsample_bilinear2d(coarse, {12, 20}, false);
  at::Tensor x = at::cat({smooth, w.at("position").expand({3, 8, 12, 20})}, 1);
  x = at::conv2d(x, w.at("conv1.weight"), w.at("conv1.bias"), 1, 2).relu();
  x = at::conv2d(x, w.at("conv2.weight"), w.at("conv2.bias"), 1, 2).relu();
  x = at::conv2d(x, w.at("conv3.weight"), w.at("conv3.bias"), 1, 1) + smooth;
  EXPECT_LT((model->Predict(coarse) - x).abs().max().item<double>(), 1e-5);
}

TEST(BuiltinModel, DropoutWorksInTrainingOnly) {
  const FixedDataset data(at::ones({4, 50}), at::zeros({4}));
  const auto model = MakeModel(SpecOf("mlp", "mse", {{"dropout", 0.5}}), data, {});
  const auto loss = [&] { return model->TrainingStep(data.all()).loss.item<double>(); };
  EXPECT_NE(loss(), loss());  // MakeModel leaves it in training mode
  model->Train(false);
  EXPECT_EQ(loss(), loss());
}

TEST(BuiltinModel, NllTakesTheScoresOfABuiltInNetwork) {
  const FixedDataset data(at::ones({4, 5}), at::tensor({0, 1, 2, 1}, at::kLong));
  const auto nll = MakeModel(SpecOf("mlp", "nll"), data, {}),
             entropy = MakeModel(SpecOf("mlp", "cross_entropy"), data, {});
  EXPECT_FLOAT_EQ(nll->EvaluationStep(data.all()).loss.item<float>(),
                  entropy->EvaluationStep(data.all()).loss.item<float>());
}

TEST(BuiltinModel, SavesWhatPythonCanLoad) {
  const Scratch scratch;
  const FixedDataset data(at::ones({4, 3, 8, 8}), at::zeros({4}, at::kLong));
  const auto model = MakeModel(SpecOf("resnet18", "cross_entropy", {{"width", 2}}), data, {});
  // As the loop leaves them: views into one large storage.
  at::Tensor flat = at::zeros({1000000});
  int64_t at = 0;
  for (auto& [name, parameter] : model->parameters()) {
    at::Tensor view = flat.narrow(0, at, parameter.numel()).view(parameter.sizes());
    view.copy_(parameter.detach());
    at += parameter.numel();
    parameter.set_data(view);
  }
  model->Save(scratch.path());
  const auto parameters = model->parameters();
  const auto saved = ReadSafetensors(scratch / "weights.safetensors");
  EXPECT_EQ(saved.size(), parameters.size() + model->buffers().size());
  EXPECT_EQ(saved[0].first, parameters[0].first);
  EXPECT_TRUE(at::equal(saved[0].second, parameters[0].second.detach()));
  EXPECT_EQ(ExportTorchScript(*model, data, scratch / "model.pt"), "");
  EXPECT_LT(std::filesystem::file_size(scratch / "model.pt"), 200000u);
  for (const auto& [name, parameter] : parameters)  // still the loop's
    EXPECT_EQ(parameter.storage().nbytes(), flat.storage().nbytes()) << name;
  scratch.Python(R"(
import json, torch
weights = torch.jit.load('model.pt').state_dict()
assert weights['fc.weight'].shape == (1, 16) and weights['bn1.running_var'].eq(1).all()
model = json.load(open('model.json'))
assert model['builtin'] == 'resnet18' and model['options']['width'] == 2 and model['options']['small_images'] is True
assert model['loss'] == 'cross_entropy' and model['input_shape'] == [3, 8, 8]
assert json.load(open('preprocessing.json'))['transforms'] == ['known']
)");
}

// What is recorded from two samples serves any number of them, in Python, without our code.
TEST(BuiltinModel, EveryNetworkIsTorchScriptForPython) {
  const Scratch scratch;
  int count = 0;
  for (const Task& task : Tasks()) {
    const FixedDataset data = DataFor(task);
    const auto model = MakeModel(SpecOf(task.network, task.classes > 0 ? "cross_entropy" : "mse", task.options), data, {});
    Descend(model.get(), data.all(), 2, task.rate);  // running statistics are not what they were
    const std::string number = std::to_string(count++);
    ASSERT_EQ(ExportTorchScript(*model, data, scratch / ("model" + number + ".pt")), "") << task.network;
    const at::Tensor input = data.all().at("input");
    NamedTensors expected = {{"input", input}, {"prediction", model->Predict(input).contiguous()}};
    for (const auto& tensors : {model->parameters(), model->buffers()}) {
      for (const auto& [name, tensor] : tensors) expected.emplace_back("state/" + name, tensor.detach().contiguous());
    }
    WriteStateDict(scratch / ("expected" + number + ".pt"), expected);
  }
  scratch.Write("count", std::to_string(count));
  scratch.Python(R"(
import torch
for number in range(int(open('count').read())):
    expected = torch.load(f'expected{number}.pt')
    model = torch.jit.load(f'model{number}.pt')
    assert not model.training
    state = {'state/' + name: tensor for name, tensor in model.state_dict().items()}
    assert state.keys() == expected.keys() - {'input', 'prediction'}, (number, state.keys() ^ expected.keys())
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), (number, name)
    with torch.no_grad():
        for count in (1, 5, 8):
            torch.testing.assert_close(model(expected['input'][:count]), expected['prediction'][:count], rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())
)");
}

TEST(BuiltinModel, NamesWhatIsWrong) {
  const FixedDataset images(at::zeros({2, 3, 16, 16}), at::zeros({2}, at::kLong));
  const FixedDataset vectors(at::zeros({2, 7}), at::zeros({2, 3}));
  const auto error = [](const std::string& name, const FixedDataset& data,
                        nlohmann::json options = {}) {
    return UserErrorOf([&] {
      MakeModel(SpecOf(name, data.classes() > 0 ? "cross_entropy" : "mse", options), data, {});
    });
  };
  EXPECT_THAT(error("resnet", images),
              AllOf(HasSubstr("did you mean \"resnet18\""), HasSubstr("unet")));
  EXPECT_THAT(error("mlp", images, {{"hiden", {3}}}), HasSubstr("did you mean \"hidden\""));
  EXPECT_THAT(error("cnn", vectors),
              AllOf(HasSubstr("cnn does not fit"), HasSubstr("[7]"), HasSubstr("[3]")));
  EXPECT_THAT(error("resnet18", images, {{"channels", 1}}), HasSubstr("1 input channels"));
  EXPECT_THAT(error("mlp", vectors, {{"classes", 3}}), HasSubstr("floats, not class numbers"));
  EXPECT_THAT(error("unet", images), HasSubstr("same rows and columns"));
  EXPECT_THAT(error("downscale", images), HasSubstr("coarsen"));
  EXPECT_THAT(error("lstm", images, {{"dropout", 0.1}}), HasSubstr("layers"));
  EXPECT_THAT(error("cnn", images, {{"channels", {1, 1, 1, 1, 1}}}), HasSubstr("at least 32 rows"));
  const FixedDataset odd(at::zeros({2, 1, 10, 12}), at::zeros({2, 1, 10, 12}));
  EXPECT_THAT(error("unet", odd), HasSubstr("multiples of 8"));
  const FixedDataset more(at::zeros({2, 7}), at::tensor({0, 9}, at::kLong));
  EXPECT_THAT(error("mlp", more, {{"classes", 5}}),
              AllOf(HasSubstr("5 is too few"), HasSubstr("10 classes")));
  EXPECT_THAT(UserErrorOf([&] { MakeModel(SpecOf("mlp", "cross_entropy"), vectors, {}); }),
              HasSubstr("floats"));
}

}  // namespace
}  // namespace itwin::worker
