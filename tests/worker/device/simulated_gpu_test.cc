// That the simulated GPU would catch what it is there for.
#include "tests/testing/simulated_gpu.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "agent/worker/device/streams.h"
#include "tests/testing/simulated_streams.h"

namespace itwin::worker {
namespace {

using testing::ComputeStream;
using testing::NativeStream;
using testing::SimulatedGpu;
using testing::SimulatedMark;
using testing::SimulatedStream;

// Nothing that the stream is given from now on is done before the gate is set.
std::shared_ptr<SimulatedMark> Gate(const c10::Stream& stream) {
  auto gate = std::make_shared<SimulatedMark>();
  static_cast<SimulatedStream*>(NativeStream(stream))->WaitFor(gate);
  return gate;
}

at::TensorOptions OnGpu() { return at::TensorOptions().dtype(at::kFloat).device(SimulatedGpu(0)); }

TEST(SimulatedGpu, ComputesWhatTheProcessorComputes) {
  const ComputeStream compute(SimulatedGpu(0));
  at::manual_seed(1);
  const at::Tensor x = at::randn({5, 7}), w = at::randn({3, 7}), b = at::randn({3});
  const at::Tensor there = at::linear(x.to(SimulatedGpu(0)), w.to(SimulatedGpu(0)), b.to(SimulatedGpu(0)));
  EXPECT_EQ(there.device(), SimulatedGpu(0));
  EXPECT_TRUE(there.cpu().equal(at::linear(x, w, b)));
  const at::Tensor image = at::randn({2, 3, 8, 8}), kernel = at::randn({4, 3, 3, 3});
  EXPECT_TRUE(at::conv2d(image.to(SimulatedGpu(0)), kernel.to(SimulatedGpu(0)), {}, 1, 1)
                  .cpu()
                  .allclose(at::conv2d(image, kernel, {}, 1, 1)));
  at::Tensor in_place = at::ones({4}, OnGpu());
  in_place.narrow(0, 1, 2).mul_(3).add_(at::ones({2}, OnGpu()));
  EXPECT_TRUE(in_place.cpu().equal(at::tensor({1.0f, 4.0f, 4.0f, 1.0f})));
}

TEST(SimulatedGpu, DifferentiatesInAThreadOfTheDevice) {
  const ComputeStream compute(SimulatedGpu(1));
  const at::Tensor x = at::randn({5, 7}), target = at::randn({5, 3});
  torch::nn::Linear here(7, 3), there(7, 3);
  {
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < 2; ++i) there->parameters()[i].copy_(here->parameters()[i]);
  }
  there->to(SimulatedGpu(1));
  std::thread::id backward;
  there->weight.register_hook([&](const at::Tensor&) { backward = std::this_thread::get_id(); });
  at::mse_loss(here(x), target).backward();
  const at::Tensor loss = at::mse_loss(there(x.to(SimulatedGpu(1))), target.to(SimulatedGpu(1)));
  EXPECT_EQ(loss.dim(), 0);
  loss.backward();
  EXPECT_NE(backward, std::this_thread::get_id());
  EXPECT_NE(backward, std::thread::id());
  EXPECT_TRUE(there->weight.grad().cpu().allclose(here->weight.grad()));
}

TEST(SimulatedGpu, OperatorsWaitForTheirOwnStreamOnly) {
  const ComputeStream compute(SimulatedGpu(0));
  const c10::Stream mine = CurrentStream(SimulatedGpu(0)), beside = StreamBeside(SimulatedGpu(0));
  const at::Tensor host = at::full({3}, 5.0f);
  for (const bool waits : {true, false}) {
    at::Tensor there = at::zeros({3}, OnGpu());
    StreamMark(mine).HoldBack(beside);
    const auto gate = Gate(beside);
    {
      const StreamScope scope(beside);
      there.copy_(host, /*non_blocking=*/true);
    }
    if (waits) {
      StreamMark(beside).HoldBack(mine);
      gate->Set();
    }
    const float seen = there.sum().item<float>();
    EXPECT_EQ(seen, waits ? 15 : 0);
    gate->Set();
    StreamMark(beside).Wait();
  }
}

TEST(SimulatedGpuDeathTest, TheHostCannotReadItsMemory) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const ComputeStream compute(SimulatedGpu(0));
  const at::Tensor there = at::ones({3}, OnGpu());
  EXPECT_DEATH(
      {
        volatile float value = *there.data_ptr<float>();
        static_cast<void>(value);
      },
      "");
}

TEST(SimulatedGpuDeathTest, MemoryThatIsGoneIsNoticed) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const ComputeStream compute(SimulatedGpu(0));
  const c10::Stream beside = StreamBeside(SimulatedGpu(0));
  EXPECT_DEATH(
      {
        at::Tensor there = at::ones({3}, OnGpu());
        at::Tensor host = at::zeros({3});
        const auto gate = Gate(beside);
        {
          const StreamScope scope(beside);
          host.copy_(there, /*non_blocking=*/true);
        }
        there.reset();
        StreamMark(CurrentStream(SimulatedGpu(0))).Wait();
        gate->Set();
        StreamMark(beside).Wait();
      },
      "not, or no longer, its memory");
  // Recorded on the stream, it stays until that gets there.
  at::Tensor there = at::ones({3}, OnGpu()), host = at::zeros({3});
  there.record_stream(beside);
  const auto gate = Gate(beside);
  {
    const StreamScope scope(beside);
    host.copy_(there, /*non_blocking=*/true);
  }
  there.reset();
  gate->Set();
  StreamMark(beside).Wait();
  EXPECT_TRUE(host.equal(at::ones({3})));
}

}  // namespace
}  // namespace itwin::worker
