#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

// Names in messages: those that people mistype are answered with the nearest one there is. Pure.
namespace itwin {

// The candidate with the fewest edits (insert, delete, replace, swap of neighbours; case, '-' and '_' do not
// count) from `word`, if it is near enough to be meant: about one edit per three letters. Else the only candidate that
// begins with `word`, if it has at least three letters.
std::optional<std::string> NearestName(absl::string_view word, const std::vector<std::string>& candidates);

// A clause for an error message: "did you mean 'adam'?", or "use one of sgd, adam, adamw" when nothing is near.
std::string UnknownNameHint(absl::string_view word, const std::vector<std::string>& candidates);

// "a, b and 3 more": at most `most` of them.
std::string ListNames(const std::vector<std::string>& names, size_t most);

}  // namespace itwin
