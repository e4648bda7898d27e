// Every strategy on GPUs, which are simulated (tests/testing/simulated_gpu.h), against one process on the
// processor: that nothing reads the device's memory, uses it too early or too late, or waits for ever.
// The numbers of real GPUs and their speed are not shown here.
#include "agent/worker/device/staged_communicator.h"
#include "agent/worker/dist/nccl_communicator.h"
#include "tests/testing/simulated_gpu.h"
#include "tests/worker/dist/forwarding_communicator.h"
#include "tests/worker/training/proof.h"

namespace itwin::worker {
namespace {

using testing::ComputeStream;
using testing::Difference;
using testing::ExpectEqualRuns;
using testing::Families;
using testing::Family;
using testing::ForwardingCommunicator;
using testing::JobOf;
using testing::Json;
using testing::kFloat32Tolerance;
using testing::kStrategies;
using testing::Machine;
using testing::MakeMachine;
using testing::MeshCase;
using testing::MeshFamilies;
using testing::Outcome;
using testing::RunRanks;
using testing::SettingsOf;
using testing::SimulatedGpu;

// A GPU for each rank, whose buffers travel over NCCL, or through the host.
MakeMachine Gpus(bool nccl) {
  return [nccl](int rank, InProcessGroup& ranks) {
    Machine machine;
    machine.device = SimulatedGpu(rank);
    machine.while_it_runs = std::make_shared<ComputeStream>(machine.device);
    auto host = std::make_unique<InProcessCommunicator>(ranks, rank);
    if (nccl) {
      machine.gradients = std::make_unique<NcclCommunicator>(
          std::move(host),
          NcclCommunicator::Options{.device = rank,
                                    .compute_stream = testing::NativeStream(CurrentStream(machine.device))});
    } else {
      machine.gradients = std::make_unique<StagedCommunicator>(std::move(host), machine.device);
    }
    return machine;
  };
}

class GpuProof : public testing::Proof {};

TEST_F(GpuProof, EveryStrategyOnEveryFamilyEqualsOneProcess) {
  for (const Family& family : Families("net.pt")) {
    const Outcome one = Run(JobOf(family, {}), 1);
    ASSERT_EQ(one.error, "") << family.name;
    for (const std::string& strategy : kStrategies) {
      for (const int ranks : {1, 2, 4}) {
        SCOPED_TRACE(family.name + ", " + strategy + ", " + std::to_string(ranks) + " GPUs");
        ExpectEqualRuns(one, Run(JobOf(family, SettingsOf(strategy)), ranks, nullptr, {}, Gpus(/*nccl=*/true)),
                        family.tolerance);
      }
    }
  }
}

TEST_F(GpuProof, EveryMeshEqualsOneProcess) {
  for (const Family& family : MeshFamilies()) {
    for (const double clip : {0.0, 0.1}) {
      const Outcome one = Run(JobOf(family, {{"clip_norm", clip}}), 1);
      for (const MeshCase& c : std::vector<MeshCase>{{1, 2, 1}, {1, 1, 3}, {2, 1, 2}, {1, 2, 2}, {2, 2, 1},
                                                     {1, 1, 2, "gpipe"}}) {
        if (c.pipeline > 1 && family.model["options"].value("tied", false)) continue;
        Json settings = SettingsOf(c);
        settings["clip_norm"] = clip;
        SCOPED_TRACE(family.name + settings.dump());
        ExpectEqualRuns(one,
                        Run(JobOf(family, settings), c.data * c.tensor * c.pipeline, nullptr, {}, Gpus(true)),
                        kFloat32Tolerance);
      }
    }
  }
}

TEST_F(GpuProof, ThroughTheHostItIsTheSame) {
  const Family mlp = MeshFamilies()[0];
  const Outcome one = Run(JobOf(mlp, {}), 1);
  std::vector<Json> all;
  for (const std::string& strategy : kStrategies) all.push_back(SettingsOf(strategy));
  for (const MeshCase& c : {MeshCase{1, 2, 1}, MeshCase{1, 1, 2}}) all.push_back(SettingsOf(c));
  for (const Json& settings : all) {
    SCOPED_TRACE(settings.dump());
    ExpectEqualRuns(one, Run(JobOf(mlp, settings), 2, nullptr, {}, Gpus(/*nccl=*/false)), kFloat32Tolerance);
  }
}

TEST_F(GpuProof, GoesOnFromACheckpointOfProcessorsAndBack) {
  const Family mlp = MeshFamilies()[0];
  const Outcome whole = Run(JobOf(mlp, {}), 1);
  for (const Json& settings : {SettingsOf("zero3"), SettingsOf(MeshCase{1, 2, 1}), SettingsOf("horovod")}) {
    for (const bool gpus_first : {true, false}) {
      SCOPED_TRACE(settings.dump());
      Json begin = settings;
      begin["steps"] = 4;
      const MakeMachine first = gpus_first ? Gpus(true) : nullptr, second = gpus_first ? nullptr : Gpus(true);
      const Outcome half = Run(JobOf(mlp, begin), 2, nullptr, {}, first);
      ASSERT_EQ(half.error, "");
      ExpectEqualRuns(whole, Run(JobOf(mlp, settings), 2, nullptr, half.checkpoints, second), kFloat32Tolerance);
    }
  }
}

TEST_F(GpuProof, ARankThatEndsInTheMidstOfACollectiveIsTheNodesMatter) {
  FailureClass seen = FailureClass::kApp;
  std::string message;
  RunRanks(1, [&](Communicator&, Communicator&) {
    InProcessGroup alone(1);
    const Machine machine = Gpus(true)(0, alone);
    at::Tensor values = at::ones({8}, at::TensorOptions().device(machine.device));
    testing::SetNcclFails(true);
    machine.gradients->AllReduce(BufferOfTensor(values), Reduction::kSum)->Wait();
    values.sum().item<float>();  // the stream has been let go
    testing::SetNcclFails(false);
    try {
      machine.gradients->CheckProgress();
    } catch (const WorkerError& error) {
      seen = error.failure;
      message = error.what();
    }
  });
  EXPECT_EQ(seen, FailureClass::kInfra);
  EXPECT_THAT(message, ::testing::HasSubstr("or a rank has ended"));
}

// ---- The proof itself: who does not wait for NCCL must be seen.

class Impatient : public ForwardingCommunicator {
 public:
  using ForwardingCommunicator::ForwardingCommunicator;
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override {
    return Hurry(buffer, inner_.AllReduce(buffer, reduction));
  }
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override {
    return Hurry(mine, inner_.ReduceScatter(all, mine, reduction));
  }
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override {
    return Hurry(mine, inner_.AllGather(mine, all));
  }

 private:
  struct Nothing : Work {
    void Wait() override {}
  };
  static std::unique_ptr<Work> Hurry(const Buffer& buffer, std::unique_ptr<Work> work) {
    if (!buffer.on_device) return work;
    return std::make_unique<Nothing>();
  }
};

TEST_F(GpuProof, WhoDoesNotWaitIsSeen) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  const Family mlp = Families("net.pt")[0];
  // Other numbers, ranks that differ, or memory that is used when it is gone.
  const auto run = [&](const std::string& strategy) {
    const Outcome one = Run(JobOf(mlp, {}), 1);
    testing::SetNcclTakes(std::chrono::milliseconds(20));
    const Outcome wrong = Run(
        JobOf(mlp, SettingsOf(strategy)), 2,
        [](Communicator& whole) { return std::make_unique<Impatient>(whole); }, {}, Gpus(true));
    if (wrong.error.empty() && Difference(one.parameters, wrong.parameters) < 10 * kFloat32Tolerance) std::_Exit(0);
    std::fprintf(stderr, "not the numbers of one process\n");
    std::abort();
  };
  for (const std::string& strategy : kStrategies) {
    SCOPED_TRACE(strategy);
    EXPECT_DEATH(run(strategy), "not the numbers of one process|not, or no longer, its memory");
  }
}

}  // namespace
}  // namespace itwin::worker
