#pragma once

#include <functional>
#include <ostream>

// Where a command prints, and what may be printed there.
namespace itwin::cli {

struct Terminal {
  std::ostream* out = nullptr;
  std::ostream* err = nullptr;
  bool out_is_terminal = false;
  bool err_is_terminal = false;
  bool color = false;    // out_is_terminal, NO_COLOR not set, TERM not "dumb"
  bool unicode = false;  // the locale's character set is UTF-8
  std::function<int()> width = [] { return 80; };  // columns now; asked again for each drawing, so resizing works
};

// Of this process: stdout and stderr, their nature, the locale (setlocale was called).
Terminal ProcessTerminal();

}  // namespace itwin::cli
