// How the stored numbers of an array become values, as the attributes of the CF conventions say.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace itwin::worker {

// All but scale and offset are in stored ("packed") numbers, as CF has it, and apply before these
// two. The caller gives them as the array's own type has them: -99.9 in a float array is not the
// double -99.9.
struct CellDecoding {
  std::vector<double> missing;                              // missing_value and _FillValue
  double least = -std::numeric_limits<double>::infinity();  // valid_min, valid_max, valid_range
  double most = std::numeric_limits<double>::infinity();
  double scale = 1, offset = 0;

  bool IsPacked() const { return scale != 1 || offset != 0; }
  bool MarksMissing() const { return !missing.empty() || !std::isinf(least) || !std::isinf(most); }
  void Narrow(double lowest, double highest) {
    least = std::max(least, lowest);
    most = std::min(most, highest);
  }
  // NaN for a missing cell.
  float operator()(double stored) const {
    if (std::isnan(stored) || stored < least || stored > most ||
        std::find(missing.begin(), missing.end(), stored) != missing.end()) {
      return std::numeric_limits<float>::quiet_NaN();
    }
    return static_cast<float>(IsPacked() ? stored * scale + offset : stored);
  }
};

}  // namespace itwin::worker
