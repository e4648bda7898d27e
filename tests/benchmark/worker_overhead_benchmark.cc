// What the worker's training loop costs beside a bare LibTorch loop with the same network, data,
// optimiser and threads, in one process and turn by turn; and what a second rank brings. One thread
// per rank throughout.
#include <fcntl.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include <torch/torch.h>
#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/checkpoint.h"
#include "agent/worker/data/dataset.h"
#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/model/model.h"
#include "agent/worker/report/metric_sink.h"
#include "agent/worker/spec/train_spec.h"
#include "agent/worker/training/compute_threads.h"
#include "agent/worker/training/training_loop.h"
#include "tests/benchmark/figures.h"
#include "tests/testing/program.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kRounds = 9;
constexpr int kRankRounds = 5;

struct Case {
  std::string name;
  Json job;
  std::function<torch::nn::Sequential()> bare;
};

Json Job(const Json& model, const Json& input_shape, int samples, int batch, int epochs) {
  return {
      {"name", "overhead"},
      {"train",
       {{"model", model},
        {"data",
         {{"synthetic", {{"samples", samples}, {"input_shape", input_shape}, {"classes", 10}}}}},
        {"loss", "cross_entropy"},
        {"optimizer", {{"adam", {{"lr", 1e-3}}}}},
        {"batch", batch},
        {"epochs", epochs}}}};
}

std::vector<Case> Cases() {
  namespace nn = torch::nn;
  return {
      {"mlp_small",
       Job({{"builtin", "mlp"}, {"options", {{"hidden", {32, 32}}}}}, {16}, 16000, 8, 1),
       [] {
         return nn::Sequential(nn::Flatten(), nn::Linear(16, 32), nn::ReLU(), nn::Linear(32, 32),
                               nn::ReLU(), nn::Linear(32, 10));
       }},
      {"mlp_large",
       Job({{"builtin", "mlp"}, {"options", {{"hidden", {1024, 1024}}}}}, {784}, 6400, 64, 1),
       [] {
         return nn::Sequential(nn::Flatten(), nn::Linear(784, 1024), nn::ReLU(),
                               nn::Linear(1024, 1024), nn::ReLU(), nn::Linear(1024, 10));
       }},
      {"cnn", Job({{"builtin", "cnn"}}, {1, 28, 28}, 4096, 64, 1),
       [] {
         return nn::Sequential(nn::Conv2d(nn::Conv2dOptions(1, 16, 3).padding(1)), nn::MaxPool2d(2),
                               nn::ReLU(nn::ReLUOptions(true)),
                               nn::Conv2d(nn::Conv2dOptions(16, 32, 3).padding(1)),
                               nn::MaxPool2d(2), nn::ReLU(nn::ReLUOptions(true)), nn::Flatten(),
                               nn::Linear(32 * 7 * 7, 128), nn::ReLU(nn::ReLUOptions(true)),
                               nn::Dropout(0.25), nn::Linear(128, 10));
       }},
  };
}

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

using itwin::benchmark::Median;
using itwin::benchmark::PrintFigure;

// The loop one would write by hand: samples per second of one epoch.
class BareLoop {
 public:
  BareLoop(const Case& c, const TrainSpec& spec, const Dataset& dataset)
      : net_(c.bare()),
        optimizer_(net_->parameters(), torch::optim::AdamOptions(1e-3)),
        batch_(spec.batch) {
    std::vector<int64_t> all(static_cast<size_t>(dataset.size(Split::kTrain)));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
    Batch whole = dataset.Gather(Split::kTrain, all);
    input_ = whole.at("input");
    target_ = whole.at("target").view({-1});
  }
  double Epoch() {
    const double start = Seconds();
    const torch::Tensor order = torch::randperm(input_.size(0));
    double sum = 0;
    for (int64_t first = 0; first < input_.size(0); first += batch_) {
      const torch::Tensor indices =
          order.narrow(0, first, std::min(batch_, input_.size(0) - first));
      optimizer_.zero_grad();
      torch::Tensor loss = torch::nn::functional::cross_entropy(
          net_->forward(input_.index_select(0, indices)), target_.index_select(0, indices));
      loss.backward();
      optimizer_.step();
      sum += loss.item<double>();  // what one would log
    }
    return std::isfinite(sum) ? static_cast<double>(input_.size(0)) / (Seconds() - start) : 0;
  }

 private:
  torch::nn::Sequential net_;
  torch::optim::Adam optimizer_;
  const int64_t batch_;
  torch::Tensor input_, target_;
};

// The worker's loop with everything on: metrics file, progress, hashes. The checkpoint at the end
// is outside.
double WorkerEpoch(const TrainSpec& spec, const Dataset& dataset, const fs::path& directory) {
  SelfCommunicator self;
  const std::unique_ptr<Model> model = MakeModel(spec, dataset, directory);
  const std::unique_ptr<MetricSink> metrics = OpenMetricFile(directory / "metrics.jsonl");
  CheckpointStore checkpoints(directory / "checkpoints", 1, self);
  StopRequest stop(directory / "stop", Now() + 1e6);
  TrainingLoop loop({.spec = spec,
                     .dataset = dataset,
                     .model = *model,
                     .gradients = self,
                     .control = self,
                     .metrics = *metrics,
                     .checkpoints = checkpoints,
                     .stop = stop,
                     .print = [](const std::string&) {},
                     .spec_sha256 = ""});
  return loop.Run().metrics.at("perf/samples_per_second");
}

// Samples per second of the program's last epoch, median over its epochs after the first.
double ProgramRate(const Json& job, int ranks, const fs::path& directory) {
  fs::remove_all(directory / "spool");
  std::ofstream(directory / "job.json") << job.dump();
  const char* bin = std::getenv("ITWIN_BIN");
  itwin::testing::Program program(
      {"mpirun", "-n", std::to_string(ranks), "--oversubscribe",
       (bin == nullptr ? std::string("bin") : bin) + "/itwin-worker", "--spec",
       (directory / "job.json").string(), "--spool", (directory / "spool").string()},
      {{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}},
      directory / "log");
  if (program.Wait(std::chrono::seconds(300)) != 0) {
    std::fprintf(stderr, "%s\nis ITWIN_BIN the folder of the programs?\n", program.Output().c_str());
    std::exit(1);
  }
  std::vector<double> rates;
  std::ifstream lines(directory / "spool" / "metrics.jsonl");
  for (std::string line; std::getline(lines, line);) {
    const Json json = Json::parse(line);
    if (json.contains("metrics") && json["metrics"].contains("perf/samples_per_second")) {
      rates.push_back(json["metrics"]["perf/samples_per_second"]);
    }
  }
  if (rates.size() > 1) rates.erase(rates.begin());
  return rates.empty() ? 0 : Median(rates);
}

int Main() {
  ChooseBlasKernels();
  SetComputeThreads(1);
  std::string name = fs::temp_directory_path() / "itwin-overhead-XXXXXX";
  const fs::path directory = mkdtemp(name.data());
  for (const Case& c : Cases()) {
    const TrainSpec spec = ParseSpec(c.job);
    const std::unique_ptr<Dataset> dataset = OpenDataset(spec.data, spec.seed, directory);
    BareLoop bare(c, spec, *dataset);
    std::vector<double> ours, theirs, ratios;
    for (int round = -1; round < kRounds; ++round) {  // the first warms up
      double a = 0, b = 0;
      if (round % 2 == 0) {
        b = bare.Epoch();
        a = WorkerEpoch(spec, *dataset, directory);
      } else {
        a = WorkerEpoch(spec, *dataset, directory);
        b = bare.Epoch();
      }
      if (round < 0) continue;
      ours.push_back(a);
      theirs.push_back(b);
      ratios.push_back(a / b);
    }
    PrintFigure("worker_samples_per_second_" + c.name, Median(ours), "samples/s", Median(theirs),
                kRounds, Median(ratios));
  }

  // A second rank, with the same batch per rank (weak) and with the same batch in all (strong).
  for (const bool weak : {true, false}) {
    std::vector<double> one, two, ratios;
    for (int round = 0; round < kRankRounds; ++round) {
      Json job = Job({{"builtin", "cnn"}}, {1, 28, 28}, 4096, 64, 3);
      job["resources"] = {{"cpus_per_rank", 1}};
      one.push_back(ProgramRate(job, 1, directory));
      if (weak) job["train"]["batch"] = 128;
      two.push_back(ProgramRate(job, 2, directory));
      ratios.push_back(one.back() > 0 ? two.back() / one.back() : 0);
    }
    PrintFigure(std::string("worker_two_ranks_") + (weak ? "weak" : "strong") + "_cnn", Median(two),
                "samples/s", Median(one), kRankRounds, Median(ratios));
  }
  fs::remove_all(directory);
  return 0;
}

}  // namespace
}  // namespace itwin::worker

int main() { return itwin::worker::Main(); }
