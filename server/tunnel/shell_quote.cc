#include "server/tunnel/shell_quote.h"

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

// Means itself in every shell, wherever it stands in a word.
bool IsPlain(char c) { return absl::ascii_isalnum(static_cast<unsigned char>(c)) || absl::StrContains("_-./:,@+%", c); }

}  // namespace

absl::StatusOr<std::string> QuoteForShell(absl::string_view text) {
  if (absl::StrContains(text, '\0')) return absl::InvalidArgumentError("a word of a command may not hold a NUL byte");
  return absl::StrCat("'", absl::StrReplaceAll(text, {{"'", "'\\''"}}), "'");
}

absl::StatusOr<std::string> CommandLine(const std::vector<std::string>& argv) {
  std::string line;
  for (const std::string& word : argv) {
    bool plain = !word.empty();
    for (const char c : word) plain = plain && IsPlain(c);
    std::string quoted = word;
    if (!plain) {
      ITWIN_ASSIGN_OR_RETURN(quoted, QuoteForShell(word));
    }
    absl::StrAppend(&line, line.empty() ? "" : " ", quoted);
  }
  return line;
}

}  // namespace itwin::server
