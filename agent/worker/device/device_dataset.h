// A dataset whose samples are on a device. The bytes go through pinned memory on a stream beside the
// computing; Gather() returns when they are there, so who gathers ahead in another thread (BatchSource)
// hides the copy.
#pragma once

#include "agent/worker/data/dataset.h"
#include "agent/worker/device/streams.h"

namespace itwin::worker {

class DeviceDataset : public Dataset {
 public:
  // With `channels_last`, arrays of four and five dimensions lie as NHWC and NDHWC. `host` must outlive
  // it; what is gathered is used on the stream that is current here.
  DeviceDataset(const Dataset& host, at::Device device, bool channels_last);

  int64_t size(Split split) const override { return host_.size(split); }
  Batch Gather(Split split, const std::vector<int64_t>& indices) const override;
  std::vector<std::string> baselines() const override { return host_.baselines(); }
  std::map<std::string, at::Tensor> BaselinePredictions(const Batch& batch) const override;
  std::map<std::string, std::vector<int64_t>> sample_shapes() const override {
    return host_.sample_shapes();
  }
  int64_t classes() const override { return host_.classes(); }
  nlohmann::json preprocessing() const override { return host_.preprocessing(); }

 private:
  const Dataset& host_;
  const at::Device device_;
  const bool channels_last_;
  const c10::Stream compute_, beside_;
};

}  // namespace itwin::worker
