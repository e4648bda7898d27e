#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

namespace itwin::benchmark {

inline double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// One figure is one line of JSON on stdout; deploy/bench.sh gathers them. `reference` is what the value is held
// against, in the same unit, measured in the same run (0: none); everything else a program prints is for people.
inline void PrintFigure(const std::string& name, double value, const std::string& unit, double reference,
                        int runs, double paired_ratio = 0) {
  // Where every run measured both, turn by turn, the median of the ratios is steadier than the ratio of medians.
  const double ratio = paired_ratio > 0 ? paired_ratio : reference > 0 ? value / reference : 0;
  std::printf("{\"name\":\"%s\",\"value\":%.6g,\"unit\":\"%s\",\"reference\":%.6g,\"ratio\":%.4g,\"runs\":%d}\n",
              name.c_str(), value, unit.c_str(), reference, ratio, runs);
  std::fflush(stdout);
}

}  // namespace itwin::benchmark
