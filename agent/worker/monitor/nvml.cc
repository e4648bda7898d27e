#include "agent/worker/monitor/nvml.h"

#include <dlfcn.h>

#include <algorithm>
#include <charconv>
#include <type_traits>

namespace itwin::worker {

// As nvml.h declares them; the library keeps these names and layouts across versions.
struct Nvml::Functions {
  struct Utilization {
    unsigned int gpu, memory;  // percent
  };
  struct Memory {
    unsigned long long total, free, used;  // bytes
  };
  static constexpr int kSmClock = 1, kMemoryClock = 2, kTemperatureOfGpu = 0;

  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  const char* (*error_string)(int) = nullptr;
  int (*device_count)(unsigned int*) = nullptr;
  int (*device_handle)(unsigned int, void**) = nullptr;
  int (*device_name)(void*, char*, unsigned int) = nullptr;
  int (*utilization)(void*, Utilization*) = nullptr;
  int (*memory)(void*, Memory*) = nullptr;
  int (*clock)(void*, int, unsigned int*) = nullptr;
  int (*temperature)(void*, int, unsigned int*) = nullptr;
  int (*power)(void*, unsigned int*) = nullptr;              // milliwatts
  int (*energy)(void*, unsigned long long*) = nullptr;       // millijoules
};

std::unique_ptr<Nvml> Nvml::Open(const std::vector<int>& indices, std::string* why,
                                 const std::string& library) {
  std::unique_ptr<Nvml> nvml(new Nvml);
  nvml->library_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (nvml->library_ == nullptr) {
    *why = "no NVIDIA driver on this node";
    return nullptr;
  }
  nvml->functions_ = std::make_unique<Functions>();
  Functions& f = *nvml->functions_;
  const auto load = [&nvml](const char* name, auto& function) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(
        dlsym(nvml->library_, name));
  };
  load("nvmlInit_v2", f.init);
  load("nvmlShutdown", f.shutdown);
  load("nvmlErrorString", f.error_string);
  load("nvmlDeviceGetCount_v2", f.device_count);
  load("nvmlDeviceGetHandleByIndex_v2", f.device_handle);
  load("nvmlDeviceGetName", f.device_name);
  load("nvmlDeviceGetUtilizationRates", f.utilization);
  load("nvmlDeviceGetMemoryInfo", f.memory);
  load("nvmlDeviceGetClockInfo", f.clock);
  load("nvmlDeviceGetTemperature", f.temperature);
  load("nvmlDeviceGetPowerUsage", f.power);
  load("nvmlDeviceGetTotalEnergyConsumption", f.energy);
  if (f.init == nullptr || f.device_count == nullptr || f.device_handle == nullptr) {
    f.shutdown = nullptr;
    *why = library + " is not NVIDIA's management library";
    return nullptr;
  }
  if (const int result = f.init(); result != 0) {
    f.shutdown = nullptr;
    *why = "the NVIDIA driver does not answer: " +
           std::string(f.error_string ? f.error_string(result) : "unknown error");
    return nullptr;
  }
  unsigned int count = 0;
  f.device_count(&count);
  // Inside a control group the library numbers what is left; then the job's numbers do not fit.
  std::vector<int> wanted = indices;
  for (const int index : indices) {
    if (index >= static_cast<int>(count)) wanted.clear();
  }
  if (wanted.empty()) {
    for (unsigned int i = 0; i < count; ++i) wanted.push_back(static_cast<int>(i));
  }
  for (const int index : wanted) {
    void* device = nullptr;
    if (f.device_handle(static_cast<unsigned int>(index), &device) == 0) {
      nvml->devices_.emplace_back(index, device);
    }
  }
  if (nvml->devices_.empty()) {
    *why = "no GPU on this node";
    return nullptr;
  }
  return nvml;
}

Nvml::~Nvml() {
  if (functions_ && functions_->shutdown != nullptr) functions_->shutdown();
  if (library_ != nullptr) dlclose(library_);
}

std::vector<GpuSample> Nvml::Sample() const {
  const Functions& f = *functions_;
  std::vector<GpuSample> samples;
  for (const auto& [index, device] : devices_) {
    GpuSample sample{.index = index};
    if (Functions::Utilization u{}; f.utilization && f.utilization(device, &u) == 0) {
      sample.utilization_percent = u.gpu;
    }
    if (Functions::Memory m{}; f.memory && f.memory(device, &m) == 0) {
      sample.memory_bytes = static_cast<double>(m.used);
      sample.memory_total_bytes = static_cast<double>(m.total);
    }
    unsigned int value = 0;
    if (f.clock && f.clock(device, Functions::kSmClock, &value) == 0) sample.sm_clock_mhz = value;
    if (f.clock && f.clock(device, Functions::kMemoryClock, &value) == 0)
      sample.memory_clock_mhz = value;
    if (f.temperature && f.temperature(device, Functions::kTemperatureOfGpu, &value) == 0)
      sample.temperature_celsius = value;
    if (f.power && f.power(device, &value) == 0) sample.power_watts = value / 1000.0;
    if (unsigned long long mj = 0; f.energy && f.energy(device, &mj) == 0)
      sample.energy_joules = static_cast<double>(mj) / 1000.0;
    samples.push_back(sample);
  }
  return samples;
}

std::vector<std::string> Nvml::names() const {
  std::vector<std::string> names;
  for (const auto& [index, device] : devices_) {
    char name[96] = {};
    if (functions_->device_name) functions_->device_name(device, name, sizeof(name) - 1);
    names.emplace_back(name);
  }
  return names;
}

std::vector<int> ParseGpuIndices(const std::string& text) {
  std::vector<int> indices;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    int index = 0;
    const auto [stop, error] = std::from_chars(text.data() + at, text.data() + end, index);
    if (error != std::errc() || stop != text.data() + end || index < 0) return {};
    indices.push_back(index);
    at = end + 1;
  }
  return indices;
}

}  // namespace itwin::worker
