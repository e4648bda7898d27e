#include "agent/worker/training/stop_request.h"

#include <unistd.h>

#include <chrono>
#include <csignal>

namespace itwin::worker {
namespace {

constexpr double kLookSeconds = 0.25;

volatile std::sig_atomic_t received_signal = 0;

const char* NameOf(int signal) {
  return signal == SIGTERM ? "SIGTERM" : signal == SIGUSR1 ? "SIGUSR1" : "SIGUSR2";
}

double Now(auto clock) {
  return std::chrono::duration<double>(decltype(clock)::now().time_since_epoch()).count();
}

}  // namespace

StopRequest::StopRequest(std::filesystem::path file, std::optional<double> deadline)
    : file_(std::move(file)), deadline_(deadline) {}

bool StopRequest::Poll(double reserve_seconds) {
  if (!reason_.empty()) return true;
  if (received_signal != 0) {
    reason_ = std::string("the signal ") + NameOf(received_signal) + " asked for it";
    return true;
  }
  const double now = Now(std::chrono::steady_clock());
  if (now < next_look_) return false;
  next_look_ = now + kLookSeconds;
  if (!file_.empty() && access(file_.c_str(), F_OK) == 0) {
    reason_ = "the stop file appeared";
  } else if (deadline_ && Now(std::chrono::system_clock()) + reserve_seconds >= *deadline_) {
    reason_ = "the wall-time limit is near";
    near_deadline_ = true;
  }
  return !reason_.empty();
}

void StopRequest::InstallSignalHandlers() {
  struct sigaction action {};
  action.sa_handler = [](int signal) { received_signal = signal; };
  action.sa_flags = SA_RESTART;
  for (int signal : {SIGTERM, SIGUSR1, SIGUSR2}) sigaction(signal, &action, nullptr);
}

}  // namespace itwin::worker
