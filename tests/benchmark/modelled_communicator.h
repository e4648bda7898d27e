// A communicator over a slow link: what is started is done at once underneath, and is called done
// when a link that takes `latency` per message and `seconds_per_byte`, one message after the other,
// would have done it.
#pragma once

#include <chrono>
#include <memory>
#include <thread>

#include "tests/worker/dist/forwarding_communicator.h"

namespace itwin::benchmark {

class ModelledCommunicator : public worker::testing::ForwardingCommunicator {
 public:
  ModelledCommunicator(worker::Communicator& inner, double latency, double seconds_per_byte)
      : ForwardingCommunicator(inner), latency_(latency), seconds_per_byte_(seconds_per_byte) {}

  std::unique_ptr<worker::Work> AllReduce(worker::Buffer buffer,
                                          worker::Reduction reduction) override {
    const auto start = std::max(Clock::now(), free_);
    const double n = inner_.size();
    const double bytes = 2 * (n - 1) / n * static_cast<double>(worker::SizeInBytes(buffer));
    free_ = start + std::chrono::duration_cast<Clock::duration>(
                        std::chrono::duration<double>(latency_ + bytes * seconds_per_byte_));
    return std::make_unique<Arrival>(inner_.AllReduce(buffer, reduction), free_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  class Arrival : public worker::Work {
   public:
    Arrival(std::unique_ptr<worker::Work> inner, Clock::time_point at)
        : inner_(std::move(inner)), at_(at) {}
    void Wait() override {
      inner_->Wait();
      std::this_thread::sleep_until(at_);
    }

   private:
    const std::unique_ptr<worker::Work> inner_;
    const Clock::time_point at_;
  };

  const double latency_, seconds_per_byte_;
  Clock::time_point free_{};
};

}  // namespace itwin::benchmark
