#pragma once

// One logger per program, to stderr: time, level, message. spdlog's own macros are not used, so that the
// library can be changed in one place.
#include <spdlog/spdlog.h>

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace itwin {

// Sets level ("debug", "info", "warning", "error") and format. Unknown level: kInvalidArgument.
absl::Status InitLog(absl::string_view program, absl::string_view level);

// The same into a file, which is kept below `max_bytes` (one older file, `<path>.1`, stays).
absl::Status InitFileLog(absl::string_view program, absl::string_view level, const std::string& path,
                         int64_t max_bytes);

namespace log {
template <typename... Args>
void Debug(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::debug(format, std::forward<Args>(args)...);
}
template <typename... Args>
void Info(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::info(format, std::forward<Args>(args)...);
}
template <typename... Args>
void Warn(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::warn(format, std::forward<Args>(args)...);
}
template <typename... Args>
void Error(spdlog::format_string_t<Args...> format, Args&&... args) {
  spdlog::error(format, std::forward<Args>(args)...);
}
}  // namespace log

}  // namespace itwin
