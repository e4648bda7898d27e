#include <locale.h>
#include <signal.h>
#include <stdlib.h>

#include <exception>
#include <iostream>

#include "client/cli/command_line.h"
#include "client/cli/exit_code.h"

int main(int argc, char** argv) {
  setlocale(LC_ALL, "");
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);  // its own log lines; what matters is in our errors
  signal(SIGPIPE, SIG_IGN);  // `itwin logs | head` ends by a failed write
  // The door for what libraries throw.
  try {
    const itwin::cli::Terminal terminal = itwin::cli::ProcessTerminal();
    return itwin::cli::RunCommandLine(std::vector<std::string>(argv + 1, argv + argc), terminal,
                                      [](itwin::client::ConnectOptions options) {
                                        return itwin::client::Connect(std::move(options));
                                      });
  } catch (const std::exception& error) {
    std::cerr << "itwin: " << error.what() << "\n";
    return itwin::cli::kOther;
  }
}
