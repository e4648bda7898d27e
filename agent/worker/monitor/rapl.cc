#include "agent/worker/monitor/rapl.h"

#include <algorithm>
#include <fstream>
#include <optional>

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;

std::optional<uint64_t> ReadNumber(const fs::path& path) {
  uint64_t value = 0;
  if (std::ifstream(path) >> value) return value;
  return std::nullopt;
}

}  // namespace

Rapl::Rapl(const fs::path& root) {
  std::error_code error;
  bool any = false;
  std::vector<fs::path> zones;
  for (fs::directory_iterator it(root, error), end; !error && it != end; it.increment(error)) {
    // "intel-rapl:0" is a package, "intel-rapl:0:1" a part of it; "intel-rapl-mmio:0" the same again.
    if (it->path().filename().string().starts_with("intel-rapl:")) zones.push_back(it->path());
  }
  std::sort(zones.begin(), zones.end());
  for (const fs::path& zone : zones) {
    std::string name;
    std::ifstream(zone / "name") >> name;
    // Cores and graphics are part of the package; the memory is not.
    if (!name.starts_with("package") && name != "dram") continue;
    any = true;
    const auto value = ReadNumber(zone / "energy_uj");
    const auto range = ReadNumber(zone / "max_energy_range_uj");
    if (value && range) counters_.push_back({zone / "energy_uj", *range, *value, 0});
  }
  if (counters_.empty()) {
    why_ = any ? "the processors' energy counters are readable by root only"
               : "the processors of this node have no energy counters";
  }
}

double Rapl::Joules() {
  double joules = 0;
  for (Counter& counter : counters_) {
    if (const auto value = ReadNumber(counter.path)) {
      const uint64_t used = *value >= counter.last ? *value - counter.last
                                                   : *value + counter.range - counter.last;
      counter.joules += static_cast<double>(used) * 1e-6;
      counter.last = *value;
    }
    joules += counter.joules;
  }
  return joules;
}

}  // namespace itwin::worker
