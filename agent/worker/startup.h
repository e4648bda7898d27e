// What a rank sets up before any tensor is made, and what it finds out about its machine.
#pragma once

#include <string>

#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

struct Machine {
  std::string host;
  int local_rank = 0;  // among the ranks on this host
  int local_size = 1;
  int nodes = 1;
  int threads = 1;           // compute threads of this rank
  std::string blas_kernels;  // see ChooseBlasKernels
};

// The C library's allocator gives big blocks back to the system and fetches them again in every
// step unless told otherwise (up to 1.4 times slower). Call first.
void TuneAllocator();

// The optimising TorchScript executor delivers all gradients at the end of backward, and hangs in
// some versions.
void TuneTorchScript();

// Only algorithms of LibTorch that give the same bits each time; one that has none throws when it is
// used.
void MakeDeterministic();

// Finds host, local ranks and threads, and sets the threads. Threads are `cpus_per_rank` if that is
// above 0, else this rank's share of the processors that it may run on. Every rank calls it.
Machine SetUpMachine(Communicator& communicator, int cpus_per_rank);

// Billions of operations per second and thread of a matrix product. Below kSlowGflops it is the
// reference BLAS, which is some ten times slower than OpenBLAS.
double MeasureBlas();
inline constexpr double kSlowGflops = 6;
std::string SlowBlasWarning(double gflops);

// "1.13.1": of the LibTorch that runs.
std::string TorchVersion();

}  // namespace itwin::worker
