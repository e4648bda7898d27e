// Figures of a device, read while it is already at the next work: asking for one at once would make
// the host wait until the device has done everything, and then the device wait for the host.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "agent/worker/device/streams.h"

namespace itwin::worker {

class Readback {
 public:
  explicit Readback(at::Device device);

  // Begins to read `figures`, as they are after what the current stream has been given. One at a time.
  void Start(const at::Tensor& figures);
  bool under_way() const { return mark_.has_value(); }
  // Waits for that alone.
  std::vector<double> Take(const std::function<void()>& meanwhile = {});

 private:
  const at::Device device_;
  const c10::Stream beside_;
  at::Tensor figures_, host_;
  std::optional<StreamMark> mark_;
};

}  // namespace itwin::worker
