#include "agent/worker/monitor/node_monitor.h"

#include <cctype>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/monitor/rapl.h"
#include "agent/worker/report/metric_sink.h"

namespace itwin::worker {
namespace {

constexpr auto kInterval = std::chrono::seconds(1);

// Files in /proc have no size, so they are read to their end.
std::string ReadProc(const char* path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return std::move(text).str();
}

uint64_t KilobytesOf(std::string_view meminfo, std::string_view key) {
  const size_t at = meminfo.find(key);
  if (at == std::string_view::npos) return 0;
  return std::strtoull(std::string(meminfo.substr(at + key.size(), 40)).c_str(), nullptr, 10);
}

NodeSample Sample() {
  return ParseNodeSample(ReadProc("/proc/stat"), ReadProc("/proc/meminfo"),
                         ReadProc("/proc/loadavg"), ReadProc("/proc/net/dev"),
                         ReadProc("/proc/diskstats"));
}

// GPUs of this node that belong to the job, where the scheduler tells them by number.
std::vector<int> GpusOfJob() {
  for (const char* name : {"SLURM_JOB_GPUS", "CUDA_VISIBLE_DEVICES"}) {
    if (const char* value = std::getenv(name)) {
      if (auto indices = ParseGpuIndices(value); !indices.empty()) return indices;
    }
  }
  return {};
}

// Disks, not their partitions: "sda", "nvme0n1"; nothing that lies on other disks.
bool IsWholeDisk(const std::string& name) {
  if (name.starts_with("nvme")) return name.find('p') == std::string::npos;
  if (name.starts_with("mmcblk")) return name.find('p') == std::string::npos;
  for (const char* kind : {"sd", "vd", "hd", "xvd"}) {
    if (name.starts_with(kind)) return !std::isdigit(static_cast<unsigned char>(name.back()));
  }
  return false;
}

}  // namespace

NodeSample ParseNodeSample(std::string_view stat, std::string_view meminfo,
                           std::string_view loadavg, std::string_view net_dev,
                           std::string_view diskstats) {
  NodeSample sample;
  {
    std::istringstream line{std::string(stat.substr(0, stat.find('\n')))};
    std::string name;
    line >> name;
    uint64_t ticks = 0;
    // user nice system idle iowait irq softirq steal; guest time is part of user time
    for (int field = 0; field < 8 && line >> ticks; ++field) {
      sample.cpu_total += ticks;
      if (field != 3 && field != 4) sample.cpu_busy += ticks;
    }
  }
  sample.memory_total_bytes = KilobytesOf(meminfo, "MemTotal:") * 1024;
  sample.memory_available_bytes = KilobytesOf(meminfo, "MemAvailable:") * 1024;
  sample.load = std::strtod(std::string(loadavg.substr(0, loadavg.find(' '))).c_str(), nullptr);
  std::istringstream lines{std::string(net_dev)};
  for (std::string line; std::getline(lines, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || line.substr(0, colon).ends_with(" lo") ||
        line.starts_with("lo:"))
      continue;
    std::istringstream fields(line.substr(colon + 1));
    uint64_t value[9] = {};
    for (uint64_t& v : value) fields >> v;
    sample.network_received_bytes += value[0];
    sample.network_sent_bytes += value[8];
  }
  std::istringstream disks{std::string(diskstats)};
  for (std::string line; std::getline(disks, line);) {
    std::istringstream fields(line);
    uint64_t major = 0, minor = 0, value[7] = {};
    std::string name;
    fields >> major >> minor >> name;
    if (!IsWholeDisk(name)) continue;
    for (uint64_t& v : value) fields >> v;
    constexpr uint64_t kSector = 512;  // of this file, whatever the disk's own
    sample.disk_read_bytes += value[2] * kSector;
    sample.disk_written_bytes += value[6] * kSector;
  }
  return sample;
}

std::map<std::string, double> NodeMetrics(const NodeSample& before, const NodeSample& after,
                                          double seconds) {
  const auto rate = [&](uint64_t from, uint64_t to) {
    return to >= from && seconds > 0 ? static_cast<double>(to - from) / seconds : 0.0;
  };
  std::map<std::string, double> metrics;
  if (after.cpu_total > before.cpu_total && after.cpu_busy >= before.cpu_busy) {
    metrics["node/cpu_percent"] = 100.0 * static_cast<double>(after.cpu_busy - before.cpu_busy) /
                                  static_cast<double>(after.cpu_total - before.cpu_total);
  }
  metrics["node/memory_bytes"] = static_cast<double>(after.memory_total_bytes) -
                                 static_cast<double>(after.memory_available_bytes);
  metrics["node/memory_total_bytes"] = static_cast<double>(after.memory_total_bytes);
  metrics["node/load"] = after.load;
  metrics["node/net_received_bytes_per_second"] =
      rate(before.network_received_bytes, after.network_received_bytes);
  metrics["node/net_sent_bytes_per_second"] =
      rate(before.network_sent_bytes, after.network_sent_bytes);
  metrics["node/disk_read_bytes_per_second"] = rate(before.disk_read_bytes, after.disk_read_bytes);
  metrics["node/disk_written_bytes_per_second"] =
      rate(before.disk_written_bytes, after.disk_written_bytes);
  return metrics;
}

std::map<std::string, double> GpuMetrics(const std::vector<GpuSample>& samples) {
  std::map<std::string, double> metrics;
  for (const GpuSample& sample : samples) {
    const std::string prefix = "node/gpu" + std::to_string(sample.index) + "_";
    for (const auto& [name, value] :
         {std::pair{"utilization_percent", sample.utilization_percent},
          {"memory_bytes", sample.memory_bytes},
          {"memory_total_bytes", sample.memory_total_bytes},
          {"sm_clock_mhz", sample.sm_clock_mhz},
          {"memory_clock_mhz", sample.memory_clock_mhz},
          {"temperature_celsius", sample.temperature_celsius},
          {"power_watts", sample.power_watts}}) {
      if (value) metrics[prefix + name] = *value;
    }
  }
  return metrics;
}

void GpuEnergy::Add(const std::vector<GpuSample>& samples, double time) {
  for (const GpuSample& sample : samples) {
    const auto [found, first] = devices_.try_emplace(sample.index);
    Device& device = found->second;
    if (!first) {
      if (sample.energy_joules && device.counter && *sample.energy_joules >= *device.counter) {
        device.joules += *sample.energy_joules - *device.counter;
      } else if (sample.power_watts && device.watts) {
        device.joules += (*sample.power_watts + *device.watts) / 2 * (time - device.time);
      }
    }
    device.time = time;
    device.counter = sample.energy_joules;
    device.watts = sample.power_watts;
  }
}

std::optional<double> GpuEnergy::joules() const {
  std::optional<double> sum;
  for (const auto& [index, device] : devices_) {
    if (device.counter || device.watts) sum = sum.value_or(0) + device.joules;
  }
  return sum;
}

NodeMonitor::NodeMonitor(const std::filesystem::path& spool, std::string host)
    : host_(std::move(host)),
      thread_([this, path = spool / ("node-" + host_ + ".jsonl")] { Run(path); }) {}

NodeMonitor::~NodeMonitor() {
  if (thread_.joinable()) Stop();
}

NodeEnergy NodeMonitor::Stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  if (thread_.joinable()) thread_.join();
  return energy_;
}

void NodeMonitor::Run(const std::filesystem::path& path) {
  try {
    const std::unique_ptr<Nvml> nvml = Nvml::Open(GpusOfJob(), &energy_.gpu_note);
    Rapl rapl;
    energy_.cpu_note = rapl.why();
    if (nvml) energy_.gpus = nvml->names();
    std::printf("energy on %s: GPUs: %s; processors: %s\n", host_.c_str(),
                nvml ? std::to_string(energy_.gpus.size()).c_str() : energy_.gpu_note.c_str(),
                rapl.readable() ? "measured" : energy_.cpu_note.c_str());
    std::fflush(stdout);

    OutputFile file(path, /*append=*/true);
    GpuEnergy gpu_energy;
    const auto start = std::chrono::steady_clock::now();
    const auto since_start = [start](std::chrono::steady_clock::time_point time) {
      return std::chrono::duration<double>(time - start).count();
    };
    if (nvml) gpu_energy.Add(nvml->Sample(), 0);
    NodeSample before = Sample();
    auto before_time = start;
    double before_joules = 0;
    std::unique_lock lock(mutex_);
    while (true) {
      const bool last =
          stop_.wait_until(lock, before_time + kInterval, [&] { return stopping_; });
      const NodeSample after = Sample();
      const auto now = std::chrono::steady_clock::now();
      const double seconds = std::chrono::duration<double>(now - before_time).count();
      auto metrics = NodeMetrics(before, after, seconds);
      if (nvml) {
        const std::vector<GpuSample> gpus = nvml->Sample();
        gpu_energy.Add(gpus, since_start(now));
        metrics.merge(GpuMetrics(gpus));
        energy_.gpu_joules = gpu_energy.joules();
        if (energy_.gpu_joules) metrics["node/gpu_energy_joules"] = *energy_.gpu_joules;
      }
      if (rapl.readable()) {
        energy_.cpu_joules = rapl.Joules();
        metrics["node/cpu_energy_joules"] = *energy_.cpu_joules;
        metrics["node/cpu_power_watts"] = (*energy_.cpu_joules - before_joules) / seconds;
        before_joules = *energy_.cpu_joules;
      }
      energy_.seconds = since_start(now);
      before = after;
      before_time = now;
      if (last) return;
      std::string line = "{\"t\":";
      char time[40];
      std::snprintf(time, sizeof(time), "%.3f", Now());
      line += time;
      line += ",\"host\":";
      AppendJsonString(line, host_);
      line += ",\"metrics\":{";
      bool first = true;
      for (const auto& [name, value] : metrics) {
        if (!first) line += ',';
        first = false;
        AppendJsonString(line, name);
        line += ':';
        AppendJsonNumber(line, value);
      }
      line += "}}\n";
      file.Write(line);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "itwin-worker: node monitoring ends: %s\n", e.what());
  }
}

}  // namespace itwin::worker
