// Comma-separated numbers with a header line (RFC 4180: fields may be quoted, "" is a quote, lines
// end in LF or CRLF).
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "agent/worker/data/array.h"

namespace itwin::worker {

// Selected columns of a file, each array float32 [rows, columns]. With `target_is_class` (one
// target column) the targets are int64 [rows]. Throws UserError: an unknown column (with the
// nearest known one), one that the header has twice, a target that is also an input, a field that is not a number (with line and column), a line with too many or
// too few fields, no rows.
struct CsvTable {
  Array inputs;
  Array targets;
};

CsvTable ReadCsv(const std::filesystem::path& path, const std::vector<std::string>& inputs,
                 const std::vector<std::string>& targets, bool target_is_class);

}  // namespace itwin::worker
