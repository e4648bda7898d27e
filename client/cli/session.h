#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "client/cli/output/output.h"
#include "client/cli/terminal.h"
#include "itwin/client.h"

namespace itwin::cli {

// What a command needs: the terminal, the output in the chosen form, and the gateway once it asks for it.
class Session {
 public:
  using Connect = std::function<absl::StatusOr<client::Client>(client::ConnectOptions)>;
  Session(const Terminal& terminal, client::ConnectOptions options, Connect connect, std::unique_ptr<Output> output,
          bool json)
      : terminal_(terminal), options_(std::move(options)), connect_(std::move(connect)), output_(std::move(output)),
        json_(json) {}

  const Terminal& terminal() const { return terminal_; }
  Output& output() { return *output_; }
  bool json() const { return json_; }
  // Connected at the first call: `validate` and `completion` need no gateway.
  absl::StatusOr<client::Client> Gateway() {
    if (!gateway_) {
      absl::StatusOr<client::Client> made = connect_(options_);
      if (!made.ok()) return made.status();
      gateway_ = *std::move(made);
    }
    return *gateway_;
  }

 private:
  const Terminal& terminal_;
  const client::ConnectOptions options_;
  const Connect connect_;
  const std::unique_ptr<Output> output_;
  const bool json_;
  std::optional<client::Client> gateway_;
};

}  // namespace itwin::cli
