#include "agent/worker/monitor/node_monitor.h"

#include <gtest/gtest.h>

namespace itwin::worker {
namespace {

constexpr char kMemory[] =
    "MemTotal:       24680000 kB\nMemFree:  1 kB\nMemAvailable:   20000000 kB\n";
constexpr char kNetwork[] =
    "Inter-|   Receive                                                |  Transmit\n"
    " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop "
    "fifo colls\n"
    "    lo: 5000       1    0    0    0     0          0         0     5000       1    0    0    "
    "0     0\n"
    "  eth0: 1000      10    0    0    0     0          0         0      300      10    0    0    "
    "0     0\n"
    "   ib0:7         10    0    0    0     0          0         0      3      10    0    0    0   "
    "  0\n";

TEST(NodeMonitor, ReadsTheKernelsTexts) {
  const NodeSample sample = ParseNodeSample("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n", kMemory,
                                            "0.42 0.30 0.20 1/200 123\n", kNetwork);
  EXPECT_EQ(sample.cpu_total, 1000u);
  EXPECT_EQ(sample.cpu_busy, 150u);
  EXPECT_EQ(sample.memory_total_bytes, 24680000ull * 1024);
  EXPECT_EQ(sample.memory_available_bytes, 20000000ull * 1024);
  EXPECT_EQ(sample.load, 0.42);
  EXPECT_EQ(sample.network_received_bytes, 1007u);  // not the loopback
  EXPECT_EQ(sample.network_sent_bytes, 303u);
}

TEST(NodeMonitor, TurnsTwoSamplesIntoRates) {
  NodeSample before, after;
  before = {
      .cpu_busy = 100, .cpu_total = 1000, .network_received_bytes = 500, .network_sent_bytes = 100};
  after = {.cpu_busy = 250,
           .cpu_total = 1200,
           .memory_total_bytes = 100,
           .memory_available_bytes = 30,
           .load = 2,
           .network_received_bytes = 1500,
           .network_sent_bytes = 50};
  const auto metrics = NodeMetrics(before, after, 2);
  EXPECT_EQ(metrics.at("node/cpu_percent"), 75);
  EXPECT_EQ(metrics.at("node/memory_bytes"), 70);
  EXPECT_EQ(metrics.at("node/net_received_bytes_per_second"), 500);
  EXPECT_EQ(metrics.at("node/net_sent_bytes_per_second"), 0) << "a counter that went back";
}

TEST(NodeMonitor, MissingFilesAreZero) {
  const NodeSample sample = ParseNodeSample("", "", "", "");
  EXPECT_EQ(sample.cpu_total, 0u);
  EXPECT_FALSE(NodeMetrics(sample, sample, 1).contains("node/cpu_percent"));
}

}  // namespace
}  // namespace itwin::worker
