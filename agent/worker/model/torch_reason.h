// What LibTorch's errors say, without its backtrace.
#pragma once

#include <exception>
#include <string>

namespace itwin::worker {

// Without space around it, and no longer than a person reads.
std::string ReasonOf(const std::exception& error);
std::string FirstLineOf(const std::exception& error);

}  // namespace itwin::worker
