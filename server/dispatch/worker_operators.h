#pragma once

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"

namespace itwin::server {

// What the LibTorch of a site's worker can do, as `itwin-worker --operators` says it there. Asked for when the first model
// needs it, as that starts a LibTorch. Thread-safe.
class WorkerOperators {
 public:
  using Ask = std::function<absl::StatusOr<std::string>()>;  // gives that JSON
  // `where`: of the JSON, for messages.
  WorkerOperators(std::string where, Ask ask) : where_(std::move(where)), ask_(std::move(ask)) {}

  // Now, for those that have the JSON at hand. kInvalidArgument: it is something else.
  absl::Status Load() ABSL_LOCKS_EXCLUDED(mu_);

  struct Missing {
    std::string libtorch;  // its version
    std::vector<std::string> names;
  };
  // Those of `operators` ("aten::add.Tensor"; without an overload any will do) that it does not have. None when it could not be
  // asked: then the worker finds out.
  Missing WhatLacks(absl::Span<const std::string> operators) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  absl::Status LoadOnce() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::string where_;
  absl::Mutex mu_;
  Ask ask_ ABSL_GUARDED_BY(mu_);  // empty: was asked
  std::string libtorch_ ABSL_GUARDED_BY(mu_);
  std::set<std::string, std::less<>> names_ ABSL_GUARDED_BY(mu_);  // empty: not known
};

}  // namespace itwin::server
