// CUDA's runtime and NCCL as NcclLibraries wants them, over the simulated GPU's streams and memory.
// Ranks are threads. As with NCCL, a collective is done when all ranks' streams have come to it, and a
// message when its receiver's stream has: who orders them wrongly waits for ever.
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "agent/worker/dist/in_process_communicator.h"
#include "tests/testing/simulated_gpu.h"
#include "tests/testing/simulated_streams.h"

namespace {

using namespace itwin::worker;
using namespace itwin::worker::testing;

struct UniqueId {
  char bytes[128];
};

struct Comm {
  std::shared_ptr<InProcessGroup> group;
  std::unique_ptr<InProcessCommunicator> ranks;
  std::atomic<bool> failed = false;
  std::atomic<int> under_way = 0;
};

ElementType TypeOf(int nccl_type) {
  switch (nccl_type) {
    case 4:
      return ElementType::kInt64;
    case 6:
      return ElementType::kFloat16;
    case 7:
      return ElementType::kFloat32;
    case 8:
      return ElementType::kFloat64;
    case 9:
      return ElementType::kBfloat16;
    default:
      return ElementType::kByte;
  }
}
Reduction OpOf(int op) { return op == 0 ? Reduction::kSum : Reduction::kMax; }

std::mutex groups_mutex;
std::map<int, std::weak_ptr<InProcessGroup>> groups;

// Memory of the device as a buffer of the host, while it lives.
struct Seen {
  Seen(const void* address, size_t count, int type)
      : bytes(SimulatedBytes(address, count * static_cast<size_t>(SizeInBytes(TypeOf(type))), "NCCL")),
        buffer{bytes.get(), static_cast<int64_t>(count), TypeOf(type)} {}
  std::shared_ptr<char> bytes;
  Buffer buffer;
};

std::atomic<int64_t> takes_microseconds = 200;
std::atomic<bool> fails = false;

template <typename F>
int Give(void* comm, void* stream, F work) {
  auto* c = static_cast<Comm*>(comm);
  ++c->under_way;
  static_cast<SimulatedStream*>(stream)->Give([c, work] {
    std::this_thread::sleep_for(std::chrono::microseconds(takes_microseconds));
    try {
      if (fails) {
        c->failed = true;
      } else {
        work(*c->ranks);
      }
    } catch (const std::exception&) {  // another rank has aborted
      c->failed = true;
    }
    --c->under_way;
  });
  return 0;
}

using MarkPointer = std::shared_ptr<SimulatedMark>;

}  // namespace

void itwin::worker::testing::SetNcclTakes(std::chrono::microseconds time) { takes_microseconds = time.count(); }
void itwin::worker::testing::SetNcclFails(bool do_fail) { fails = do_fail; }

extern "C" {

int cudaGetDeviceCount(int* count) {
  *count = kSimulatedGpus;
  return 0;
}
int cudaSetDevice(int) { return 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) {
  *stream = new SimulatedStream;
  return 0;
}
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamWaitEvent(void* stream, void* event, unsigned) {
  static_cast<SimulatedStream*>(stream)->WaitFor(*static_cast<MarkPointer*>(event));
  return 0;
}
int cudaEventCreateWithFlags(void** event, unsigned) {
  *event = new MarkPointer;
  return 0;
}
int cudaEventDestroy(void* event) {
  delete static_cast<MarkPointer*>(event);
  return 0;
}
int cudaEventRecord(void* event, void* stream) {
  *static_cast<MarkPointer*>(event) = static_cast<SimulatedStream*>(stream)->Mark();
  return 0;
}
const char* cudaGetErrorString(int) { return "an error of the simulated CUDA"; }

int ncclGetUniqueId(UniqueId* id) {
  static std::atomic<int> next = 1;
  const int number = next++;
  std::memcpy(id->bytes, &number, sizeof(number));
  return 0;
}
int ncclCommInitRank(void** comm, int size, UniqueId id, int rank) {
  int number = 0;
  std::memcpy(&number, id.bytes, sizeof(number));
  auto c = std::make_unique<Comm>();
  {
    std::lock_guard lock(groups_mutex);
    c->group = groups[number].lock();
    if (!c->group) groups[number] = c->group = std::make_shared<InProcessGroup>(size);
  }
  c->ranks = std::make_unique<InProcessCommunicator>(c->group, rank);
  c->ranks->Barrier()->Wait();
  *comm = c.release();
  return 0;
}
// What is under way still uses it: tests have few of them.
int ncclCommDestroy(void*) { return 0; }
int ncclCommAbort(void* comm) {
  static_cast<Comm*>(comm)->group->Fail();
  return 0;
}
int ncclCommGetAsyncError(void* comm, int* error) {
  *error = static_cast<Comm*>(comm)->failed ? 6 : 0;  // ncclRemoteError
  return 0;
}
const char* ncclGetErrorString(int) { return "remote process exited or there was a network error"; }

int ncclAllReduce(const void* from, void* to, size_t count, int type, int op, void* comm, void* stream) {
  return Give(comm, stream, [=](InProcessCommunicator& ranks) {
    const Seen in(from, count, type), out(to, count, type);
    if (from != to) std::memcpy(out.buffer.data, in.buffer.data, static_cast<size_t>(SizeInBytes(in.buffer)));
    ranks.AllReduce(out.buffer, OpOf(op))->Wait();
  });
}
int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, void* comm, void* stream) {
  return Give(comm, stream, [=](InProcessCommunicator& ranks) {
    const Seen in(from, count, type), out(to, count, type);
    if (from != to) std::memcpy(out.buffer.data, in.buffer.data, static_cast<size_t>(SizeInBytes(in.buffer)));
    ranks.Broadcast(out.buffer, root)->Wait();
  });
}
int ncclAllGather(const void* from, void* to, size_t count, int type, void* comm, void* stream) {
  return Give(comm, stream, [=](InProcessCommunicator& ranks) {
    const Seen in(from, count, type), out(to, count * static_cast<size_t>(ranks.size()), type);
    ranks.AllGather(in.buffer, out.buffer)->Wait();
  });
}
int ncclReduceScatter(const void* from, void* to, size_t count, int type, int op, void* comm, void* stream) {
  return Give(comm, stream, [=](InProcessCommunicator& ranks) {
    const Seen in(from, count * static_cast<size_t>(ranks.size()), type), out(to, count, type);
    ranks.ReduceScatter(in.buffer, out.buffer, OpOf(op))->Wait();
  });
}
int ncclSend(const void* from, size_t count, int type, int to, void* comm, void* stream) {
  return Give(comm, stream, [=](InProcessCommunicator& ranks) {
    const Seen in(from, count, type);
    char answer = 0;
    ranks.Send(in.buffer, to)->Wait();
    ranks.Recv({&answer, 1}, to)->Wait();
  });
}
int ncclRecv(void* to, size_t count, int type, int from, void* comm, void* stream) {
  return Give(comm, stream, [=](InProcessCommunicator& ranks) {
    const Seen out(to, count, type);
    char answer = 1;
    ranks.Recv(out.buffer, from)->Wait();
    ranks.Send({&answer, 1}, from)->Wait();
  });
}

}  // extern "C"
