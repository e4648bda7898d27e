#include "agent/worker/dist/mpi_communicator.h"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "agent/worker/dist/half.h"
#include "agent/worker/dist/mpi_ring.h"
#include "agent/worker/dist/work_thread.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// MPI counts are int; longer buffers go in pieces.
constexpr int64_t kMaxElementsPerCall = 1 << 28;

// MPI has no 16-bit floats: they travel as a type of ours that is added by functions of ours, so the
// sum is rounded to 16 bits at every stage of the algorithm.
template <uint16_t (*To)(float), float (*From)(uint16_t), bool kMax>
void CombineHalf(void* in, void* in_out, int* count, MPI_Datatype*) {
  const auto* a = static_cast<const uint16_t*>(in);
  auto* b = static_cast<uint16_t*>(in_out);
  for (int i = 0; i < *count; ++i) {
    const float x = From(a[i]), y = From(b[i]);
    b[i] = To(kMax ? std::max(x, y) : x + y);
  }
}
struct HalfTypes {
  MPI_Datatype float16 = MPI_DATATYPE_NULL, bfloat16 = MPI_DATATYPE_NULL;
  MPI_Op sum16 = MPI_OP_NULL, max16 = MPI_OP_NULL, sum_b16 = MPI_OP_NULL, max_b16 = MPI_OP_NULL;

  HalfTypes() {
    for (MPI_Datatype* type : {&float16, &bfloat16}) {
      MPI_Type_contiguous(2, MPI_BYTE, type);
      MPI_Type_commit(type);
    }
    MPI_Op_create(CombineHalf<ToFloat16, FromFloat16, false>, 1, &sum16);
    MPI_Op_create(CombineHalf<ToFloat16, FromFloat16, true>, 1, &max16);
    MPI_Op_create(CombineHalf<ToBfloat16, FromBfloat16, false>, 1, &sum_b16);
    MPI_Op_create(CombineHalf<ToBfloat16, FromBfloat16, true>, 1, &max_b16);
  }
};
// Made at first use, after MPI_Init_thread; MPI_Finalize takes them down.
const HalfTypes& Halves() {
  static const HalfTypes halves;
  return halves;
}

MPI_Datatype TypeOf(ElementType type) {
  switch (type) {
    case ElementType::kFloat16:
      return Halves().float16;
    case ElementType::kBfloat16:
      return Halves().bfloat16;
    case ElementType::kByte:
      return MPI_BYTE;
    case ElementType::kInt64:
      return MPI_INT64_T;
    case ElementType::kFloat32:
      return MPI_FLOAT;
    case ElementType::kFloat64:
      return MPI_DOUBLE;
  }
  return MPI_DATATYPE_NULL;
}

MPI_Op OpOf(ElementType type, Reduction reduction) {
  const bool sum = reduction == Reduction::kSum;
  if (type == ElementType::kFloat16) return sum ? Halves().sum16 : Halves().max16;
  if (type == ElementType::kBfloat16) return sum ? Halves().sum_b16 : Halves().max_b16;
  return sum ? MPI_SUM : MPI_MAX;
}

template <typename F>
void InPieces(Buffer buffer, F f) {
  const int64_t element = buffer.count > 0 ? SizeInBytes(buffer) / buffer.count : 1;
  for (int64_t done = 0; done < buffer.count; done += kMaxElementsPerCall) {
    const int count = static_cast<int>(std::min(kMaxElementsPerCall, buffer.count - done));
    f(static_cast<char*>(buffer.data) + done * element, count);
  }
}

void BlockingAllReduce(MPI_Comm comm, MpiRing& ring, Buffer buffer, Reduction reduction) {
  const MPI_Datatype type = TypeOf(buffer.type);
  const MPI_Op op = OpOf(buffer.type, reduction);
  if (ring.Serves(SizeInBytes(buffer))) return ring.AllReduce(buffer.data, buffer.count, type, op);
  InPieces(buffer, [&](void* data, int count) {
    CheckMpi(MPI_Allreduce(MPI_IN_PLACE, data, count, type, op, comm), "MPI_Allreduce");
  });
}

void BlockingBroadcast(MPI_Comm comm, Buffer buffer, int root) {
  InPieces(buffer, [&](void* data, int count) {
    CheckMpi(MPI_Bcast(data, count, TypeOf(buffer.type), root, comm), "MPI_Bcast");
  });
}

void BlockingAllGather(MPI_Comm comm, MpiRing& ring, Buffer mine, Buffer all) {
  if (ring.Serves(SizeInBytes(all))) return ring.AllGather(mine.data, all.data, SizeInBytes(mine));
  if (mine.count > kMaxElementsPerCall) throw AppError("AllGather of a buffer that is too long");
  int rank = 0;
  MPI_Comm_rank(comm, &rank);
  const bool in_place = mine.data == static_cast<char*>(all.data) + rank * SizeInBytes(mine);
  CheckMpi(MPI_Allgather(in_place ? MPI_IN_PLACE : mine.data, static_cast<int>(mine.count),
                         TypeOf(mine.type), all.data, static_cast<int>(mine.count),
                         TypeOf(all.type), comm),
           "MPI_Allgather");
}

void BlockingReduceScatter(MPI_Comm comm, MpiRing& ring, Buffer all, Buffer mine,
                           Reduction reduction) {
  const MPI_Datatype type = TypeOf(mine.type);
  const MPI_Op op = OpOf(mine.type, reduction);
  if (ring.Serves(SizeInBytes(all)))
    return ring.ReduceScatter(all.data, mine.data, mine.count, type, op);
  if (mine.count > kMaxElementsPerCall)
    throw AppError("ReduceScatter to a buffer that is too long");
  CheckMpi(MPI_Reduce_scatter_block(all.data, mine.data, static_cast<int>(mine.count), type, op,
                                    comm),
           "MPI_Reduce_scatter_block");
}

class Done : public Work {
 public:
  void Wait() override {}
};

// Tells the log, if there is one, what this thread is blocked in.
class Logged {
 public:
  Logged(CollectiveLog* log, const char* operation, int64_t bytes,
         CollectiveLog::Kind kind = CollectiveLog::Kind::kCollective)
      : log_(log) {
    if (log_ != nullptr) log_->Begin(operation, bytes, kind);
  }
  Logged(CollectiveLog* log, const char* operation, const Buffer& buffer)
      : Logged(log, operation, SizeInBytes(buffer)) {}
  ~Logged() {
    if (log_ != nullptr) log_->End();
  }
  Logged(const Logged&) = delete;

 private:
  CollectiveLog* const log_;
};

// Messages that were started; they progress while any thread of this process is in MPI.
class Messages : public Work {
 public:
  Messages(CollectiveLog* log, const char* what, int64_t bytes) : log_(log), what_(what), bytes_(bytes) {}
  std::vector<MPI_Request> requests;
  void Wait() override {
    const Logged logged(log_, what_, bytes_, CollectiveLog::Kind::kMessage);
    CheckMpi(MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE),
             "MPI_Waitall");
  }

 private:
  CollectiveLog* const log_;
  const char* const what_;
  const int64_t bytes_;
};

// Shared by both kinds: owns an MPI communicator.
class MpiBase : public Communicator {
 public:
  // `message_log`: of messages, for which the thread that starts them waits.
  MpiBase(MPI_Comm owned, CollectiveLog* log, CollectiveLog* message_log)
      : log_(log), message_log_(message_log), comm_(owned), ring_(owned) {
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
  }
  ~MpiBase() override { MPI_Comm_free(&comm_); }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::unique_ptr<Work> AllReduce(Buffer buffer, Reduction reduction) override {
    return Start([=, this] {
      const Logged logged(log_, "all-reduce", buffer);
      BlockingAllReduce(comm_, ring_, buffer, reduction);
    });
  }
  std::unique_ptr<Work> Broadcast(Buffer buffer, int root) override {
    return Start([=, this] {
      const Logged logged(log_, "broadcast", buffer);
      BlockingBroadcast(comm_, buffer, root);
    });
  }
  std::unique_ptr<Work> AllGather(Buffer mine, Buffer all) override {
    return Start([=, this] {
      const Logged logged(log_, "all-gather", all);
      BlockingAllGather(comm_, ring_, mine, all);
    });
  }
  std::unique_ptr<Work> ReduceScatter(Buffer all, Buffer mine, Reduction reduction) override {
    return Start([=, this] {
      const Logged logged(log_, "reduce-scatter", all);
      BlockingReduceScatter(comm_, ring_, all, mine, reduction);
    });
  }
  std::unique_ptr<Work> Barrier() override {
    return Start([this] {
      const Logged logged(log_, "barrier", Buffer{});
      CheckMpi(MPI_Barrier(comm_), "MPI_Barrier");
    });
  }
  // Started at once by the caller, whatever collectives are queued.
  std::unique_ptr<Work> Send(Buffer buffer, int to) override {
    auto work = std::make_unique<Messages>(message_log_, "send", SizeInBytes(buffer));
    InPieces(buffer, [&](void* data, int count) {
      CheckMpi(MPI_Isend(data, count, TypeOf(buffer.type), to, 0, comm_,
                         &work->requests.emplace_back(MPI_REQUEST_NULL)),
               "MPI_Isend");
    });
    return work;
  }
  std::unique_ptr<Work> Recv(Buffer buffer, int from) override {
    auto work = std::make_unique<Messages>(message_log_, "receive", SizeInBytes(buffer));
    InPieces(buffer, [&](void* data, int count) {
      CheckMpi(MPI_Irecv(data, count, TypeOf(buffer.type), from, 0, comm_,
                         &work->requests.emplace_back(MPI_REQUEST_NULL)),
               "MPI_Irecv");
    });
    return work;
  }
  std::unique_ptr<Communicator> Split(int color, int key) override {
    MPI_Comm part = MPI_COMM_NULL;
    Start([&] {
      CheckMpi(MPI_Comm_split(comm_, color, key, &part), "MPI_Comm_split");
    })->Wait();
    return Wrap(part);
  }

 protected:
  virtual std::unique_ptr<Work> Start(std::function<void()> collective) = 0;
  // A communicator of the same kind.
  virtual std::unique_ptr<Communicator> Wrap(MPI_Comm owned) const = 0;

  CollectiveLog* const log_;  // may be null

 private:
  CollectiveLog* const message_log_;  // may be null
  MPI_Comm comm_ = MPI_COMM_NULL;
  MpiRing ring_;  // used by whom the collectives are run by
  int rank_ = 0;
  int size_ = 1;
};

MPI_Comm DuplicateOfWorld() {
  MPI_Comm comm = MPI_COMM_NULL;
  CheckMpi(MPI_Comm_dup(MPI_COMM_WORLD, &comm), "MPI_Comm_dup");
  return comm;
}

class DirectMpiCommunicator : public MpiBase {
 public:
  DirectMpiCommunicator(MPI_Comm owned, CollectiveLog* log) : MpiBase(owned, log, log) {}

 private:
  std::unique_ptr<Communicator> Wrap(MPI_Comm owned) const override {
    return std::make_unique<DirectMpiCommunicator>(owned, log_);
  }
  std::unique_ptr<Work> Start(std::function<void()> collective) override {
    collective();
    return std::make_unique<Done>();
  }
};

class ThreadedMpiCommunicator : public MpiBase {
 public:
  // Its thread writes the log, which is one thread's.
  ThreadedMpiCommunicator(MPI_Comm owned, CollectiveLog* log) : MpiBase(owned, log, nullptr) {}

 private:
  std::unique_ptr<Communicator> Wrap(MPI_Comm owned) const override {
    return std::make_unique<ThreadedMpiCommunicator>(owned, log_);
  }
  std::unique_ptr<Work> Start(std::function<void()> collective) override {
    return thread_.Start(std::move(collective));
  }

  WorkThread thread_;  // last: its work uses all of the base
};

int TasksOfLauncher() {
  for (const char* name : {"SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}) {
    if (const char* value = std::getenv(name)) return std::max(1, std::atoi(value));
  }
  return 1;
}

}  // namespace

bool MpiWorld::Launched() {
  for (const char* name :
       {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "SLURM_STEP_NUM_TASKS"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  return false;
}

MpiWorld::MpiWorld() {
  // A collective that waits for a slower rank shall not take the processor from this rank's own
  // computing.
  setenv("OMPI_MCA_mpi_yield_when_idle", "1", /*overwrite=*/0);
  int provided = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided);
  if (provided < MPI_THREAD_MULTIPLE) {
    throw UserError(
        "this MPI was built without MPI_THREAD_MULTIPLE, which the worker needs for its "
        "communication "
        "thread; load an Open MPI of version 4 or later");
  }
  const int tasks = TasksOfLauncher();
  if (tasks > 1 && size() == 1) {
    throw UserError(
        "the launcher started " + std::to_string(tasks) +
        " tasks, but MPI sees only one; start with SLURM's `--mpi=pmix` or with mpirun of the "
        "MPI that the worker was built with");
  }
}

MpiWorld::~MpiWorld() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (!finalized) MPI_Finalize();
}

int MpiWorld::rank() const {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

int MpiWorld::size() const {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

std::unique_ptr<Communicator> MpiWorld::MakeThreaded(CollectiveLog* log) {
  return std::make_unique<ThreadedMpiCommunicator>(DuplicateOfWorld(), log);
}
std::unique_ptr<Communicator> MpiWorld::MakeDirect(CollectiveLog* log) {
  return std::make_unique<DirectMpiCommunicator>(DuplicateOfWorld(), log);
}

void MpiWorld::Abort(int exit_code) {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (initialized && !finalized) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

}  // namespace itwin::worker
