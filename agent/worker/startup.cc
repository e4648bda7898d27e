#include "agent/worker/startup.h"

#include <malloc.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <set>
#include <vector>

#include <ATen/Context.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <torch/version.h>

#include "agent/worker/training/compute_threads.h"

namespace torch::jit {
std::atomic<bool>&
getProfilingMode();  // torch/csrc/jit/runtime/graph_executor.h, which costs 10 s to compile
}

namespace itwin::worker {

void TuneAllocator() {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the largest that glibc takes
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
  mallopt(M_TOP_PAD, 64 << 20);
}

void MakeDeterministic() {
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);  // cuBLAS reads it with its first call
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
}

void TuneTorchScript() { torch::jit::getProfilingMode() = false; }

Machine SetUpMachine(Communicator& communicator, int cpus_per_rank) {
  struct Rank {
    char host[256] = {};
    cpu_set_t cpus;
  };
  Rank mine;
  gethostname(mine.host, sizeof(mine.host) - 1);
  CPU_ZERO(&mine.cpus);
  if (sched_getaffinity(0, sizeof(mine.cpus), &mine.cpus) != 0) {
    for (long c = 0; c < sysconf(_SC_NPROCESSORS_ONLN) && c < CPU_SETSIZE; ++c)
      CPU_SET(c, &mine.cpus);
  }
  std::vector<Rank> all(communicator.size());
  communicator
      .AllGather(
          BufferOf(std::span(reinterpret_cast<char*>(&mine), sizeof(mine))),
          BufferOf(std::span(reinterpret_cast<char*>(all.data()), all.size() * sizeof(Rank))))
      ->Wait();

  Machine machine;
  machine.host = mine.host;
  machine.local_size = 0;
  std::set<std::string> hosts;
  int sharing = 0;  // local ranks that may run on some of our processors
  for (int r = 0; r < communicator.size(); ++r) {
    hosts.insert(all[r].host);
    if (machine.host != all[r].host) continue;
    if (r < communicator.rank()) ++machine.local_rank;
    ++machine.local_size;
    cpu_set_t both;
    CPU_AND(&both, &mine.cpus, &all[r].cpus);
    if (CPU_COUNT(&both) > 0) ++sharing;
  }
  machine.nodes = static_cast<int>(hosts.size());
  const int cpus = CPU_COUNT(&mine.cpus);
  machine.threads =
      std::max(1, cpus_per_rank > 0 ? std::min(cpus_per_rank, cpus) : cpus / std::max(1, sharing));
  machine.blas_kernels = ChooseBlasKernels();
  SetComputeThreads(machine.threads);
  return machine;
}

double MeasureBlas() {
  constexpr int64_t kSize = 512;
  const at::Tensor a = at::full({kSize, kSize}, 0.5f), b = at::full({kSize, kSize}, 0.25f);
  at::mm(a, b);
  double best = 1e9;
  for (int i = 0; i < 3; ++i) {
    // Time of the processor, not of the clock: other work on this machine does not count.
    const auto now = [] {
      timespec t{};
      clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
      return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
    };
    const double start = now();
    at::mm(a, b);
    best = std::min(best, now() - start);
  }
  return 2.0 * kSize * kSize * kSize / best / 1e9;
}

std::string SlowBlasWarning(double gflops) {
  char text[400];
  std::snprintf(
      text, sizeof(text),
      "WARNING: the BLAS library does %.1f Gflop/s per thread, which is as slow as the reference "
      "BLAS; "
      "training will be up to 17 times slower than it could be. Install OpenBLAS beside LibTorch "
      "(Debian: apt-get install libopenblas0-pthread; elsewhere: load its module).",
      gflops);
  return text;
}

std::string TorchVersion() { return TORCH_VERSION; }

}  // namespace itwin::worker
