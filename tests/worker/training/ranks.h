// Runs a function on several in-process ranks, each a thread.
#pragma once

#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include "agent/worker/dist/in_process_communicator.h"

namespace itwin::worker::testing {

// `rank_main(gradients, control)`. Returns what each rank threw (null: nothing). A rank that throws
// lets the others out of their collectives.
inline std::vector<std::exception_ptr> RunRanks(
    int size,
    const std::function<void(Communicator& gradients, Communicator& control)>& rank_main) {
  InProcessGroup gradients(size), control(size);
  std::vector<std::exception_ptr> errors(size);
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      InProcessCommunicator my_gradients(gradients, r), my_control(control, r);
      try {
        rank_main(my_gradients, my_control);
      } catch (...) {
        errors[r] = std::current_exception();
        gradients.Fail();
        control.Fail();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

// The same, where nothing may be thrown.
inline void RunRanksOrThrow(int size,
                            const std::function<void(Communicator&, Communicator&)>& rank_main) {
  for (const std::exception_ptr& error : RunRanks(size, rank_main)) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace itwin::worker::testing
