#include "agent/spool/fault_point.h"

#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

namespace itwin::agent {

void FaultPoint(const char* name) {
  static const char* const wanted = getenv("ITWIN_TEST_CRASH_AT");
  if (wanted == nullptr) return;
  const char* colon = strchr(wanted, ':');
  const int nth = colon == nullptr ? 1 : atoi(wanted);
  if (strcmp(colon == nullptr ? wanted : colon + 1, name) != 0) return;
  static std::atomic<int> seen{0};
  if (++seen == nth) kill(getpid(), SIGKILL);
}

}  // namespace itwin::agent
