// Energy of the processors, as the kernel's powercap files tell it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace itwin::worker {

class Rapl {
 public:
  // Finds the packages ("package-0") and, on servers, their memory ("dram"). Many sites let only
  // root read these files: then there are none, and why() says so.
  explicit Rapl(const std::filesystem::path& root = "/sys/class/powercap");

  bool readable() const { return !counters_.empty(); }
  const std::string& why() const { return why_; }

  // Joules since construction; counters that wrapped around once since the last call are followed.
  double Joules();

 private:
  struct Counter {
    std::filesystem::path path;
    uint64_t range = 0;  // microjoules at which it begins again
    uint64_t last = 0;
    double joules = 0;
  };
  std::vector<Counter> counters_;
  std::string why_;
};

}  // namespace itwin::worker
