// Ranks as MPI processes. The only code that includes mpi.h is this and mpi_ring.
//
// Open MPI does not progress a non-blocking collective by itself, so overlap needs a thread that
// blocks in it: the *threaded* communicator queues collectives to one communication thread; the
// *direct* one blocks the caller. Each has its own duplicated MPI communicator, so that both may be
// busy at once.
#pragma once

#include <memory>
#include <string>

#include "agent/worker/dist/collective_log.h"
#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// MPI from start to finish. One per process.
class MpiWorld {
 public:
  // Whether a launcher (mpirun, SLURM) started this process as part of a job.
  static bool Launched();

  // Calls MPI_Init_thread. Throws UserError when this MPI lacks MPI_THREAD_MULTIPLE, and when the
  // launcher started several tasks but MPI sees one (SLURM without --mpi).
  MpiWorld();
  // Finalizes; every rank must come here. Communicators must be gone.
  ~MpiWorld();
  MpiWorld(const MpiWorld&) = delete;

  int rank() const;
  int size() const;

  // Every rank calls these in the same order.
  // The log, if given, must outlive the communicator and what is split from it.
  std::unique_ptr<Communicator> MakeThreaded(CollectiveLog* log = nullptr);
  std::unique_ptr<Communicator> MakeDirect(CollectiveLog* log = nullptr);

  // Ends every rank of the job; the launcher's exit code becomes `exit_code`. May be called by any
  // thread.
  [[noreturn]] static void Abort(int exit_code);
};

}  // namespace itwin::worker
