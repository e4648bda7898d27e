// When to trace: the steps that the spec names, or the next ones once a file appears in the spool. It may
// hold their number and, after a space, the name that the trace is to have ("20 trace-1.json"); the same
// name again is asked for by somebody who has not seen the answer yet, and changes nothing. All ranks
// trace the same steps and then gather the trace together.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "agent/worker/dist/collective_log.h"
#include "agent/worker/dist/communicator.h"
#include "agent/worker/profile/profiler.h"

namespace itwin::worker {

// Used by the training thread.
class TraceSession {
 public:
  struct Options {
    std::filesystem::path request;  // the file; rank 0 looks for it and removes it
    std::filesystem::path outputs;  // the directory in which rank 0 writes
    std::string host;
    int64_t steps = 0;    // of the spec; 0: none
    int64_t at_step = 1;  // the first of them, counted from the start of this attempt
    std::vector<CollectiveLog*> logs;
  };
  TraceSession(Options options, Profiler& profiler, Communicator& control)
      : options_(std::move(options)), profiler_(profiler), control_(control) {}

  // Steps that the file asks for, on rank 0; 0 when there is none, and on other ranks. To be told to
  // all ranks, which then call Start() between the same two steps. Cheap.
  int64_t Asked();
  void Start(int64_t steps);
  // Around each step; `step` is that of the run. Every rank calls them.
  void BeforeStep();
  void AfterStep(int64_t step);
  // At the end: writes what was traced so far.
  void Finish(int64_t step);

 private:
  void Write(int64_t step);

  const Options options_;
  Profiler& profiler_;
  Communicator& control_;
  int64_t steps_begun_ = 0;
  bool running_ = false, of_spec_ = false;
  double next_look_ = 0;
  int64_t asked_ = 0;
  std::string name_, taken_name_;  // that the trace is to have, and that of the last one; rank 0
};

}  // namespace itwin::worker
