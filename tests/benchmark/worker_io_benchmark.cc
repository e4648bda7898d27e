// The trainer's disk side and its profiler: how long a checkpoint holds the training up, with and
// without a background thread; how fast samples come out of files; what measuring costs per step.
#include <cstdlib>
#include <filesystem>
#include <random>

#include <ATen/ops/randn.h>

#include "agent/worker/checkpoint/checkpoint.h"
#include "agent/worker/data/dataset.h"
#include "agent/worker/data/netcdf_writer.h"
#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/profile/profiler.h"
#include "agent/worker/training/compute_threads.h"
#include "tests/benchmark/figures.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;
using itwin::benchmark::Median;
using itwin::benchmark::PrintFigure;

constexpr int kRounds = 5;
constexpr int64_t kStateElements = 48 << 20;  // 192 MiB of weights, twice that of optimiser state

CheckpointParts State(int64_t step) {
  static const at::Tensor weights = at::randn({kStateElements}, at::kFloat);
  CheckpointParts parts;
  parts.position.step = step;
  parts.weights = WholeParts({{"weights", weights}});
  parts.optimizer = WholeParts({{"m/weights", weights}, {"v/weights", weights}});
  return parts;
}

void MeasureCheckpoints(const fs::path& directory) {
  SelfCommunicator self, background;
  std::vector<double> in_front, behind, seconds;
  for (int round = -1; round < kRounds; ++round) {
    for (const bool in_background : {false, true}) {
      CheckpointStore store(directory / "checkpoints", 1, self, in_background ? &background : nullptr);
      store.Save(State(2 * round + (in_background ? 4 : 3)));
      const double stall = store.last_stall_seconds();
      store.Finish();
      if (round < 0) continue;
      (in_background ? behind : in_front).push_back(stall);
      if (in_background) seconds.push_back(store.longest_save_seconds());
    }
  }
  const double megabytes = 3.0 * kStateElements * sizeof(float) / 1e6;
  PrintFigure("checkpoint_stall_background", Median(behind), "s", Median(in_front), kRounds);
  PrintFigure("checkpoint_write", megabytes / Median(seconds), "MB/s", 0, kRounds);
}

void MeasureReading(const fs::path& directory) {
  constexpr int64_t kSamples = 1500, kSide = 128;
  const fs::path file = directory / "field.nc";
  {
    NetcdfWriter writer(file, {kSamples, kSide, kSide});
    const at::Tensor block = at::randn({kSamples, kSide, kSide}, at::kFloat);
    writer.Write(0, kSamples, block.data_ptr<float>());
    writer.Close();
  }
  for (const char* load : {"stream", "memory"}) {
    DataSpec spec;
    spec.source = NetcdfFile{file.string()};
    spec.variables = {"prediction"};
    spec.transforms = {Coarsen{.factor = 4, .baselines = {}}};
    spec.load = load;
    const std::unique_ptr<Dataset> dataset = OpenDataset(spec, 1, directory);
    std::mt19937_64 random(1);
    std::vector<double> rates;
    for (int round = -1; round < kRounds; ++round) {
      const double start = SteadySeconds();
      int64_t taken = 0;
      while (SteadySeconds() - start < 1) {
        std::vector<int64_t> indices(32);
        for (int64_t& index : indices) index = static_cast<int64_t>(random() % kSamples);
        dataset->Gather(Split::kTrain, indices);
        taken += 32;
      }
      if (round < 0) continue;
      rates.push_back(static_cast<double>(taken) * kSide * kSide * sizeof(float) / 1e6 /
                      (SteadySeconds() - start));
    }
    PrintFigure(std::string("netcdf_random_batches_") + load, Median(rates), "MB/s", 0, kRounds);
  }
}

void MeasureProfiler() {
  constexpr int kSteps = 200'000;
  std::vector<double> nanoseconds;
  for (int round = 0; round < kRounds; ++round) {
    Profiler profiler;
    const double start = SteadySeconds();
    for (int step = 0; step < kSteps; ++step) {
      profiler.BeginStep();
      for (const Activity activity : {Activity::kForward, Activity::kBackward, Activity::kForward,
                                      Activity::kOptimizer, Activity::kOther}) {
        profiler.Move(profiler.Enter(activity), Activity::kCommunication, 0);
      }
      profiler.EndStep(32);
    }
    nanoseconds.push_back((SteadySeconds() - start) / kSteps * 1e9);
  }
  // Against one per cent of a step of a tenth of a millisecond, the shortest there is.
  PrintFigure("profiler_per_step", Median(nanoseconds), "ns", 1000, kRounds);
}

int Main() {
  SetComputeThreads(1);
  std::string name = fs::temp_directory_path() / "itwin-io-XXXXXX";
  const fs::path directory = mkdtemp(name.data());
  MeasureProfiler();
  MeasureReading(directory);
  MeasureCheckpoints(directory);
  fs::remove_all(directory);
  return 0;
}

}  // namespace
}  // namespace itwin::worker

int main() { return itwin::worker::Main(); }
