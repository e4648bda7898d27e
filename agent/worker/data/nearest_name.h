// "did you mean": the known name closest to a misspelt one.
#pragma once

#include <string>
#include <vector>

namespace itwin::worker {

// The known name with the smallest edit distance (letter case ignored), or "" when none is near
// enough to be meant.
std::string NearestName(const std::string& name, const std::vector<std::string>& known);

// "; did you mean \"UWND\"?", or "" when nothing is near. To be appended to an error.
std::string NearestHint(const std::string& name, const std::vector<std::string>& known);

// "a, b, c"
std::string JoinNames(const std::vector<std::string>& names);

}  // namespace itwin::worker
