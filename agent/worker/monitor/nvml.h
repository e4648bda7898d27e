// NVIDIA's management library, loaded at run time: nothing of it is needed to build, and a node
// without it is an ordinary node.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace itwin::worker {

// One reading of one GPU; what the device does not tell is absent.
struct GpuSample {
  int index = 0;
  std::optional<double> utilization_percent = {}, memory_bytes = {}, memory_total_bytes = {};
  std::optional<double> sm_clock_mhz = {}, memory_clock_mhz = {};
  std::optional<double> temperature_celsius = {}, power_watts = {};
  std::optional<double> energy_joules = {};  // since the driver was loaded
};

class Nvml {
 public:
  // Null, with the reason in `*why`, where there is no library or no GPU. `library` is for tests.
  // Only the GPUs of `indices` are looked at; empty: all.
  static std::unique_ptr<Nvml> Open(const std::vector<int>& indices, std::string* why,
                                    const std::string& library = "libnvidia-ml.so.1");
  ~Nvml();
  Nvml(const Nvml&) = delete;

  std::vector<GpuSample> Sample() const;
  std::vector<std::string> names() const;  // "NVIDIA H100 80GB HBM3"

 private:
  struct Functions;
  Nvml() = default;

  void* library_ = nullptr;
  std::unique_ptr<Functions> functions_;
  std::vector<std::pair<int, void*>> devices_;  // index, handle
};

// Which GPUs of this node the job was given: "0,2" of SLURM_JOB_GPUS or CUDA_VISIBLE_DEVICES. Empty
// when that is not told by number.
std::vector<int> ParseGpuIndices(const std::string& text);

}  // namespace itwin::worker
