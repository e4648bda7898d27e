#include "agent/scheduler/bounded_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace itwin::agent {

absl::Status BoundedLog::Open(const std::string& path, int64_t limit) {
  ITWIN_ASSIGN_OR_RETURN(file_, OpenFile(path, O_WRONLY | O_CREAT | O_APPEND));
  path_ = path;
  limit_ = limit;
  return absl::OkStatus();
}

void BoundedLog::Write(absl::string_view bytes) {
  const int64_t room = closed_ ? 0 : std::min<int64_t>(limit_ - written_, static_cast<int64_t>(bytes.size()));
  absl::string_view kept = bytes.substr(0, static_cast<size_t>(room));
  while (!kept.empty()) {
    const ssize_t got = write(file_.get(), kept.data(), kept.size());
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    written_ += got;
    kept.remove_prefix(static_cast<size_t>(got));
  }
  const bool failed = !kept.empty();
  const int64_t lost = static_cast<int64_t>(bytes.size()) - room + static_cast<int64_t>(kept.size());
  dropped_ += lost;
  if (lost > 0 && !closed_) {
    closed_ = true;
    const std::string why = failed ? "There is no space left for this log"
                                   : absl::StrCat("This log has reached its limit of ", limit_, " bytes");
    WriteAll(file_.get(), absl::StrCat("\n[itwin] ", why, "; what follows is not kept, dropped.json counts it.\n"),
             path_).IgnoreError();  // on a full disk dropped.json says it
  }
}

}  // namespace itwin::agent
