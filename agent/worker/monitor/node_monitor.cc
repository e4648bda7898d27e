#include "agent/worker/monitor/node_monitor.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "agent/worker/checkpoint/durable_file.h"
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
                         ReadProc("/proc/loadavg"), ReadProc("/proc/net/dev"));
}

}  // namespace

NodeSample ParseNodeSample(std::string_view stat, std::string_view meminfo,
                           std::string_view loadavg, std::string_view net_dev) {
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
  return metrics;
}

NodeMonitor::NodeMonitor(const std::filesystem::path& spool, std::string host)
    : host_(std::move(host)),
      thread_([this, path = spool / ("node-" + host_ + ".jsonl")] { Run(path); }) {}

NodeMonitor::~NodeMonitor() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  thread_.join();
}

void NodeMonitor::Run(const std::filesystem::path& path) {
  try {
    OutputFile file(path, /*append=*/true);
    NodeSample before = Sample();
    auto before_time = std::chrono::steady_clock::now();
    std::unique_lock lock(mutex_);
    while (!stop_.wait_until(lock, before_time + kInterval, [&] { return stopping_; })) {
      const NodeSample after = Sample();
      const auto now = std::chrono::steady_clock::now();
      const auto metrics =
          NodeMetrics(before, after, std::chrono::duration<double>(now - before_time).count());
      before = after;
      before_time = now;
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
