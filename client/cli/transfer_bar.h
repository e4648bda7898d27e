#pragma once

#include "absl/time/time.h"
#include "client/cli/terminal.h"
#include "itwin/client.h"

namespace itwin::cli {

// One line on stderr, drawn again in place while files travel; nothing when stderr is no terminal.
class TransferBar {
 public:
  explicit TransferBar(const Terminal& terminal) : terminal_(terminal) {}
  ~TransferBar() { Clear(); }
  void Show(const client::TransferProgress& progress);
  void Clear();

 private:
  const Terminal& terminal_;
  absl::Time drawn_at_ = absl::InfinitePast();
  bool drawn_ = false;
};

}  // namespace itwin::cli
