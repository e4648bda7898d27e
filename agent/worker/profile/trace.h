// A trace of some steps of all ranks in the Chrome format, which Perfetto and chrome://tracing open:
// one process per rank, one line for the training thread and one for each communicator, all on rank
// 0's clock.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "agent/worker/dist/collective_log.h"
#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// What the training thread does; used by it alone.
class Trace {
 public:
  // Of the next `steps` steps.
  void Start(int64_t steps) { steps_left_ = steps; }
  bool active() const { return steps_left_ > 0; }

  void Add(const char* name, double start, double end) { events_.push_back({name, 0, start, end}); }
  void EndStep(double start, double end) {
    events_.push_back({"step", 0, start, end});
    --steps_left_;
  }
  std::vector<CollectiveLog::Event> Take() { return std::exchange(events_, {}); }

 private:
  int64_t steps_left_ = 0;
  std::vector<CollectiveLog::Event> events_;
};

// Seconds to add to this rank's steady clock to get rank 0's, by ping-pong: the exchange with the
// shortest round trip counts. Every rank calls it.
double ClockOffset(Communicator& communicator);

// The events of this rank's threads, gathered from all ranks: the whole file on rank 0, "" on the
// others. Every rank calls it.
struct TraceLane {
  std::string name;  // "training", "gradients"
  std::vector<CollectiveLog::Event> events;
};
std::string GatherTrace(const std::vector<TraceLane>& lanes, const std::string& host, double offset,
                        Communicator& communicator);

}  // namespace itwin::worker
