// Gives the training loop its batches in order. When gathering a batch takes a noticeable share of
// a step, a thread gathers the next one while the loop computes; for small data that would cost
// more than it saves.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "agent/worker/data/dataset.h"
#include "agent/worker/training/sampler.h"

namespace itwin::worker {

class BatchSource {
 public:
  // The dataset must outlive it. With `stand_in`, a batch without samples for this rank holds one
  // that does not count (local_samples stays 0).
  BatchSource(const Dataset& dataset, int rank, int ranks, bool stand_in = false)
      : dataset_(dataset), rank_(rank), ranks_(ranks), stand_in_(stand_in) {}
  ~BatchSource();

  // Goes to global batch `first` of the order, which must outlive the use of it.
  void Start(const EpochOrder& order, int64_t first);

  struct Item {
    Batch batch;  // empty when local_samples is 0 and there is no stand-in
    int64_t local_samples = 0;
    int64_t global_samples = 0;
  };
  // The next global batch's part of this rank. Throws what the dataset throws.
  Item Next();

  // Returns when the thread gathers nothing.
  void WaitIdle();

  double waited_seconds() const { return waited_seconds_; }
  bool threaded() const { return thread_.joinable(); }
  // Now, instead of by measurement.
  void UseThread();

 private:
  Item Gather(int64_t g) const;
  void Run();
  void Decide(double gather_seconds, double between_seconds);

  const Dataset& dataset_;
  const int rank_, ranks_;
  const bool stand_in_;

  // The loop's.
  const EpochOrder* order_ = nullptr;
  int64_t next_ = 0;
  double waited_seconds_ = 0;
  int measured_ = 0;
  double gather_seconds_ = 0, between_seconds_ = 0;
  double last_returned_ = 0;

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  int64_t wanted_ = -1;  // batch the thread shall gather; -1: none
  std::optional<Item> ready_;
  std::exception_ptr error_;
  bool busy_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace itwin::worker
