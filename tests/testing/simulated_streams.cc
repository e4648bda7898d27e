#include "tests/testing/simulated_streams.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace itwin::worker::testing {
namespace {

// No address that a processor takes.
constexpr uintptr_t kFirstAddress = uintptr_t{1} << 60;
constexpr size_t kGap = 4096;  // between two pieces, so that running over an end is noticed

struct Piece {
  size_t bytes;
  std::shared_ptr<char> host;
  SimulatedStream* stream;
  std::vector<SimulatedStream*> recorded;
};

struct Memory {
  std::mutex mutex;
  uintptr_t next = kFirstAddress;
  std::map<uintptr_t, Piece> pieces;
};
Memory& TheMemory() {
  static auto* memory = new Memory;
  return *memory;
}

}  // namespace

void SimulatedMark::Set() {
  std::lock_guard lock(mutex_);
  set_ = true;
  changed_.notify_all();
}
void SimulatedMark::Wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return set_; });
}
bool SimulatedMark::passed() {
  std::lock_guard lock(mutex_);
  return set_;
}

SimulatedStream::SimulatedStream() : thread_([this] { Run(); }) { thread_.detach(); }

void SimulatedStream::Give(std::function<void()> work) {
  std::lock_guard lock(mutex_);
  queue_.push_back(std::move(work));
  changed_.notify_one();
}

std::shared_ptr<SimulatedMark> SimulatedStream::Mark() {
  auto mark = std::make_shared<SimulatedMark>();
  Give([mark] { mark->Set(); });
  return mark;
}

void SimulatedStream::WaitFor(std::shared_ptr<SimulatedMark> mark) {
  Give([mark = std::move(mark)] { mark->Wait(); });
}

void SimulatedStream::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return !queue_.empty(); });
    const std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    work();
    lock.lock();
  }
}

uintptr_t SimulatedAllocate(size_t bytes, SimulatedStream& stream) {
  Memory& memory = TheMemory();
  char* host = static_cast<char*>(std::malloc(bytes + 1));
  std::memset(host, 0xff, bytes + 1);  // not a number
  std::lock_guard lock(memory.mutex);
  const uintptr_t address = memory.next;
  memory.next += (bytes / 64 + 1) * 64 + kGap;
  memory.pieces[address] = {bytes, std::shared_ptr<char>(host, std::free), &stream, {}};
  return address;
}

void SimulatedFree(uintptr_t address) {
  Memory& memory = TheMemory();
  std::unique_lock lock(memory.mutex);
  const Piece& piece = memory.pieces.at(address);
  SimulatedStream& stream = *piece.stream;
  const std::vector<SimulatedStream*> recorded = piece.recorded;
  lock.unlock();
  for (SimulatedStream* other : recorded) stream.WaitFor(other->Mark());
  stream.Give([address, &memory] {
    std::lock_guard inner(memory.mutex);
    memory.pieces.erase(address);
  });
}

void SimulatedRecord(uintptr_t address, SimulatedStream& stream) {
  Memory& memory = TheMemory();
  std::lock_guard lock(memory.mutex);
  memory.pieces.at(address).recorded.push_back(&stream);
}

std::shared_ptr<char> SimulatedBytes(const void* address, size_t bytes, const char* what) {
  if (bytes == 0) return nullptr;
  const auto at = reinterpret_cast<uintptr_t>(address);
  Memory& memory = TheMemory();
  std::lock_guard lock(memory.mutex);
  auto found = memory.pieces.upper_bound(at);
  if (found != memory.pieces.begin()) {
    --found;
    const size_t offset = at - found->first;
    if (offset + bytes <= found->second.bytes)
      return {found->second.host, found->second.host.get() + offset};
  }
  std::fprintf(stderr, "simulated GPU: %s: %zu bytes at %#zx are not, or no longer, its memory\n", what,
               bytes, static_cast<size_t>(at));
  std::abort();
}

}  // namespace itwin::worker::testing
