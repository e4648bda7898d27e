#include "common/log.h"

#include <spdlog/sinks/rotating_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <cstdio>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace itwin {

namespace {

absl::Status UseSink(absl::string_view program, absl::string_view level, spdlog::sink_ptr sink) {
  const spdlog::level::level_enum parsed = spdlog::level::from_str(std::string(level));
  if (parsed == spdlog::level::off && level != "off") {
    return absl::InvalidArgumentError(
        absl::StrCat("log level '", level, "' is unknown; use debug, info, warning, error or off"));
  }
  auto logger = std::make_shared<spdlog::logger>(std::string(program), std::move(sink));
  logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %n %l: %v");
  logger->set_level(parsed);
  logger->flush_on(spdlog::level::debug);
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

}  // namespace

absl::Status InitLog(absl::string_view program, absl::string_view level) {
  return UseSink(program, level, std::make_shared<spdlog::sinks::stderr_sink_mt>());
}

absl::Status InitFileLog(absl::string_view program, absl::string_view level, const std::string& path,
                         int64_t max_bytes) {
  try {
    return UseSink(program, level,
                   std::make_shared<spdlog::sinks::rotating_file_sink_mt>(path, static_cast<size_t>(max_bytes) / 2, 1));
  } catch (const spdlog::spdlog_ex& error) {
    return absl::UnavailableError(absl::StrCat("cannot log into ", path, ": ", error.what()));
  }
}

void CheckFailed(const char* file, int line, const char* expression) {
  std::fprintf(stderr, "%s:%d: broken invariant: %s\n", file, line, expression);
  std::abort();
}

}  // namespace itwin
