// Whether this run has been asked to save and end: by the stop file, by a signal, or because the
// wall limit is near.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace itwin::worker {

class StopRequest {
 public:
  // `file` may be empty: it is then not looked for (ranks beyond the first leave that to rank 0).
  StopRequest(std::filesystem::path file, std::optional<double> deadline);

  // True once asked; stays true. `reserve_seconds` is how long before the deadline saving must
  // begin. Cheap: the file is looked for at most four times a second.
  bool Poll(double reserve_seconds);

  // Why, as a sentence's beginning: "the stop file appeared". Empty when not asked.
  const std::string& reason() const { return reason_; }

  // The reason is the deadline.
  bool near_deadline() const { return near_deadline_; }

  // SIGTERM, SIGUSR1 and SIGUSR2 ask every StopRequest of the process.
  static void InstallSignalHandlers();

 private:
  const std::filesystem::path file_;
  const std::optional<double> deadline_;
  double next_look_ = 0;
  bool near_deadline_ = false;
  std::string reason_;
};

}  // namespace itwin::worker
