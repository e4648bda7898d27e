#include "client/cli/terminal.h"

#include <langinfo.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <iostream>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"

namespace itwin::cli {

Terminal ProcessTerminal() {
  Terminal terminal;
  terminal.out = &std::cout;
  terminal.err = &std::cerr;
  const char* term = getenv("TERM");
  const bool dumb = term == nullptr || absl::string_view(term) == "dumb" || *term == '\0';
  terminal.out_is_terminal = isatty(STDOUT_FILENO) && !dumb;
  terminal.err_is_terminal = isatty(STDERR_FILENO) && !dumb;
  const char* no_color = getenv("NO_COLOR");
  terminal.color = terminal.out_is_terminal && (no_color == nullptr || *no_color == '\0');
  terminal.unicode = absl::EqualsIgnoreCase(nl_langinfo(CODESET), "UTF-8");
  terminal.width = [] {
    winsize size{};
    for (int fd : {STDOUT_FILENO, STDERR_FILENO}) {
      if (ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return static_cast<int>(size.ws_col);
    }
    return 80;
  };
  return terminal;
}

}  // namespace itwin::cli
