#pragma once

#include <string>
#include <vector>

#include "client/cli/session.h"
#include "client/cli/terminal.h"

namespace itwin::cli {

// Parses and runs one command line (without the program's name); returns the exit code. Everything printed goes to
// `terminal`; `connect` makes the client, so that tests bring their own.
int RunCommandLine(const std::vector<std::string>& arguments, const Terminal& terminal, const Session::Connect& connect);

}  // namespace itwin::cli
