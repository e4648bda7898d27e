#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/files.h"

namespace itwin::agent {

// stdout.log or stderr.log: the first `limit` bytes, then one sentence; the rest is counted. A full disk is treated
// like the limit. Not thread-safe.
class BoundedLog {
 public:
  absl::Status Open(const std::string& path, int64_t limit);
  void Write(absl::string_view bytes);
  int64_t dropped() const { return dropped_; }

 private:
  FileDescriptor file_;
  std::string path_;
  int64_t limit_ = 0;
  int64_t written_ = 0;
  int64_t dropped_ = 0;
  bool closed_ = false;
};

}  // namespace itwin::agent
