#include "agent/worker/training/compute_threads.h"

#include <dlfcn.h>

#include <cstdlib>
#include <set>
#include <string>

#include <ATen/Parallel.h>
#include <omp.h>

namespace itwin::worker {

void SetComputeThreads(int threads) {
  at::set_num_interop_threads(1);
  at::set_num_threads(threads);
  // OpenBLAS has threads of its own; it reads its environment variable when it is loaded, before
  // main.
  using Setter = void (*)(int);
  if (auto set = reinterpret_cast<Setter>(dlsym(RTLD_DEFAULT, "openblas_set_num_threads")))
    set(threads);
}

std::string ChooseBlasKernels() {
  const auto name = reinterpret_cast<char* (*)()>(dlsym(RTLD_DEFAULT, "openblas_get_corename"));
  if (name == nullptr) return "";
#if defined(__x86_64__)
  // Kernels without AVX2, by OpenBLAS's names.
  static const std::set<std::string> kOld = {
      "Katmai", "Coppermine", "Northwood",   "Prescott",  "Banias",     "Atom",         "Core2",
      "Penryn", "Dunnington", "Nehalem",     "Athlon",    "Opteron",    "Opteron_SSE3", "Barcelona",
      "Nano",   "Bobcat",     "Sandybridge", "Bulldozer", "Piledriver", "Steamroller"};
  using Hook = void (*)();
  const auto leave = reinterpret_cast<Hook>(dlsym(RTLD_DEFAULT, "gotoblas_dynamic_quit"));
  const auto enter = reinterpret_cast<Hook>(dlsym(RTLD_DEFAULT, "gotoblas_dynamic_init"));
  if (leave == nullptr || enter == nullptr || std::getenv("OPENBLAS_CORETYPE") != nullptr ||
      !kOld.contains(name()) || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return name();
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512cd");
  for (const char* kernels : {"SkylakeX", "Haswell"}) {
    if (kernels == std::string("SkylakeX") && !avx512) continue;
    setenv("OPENBLAS_CORETYPE", kernels, 1);
    leave();
    enter();                                    // reads the variable
    if (name() == std::string(kernels)) break;  // else this build of OpenBLAS does not have them
  }
  unsetenv("OPENBLAS_CORETYPE");
#endif
  return name();
}

void UseOneComputeThreadHere() {
  at::init_num_threads();  // LibTorch does it at a thread's first use and would undo the next line
  omp_set_num_threads(1);
}

}  // namespace itwin::worker
