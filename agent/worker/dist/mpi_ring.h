// Collectives of long buffers around a ring: every rank sends to the next and receives from the one
// before, so that all links are busy in both directions, and each carries 2 (p - 1) / p of the
// buffer's bytes per all-reduce, the least there can be (Patarasuk and Yuan, J. Parallel Distrib.
// Comput. 69, 2009). Open MPI 4 takes Rabenseifner's algorithm for them, which over TCP is slower
// at 4 nodes and much slower where the ranks are no power of two: docs/training.md has the figures.
#pragma once

#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <cstdint>
#include <vector>

namespace itwin::worker {

// Throws AppError with MPI's words unless the call succeeded.
void CheckMpi(int code, const char* call);

class MpiRing {
 public:
  // Every rank calls it. Neighbours in the ring are ranks of the same node, as far as there are
  // any.
  explicit MpiRing(MPI_Comm comm);

  // Whether a collective over `bytes` in all goes round the ring: long ones of more than two ranks
  // on several nodes. The variable ITWIN_COLLECTIVES of all ranks overrules it: "mpi" (none),
  // "ring" (long ones on one node, too). Other values throw UserError in the constructor.
  bool Serves(int64_t bytes) const { return serves_ && bytes >= size_ * kShortestPart; }

  // As in Communicator. A sum's order follows from the ranks and their nodes alone: all ranks have
  // the same bits, and a run repeats.
  void AllReduce(void* data, int64_t count, MPI_Datatype type, MPI_Op op);
  void ReduceScatter(const void* all, void* mine, int64_t count, MPI_Datatype type, MPI_Op op);
  void AllGather(const void* mine, void* all, int64_t bytes);

 private:
  static constexpr int64_t kShortestPart = 64 << 10;  // shorter ones are a matter of latency
  // Is passed on while the next is on its way. Below 64 KiB, up to which Open MPI sends over TCP
  // without asking the receiver first.
  static constexpr int64_t kSegment = 60 << 10;

  // Whose part of a buffer: elements [begin[rank], begin[rank + 1]).
  using Parts = std::vector<int64_t>;
  Parts Split(int64_t count) const;
  // What comes from the rank before at a step, and is the next step's message to the next rank.
  struct Step {
    char* into = nullptr;
    int64_t count = 0;          // elements
    const char* add = nullptr;  // is added to what came
    char* keep = nullptr;       // the sum goes there, and on from there
    int after = 0;              // messages up to this step's have left when `into` may be written
  };
  struct Elements {
    MPI_Datatype type;
    MPI_Op op;
    int64_t bytes;  // of one
  };

  int RankAt(int position) const { return order_[(position % size_ + size_) % size_]; }
  // Until this rank's part is reduced, which is kept at `mine`.
  std::vector<Step> ReduceSteps(const char* all, const Parts& parts, char* mine,
                                const Elements& elements);
  // Until all parts are everywhere.
  std::vector<Step> GatherSteps(char* all, const Parts& parts, const Elements& elements) const;
  // `first` of `count` elements is the first step's message.
  void Run(const char* first, int64_t count, const std::vector<Step>& steps,
           const Elements& elements);

  const MPI_Comm comm_;
  int rank_ = 0, size_ = 1;
  bool serves_ = false;
  std::vector<int> order_;  // ranks by position
  int position_ = 0, next_ = 0, before_ = 0;
  std::vector<char> work_[3];  // of steps in turn: received into, on its way to the next, and free
};

}  // namespace itwin::worker
