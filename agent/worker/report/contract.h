// Where the worker reads and writes, as docs/worker-contract.md says.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace itwin::worker {

struct Contract {
  std::filesystem::path spool;
  std::filesystem::path spec;
  std::filesystem::path work;  // inputs lie here: the spool's work/, or where the spec lies
  std::filesystem::path metrics;
  std::filesystem::path outputs;
  std::filesystem::path checkpoints;
  std::vector<std::filesystem::path> resume;  // newest first; empty: a fresh start
  std::filesystem::path stop;
  std::filesystem::path result;
  std::optional<double> deadline;  // seconds since 1970
  std::string attempt;
};

// `spec` and `spool` are the command line's, empty when absent; the environment (ITWIN_SPEC,
// ITWIN_METRICS, …) wins where it says something. Throws UserError when no spec or no spool can be
// told.
Contract ReadContract(const std::string& spec, const std::string& spool,
                      const std::function<const char*(const char*)>& environment);

}  // namespace itwin::worker
