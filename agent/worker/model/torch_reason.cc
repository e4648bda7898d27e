#include "agent/worker/model/torch_reason.h"

#include <c10/util/Exception.h>

namespace itwin::worker {
namespace {

constexpr size_t kMaxBytes = 2000;

std::string WithoutBacktrace(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

}  // namespace

std::string FirstLineOf(const std::exception& error) {
  const std::string reason = WithoutBacktrace(error);
  return reason.substr(0, reason.find('\n'));
}

std::string ReasonOf(const std::exception& error) {
  std::string reason = WithoutBacktrace(error);
  reason.erase(0, reason.find_first_not_of(" \n"));
  reason.erase(reason.find_last_not_of(" \n") + 1);
  if (reason.size() > kMaxBytes) {  // the end of a TorchScript error says what happened
    reason = reason.substr(0, kMaxBytes / 2) + " … " + reason.substr(reason.size() - kMaxBytes / 2);
  }
  return reason;
}

}  // namespace itwin::worker
