#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/store/job_rows.h"

namespace itwin::server {

// Points packed column by column: steps and times as zigzag varints of the differences (of the differences, for steps),
// values as little-endian doubles, bit for bit. Format byte first, so that it may change. Pure.
// Packs points [first, last) of the columns.
std::string EncodePoints(const PointColumns& points, size_t first, size_t last);
// Appends to the columns. kDataLoss when the bytes are not what EncodePoints made.
absl::Status DecodePoints(absl::string_view bytes, std::vector<int64_t>* steps, std::vector<int64_t>* times_us,
                          std::vector<double>* values);

}  // namespace itwin::server
