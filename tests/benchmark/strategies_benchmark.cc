// What the strategies cost and bring. One compute thread per rank throughout.
//   strategies_benchmark overlap     ddp reducing during backward against after it, over a slow
//   link strategies_benchmark bandwidth   all-reduce of the communicator against plain
//   MPI_Allreduce strategies_benchmark memory      bytes per rank of zero1..3 against theory
//   strategies_benchmark pytorch     one rank against PyTorch
//   strategies_benchmark gloo        two ranks against PyTorch DDP over gloo
// Without an argument: all of them, one after the other.
#define OMPI_SKIP_MPICXX 1
#include <mpi.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/checkpoint.h"
#include "agent/worker/dist/mpi_communicator.h"
#include "agent/worker/model/model.h"
#include "agent/worker/training/compute_threads.h"
#include "agent/worker/training/training_loop.h"
#include "tests/benchmark/figures.h"
#include "tests/benchmark/modelled_communicator.h"
#include "tests/testing/program.h"
#include "tests/worker/training/ranks.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using itwin::benchmark::Median;
using itwin::benchmark::ModelledCommunicator;
using itwin::benchmark::PrintFigure;

constexpr int kRounds = 5;

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

fs::path MakeScratch() {
  std::string name = fs::temp_directory_path() / "itwin-strategies-XXXXXX";
  return mkdtemp(name.data());
}

Json MlpJob(int width, int batch, int samples, int epochs) {
  return {{"name", "strategies"},
          {"train",
           {{"model", {{"builtin", "mlp"}, {"options", {{"hidden", {width, width, width}}}}}},
            {"data",
             {{"synthetic", {{"samples", samples}, {"input_shape", {width}}, {"classes", 10}}}}},
            {"loss", "cross_entropy"},
            {"optimizer", {{"adam", {{"lr", 1e-3}}}}},
            {"batch", batch},
            {"epochs", epochs},
            {"check_every", 0}}}};
}

// ---- overlap

// Samples per second of two ranks, as threads, over a link on which reducing takes about as long as
// backward.
double RateOverSlowLink(bool overlap, const fs::path& directory) {
  Json job = MlpJob(768, 128, 128 * 12, 2);
  job["train"]["ddp"] = {{"overlap", overlap}, {"bucket_mb", 2}};
  const TrainSpec spec = ParseSpec(job);
  const std::unique_ptr<Dataset> dataset = OpenDataset(spec.data, spec.seed, "");
  double rate = 0;
  std::mutex alone;
  testing::RunRanksOrThrow(2, [&](Communicator& gradients, Communicator& control) {
    UseOneComputeThreadHere();
    std::unique_ptr<Model> model;
    {
      std::lock_guard lock(alone);  // LibTorch's one generator
      model = MakeModel(spec, *dataset, "");
    }
    ModelledCommunicator slow(gradients, 1e-4, 1 / 0.2e9);
    NullMetricSink drop;
    CheckpointStore store(directory / "overlap", 1, control);
    StopRequest stop("", std::nullopt);
    TrainingLoop loop({.spec = spec,
                       .dataset = *dataset,
                       .model = *model,
                       .gradients = slow,
                       .control = control,
                       .metrics = drop,
                       .checkpoints = store,
                       .stop = stop,
                       .print = [](const std::string&) {},
                       .spec_sha256 = ""});
    const double value = loop.Run().metrics.at("perf/samples_per_second");
    if (control.rank() == 0) rate = value;
  });
  return rate;
}

void Overlap(const fs::path& directory) {
  std::vector<double> with, without, ratios;
  for (int round = -1; round < kRounds; ++round) {
    const bool first = round % 2 == 0;
    const double a = RateOverSlowLink(first, directory), b = RateOverSlowLink(!first, directory);
    if (round < 0) continue;  // warms up
    with.push_back(first ? a : b);
    without.push_back(first ? b : a);
    ratios.push_back(with.back() / without.back());
  }
  PrintFigure("ddp_overlap_over_slow_link", Median(with), "samples/s", Median(without), kRounds,
              Median(ratios));
}

// ---- under mpirun

std::string Self() { return fs::read_symlink("/proc/self/exe").string(); }

std::string RunUnderMpi(int ranks, std::vector<std::string> argv, const fs::path& directory) {
  const fs::path log = directory / "log";
  fs::remove(log);
  std::vector<std::string> all = {"mpirun", "-n", std::to_string(ranks), "--oversubscribe"};
  all.insert(all.end(), argv.begin(), argv.end());
  itwin::testing::Program program(all,
                                  {{"OMPI_ALLOW_RUN_AS_ROOT", "1"},
                                   {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
                                   {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"},
                                   {"OPENBLAS_NUM_THREADS", "1"},
                                   {"OMP_NUM_THREADS", "1"}},
                                  log);
  if (program.Wait(std::chrono::seconds(600)) != 0) {
    std::fprintf(stderr, "%s\n", program.Output().c_str());
    std::exit(1);
  }
  return program.Output();
}

// One rank of `bandwidth` and of network_benchmark.py: prints, on rank 0, a line per operation and
// size: bytes in all (or a few less, to be equal parts), seconds of the communicator's, of MPI's
// own. Turn by turn, medians.
int CollectivesRank() {
  MpiWorld world;
  const auto communicator = world.MakeThreaded();
  const int ranks = world.size();
  for (const int64_t bytes : {256, 4 << 10, 64 << 10, 512 << 10, 1 << 20, 4 << 20, 8 << 20}) {
    const int part = static_cast<int>(bytes / 4 / ranks);  // elements
    const int all = part * ranks;
    std::vector<float> values(static_cast<size_t>(all)), mine(static_cast<size_t>(part));
    const Buffer whole = BufferOf(std::span(values)), own = BufferOf(std::span(mine));
    using Call = std::function<void()>;
    const std::tuple<const char*, Call, Call> operations[] = {
        {"all-reduce", [&] { communicator->AllReduce(whole, Reduction::kSum)->Wait(); },
         [&] {
           MPI_Allreduce(MPI_IN_PLACE, values.data(), all, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
         }},
        {"reduce-scatter",
         [&] { communicator->ReduceScatter(whole, own, Reduction::kSum)->Wait(); },
         [&] {
           MPI_Reduce_scatter_block(values.data(), mine.data(), part, MPI_FLOAT, MPI_SUM,
                                    MPI_COMM_WORLD);
         }},
        {"all-gather", [&] { communicator->AllGather(own, whole)->Wait(); },
         [&] {
           MPI_Allgather(mine.data(), part, MPI_FLOAT, values.data(), part, MPI_FLOAT,
                         MPI_COMM_WORLD);
         }}};
    for (const auto& [name, of_ours, of_mpi] : operations) {
      const auto time = [&](const Call& call) {
        std::fill(values.begin(), values.end(), 1.0f);
        std::fill(mine.begin(), mine.end(), 1.0f);
        MPI_Barrier(MPI_COMM_WORLD);
        const double start = Seconds();
        call();
        return Seconds() - start;
      };
      std::vector<double> ours, plain;
      for (int i = 0; i < (bytes < 1 << 16 ? 400 : 9); ++i) {
        ours.push_back(time(of_ours));
        plain.push_back(time(of_mpi));
      }
      if (world.rank() == 0)
        std::printf("%s %lld %.9f %.9f\n", name, static_cast<long long>(bytes), Median(ours),
                    Median(plain));
    }
  }
  return 0;
}

struct Measured {
  double bytes, ours, plain;
};
std::vector<Measured> MeasureAllReduce(int ranks, const fs::path& directory) {
  std::istringstream in(RunUnderMpi(ranks, {Self(), "collectives-rank"}, directory));
  std::vector<Measured> all;
  for (std::string word; in >> word;) {
    Measured m{};
    if (word == "all-reduce" && in >> m.bytes >> m.ours >> m.plain) all.push_back(m);
  }
  return all;
}

void Bandwidth(const fs::path& directory) {
  std::map<double, std::vector<Measured>> by_size;
  for (int round = 0; round < kRounds; ++round) {
    for (const Measured& m : MeasureAllReduce(2, directory)) by_size[m.bytes].push_back(m);
  }
  for (const auto& [bytes, runs] : by_size) {
    if (bytes < 1 << 20) continue;  // a bucket is larger
    std::vector<double> ours, plain, ratios;
    for (const Measured& m : runs) {
      ours.push_back(bytes / m.ours / 1e9);
      plain.push_back(bytes / m.plain / 1e9);
      ratios.push_back(m.plain / m.ours);
    }
    PrintFigure("all_reduce_bandwidth_" + std::to_string(static_cast<int64_t>(bytes) >> 20) + "mb",
                Median(ours), "GB/s", Median(plain), kRounds, Median(ratios));
  }
}

// ---- the program

Json RunWorker(const Json& job, int ranks, const fs::path& directory) {
  fs::remove_all(directory / "spool");
  std::ofstream(directory / "job.json") << job.dump();
  const char* bin = std::getenv("ITWIN_BIN");
  RunUnderMpi(ranks,
              {(bin == nullptr ? std::string("bin") : bin) + "/itwin-worker", "--spec",
               (directory / "job.json").string(), "--spool", (directory / "spool").string()},
              directory);
  return Json::parse(std::ifstream(directory / "spool" / "result.json"));
}

void Memory(const fs::path& directory) {
  const double ranks = 2;
  Json job = MlpJob(1024, 32, 128, 1);
  const auto of = [&](const std::string& strategy, int n) {
    job["train"]["strategy"] = strategy;
    job["train"].erase("zero");
    if (strategy.starts_with("zero")) job["train"]["zero"] = {{"bucket_mb", 1}};
    const Json metrics = RunWorker(job, n, directory)["metrics"];
    return metrics["perf/memory_parameters"].get<double>() +
           metrics["perf/memory_gradients"].get<double>() +
           metrics["perf/memory_optimizer"].get<double>();
  };
  const double whole = of("ddp", 2);  // 16 bytes a parameter
  const std::map<std::string, double> theory = {{"zero1", (8 + 8 / ranks + 4 / ranks) / 16},
                                                {"zero2", (4 + 12 / ranks) / 16},
                                                {"zero3", 1 / ranks}};
  for (const auto& [strategy, share] : theory) {
    PrintFigure("memory_per_rank_" + strategy, of(strategy, 2) / 1e6, "MB", share * whole / 1e6, 1);
  }
}

double SteadyRate(const fs::path& directory) {
  std::vector<double> rates;
  std::ifstream lines(directory / "spool" / "metrics.jsonl");
  for (std::string line; std::getline(lines, line);) {
    const Json json = Json::parse(line);
    if (json.contains("metrics") && json["metrics"].contains("perf/samples_per_second"))
      rates.push_back(json["metrics"]["perf/samples_per_second"]);
  }
  if (rates.size() > 1) rates.erase(rates.begin());
  return Median(rates);
}

// The same modules, exported by the script and run by it: tests/benchmark/pytorch_reference.py.
void AgainstPytorch(int ranks, const std::string& figure, const fs::path& directory) {
  const char* source = std::getenv("ITWIN_SOURCE");
  const std::string script =
      (source == nullptr ? std::string(".") : source) + "/tests/benchmark/pytorch_reference.py";
  const auto python = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"/usr/bin/python3", script});
    const fs::path log = directory / "python.log";
    fs::remove(log);
    itwin::testing::Program program(arguments,
                                    {{"OPENBLAS_NUM_THREADS", "1"},
                                     {"OMP_NUM_THREADS", "1"},
                                     {"MALLOC_MMAP_THRESHOLD_", "33554432"},
                                     {"MALLOC_TRIM_THRESHOLD_", "2147483647"},
                                     {"MALLOC_TOP_PAD_", "67108864"}},
                                    log);
    if (program.Wait(std::chrono::seconds(600)) != 0) {
      std::fprintf(stderr, "%s\n", program.Output().c_str());
      std::exit(1);
    }
    return program.Output();
  };
  python({"export", directory.string()});
  double logarithms = 0;
  int models = 0;
  for (const std::string name : {"mlp", "resnet", "lstm", "transformer"}) {
    const Json form = Json::parse(std::ifstream(directory / (name + ".json")));
    const Json job = {
        {"name", name},
        {"resources", {{"cpus_per_rank", 1}}},
        {"train",
         {{"model", {{"torchscript", (directory / (name + ".pt")).string()}}},
          {"data",
           {{"synthetic",
             {{"samples", form["samples"]}, {"input_shape", form["input"]}, {"classes", 10}}}}},
          {"loss", "cross_entropy"},
          {"optimizer", {{"adam", {{"lr", 1e-3}}}}},
          {"batch", form["batch"].get<int>() * ranks},
          {"epochs", 3},
          {"check_every", 0}}}};
    std::vector<double> ours, theirs, ratios;
    for (int round = 0; round < kRounds; ++round) {
      const auto mine = [&] {
        RunWorker(job, ranks, directory);
        ours.push_back(SteadyRate(directory));
      };
      if (round % 2 == 0) mine();
      theirs.push_back(
          std::stod(python({"train", directory.string(), name, std::to_string(ranks)})));
      if (round % 2 != 0) mine();
      ratios.push_back(ours.back() / theirs.back());
    }
    PrintFigure(figure + "_" + name, Median(ours), "samples/s", Median(theirs), kRounds,
                Median(ratios));
    logarithms += std::log(Median(ratios));
    ++models;
  }
  PrintFigure(figure + "_geometric_mean", std::exp(logarithms / models), "ratio", 1, kRounds);
}

void Pytorch(const fs::path& directory) {
  AgainstPytorch(1, "one_rank_against_pytorch", directory);
}
void Gloo(const fs::path& directory) { AgainstPytorch(2, "two_ranks_against_ddp_gloo", directory); }

int Main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "";
  if (part == "collectives-rank") return CollectivesRank();
  ChooseBlasKernels();
  SetComputeThreads(1);
  const fs::path directory = MakeScratch();
  const std::pair<const char*, void (*)(const fs::path&)> parts[] = {{"overlap", Overlap},
                                                                     {"bandwidth", Bandwidth},
                                                                     {"memory", Memory},
                                                                     {"pytorch", Pytorch},
                                                                     {"gloo", Gloo}};
  for (const auto& [name, run] : parts) {
    if (part.empty() || part == name) run(directory);
  }
  fs::remove_all(directory);
  return 0;
}

}  // namespace
}  // namespace itwin::worker

int main(int argc, char** argv) { return itwin::worker::Main(argc, argv); }
