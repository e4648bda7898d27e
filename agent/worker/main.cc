// itwin-worker: one rank of a training job. `mpirun -n 2 itwin-worker --spec spec.json --spool
// DIR`; under the agent the paths come from the environment (docs/worker-contract.md).
//
// This file is the door through which every error leaves: it becomes a sentence, result.json and an
// exit code.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <tuple>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/checkpoint.h"
#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/state_dict.h"
#include "agent/worker/data/dataset.h"
#include "agent/worker/device/device.h"
#include "agent/worker/device/device_dataset.h"
#include "agent/worker/device/gpu.h"
#include "agent/worker/device/staged_communicator.h"
#include "agent/worker/dist/collective_log.h"
#include "agent/worker/dist/gather_texts.h"
#include "agent/worker/dist/mpi_communicator.h"
#include "agent/worker/dist/nccl_communicator.h"
#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/error.h"
#include "agent/worker/model/archive.h"
#include "agent/worker/model/model.h"
#include "agent/worker/model/operators.h"
#include "agent/worker/model/torchscript_export.h"
#include "agent/worker/monitor/node_monitor.h"
#include "agent/worker/predict/predict.h"
#include "agent/worker/profile/hang_detector.h"
#include "agent/worker/profile/profiler.h"
#include "agent/worker/profile/trace_session.h"
#include "agent/worker/report/contract.h"
#include "agent/worker/report/metric_sink.h"
#include "agent/worker/report/result.h"
#include "agent/worker/spec/train_spec.h"
#include "agent/worker/startup.h"
#include "agent/worker/training/mesh.h"
#include "agent/worker/training/precision.h"
#include "agent/worker/training/run_identity.h"
#include "agent/worker/training/stop_request.h"
#include "agent/worker/training/strategy.h"
#include "agent/worker/training/training_loop.h"
#include "agent/worker/training/weights.h"

namespace itwin::worker {
namespace {

constexpr char kUsage[] =
    "itwin-worker: trains a model as a job spec says, as one rank of an MPI job or alone\n"
    "\n"
    "  itwin-worker --spec FILE --spool DIR    train; DIR gets metrics.jsonl, checkpoints/, "
    "outputs/, result.json\n"
    "  itwin-worker --self-test                check MPI, BLAS and LibTorch on this machine\n"
    "  itwin-worker --operators                the operators a model may use here, as JSON\n"
    "  itwin-worker --version\n"
    "\n"
    "  --allow-library FILE                    a shared object whose operators models may use, too; "
    "may be repeated,\n"
    "                                          or be in ITWIN_LIBRARIES, separated by colons\n"
    "\n"
    "The variables ITWIN_SPEC, ITWIN_METRICS, ITWIN_OUTPUTS, ITWIN_CHECKPOINTS, ITWIN_RESUME, "
    "ITWIN_STOP,\n"
    "ITWIN_RESULT, ITWIN_DEADLINE and ITWIN_ATTEMPT win over the options.\n"
    "Exit codes: 0 done, 2 the request cannot work, 3 the training failed, 4 out of memory or "
    "disk,\n"
    "5 a node or the network failed, 85 saved and to be continued.\n";

constexpr auto kOthersWriteFirst =
    std::chrono::milliseconds(300);  // before a rank beyond 0 reports a failure
constexpr double kPredictionReserveSeconds = 5;  // before the deadline: to end and to say so
constexpr auto kOwnerWrites =
    std::chrono::seconds(3);  // for the rank that an agreed failure is about

struct Options {
  std::string spec, spool;
  std::vector<std::string> libraries;
  bool version = false, self_test = false, operators = false, help = false;
};

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--version") {
      options.version = true;
    } else if (name == "--self-test") {
      options.self_test = true;
    } else if (name == "--help" || name == "-h") {
      options.help = true;
    } else if (name == "--operators") {
      options.operators = true;
    } else if (name == "--allow-library") {
      if (i + 1 == argc) throw UserError(name + " needs a value");
      options.libraries.push_back(argv[++i]);
    } else if (name == "--spec" || name == "--spool") {
      if (i + 1 == argc) throw UserError(name + " needs a value");
      (name == "--spec" ? options.spec : options.spool) = argv[++i];
    } else {
      throw UserError("unknown option " + name + "; see itwin-worker --help");
    }
  }
  // A job's environment cannot have names that begin with ITWIN_, so this is the site's.
  const char* libraries = std::getenv("ITWIN_LIBRARIES");
  for (std::string rest = libraries == nullptr ? "" : libraries; !rest.empty();) {
    const size_t colon = std::min(rest.find(':'), rest.size());
    if (colon > 0) options.libraries.push_back(rest.substr(0, colon));
    rest.erase(0, colon + 1);
  }
  return options;
}

// The ranks' ways to talk. Alone when no launcher started us.
struct World {
  // What each communicator is doing; they outlive these.
  CollectiveLog gradients_log{"gradients"}, layers_log{"layers"}, control_log{"control"}, saving_log{"saving"};
  std::unique_ptr<MpiWorld> mpi;  // first in, last out
  std::unique_ptr<Communicator> control;

  World() {
    if (MpiWorld::Launched()) {
      mpi = std::make_unique<MpiWorld>();
      control = mpi->MakeDirect(&control_log);
    } else {
      control = std::make_unique<SelfCommunicator>();
    }
  }
  int rank() const { return control->rank(); }
  int size() const { return control->size(); }
  // For the thread that saves.
  std::unique_ptr<Communicator> MakeSaving() {
    if (!mpi) return std::make_unique<SelfCommunicator>();
    return mpi->MakeDirect(&saving_log);
  }
  // For the activations of a model that is split.
  std::unique_ptr<Communicator> MakeLayers() {
    if (!mpi) return std::make_unique<SelfCommunicator>();
    return mpi->MakeDirect(&layers_log);
  }
  std::unique_ptr<Communicator> MakeGradients(bool overlap) {
    if (!mpi) return std::make_unique<SelfCommunicator>();
    return overlap ? mpi->MakeThreaded(&gradients_log) : mpi->MakeDirect(&gradients_log);
  }
  // For buffers of the device, which is what this thread's current stream computes on. `note` becomes a
  // sentence where NCCL cannot be used. Every rank calls it.
  std::unique_ptr<Communicator> MakeGpuGradients(at::Device device, std::string* note) {
    if (!mpi) return std::make_unique<SelfCommunicator>();
    std::string why_not;
    int64_t without = NcclAvailable(&why_not) ? 0 : 1;
    const std::vector<std::string> reasons = GatherTexts(*control, why_not);
    control->AllReduce(BufferOf(std::span(&without, 1)), Reduction::kMax)->Wait();
    if (without == 0) {
      return std::make_unique<NcclCommunicator>(
          mpi->MakeDirect(&control_log),
          NcclCommunicator::Options{.device = device.index(),
                                    .compute_stream = gpu::Native(CurrentStream(device)),
                                    .log = &gradients_log});
    }
    for (const std::string& reason : reasons) {
      if (note->empty() && !reason.empty()) {
        *note = "gradients travel through the nodes' memory and MPI instead of NCCL, which is slower: " + reason;
      }
    }
    return std::make_unique<StagedCommunicator>(mpi->MakeDirect(&gradients_log), device);
  }
  std::vector<std::string> DescribeCommunicators() const {
    if (!mpi) return {};
    std::vector<std::string> texts = {gradients_log.Describe(), control_log.Describe(), saving_log.Describe()};
    if (layers_log.counts().started > 0) texts.push_back(layers_log.Describe());
    return texts;
  }
  // What every rank starts equally often. Stages of a model have layers and buckets of their own.
  std::atomic<bool> has_stages = false;
  int64_t started() const {
    const int64_t of_all = control_log.counts().started;
    return has_stages ? of_all : of_all + gradients_log.counts().started + layers_log.counts().started;
  }
  bool waits() const { return gradients_log.under_way() || layers_log.under_way() || control_log.under_way(); }
};

// Sums over the nodes; absent, with a reason, when a node could not tell.
struct Energy {
  std::optional<double> gpu_joules, cpu_joules;
  std::string gpu_note, cpu_note;
};

// Every rank calls it; `monitor` is the first rank's of each node.
Energy SumEnergy(std::optional<NodeMonitor>& monitor, Communicator& control) {
  double sums[] = {0, 0, 0, 0};  // joules and nodes that do not tell, of GPUs and of processors
  Energy energy;
  if (monitor) {
    const NodeEnergy mine = monitor->Stop();
    sums[0] = mine.gpu_joules.value_or(0);
    sums[1] = mine.gpu_joules ? 0 : 1;
    sums[2] = mine.cpu_joules.value_or(0);
    sums[3] = mine.cpu_joules ? 0 : 1;
    energy.gpu_note = mine.gpu_note;
    energy.cpu_note = mine.cpu_note;
  }
  control.AllReduce(BufferOf(std::span(sums)), Reduction::kSum)->Wait();
  if (sums[1] == 0) energy.gpu_joules = sums[0];
  if (sums[3] == 0) energy.cpu_joules = sums[2];
  return energy;
}

nlohmann::json EnergyJson(const Energy& energy, int64_t samples) {
  nlohmann::json json = nlohmann::json::object();
  double joules = 0;
  for (const auto& [device, value, note] :
       {std::tuple{"gpu", energy.gpu_joules, energy.gpu_note},
        std::tuple{"cpu", energy.cpu_joules, energy.cpu_note}}) {
    if (value) {
      json[std::string(device) + "_joules"] = *value;
      joules += *value;
    } else {
      json[std::string(device) + "_note"] = note;
    }
  }
  if (joules > 0) json["samples_per_joule"] = static_cast<double>(samples) / joules;
  return json;
}

// What is known of a run when it fails.
struct RunState {
  int rank = 0;
  std::optional<Contract> contract;
};

WorkerError OneSample() {
  return UserError(
      "a rank's share of a batch was a single sample, of which batch norm cannot take statistics in "
      "training; choose train.batch so that the last batch of an epoch is larger, use another number "
      "of ranks, or use group norm");
}

// Whatever was thrown, as one of ours.
WorkerError Translate(const std::exception_ptr& error) {
  // Batch norm of one sample, in every version of LibTorch and in TorchScript.
  const auto is_one_sample = [](const std::string& text) {
    return text.find("Expected more than 1 value per channel when training") != std::string::npos;
  };
  const auto is_memory = [](const std::string& text) {
    return text.find("can't allocate memory") != std::string::npos ||
           text.find("out of memory") != std::string::npos;
  };
  try {
    std::rethrow_exception(error);
  } catch (const WorkerError& e) {
    return e;
  } catch (const std::bad_alloc&) {
    return ResourceError(
        "out of memory; ask for more memory per node, use a smaller batch or more ranks");
  } catch (const c10::Error& e) {
    const std::string text = e.what_without_backtrace();
    if (is_memory(text) && text.find("CUDA") != std::string::npos) {
      return ResourceError(
          "out of GPU memory; use a smaller batch, more GPUs, train.accumulate, precision bf16 or "
          "strategy zero2 (" +
          text.substr(0, text.find('\n')) + ")");
    }
    if (is_memory(text)) {
      return ResourceError(
          "out of memory; ask for more memory per node, use a smaller batch or more ranks (" +
          text + ")");
    }
    if (is_one_sample(text)) return OneSample();
    return AppError(text);
  } catch (const std::exception& e) {
    if (is_one_sample(e.what())) return OneSample();
    return is_memory(e.what()) ? ResourceError(e.what()) : AppError(e.what());
  } catch (...) {
    return AppError("an unknown error");
  }
}

// Writes the failure as the job's result, unless another rank has. The ranks may all come here, or
// only one. `mine`: it is this rank's where it says of no other.
void ReportFailure(const RunState& state, const WorkerError& error, bool mine = true) {
  // Who hangs writes nothing.
  const bool about_another = error.rank && *error.rank != state.rank &&
                             error.failure != FailureClass::kInfra;
  if (!about_another) {
    std::fprintf(stderr, "itwin-worker: rank %d: %s\n", state.rank, error.what());
    std::fflush(stderr);
  }
  if (!state.contract) return;
  const auto patience = about_another                   ? std::chrono::milliseconds(kOwnerWrites)
                        : state.rank == 0 || error.rank ? std::chrono::milliseconds(0)
                                                        : kOthersWriteFirst;
  const auto until = std::chrono::steady_clock::now() + patience;
  while (std::chrono::steady_clock::now() < until &&
         access(state.contract->result.c_str(), F_OK) != 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  Result result;
  result.attempt = state.contract->attempt;
  result.outcome = Outcome::kFailed;
  result.message = error.what();
  char host[256] = {};
  gethostname(host, sizeof(host) - 1);
  result.failure = Failure{.failure_class = error.failure,
                           .rank = error.rank || !mine ? error.rank : state.rank,
                           .step = error.step,
                           .host = error.host.empty() ? host : error.host};
  if (error.step) result.steps = *error.step;
  try {
    CreateFileDurably(state.contract->result, RenderResult(result));
  } catch (const WorkerError& e) {
    std::fprintf(stderr, "itwin-worker: rank %d: %s\n", state.rank, e.what());
  }
}

// Reports the error in flight and ends every rank: the others may be waiting for this one. Comes
// back only in a job of one rank, with the exit code.
int EndJob(const World* world, const RunState& state) {
  const WorkerError error = Translate(std::current_exception());
  ReportFailure(state, error);
  std::fflush(stdout);
  if (world != nullptr && world->size() > 1) MpiWorld::Abort(ExitCode(error.failure));
  return ExitCode(error.failure);
}

// Watches this rank from now on; gives up on behalf of all when nothing happens any more.
HangDetector::Options WatchFor(World& world, const RunState& state, const Machine& machine,
                               double timeout_seconds) {
  return {.directory = state.contract->spool / "ranks",
          .rank = world.rank(),
          .ranks = world.size(),
          .host = machine.host,
          .timeout_seconds = timeout_seconds,
          .collectives = [&world] { return world.started(); },
          .waits = [&world] { return world.waits(); },
          .communicators = [&world] { return world.DescribeCommunicators(); },
          .give_up =
              [&state](const WorkerError& error) {
                ReportFailure(state, error, /*mine=*/false);
                std::fflush(stdout);
                MpiWorld::Abort(ExitCode(error.failure));
              }};
}

nlohmann::json ReadSpecFile(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    throw UserError("there is no job spec " + path.string());
  }
  nlohmann::json json =
      nlohmann::json::parse(ReadWholeFile(path), nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) throw UserError("the job spec " + path.string() + " is not JSON");
  return json;
}

void PrepareSpool(const Contract& contract) {
  MakeDirectories(contract.spool);
  MakeDirectories(contract.outputs);
  std::error_code ignored;
  std::filesystem::remove(contract.result, ignored);  // of an earlier run in the same directory
}

nlohmann::json SummaryJson(const StepSummary& run) {
  nlohmann::json json = {{"steps", run.steps},
                         {"samples", run.samples},
                         {"seconds_in_steps", run.seconds},
                         {"step_seconds",
                          {{"p50", run.p50},
                           {"p90", run.p90},
                           {"p99", run.p99},
                           {"longest", run.longest}}}};
  for (size_t p = 0; p < kActivities; ++p) {
    json["seconds_in"][Name(static_cast<Activity>(p))] = run.seconds_in[p];
  }
  return json;
}

// outputs/report.json: what a scalability or energy report needs of this run. Every rank calls it.
void WriteReport(const std::filesystem::path& path, World& world, const Profiler& profiler,
                 const CheckpointStore& checkpoints, nlohmann::json head) {
  const CollectiveLog::Counts gradients = world.gradients_log.counts();
  nlohmann::json mine = SummaryJson(profiler.whole_run());
  mine["collectives"] = {{"count", gradients.finished},
                         {"bytes", gradients.bytes},
                         {"seconds", gradients.seconds}};
  mine["checkpoint"] = {{"stall_seconds", checkpoints.stall_seconds()},
                        {"longest_save_seconds", checkpoints.longest_save_seconds()},
                        {"bytes_written", checkpoints.bytes_written()}};
  const ProcessMemory memory = ReadProcessMemory();
  mine["rss_peak_bytes"] = memory.peak_bytes;
  const std::vector<std::string> ranks = GatherTexts(*world.control, mine.dump());
  if (world.rank() != 0) return;
  for (const std::string& of_rank : ranks) head["of_rank"].push_back(nlohmann::json::parse(of_rank));
  WriteFileDurably(path, head.dump(1) + "\n");
}

// A prediction keeps nothing between attempts, so to be asked to stop is to fail: as a request that
// needs more time where the wall limit is near, for another attempt to be decided upon where somebody
// asked. Every rank calls it.
[[noreturn]] void FailStoppedPrediction(Communicator& control, const StopRequest& stop) {
  std::string reason;
  for (const std::string& of_rank : GatherTexts(control, stop.reason())) {
    if (reason.empty()) reason = of_rank;
  }
  int64_t late = stop.near_deadline() ? 1 : 0;
  control.AllReduce(BufferOf(std::span(&late, 1)), Reduction::kMax)->Wait();
  const std::string message =
      reason + ": the prediction was not finished, and cannot be continued; nothing of it is kept" +
      (late != 0 ? ". Ask for more time with resources.time, or for more ranks" : "");
  WorkerError error = late != 0 ? UserError(message) : AppError(message);
  error.rank = 0;
  throw error;
}

// A job that applies a model instead of training it.
int RunPrediction(World& world, const RunState& state, const TrainSpec& spec, const Dataset& dataset,
                  Model& model, const std::function<void(const std::string&)>& print,
                  const std::function<void(int64_t)>& beat) {
  const Contract& contract = *state.contract;
  if (!spec.predict->weights.empty()) {
    LoadWeightsFile(model, ResolveFile(spec.predict->weights, contract.work, "train.predict.weights"));
  }
  const std::string& name = spec.predict->split;
  const Split split = name == "train"        ? Split::kTrain
                      : name == "validation" ? Split::kValidation
                                             : Split::kTest;  // or all, see OpenDataset
  StopRequest stop(world.rank() == 0 ? contract.stop : "", contract.deadline);
  int64_t batches = 0;
  const std::optional<Prediction> predicted =
      PredictSplit(model, dataset, split, spec.batch, spec.predict->format, contract.outputs,
                   *world.control, [&] {
                     beat(++batches);
                     return !stop.Poll(kPredictionReserveSeconds);
                   });
  if (!predicted) FailStoppedPrediction(*world.control, stop);
  const Prediction& prediction = *predicted;
  print("predictions: " + prediction.file.filename().string() + ", " +
        std::to_string(prediction.shape.front()) + " samples");
  if (world.rank() != 0) return 0;
  Result result;
  result.attempt = contract.attempt;
  result.outputs = ListOutputs(contract.outputs);
  result.info = {{"ranks", world.size()},
                 {"model", model.description()},
                 {"samples", prediction.shape.front()},
                 {"shape", prediction.shape},
                 {"worker", ITWIN_VERSION}};
  WriteFileDurably(contract.result, RenderResult(result));
  return ExitCode(result);
}

int Train(World& world, RunState& state) {
  const auto start = std::chrono::steady_clock::now();
  Communicator& control = *world.control;
  const Contract& contract = *state.contract;
  const bool first = world.rank() == 0;
  if (first) PrepareSpool(contract);
  control.Barrier()->Wait();

  const std::function<void(const std::string&)> print = [first](const std::string& line) {
    if (!first) return;
    std::printf("%s\n", line.c_str());
    std::fflush(stdout);
  };
  const nlohmann::json job = WithArchive(ReadSpecFile(contract.spec), contract.work);
  TrainSpec spec = ParseSpec(job);
  if (spec.predict) {
    spec.data.all_as_test = spec.predict->split == "all";
    if (!spec.predict->preprocessing.empty()) {
      const std::string field = "train.predict.preprocessing";
      spec.data.statistics = nlohmann::json::parse(
          ReadWholeFile(ResolveFile(spec.predict->preprocessing, contract.work, field)), nullptr,
          /*allow_exceptions=*/false);
      if (!spec.data.statistics.is_object()) throw UserError(field + ": the file is not JSON");
    }
  }
  std::string strategy_note;
  if (spec.predict && !spec.strategy.empty()) {
    strategy_note =
        "a prediction has the whole model on each rank, not strategy " + spec.strategy;
    spec.strategy.clear();
  }
  std::string choice_note;
  const std::string strategy = ChooseStrategy(spec, world.size(), &choice_note);
  if (strategy_note.empty()) strategy_note = choice_note;

  const Machine machine =
      SetUpMachine(control, spec.deterministic ? std::max(1, spec.resources.cpus_per_rank)
                                               : spec.resources.cpus_per_rank);
  if (spec.deterministic) MakeDeterministic();
  CheckGpuSettings(spec, strategy);
  const at::Device device = ChooseDevice(spec.resources, FindGpus(machine.local_rank, machine.host));
  SetUpDevice(device, spec);
  const StreamScope compute(StreamBeside(device));
  if (!device.is_cpu()) RequireOwnGpus(GatherTexts(control, gpu::Describe(device.index()).uuid));
  // A recorded step has no place for the calls that start exchanges in the midst of backward.
  if (spec.gpu.graphs) spec.ddp.overlap = spec.zero.overlap = false;
  RequirePrecision(spec.precision, device);
  double gflops = 0;
  if (first) {
    gflops = MeasureBlas();
    if (gflops < kSlowGflops) {
      print(SlowBlasWarning(gflops));
      std::fprintf(stderr, "itwin-worker: %s\n", SlowBlasWarning(gflops).c_str());
    }
  }
  std::optional<NodeMonitor> monitor;
  if (machine.local_rank == 0) monitor.emplace(contract.spool, machine.host);
  std::unique_ptr<MetricSink> metrics =
      first ? OpenMetricFile(contract.metrics) : std::make_unique<NullMetricSink>();

  print("itwin-worker " ITWIN_VERSION ": " + spec.name + ", " + std::to_string(world.size()) +
        " rank(s) on " + std::to_string(machine.nodes) + " node(s), " +
        std::to_string(machine.threads) + " thread(s) each, LibTorch " + TorchVersion());
  if (!device.is_cpu()) print("device of rank 0: " + DescribeDevice(device));
  HangDetector hang(WatchFor(world, state, machine, spec.profile.hang_timeout_seconds));
  const RankShare share{.rank = world.rank(),
                        .ranks = world.size(),
                        .ranks_on_node = machine.local_size,
                        .sum = [&control](std::span<double> values) {
                          control.AllReduce(BufferOf(values), Reduction::kSum)->Wait();
                        }};
  const std::unique_ptr<Dataset> on_host = OpenDataset(spec.data, spec.seed, contract.work, share);
  std::optional<DeviceDataset> on_device;
  if (!device.is_cpu()) on_device.emplace(*on_host, device, spec.gpu.channels_last);
  const Dataset* const dataset = on_device ? &*on_device : on_host.get();
  if (!strategy_note.empty()) print("note: " + strategy_note);
  print("data: " + std::to_string(dataset->size(Split::kTrain)) + " training, " +
        std::to_string(dataset->size(Split::kValidation)) + " validation, " +
        std::to_string(dataset->size(Split::kTest)) + " test samples");
  // Horovod brings a communication thread of its own.
  const bool threaded = strategy == "horovod"          ? false
                        : strategy.starts_with("zero") ? spec.zero.overlap
                                                       : spec.ddp.overlap;
  std::string gradients_note;
  const std::unique_ptr<Communicator> gradients =
      device.is_cpu() ? world.MakeGradients(threaded) : world.MakeGpuGradients(device, &gradients_note);
  if (!gradients_note.empty()) print("note: " + gradients_note);
  std::optional<MeshGroups> mesh;
  std::unique_ptr<Communicator> layers;
  if (IsMesh(strategy)) {
    const MeshSpec shape = MeshOf(spec, strategy, world.size());
    world.has_stages = shape.pipeline > 1;
    if (device.is_cpu()) layers = world.MakeLayers();
    mesh.emplace(shape, *gradients, layers ? *layers : *gradients, control, device,
                 &world.layers_log);
  }
  const std::unique_ptr<Model> model = mesh ? MakeMeshModel(spec, *on_host, contract.work, *mesh)
                                            : MakeModel(spec, *on_host, contract.work);
  if (!device.is_cpu()) {
    model->MoveTo(device);
    TrySamples(*model, *dataset);
  }
  print("model: " + model->description());
  if (spec.predict) {
    const int code = RunPrediction(world, state, spec, *dataset, *model, print,
                                   [&hang](int64_t batch) { hang.Beat(batch); });
    control.Barrier()->Wait();
    return code;
  }

  Profiler profiler({&world.gradients_log, &world.layers_log});
  TraceSession trace({.request = contract.spool / "profile",
                      .outputs = contract.outputs,
                      .host = machine.host,
                      .steps = spec.profile.trace_steps,
                      .at_step = spec.profile.at_step,
                      .logs = {&world.gradients_log, &world.layers_log, &world.control_log, &world.saving_log}},
                     profiler, control);
  TrainingOutcome outcome;
  nlohmann::json energy;
  {
    const std::unique_ptr<Communicator> saving =
        spec.checkpoint.background ? world.MakeSaving() : nullptr;
    CheckpointStore checkpoints(contract.checkpoints, spec.checkpoint.keep, control, saving.get());
    StopRequest stop(first ? contract.stop : "", contract.deadline);
    TrainingLoop loop({.spec = spec,
                       .dataset = *dataset,
                       .model = *model,
                       .gradients = *gradients,
                       .control = control,
                       .metrics = *metrics,
                       .checkpoints = checkpoints,
                       .stop = stop,
                       .print = print,
                       .spec_sha256 = HashSpec(job),
                       .mesh = mesh ? &*mesh : nullptr,
                       .profiler = &profiler,
                       .trace = &trace,
                       .beat = [&hang](int64_t step) { hang.Beat(step); },
                       .device = device,
                       .make_graph = spec.gpu.graphs ? StepGraph::Make(gpu::MakeGraph) : nullptr,
                       .spec_document = SpecDocument(job),
                       .data_document = BroadcastText(
                           control, first ? DescribeTrainingData(*on_host).dump() : "", 0)});
    std::filesystem::path went_on_from;
    if (!contract.resume.empty()) {
      const CheckpointContents checkpoint =
          LoadNewestCheckpoint(contract.resume, control, [&](const std::string& problem) {
            print("warning: " + problem + "; trying the checkpoint before it");
          });
      went_on_from = checkpoint.directory.parent_path();
      loop.Resume(checkpoint);
      checkpoints.GoesOnFrom(checkpoint.position.step);
      print("going on from step " + std::to_string(checkpoint.position.step) + ", epoch " +
            std::to_string(checkpoint.position.epoch));
    }
    try {
      outcome = loop.Run();
    } catch (...) {
      // Here, before anything is taken down: the communication thread may be in the middle of a
      // bucket.
      return EndJob(&world, state);
    }
    if (first && !outcome.saved && spec.checkpoint.export_optimizer) {
      // A run that only had its last evaluation left has saved nothing itself.
      ExportOptimizer({contract.checkpoints, went_on_from}, outcome.steps,
                      contract.outputs / "optimizer.safetensors");
    }
    if (!device.is_cpu() && !outcome.in_pieces) model->MoveTo(at::kCPU);  // for all that is written from here on
    metrics->Flush();
    energy = EnergyJson(SumEnergy(monitor, control), outcome.samples);
    int64_t parameter_bytes = 0;
    for (const auto& [name, tensor] : model->parameters())
      parameter_bytes += static_cast<int64_t>(tensor.nbytes());
    WriteReport(contract.outputs / "report.json", world, profiler, checkpoints,
                {{"format", 1},
                 {"ranks", world.size()},
                 {"nodes", machine.nodes},
                 {"threads_per_rank", machine.threads},
                 {"strategy", strategy},
                 {"batch", spec.batch},
                 {"parameter_bytes", parameter_bytes},
                 {"worker", ITWIN_VERSION},
                 {"libtorch", TorchVersion()},
                 {"blas_gflops_per_thread", gflops},
                 {"energy", energy}});
  }
  Result result;
  result.attempt = contract.attempt;
  result.outcome = outcome.saved ? Outcome::kSaved : Outcome::kSucceeded;
  result.message = outcome.message;
  if (first) {
    if (!outcome.saved) {
      std::unique_ptr<Model> put_together;  // here alone, where each rank holds a part
      if (outcome.in_pieces) {
        put_together = MakeModel(spec, *on_host, contract.work);
        LoadWeights(*put_together, outcome.weights);
      }
      Model& whole = put_together ? *put_together : *model;
      whole.Save(contract.outputs);
      if (const std::string why = ExportTorchScript(whole, *on_host, contract.outputs / "model.pt"); !why.empty())
        print("note: the model is not among the outputs as TorchScript (model.pt), only its weights: " + why);
      for (const auto& [name, report] : outcome.reports)
        WriteFileDurably(contract.outputs / name, report.dump(2) + "\n");
      if (!outcome.best.empty())
        WriteSafetensors(contract.outputs / "best.safetensors", outcome.best, {{"format", "pt"}});
      NamedTensors tensors = whole.parameters();
      for (auto& buffer : whole.buffers()) tensors.push_back(std::move(buffer));
      WriteStateDict(contract.outputs / "state_dict.pt", tensors);
      result.outputs = ListOutputs(contract.outputs);
    }
    result.metrics = outcome.metrics;
    result.steps = outcome.steps;
    result.epochs = outcome.epochs;
    result.info = {
        {"ranks", world.size()},
        {"nodes", machine.nodes},
        {"threads_per_rank", machine.threads},
        {"strategy", strategy},
        {"device", DescribeDevice(device)},
        {"model", model->description()},
        {"weights_sha256", outcome.weights_sha256},
        {"worker", ITWIN_VERSION},
        {"libtorch", TorchVersion()},
        {"blas_kernels", machine.blas_kernels},
        {"blas_gflops_per_thread", gflops},
        {"seconds",
         std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()},
        {"energy", energy}};
    if (!strategy_note.empty()) result.info["strategy_note"] = strategy_note;
    WriteFileDurably(contract.result, RenderResult(result));
  }
  control.Barrier()->Wait();
  return ExitCode(result);
}

int SelfTest(World& world) {
  const Machine machine = SetUpMachine(*world.control, 0);
  std::vector<float> ones(1000, 1.0f);
  const std::unique_ptr<Communicator> gradients = world.MakeGradients(/*overlap=*/true);
  gradients->AllReduce(BufferOf(std::span(ones)), Reduction::kSum)->Wait();
  for (float v : ones) {
    if (v != static_cast<float>(world.size())) throw AppError("the sum over ranks is wrong");
  }
  if (world.rank() != 0) return 0;
  const double gflops = MeasureBlas();
  std::printf(
      "ranks %d on %d node(s), %d thread(s) each; LibTorch %s; BLAS %s %.1f Gflop/s per thread%s\n",
      world.size(), machine.nodes, machine.threads, TorchVersion().c_str(),
      machine.blas_kernels.empty() ? "(not OpenBLAS)" : machine.blas_kernels.c_str(), gflops,
      gflops < kSlowGflops ? "" : ": ok");
  if (gflops < kSlowGflops) std::printf("%s\n", SlowBlasWarning(gflops).c_str());
  const GpuSituation gpus = FindGpus(machine.local_rank, machine.host);
  if (!gpus.built) {
    std::printf("GPUs: this worker is built without CUDA\n");
    return 0;
  }
  std::printf("GPUs: %d\n", gpus.visible);
  std::string why_not;
  std::printf("%s\n", NcclAvailable(&why_not) ? "NCCL: found" : why_not.c_str());
  return 0;
}

int Main(int argc, char** argv) {
  RunState state;
  std::unique_ptr<World> world;
  try {
    const Options options = ParseOptions(argc, argv);
    if (options.help) {
      std::fputs(kUsage, stdout);
      return 0;
    }
    if (options.version) {
      std::printf("itwin-worker " ITWIN_VERSION " (LibTorch %s)\n", TorchVersion().c_str());
      return 0;
    }
    for (const std::string& library : options.libraries) LoadOperatorLibrary(library);
    if (options.operators) {
      std::printf("%s\n", DescribeOperators().dump().c_str());
      return 0;
    }
    TuneAllocator();
    TuneTorchScript();
    world = std::make_unique<World>();
    state.rank = world->rank();
    if (options.self_test) return SelfTest(*world);
    StopRequest::InstallSignalHandlers();
    state.contract = ReadContract(options.spec, options.spool,
                                  [](const char* name) { return std::getenv(name); });
    return Train(*world, state);
  } catch (...) {
    return EndJob(world.get(), state);
  }
}

}  // namespace
}  // namespace itwin::worker

int main(int argc, char** argv) { return itwin::worker::Main(argc, argv); }
