// Samples this node once a second into node-<host>.jsonl: processors, memory, network and disks from
// /proc, GPUs through NVML, energy of the processors through RAPL. One per node: the first rank there
// has it.
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
#include <vector>

#include "agent/worker/monitor/nvml.h"

namespace itwin::worker {

// Counters of one moment.
struct NodeSample {
  uint64_t cpu_busy = 0, cpu_total = 0;  // clock ticks of all processors since boot
  uint64_t memory_total_bytes = 0, memory_available_bytes = 0;
  double load = 0;                                              // of the last minute
  uint64_t network_received_bytes = 0, network_sent_bytes = 0;  // all interfaces but loopback
  uint64_t disk_read_bytes = 0, disk_written_bytes = 0;         // all disks of the node itself
};

// Reads the texts of /proc/stat, /proc/meminfo, /proc/loadavg, /proc/net/dev and /proc/diskstats;
// what is missing stays 0.
NodeSample ParseNodeSample(std::string_view stat, std::string_view meminfo,
                           std::string_view loadavg, std::string_view net_dev,
                           std::string_view diskstats = "");

// The metrics of the time between two samples: node/cpu_percent (100 = all processors busy),
// node/memory_bytes (used), node/memory_total_bytes, node/load, node/net_received_bytes_per_second,
// node/net_sent_bytes_per_second, node/disk_read_bytes_per_second,
// node/disk_written_bytes_per_second.
std::map<std::string, double> NodeMetrics(const NodeSample& before, const NodeSample& after,
                                          double seconds);

// node/gpu<i>_utilization_percent, _memory_bytes, _memory_total_bytes, _sm_clock_mhz,
// _memory_clock_mhz, _temperature_celsius, _power_watts: what the device tells.
std::map<std::string, double> GpuMetrics(const std::vector<GpuSample>& samples);

// What a node has used since its monitor began; absent, with the reason, where it cannot be read.
struct NodeEnergy {
  double seconds = 0;
  std::optional<double> gpu_joules, cpu_joules;
  std::string gpu_note, cpu_note;
  std::vector<std::string> gpus;
};

// Energy of GPUs from readings: by their counters, else by power times time.
class GpuEnergy {
 public:
  void Add(const std::vector<GpuSample>& samples, double time);
  std::optional<double> joules() const;

 private:
  struct Device {
    double time = 0, joules = 0;
    std::optional<double> counter, watts;
  };
  std::map<int, Device> devices_;
};

// Starts its thread at once; the destructor joins it. A file that cannot be written ends the
// sampling, with one line on stderr: it never ends the training.
class NodeMonitor {
 public:
  NodeMonitor(const std::filesystem::path& spool, std::string host);
  ~NodeMonitor();

  // Takes a last reading and ends the sampling.
  NodeEnergy Stop();

 private:
  void Run(const std::filesystem::path& path);

  const std::string host_;
  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;
  NodeEnergy energy_;   // the thread's until it is joined
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace itwin::worker
