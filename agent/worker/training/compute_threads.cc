#include "agent/worker/training/compute_threads.h"

#include <dlfcn.h>

#include <ATen/Parallel.h>
#include <omp.h>

namespace itwin::worker {

void SetComputeThreads(int threads) {
  at::set_num_interop_threads(1);
  at::set_num_threads(threads);
  // OpenBLAS has threads of its own; it reads its environment variable when it is loaded, before main.
  using Setter = void (*)(int);
  if (auto set = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "openblas_set_num_threads"))) set(threads);
}

void UseOneComputeThreadHere() {
  at::init_num_threads();  // LibTorch does it at a thread's first use and would undo the next line
  omp_set_num_threads(1);
}

}  // namespace itwin::worker
