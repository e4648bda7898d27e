// What decides about devices, with the CPU as the only one: the choice, what is refused, and data and
// models as they are moved.
#include "agent/worker/device/device.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/device/device_dataset.h"
#include "agent/worker/device/gpu.h"
#include "agent/worker/device/readback.h"
#include "agent/worker/error.h"
#include "agent/worker/model/builtin_model.h"
#include "tests/worker/model/fixed_dataset.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::FixedDataset;

template <typename F>
WorkerError ErrorOf(F f) {
  try {
    f();
  } catch (const WorkerError& error) {
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return AppError("");
}

Resources With(int gpus, int ranks = 1) { return {.ranks_per_node = ranks, .gpus_per_node = gpus}; }

TEST(ChooseDevice, TakesTheProcessorUnlessTheJobAsksForGpus) {
  const GpuSituation rich{.built = true, .visible = 4, .local_rank = 2, .host = "n1", .libtorch = "2.6.0"};
  EXPECT_EQ(ChooseDevice(With(0, 4), rich), at::Device(at::kCPU));
  EXPECT_EQ(ChooseDevice(With(4, 4), rich), at::Device(at::kCUDA, 2));
  GpuSituation bound = rich;  // the scheduler shows each rank its own GPU alone
  bound.visible = 1;
  EXPECT_EQ(ChooseDevice(With(4, 4), bound), at::Device(at::kCUDA, 0));
}

TEST(ChooseDevice, SaysWhoHasToActWhenThereIsNone) {
  const WorkerError unbuilt =
      ErrorOf([] { ChooseDevice(With(4, 4), {.built = false, .host = "n1", .libtorch = "1.13.1"}); });
  EXPECT_EQ(unbuilt.failure, FailureClass::kUser);
  EXPECT_THAT(unbuilt.what(), AllOf(HasSubstr("resources.gpus_per_node is 4"), HasSubstr("LibTorch 1.13.1 without CUDA")));
  for (const int visible : {0, 2}) {  // two for four ranks, or a dead driver: the node's fault
    const WorkerError missing = ErrorOf(
        [&] { ChooseDevice(With(4, 4), {.built = true, .visible = visible, .local_rank = 3, .host = "n7", .libtorch = ""}); });
    EXPECT_EQ(missing.failure, FailureClass::kInfra);
    EXPECT_EQ(missing.host, "n7");
    EXPECT_THAT(missing.what(), HasSubstr("sees " + std::to_string(visible) + " GPUs, but the job was promised 4"));
  }
  const WorkerError shared =
      ErrorOf([] { ChooseDevice(With(2, 4), {.built = true, .visible = 2, .local_rank = 0, .host = "n1", .libtorch = ""}); });
  EXPECT_EQ(shared.failure, FailureClass::kUser);
  EXPECT_THAT(shared.what(), HasSubstr("resources.ranks_per_node is 4, but gpus_per_node is 2"));
}

TEST(ChooseDevice, TwoRanksWithOneGpuAreFound) {
  RequireOwnGpus({"a", "b", "c"});
  const WorkerError error = ErrorOf([] { RequireOwnGpus({"a", "b", "c", "b"}); });
  EXPECT_EQ(error.failure, FailureClass::kInfra);
  EXPECT_EQ(error.rank, 3);
  EXPECT_THAT(error.what(), HasSubstr("ranks 1 and 3 were given the same GPU"));
}

TEST(ChooseDevice, ABuildWithoutCudaHasNoGpus) {
  const GpuSituation found = FindGpus(0, "here");
  EXPECT_EQ(found.built, gpu::Built());
  if (gpu::Built()) return;
  EXPECT_EQ(found.visible, 0);
  EXPECT_THROW(gpu::MakeGraph(), WorkerError);
}

TEST(CheckGpuSettings, RefusesWhatDoesNotWorkThere) {
  TrainSpec spec;
  spec.gpu.given = true;
  EXPECT_THAT(ErrorOf([&] { CheckGpuSettings(spec, "ddp"); }).what(), HasSubstr("train.gpu is for jobs with GPUs"));
  spec.resources.gpus_per_node = 1;
  for (const char* strategy :
       {"single", "ddp", "local_sgd", "zero1", "zero2", "horovod", "zero3", "tensor", "pipeline", "mesh"}) {
    CheckGpuSettings(spec, strategy);
  }
  spec.gpu.graphs = true;
  CheckGpuSettings(spec, "zero1");
  for (const char* strategy : {"zero2", "zero3", "horovod", "tensor", "pipeline", "mesh"}) {
    EXPECT_THAT(ErrorOf([&] { CheckGpuSettings(spec, strategy); }).what(),
                HasSubstr(std::string("does not go with strategy ") + strategy));
  }
  spec.phases.resize(2);
  EXPECT_THAT(ErrorOf([&] { CheckGpuSettings(spec, "ddp"); }).what(), HasSubstr("does not go with phases"));
  spec = {};
  spec.resources.gpus_per_node = 1;
  spec.optimizer = Lars{};
  CheckGpuSettings(spec, "ddp");
  EXPECT_THAT(ErrorOf([&] { CheckGpuSettings(spec, "zero1"); }).what(), HasSubstr("lamb and lars do not go with"));
}

// Images, and a small network for them.
struct Images {
  FixedDataset dataset{at::rand({12, 3, 8, 8}), at::randint(4, {12}, at::kLong)};
  std::unique_ptr<Model> Make(const std::string& name) const {
    TrainSpec spec;
    spec.model.builtin = name;
    spec.loss = "cross_entropy";
    spec.seed = 3;
    return MakeBuiltinModel(spec, dataset);
  }
};

TEST(DeviceDataset, ChannelsLastChangesTheLayoutAndNoNumber) {
  const Images images;
  const DeviceDataset plain(images.dataset, at::kCPU, false), last(images.dataset, at::kCPU, true);
  const std::vector<int64_t> some = {3, 0, 7, 7};
  const Batch a = plain.Gather(Split::kTrain, some), b = last.Gather(Split::kTrain, some);
  EXPECT_TRUE(a.at("input").is_contiguous());
  EXPECT_FALSE(b.at("input").is_contiguous());
  EXPECT_TRUE(b.at("input").is_contiguous(at::MemoryFormat::ChannelsLast));
  EXPECT_TRUE(a.at("input").equal(b.at("input")));
  EXPECT_TRUE(a.at("target").equal(b.at("target")));
  EXPECT_EQ(last.classes(), 4);
  for (const char* name : {"cnn", "resnet18"}) {
    const auto one = images.Make(name), other = images.Make(name);
    // Without dropout, and with the running statistics: those of four images of one pixel magnify each
    // rounding.
    for (Model* model : {one.get(), other.get()}) model->Train(false);
    const at::Tensor loss = one->TrainingStep(a).loss, same = other->TrainingStep(b).loss;
    EXPECT_NEAR(loss.item<double>(), same.item<double>(), 1e-5) << name;
    loss.backward();
    same.backward();
    const auto p = one->parameters(), q = other->parameters();
    ASSERT_GT(p.size(), 2u);
    for (size_t i = 0; i < p.size(); ++i)
      EXPECT_LT(p[i].second.grad().sub(q[i].second.grad()).abs().max().item<double>(), 1e-4) << name << " " << p[i].first;
  }
}

// LibTorch lets a parameter become a GPU's, which there is none of here, and nothing else.
TEST(Model, MovingToWhereItIsLeavesTheTensorsAlone) {
  const Images images;
  const auto model = images.Make("cnn");
  std::vector<const void*> before;
  for (const auto& [name, tensor] : model->parameters()) before.push_back(tensor.data_ptr());
  model->MoveTo(at::kCPU);
  size_t i = 0;
  for (const auto& [name, tensor] : model->parameters()) EXPECT_EQ(tensor.data_ptr(), before[i++]) << name;
  EXPECT_GT(i, 2u);
}

TEST(Readback, GivesTheFiguresAsTheyWere) {
  Readback readback{at::Device(at::kCPU)};
  EXPECT_FALSE(readback.under_way());
  at::Tensor figures = at::tensor({1.5f, -2.0f, 0.0f});
  readback.Start(figures);
  figures.fill_(9);  // as the next step does
  EXPECT_TRUE(readback.under_way());
  EXPECT_EQ(readback.Take(), (std::vector<double>{1.5, -2, 0}));
  EXPECT_FALSE(readback.under_way());
}

}  // namespace
}  // namespace itwin::worker
