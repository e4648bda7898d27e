#include "agent/spool/lifecycle.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

using nlohmann::json;

constexpr int64_t kMaxLifecycleBytes = 1 << 20;

double Number(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : 0;
}

// Out-of-range numbers of a bad line must not become undefined behaviour.
int64_t Integer(const json& object, const char* key) {
  const double value = Number(object, key);
  return std::abs(value) < 9e15 ? static_cast<int64_t>(value) : 0;
}

std::string Text(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : std::string();
}

absl::Time TimeOf(const json& object) {
  const double t = Number(object, "t");
  return t > 0 && t < 1e11 ? absl::FromUnixMicros(static_cast<int64_t>(t * 1e6)) : absl::UnixEpoch();
}

bool ParseLine(absl::string_view line, Lifecycle* out) {
  const json record = json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
  if (!record.is_object()) return false;
  const std::string event = Text(record, "event");
  if (event == "started") {
    out->started.push_back({.time = TimeOf(record), .host = Text(record, "host"), .pid = Integer(record, "pid"),
                            .scheduler_id = Text(record, "scheduler_id")});
    return true;
  }
  if (event == "exited") {
    if (out->exited) return false;
    out->exited = ExitedRecord{.time = TimeOf(record),
                               .exit_code = static_cast<int>(Integer(record, "exit_code") & 0xffff),
                               .signal = static_cast<int>(Integer(record, "signal") & 0xff),
                               .cpu_seconds = Number(record, "cpu_seconds"),
                               .max_rss_bytes = Integer(record, "max_rss_bytes"),
                               .cause = Text(record, "cause"),
                               .message = Text(record, "message")};
    return true;
  }
  if (event == "duplicate") {
    ++out->duplicates;
    return true;
  }
  return false;
}

std::string Dump(const json& object) { return object.dump(-1, ' ', false, json::error_handler_t::replace); }

}  // namespace

double UnixSeconds(absl::Time time) { return static_cast<double>(absl::ToUnixMillis(time)) / 1000.0; }

Lifecycle ParseLifecycle(absl::string_view text) {
  Lifecycle out;
  while (true) {
    const size_t end = text.find('\n');
    if (end == absl::string_view::npos) return out;
    const absl::string_view line = text.substr(0, end);
    text.remove_prefix(end + 1);
    if (!line.empty() && !ParseLine(line, &out)) ++out.bad_lines;
  }
}

Lifecycle ReadLifecycle(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFileRange(path, 0, kMaxLifecycleBytes);
  return text.ok() ? ParseLifecycle(*text) : Lifecycle{};
}

DroppedBytes ReadDropped(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, kMaxLifecycleBytes);
  const json record = text.ok() ? json::parse(*text, nullptr, /*allow_exceptions=*/false) : json();
  if (!record.is_object()) return {};
  return {.out = Integer(record, "stdout"), .err = Integer(record, "stderr")};
}

std::string RenderDropped(const DroppedBytes& dropped) {
  return Dump({{"stdout", dropped.out}, {"stderr", dropped.err}}) + "\n";
}

std::string RenderStarted(const StartedRecord& record) {
  return Dump({{"t", UnixSeconds(record.time)}, {"event", "started"}, {"host", record.host}, {"pid", record.pid},
               {"scheduler_id", record.scheduler_id}});
}

std::string RenderExited(const ExitedRecord& record) {
  return Dump({{"t", UnixSeconds(record.time)}, {"event", "exited"}, {"exit_code", record.exit_code},
               {"signal", record.signal}, {"cpu_seconds", record.cpu_seconds},
               {"max_rss_bytes", record.max_rss_bytes}, {"cause", record.cause}, {"message", record.message}});
}

std::string RenderDuplicate(absl::Time time, const std::string& host) {
  return Dump({{"t", UnixSeconds(time)}, {"event", "duplicate"}, {"host", host}});
}

absl::Status AppendLine(const std::string& path, absl::string_view line) {
  ITWIN_ASSIGN_OR_RETURN(FileDescriptor file, OpenFile(path, O_RDWR | O_CREAT | O_APPEND));
  struct stat info;
  if (fstat(file.get(), &info) != 0) return ErrnoStatus(errno, path);
  std::string text;
  char last = '\n';
  if (info.st_size > 0 && pread(file.get(), &last, 1, info.st_size - 1) == 1 && last != '\n') text.push_back('\n');
  absl::StrAppend(&text, line, "\n");
  const absl::Status written = WriteAll(file.get(), text, path);
  if (!written.ok()) {
    // What a full disk took of the line would be a torn record; the file goes back to what it was.
    (void)!ftruncate(file.get(), info.st_size);
    return written;
  }
  if (fsync(file.get()) != 0) return ErrnoStatus(errno, path);
  return absl::OkStatus();
}

}  // namespace itwin::agent
