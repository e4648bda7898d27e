// Streams and memory of the simulated GPU; see simulated_gpu.h.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace itwin::worker::testing {

// A place in a stream.
class SimulatedMark {
 public:
  void Set();
  void Wait();
  bool passed();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool set_ = false;
};

// Does what it is given in its order, in a thread of its own.
class SimulatedStream {
 public:
  SimulatedStream();
  void Give(std::function<void()> work);
  std::shared_ptr<SimulatedMark> Mark();
  void WaitFor(std::shared_ptr<SimulatedMark> mark);
  // Blocks the caller until all that was given so far is done.
  void Drain() { Mark()->Wait(); }

 private:
  void Run();
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::thread thread_;  // last; streams live as long as the program
};

// Memory of the device. `stream` is the one that was current when it was asked for.
uintptr_t SimulatedAllocate(size_t bytes, SimulatedStream& stream);
// Goes when the stream gets there, and those that it was recorded on.
void SimulatedFree(uintptr_t address);
void SimulatedRecord(uintptr_t address, SimulatedStream& stream);
// Where the bytes really lie; ends the program when they are not (or no longer) there. They stay while
// the pointer lives.
std::shared_ptr<char> SimulatedBytes(const void* address, size_t bytes, const char* what);

}  // namespace itwin::worker::testing
