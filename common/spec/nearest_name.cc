#include "common/spec/nearest_name.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace itwin {
namespace {

constexpr size_t kMaxWord = 64;        // longer ones are not typing errors
constexpr size_t kMaxListedNames = 16;
constexpr size_t kShortestPrefix = 3;

std::string Normalised(absl::string_view word) {
  std::string out;
  for (char c : word) {
    if (c != '-' && c != '_') out += absl::ascii_tolower(static_cast<unsigned char>(c));
  }
  return out;
}

// Optimal string alignment.
size_t Edits(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  for (size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replace = d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, replace});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

}  // namespace

std::optional<std::string> NearestName(absl::string_view word, const std::vector<std::string>& candidates) {
  if (word.empty() || word.size() > kMaxWord) return std::nullopt;
  const std::string meant = Normalised(word);
  const size_t allowed = std::max<size_t>(1, meant.size() / 3);
  std::optional<std::string> best;
  size_t best_edits = allowed + 1;
  for (const std::string& candidate : candidates) {
    if (candidate.size() > kMaxWord) continue;
    const std::string name = Normalised(candidate);
    const size_t edits = Edits(meant, name);
    // One edit of a word of one or two letters is another word.
    if (edits >= best_edits || edits >= std::max(meant.size(), name.size())) continue;
    best_edits = edits;
    best = candidate;
  }
  if (best || meant.size() < kShortestPrefix) return best;
  // Nothing is near, but it may be the beginning of just one.
  for (const std::string& candidate : candidates) {
    if (Normalised(candidate.substr(0, kMaxWord)).rfind(meant, 0) != 0) continue;
    if (best) return std::nullopt;
    best = candidate;
  }
  return best;
}

std::string UnknownNameHint(absl::string_view word, const std::vector<std::string>& candidates) {
  if (std::optional<std::string> nearest = NearestName(word, candidates)) {
    return absl::StrCat("did you mean '", *nearest, "'?");
  }
  if (candidates.empty()) return "no name is known here";
  if (candidates.size() > kMaxListedNames) {
    return absl::StrCat("use one of ",
                        absl::StrJoin(candidates.begin(), candidates.begin() + kMaxListedNames, ", "), ", ...");
  }
  return absl::StrCat(candidates.size() == 1 ? "use " : "use one of ", absl::StrJoin(candidates, ", "));
}

std::string ListNames(const std::vector<std::string>& names, size_t most) {
  const size_t shown = std::min(most, names.size());
  return absl::StrCat(absl::StrJoin(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(shown), ", "),
                      names.size() > shown ? absl::StrCat(" and ", names.size() - shown, " more") : "");
}

}  // namespace itwin
