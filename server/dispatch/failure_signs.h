#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

// What the last lines of an attempt's standard error give away about its end: which rank failed first, on which node, and
// whether it was the node's fault. Pure; reads what srun, mpirun, NCCL, CUDA and the kernel print.
namespace itwin::server {

struct FailureSigns {
  std::optional<int> rank;  // the first that a launcher complains of
  std::string host;         // of that rank; "" when nobody says
  // A line that speaks of broken hardware ("uncorrectable ECC error"), as it was printed; "" when there is none.
  std::string hardware;
  // Whose it is: the node that line names, or the only one there was. "" when it cannot be told.
  std::string bad_node;
};

// `nodes`: where the attempt ran, when known.
FailureSigns ReadSigns(absl::string_view stderr_tail, absl::Span<const std::string> nodes);

// Nodes that the next attempt stays away from, newest first: at most `kMaxAvoidedNodes`, and never so many that fewer than
// `needed` of the partition's `available` nodes are left (0: size not known). `asked` are the user's own: always in, never
// counted.
inline constexpr size_t kMaxAvoidedNodes = 8;
std::vector<std::string> NodesToAvoid(const std::vector<std::string>& asked,
                                      const std::vector<std::vector<std::string>>& bad_by_attempt, int needed,
                                      int available);

}  // namespace itwin::server
