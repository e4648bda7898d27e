// Ends a job in which nothing happens any more. Every rank watches itself and writes a small file
// now and then; when one has seen no step for the given time it tells what its threads and
// communicators are doing, finds out from the files which rank lags behind, and gives up.
//
// The files are read instead of asking by messages: whoever hangs cannot answer, and the network may
// be what is broken.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "agent/worker/error.h"

namespace itwin::worker {

// What a rank last said of itself.
struct RankSign {
  int rank = 0;
  std::string host;
  int64_t step = 0;
  int64_t collectives = 0;   // started, of those that every rank starts
  bool waits = false;        // is blocked in an exchange with another rank
  double age_seconds = 0;    // of the file, against the file of the one who asks
  std::vector<std::string> communicators;  // CollectiveLog::Describe() of each
};

// The sentence about a hang and the rank it is about (-1: none lags behind). A rank lags whose sign
// is older than `stale_seconds` (its process does not run), else the one with the fewest steps, then
// the fewest collectives, then one that waits for no other while others wait. `missing`: ranks without
// any sign.
struct HangVerdict {
  int rank = -1;
  std::string host = {};
  std::string message = {};
};
HangVerdict JudgeHang(const std::vector<RankSign>& signs, const std::vector<int>& missing,
                      double seconds_without_step, double stale_seconds);

class HangDetector {
 public:
  struct Options {
    std::filesystem::path directory;  // shared by all ranks; made here
    int rank = 0, ranks = 1;
    std::string host;
    double timeout_seconds = 1800;
    std::function<int64_t()> collectives;                    // started by now; any thread
    std::function<bool()> waits = {};                        // for another rank; any thread
    std::function<std::vector<std::string>()> communicators;  // for people; any thread
    // Called once, by the watching thread, after the stacks were written to stderr. Does not return
    // in production.
    std::function<void(const WorkerError&)> give_up;
  };
  // Watches from now on.
  explicit HangDetector(Options options);
  ~HangDetector();

  // The training thread is alive, and has done this many steps. Costs a few nanoseconds.
  void Beat(int64_t step) {
    step_.store(step, std::memory_order_relaxed);
    beats_.fetch_add(1, std::memory_order_relaxed);
  }

 private:
  void Run();
  void WriteSign();
  void GiveUp(double seconds);
  std::filesystem::path PathOf(int rank) const;

  const Options options_;
  std::atomic<int64_t> step_ = 0, beats_ = 0;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace itwin::worker
