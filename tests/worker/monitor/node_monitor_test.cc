#include "agent/worker/monitor/node_monitor.h"

#include <chrono>
#include <cstdlib>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/monitor/rapl.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::Scratch;

constexpr char kDisks[] =
    "   8       0 sda 10 0 100 5 20 0 200 7 0 0 0\n"
    "   8       1 sda1 10 0 100 5 20 0 200 7 0 0 0\n"
    " 259       0 nvme0n1 1 0 8 1 1 0 16 1 0 0 0\n"
    " 259       1 nvme0n1p1 1 0 8 1 1 0 16 1 0 0 0\n"
    " 253       0 dm-0 1 0 1000 1 1 0 1000 1 0 0 0\n"
    "   7       0 loop0 1 0 1000 1 1 0 1000 1 0 0 0\n";

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
                                            "0.42 0.30 0.20 1/200 123\n", kNetwork, kDisks);
  EXPECT_EQ(sample.cpu_total, 1000u);
  EXPECT_EQ(sample.cpu_busy, 150u);
  EXPECT_EQ(sample.memory_total_bytes, 24680000ull * 1024);
  EXPECT_EQ(sample.memory_available_bytes, 20000000ull * 1024);
  EXPECT_EQ(sample.load, 0.42);
  EXPECT_EQ(sample.network_received_bytes, 1007u);  // not the loopback
  EXPECT_EQ(sample.network_sent_bytes, 303u);
  EXPECT_EQ(sample.disk_read_bytes, 108u * 512);  // neither partitions nor what lies on disks
  EXPECT_EQ(sample.disk_written_bytes, 216u * 512);
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

// A library with the names and layouts of NVIDIA's, for two GPUs: the first tells all and counts 2.5 J
// more each time it is asked, the second tells only its power.
constexpr char kFakeNvml[] = R"(
static int began = 0;
static unsigned long long energy = 1000;
int nvmlInit_v2(void) { began = 1; return FAIL; }
int nvmlShutdown(void) { began = 0; return 0; }
const char* nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "?"; }
int nvmlDeviceGetCount_v2(unsigned int* n) { *n = COUNT; return began ? 0 : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int i, void** d) { *d = (void*)(unsigned long)(i + 1); return 0; }
int nvmlDeviceGetName(void* d, char* name, unsigned int n) {
  const char* text = "Fake GPU";
  unsigned int i = 0;
  for (; text[i] && i + 1 < n; ++i) name[i] = text[i];
  name[i] = 0;
  return 0;
}
struct u { unsigned int gpu, memory; };
struct m { unsigned long long total, free, used; };
int nvmlDeviceGetUtilizationRates(void* d, struct u* v) { v->gpu = 87; v->memory = 3; return d == (void*)1 ? 0 : 3; }
int nvmlDeviceGetMemoryInfo(void* d, struct m* v) { v->total = 80; v->free = 50; v->used = 30; return d == (void*)1 ? 0 : 3; }
int nvmlDeviceGetClockInfo(void* d, int kind, unsigned int* v) { *v = kind == 1 ? 1980 : 2619; return d == (void*)1 ? 0 : 3; }
int nvmlDeviceGetTemperature(void* d, int kind, unsigned int* v) { *v = 61; return d == (void*)1 && kind == 0 ? 0 : 3; }
int nvmlDeviceGetPowerUsage(void* d, unsigned int* v) { *v = 300500; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void* d, unsigned long long* v) { *v = energy += 2500; return d == (void*)1 ? 0 : 3; }
)";

std::string BuildFakeNvml(const Scratch& scratch, int count, int failure) {
  scratch.Write("nvml.c", kFakeNvml);
  const std::string library = scratch / ("nvml-" + std::to_string(count) + ".so");
  const std::string command = "cc -shared -fPIC -DCOUNT=" + std::to_string(count) +
                              " -DFAIL=" + std::to_string(failure) + " -o '" + library + "' '" +
                              (scratch / "nvml.c").string() + "'";
  EXPECT_EQ(std::system(command.c_str()), 0);
  return library;
}

TEST(Nvml, ReadsWhatEachDeviceTells) {
  const Scratch scratch;
  const std::string library = BuildFakeNvml(scratch, 2, 0);
  std::string why;
  const auto nvml = Nvml::Open({}, &why, library);
  ASSERT_TRUE(nvml) << why;
  EXPECT_EQ(nvml->names(), (std::vector<std::string>{"Fake GPU", "Fake GPU"}));
  const auto metrics = GpuMetrics(nvml->Sample());
  EXPECT_EQ(metrics.at("node/gpu0_utilization_percent"), 87);
  EXPECT_EQ(metrics.at("node/gpu0_memory_bytes"), 30);
  EXPECT_EQ(metrics.at("node/gpu0_memory_total_bytes"), 80);
  EXPECT_EQ(metrics.at("node/gpu0_sm_clock_mhz"), 1980);
  EXPECT_EQ(metrics.at("node/gpu0_memory_clock_mhz"), 2619);
  EXPECT_EQ(metrics.at("node/gpu0_temperature_celsius"), 61);
  EXPECT_EQ(metrics.at("node/gpu1_power_watts"), 300.5);
  EXPECT_FALSE(metrics.contains("node/gpu1_utilization_percent"));

  // The first by its counter, the second by power times time.
  GpuEnergy energy;
  EXPECT_FALSE(energy.joules());
  energy.Add(nvml->Sample(), 0);
  energy.Add(nvml->Sample(), 2);
  EXPECT_DOUBLE_EQ(energy.joules().value(), 2.5 * 2 + 2 * 300.5);
}

TEST(Nvml, OnlyTheJobsGpusAreLookedAt) {
  const Scratch scratch;
  const std::string library = BuildFakeNvml(scratch, 2, 0);
  std::string why;
  const auto one = Nvml::Open({1}, &why, library);
  ASSERT_TRUE(one);
  ASSERT_EQ(one->Sample().size(), 1u);
  EXPECT_EQ(one->Sample()[0].index, 1);
  EXPECT_EQ(Nvml::Open({5}, &why, library)->Sample().size(), 2u) << "numbers of a larger node";
  EXPECT_EQ(ParseGpuIndices("0,2"), (std::vector<int>{0, 2}));
  EXPECT_TRUE(ParseGpuIndices("GPU-8f6d").empty());
  EXPECT_TRUE(ParseGpuIndices("").empty());
}

TEST(Nvml, SaysWhyThereIsNone) {
  const Scratch scratch;
  std::string why;
  EXPECT_FALSE(Nvml::Open({}, &why, scratch / "none.so"));
  EXPECT_EQ(why, "no NVIDIA driver on this node");
  EXPECT_FALSE(Nvml::Open({}, &why, BuildFakeNvml(scratch, 0, 0)));
  EXPECT_EQ(why, "no GPU on this node");
  EXPECT_FALSE(Nvml::Open({}, &why, BuildFakeNvml(scratch, 1, 9)));
  EXPECT_THAT(why, HasSubstr("Driver Not Loaded"));
  EXPECT_FALSE(Nvml::Open({}, &why, "libm.so.6"));
  EXPECT_THAT(why, HasSubstr("not NVIDIA's"));
}

TEST(Rapl, SumsPackagesAndMemoryAcrossWrapAround) {
  const Scratch scratch;
  const auto zone = [&](const std::string& name, const std::string& kind, uint64_t value) {
    std::filesystem::create_directories(scratch / name);
    scratch.Write(name + "/name", kind + "\n");
    scratch.Write(name + "/energy_uj", std::to_string(value) + "\n");
    scratch.Write(name + "/max_energy_range_uj", "10000000\n");
  };
  zone("intel-rapl:0", "package-0", 9'000'000);
  zone("intel-rapl:0:0", "core", 100);
  zone("intel-rapl:0:1", "dram", 5);
  zone("intel-rapl-mmio:0", "package-0", 1);
  Rapl rapl(scratch.path());
  ASSERT_TRUE(rapl.readable());
  EXPECT_EQ(rapl.Joules(), 0);
  zone("intel-rapl:0", "package-0", 1'000'000);  // has begun again: 2 J
  zone("intel-rapl:0:0", "core", 50'000'000);    // part of the package
  zone("intel-rapl:0:1", "dram", 500'005);
  EXPECT_DOUBLE_EQ(rapl.Joules(), 2.5);
  EXPECT_DOUBLE_EQ(rapl.Joules(), 2.5);
  EXPECT_THAT(Rapl(scratch / "none").why(), HasSubstr("no energy counters"));
  std::filesystem::create_directories(scratch / "closed/intel-rapl:0");
  scratch.Write("closed/intel-rapl:0/name", "package-0\n");
  EXPECT_THAT(Rapl(scratch / "closed").why(), HasSubstr("root only"));
}

TEST(NodeMonitor, WritesALineAndTellsWhatItCouldNotRead) {
  const Scratch scratch;
  NodeMonitor monitor(scratch.path(), "n1");
  const auto file = scratch / "node-n1.jsonl";
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (scratch.Read("node-n1.jsonl").empty() && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
  }
  EXPECT_THAT(scratch.Read("node-n1.jsonl"), HasSubstr("\"node/disk_read_bytes_per_second\":"));
  const NodeEnergy energy = monitor.Stop();
  EXPECT_GT(energy.seconds, 0.9);
  EXPECT_TRUE(energy.gpu_joules || !energy.gpu_note.empty());
  EXPECT_TRUE(energy.cpu_joules || !energy.cpu_note.empty());
}

}  // namespace
}  // namespace itwin::worker
