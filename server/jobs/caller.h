#pragma once

#include <string>

namespace itwin::server {

// Who asks: the name of the token, and whether it may act on everybody's jobs.
struct Caller {
  std::string name;
  bool admin = false;
};

}  // namespace itwin::server
