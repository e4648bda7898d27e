// Cells that no training can use: missing (NaN) and infinite ones. Inside data/ only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "agent/worker/data/sample_store.h"

namespace itwin::worker {

struct UnusableCells {
  int64_t missing = 0, infinite = 0;
  std::vector<int64_t> first_missing, first_infinite;  // indices; empty where there is none
};

// Adds those of float `values`, whose first dimension has the rows with these numbers.
void LookThrough(const at::Tensor& values, const int64_t* rows, UnusableCells* found);

// Of these samples (sorted) of a float array. A step that is in many windows counts once, by its
// own number. Every rank looks through a part, and all get the same answer.
UnusableCells FindUnusableCells(const StoredArray& array, const std::vector<int64_t>& samples,
                                const RankShare& share);

// Throw UserError that names the array, the number of cells and the first, and says what helps.
void RefuseInfinite(const UnusableCells& cells, const std::string& array);
void RefuseUnusable(const UnusableCells& cells, const std::string& array);

}  // namespace itwin::worker
