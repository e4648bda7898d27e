// Samples this node once a second into node-<host>.jsonl, from /proc. One per node: the first rank
// there has it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>

namespace itwin::worker {

// Counters of one moment.
struct NodeSample {
  uint64_t cpu_busy = 0, cpu_total = 0;  // clock ticks of all processors since boot
  uint64_t memory_total_bytes = 0, memory_available_bytes = 0;
  double load = 0;                                              // of the last minute
  uint64_t network_received_bytes = 0, network_sent_bytes = 0;  // all interfaces but loopback
};

// Reads the texts of /proc/stat, /proc/meminfo, /proc/loadavg and /proc/net/dev; what is missing
// stays 0.
NodeSample ParseNodeSample(std::string_view stat, std::string_view meminfo,
                           std::string_view loadavg, std::string_view net_dev);

// The metrics of the time between two samples: node/cpu_percent (100 = all processors busy),
// node/memory_bytes (used), node/memory_total_bytes, node/load, node/net_received_bytes_per_second,
// node/net_sent_bytes_per_second.
std::map<std::string, double> NodeMetrics(const NodeSample& before, const NodeSample& after,
                                          double seconds);

// Starts its thread at once; the destructor joins it. A file that cannot be written ends the
// sampling, with one line on stderr: it never ends the training.
class NodeMonitor {
 public:
  NodeMonitor(const std::filesystem::path& spool, std::string host);
  ~NodeMonitor();

 private:
  void Run(const std::filesystem::path& path);

  const std::string host_;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace itwin::worker
