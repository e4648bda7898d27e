#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace itwin {

// Adds one clause of context when an error crosses a layer: "submit job 42 to vega: <message>".
inline absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

}  // namespace itwin

#define ITWIN_RETURN_IF_ERROR(expr)                     \
  do {                                                  \
    absl::Status itwin_status_ = (expr);                \
    if (!itwin_status_.ok()) return itwin_status_;      \
  } while (false)

#define ITWIN_CONCAT_INNER_(a, b) a##b
#define ITWIN_CONCAT_(a, b) ITWIN_CONCAT_INNER_(a, b)
// ITWIN_ASSIGN_OR_RETURN(auto value, FunctionReturningStatusOr());
#define ITWIN_ASSIGN_OR_RETURN(lhs, expr) \
  ITWIN_ASSIGN_OR_RETURN_(ITWIN_CONCAT_(itwin_result_, __LINE__), lhs, expr)
#define ITWIN_ASSIGN_OR_RETURN_(result, lhs, expr)      \
  auto result = (expr);                                 \
  if (!result.ok()) return std::move(result).status();  \
  lhs = std::move(result).value()
