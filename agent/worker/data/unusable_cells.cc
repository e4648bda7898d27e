#include "agent/worker/data/unusable_cells.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr int64_t kBlockElements = 16 << 20;  // looked through at a time

// The rows of an array in memory. Windows that are views of one series give the series back.
struct Rows {
  at::Tensor values;
  int64_t per_sample = 1;
};

Rows RowsOf(const at::Tensor& values) {
  const bool overlap =
      values.dim() >= 2 && values.size(1) > 1 && values.stride(0) == values.stride(1);
  if (!overlap) return {.values = values};
  std::vector<int64_t> sizes = values.sizes().slice(1).vec(),
                       strides = values.strides().slice(1).vec();
  sizes[0] += values.size(0) - 1;
  return {.values = values.as_strided(sizes, strides), .per_sample = values.size(1)};
}

std::string CountText(int64_t count, const std::string& kind, const std::vector<int64_t>& first) {
  return std::to_string(count) + " " + kind + ", the first at " + ShapeText(first);
}

}  // namespace

void LookThrough(const at::Tensor& values, const int64_t* rows, UnusableCells* found) {
  // Either makes the sum so. The other way round it need not be, so look again.
  if (values.numel() == 0 || std::isfinite(values.sum().item<float>())) return;
  for (const auto& [bad, count, first] :
       {std::tuple{values.isnan(), &found->missing, &found->first_missing},
        {values.isinf(), &found->infinite, &found->first_infinite}}) {
    const int64_t cells = bad.sum().item<int64_t>();
    if (cells > 0 && *count == 0) {
      int64_t at = bad.reshape({-1}).to(at::kByte).argmax().item<int64_t>();
      first->assign(static_cast<size_t>(bad.dim()), 0);
      for (int64_t d = bad.dim() - 1; d >= 0; --d) {
        (*first)[static_cast<size_t>(d)] = at % bad.size(d);
        at /= bad.size(d);
      }
      first->front() = rows[first->front()];
    }
    *count += cells;
  }
}

UnusableCells FindUnusableCells(const StoredArray& array, const std::vector<int64_t>& samples,
                                const RankShare& share) {
  const Rows rows = array.streamed() ? Rows{.values = array.values} : RowsOf(array.values);
  std::vector<int64_t> used;
  for (const int64_t sample : samples) {
    const int64_t from = used.empty() ? sample : std::max(sample, used.back() + 1);
    for (int64_t row = from; row < sample + rows.per_sample; ++row) used.push_back(row);
  }
  int64_t row_elements = 1;
  for (const int64_t size : rows.values.sizes().slice(1)) row_elements *= size;
  const auto block_rows = static_cast<size_t>(
      std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, row_elements)));
  UnusableCells found;
  for (size_t first = 0, block = 0; first < used.size(); first += block_rows, ++block) {
    if (block % static_cast<size_t>(share.ranks) != static_cast<size_t>(share.rank)) continue;
    const auto count = static_cast<int64_t>(std::min(block_rows, used.size() - first));
    const int64_t* numbers = used.data() + first;
    const at::Tensor chosen =
        at::tensor(at::IntArrayRef(numbers, static_cast<size_t>(count)), at::kLong);
    if (array.streamed()) {
      LookThrough(array.Select(chosen), numbers, &found);
    } else if (numbers[count - 1] - numbers[0] == count - 1) {
      LookThrough(rows.values.narrow(0, numbers[0], count), numbers, &found);
    } else {
      LookThrough(rows.values.index_select(0, chosen), numbers, &found);
    }
  }
  if (share.ranks == 1) return found;
  // Each rank's numbers in a place of their own: the sum is exact.
  const auto dimensions = static_cast<size_t>(rows.values.dim());
  const size_t width = 2 * (1 + dimensions);
  std::vector<double> of_ranks(width * static_cast<size_t>(share.ranks), 0.0);
  double* to = of_ranks.data() + width * static_cast<size_t>(share.rank);
  for (const auto& [count, first] :
       {std::pair{found.missing, &found.first_missing}, {found.infinite, &found.first_infinite}}) {
    *to = static_cast<double>(count);
    std::copy(first->begin(), first->end(), to + 1);
    to += 1 + dimensions;
  }
  share.sum(of_ranks);
  UnusableCells all;
  for (const double* from = of_ranks.data(); from != of_ranks.data() + of_ranks.size();) {
    for (const auto& [count, first] :
         {std::pair{&all.missing, &all.first_missing}, {&all.infinite, &all.first_infinite}}) {
      if (*from > 0) {
        const std::vector<int64_t> here(from + 1, from + 1 + dimensions);
        if (*count == 0 || here < *first) *first = here;
        *count += static_cast<int64_t>(*from);
      }
      from += 1 + dimensions;
    }
  }
  return all;
}

void RefuseInfinite(const UnusableCells& cells, const std::string& array) {
  if (cells.infinite == 0) return;
  throw UserError(
      "train.data: array \"" + array + "\" has " +
      CountText(cells.infinite, cells.infinite == 1 ? "infinite cell" : "infinite cells",
                cells.first_infinite) +
      "; mend the data, or add the transform clip: {min: …, max: …} (before standardize)");
}

void RefuseUnusable(const UnusableCells& cells, const std::string& array) {
  RefuseInfinite(cells, array);
  if (cells.missing == 0) return;
  throw UserError("train.data: array \"" + array + "\" has " +
                  CountText(cells.missing,
                            cells.missing == 1 ? "missing cell (NaN)" : "missing cells (NaN)",
                            cells.first_missing) +
                  "; add the transform fill_missing: {} (before standardize), or crop them away");
}

}  // namespace itwin::worker
