// Errors of the worker. LibTorch throws, so the worker does too: anything that cannot go on throws
// a WorkerError (or whatever LibTorch throws), and main.cc is the one door that turns it into an
// exit code and result.json.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

namespace itwin::worker {

// Who has to act, and the exit code that says so (docs/worker-contract.md): the request cannot work
// (2), the training itself failed (3), memory or disk ran out (4), a node or the network did not do
// its part (5).
enum class FailureClass { kUser, kApp, kResource, kInfra };

// `what()` is a sentence for the user: what was wrong, where, what would be right.
class WorkerError : public std::runtime_error {
 public:
  WorkerError(FailureClass failure_class, const std::string& message,
              std::optional<int64_t> at_step = std::nullopt)
      : std::runtime_error(message), failure(failure_class), step(at_step) {}

  FailureClass failure;
  std::optional<int64_t> step;  // optimiser step at which it happened, if it is about one
  std::optional<int> rank;      // rank it happened on, if not the one that throws
  std::string host;             // of that rank, where it is known
};

inline WorkerError UserError(const std::string& message) {
  return WorkerError(FailureClass::kUser, message);
}
inline WorkerError AppError(const std::string& message,
                            std::optional<int64_t> step = std::nullopt) {
  return WorkerError(FailureClass::kApp, message, step);
}
inline WorkerError ResourceError(const std::string& message) {
  return WorkerError(FailureClass::kResource, message);
}

}  // namespace itwin::worker
