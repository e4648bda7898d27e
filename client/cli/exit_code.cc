#include "client/cli/exit_code.h"

namespace itwin::cli {

int ExitCodeOf(const absl::Status& status) {
  switch (static_cast<int>(status.code())) {
    case static_cast<int>(absl::StatusCode::kOk): return kOk;
    case static_cast<int>(absl::StatusCode::kInvalidArgument):
    case static_cast<int>(absl::StatusCode::kOutOfRange): return kUsage;
    case static_cast<int>(absl::StatusCode::kNotFound): return kNotFound;
    case static_cast<int>(absl::StatusCode::kUnauthenticated):
    case static_cast<int>(absl::StatusCode::kPermissionDenied): return kNotAllowed;
    case static_cast<int>(absl::StatusCode::kUnavailable):
    case static_cast<int>(absl::StatusCode::kDeadlineExceeded): return kUnreachable;
    case static_cast<int>(absl::StatusCode::kCancelled): return kInterrupted;
    default: return kOther;
  }
}

int ExitCodeOf(v1::JobState state) { return state == v1::JOB_STATE_SUCCEEDED ? kOk : kUnsuccessful; }

}  // namespace itwin::cli
