#pragma once

// Broken invariants end the process: going on would turn a bug into a wrong record.
namespace itwin {
[[noreturn]] void CheckFailed(const char* file, int line, const char* expression);
}  // namespace itwin

#define ITWIN_CHECK(condition) \
  (static_cast<bool>(condition) ? void(0) : ::itwin::CheckFailed(__FILE__, __LINE__, #condition))
