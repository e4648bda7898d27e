#include "agent/worker/device/streams.h"

#include <chrono>
#include <thread>

#include <c10/core/impl/VirtualGuardImpl.h>

namespace itwin::worker {

namespace {
constexpr auto kPoll = std::chrono::microseconds(20);
}  // namespace

c10::Stream CurrentStream(at::Device device) {
  if (device.is_cpu()) return c10::Stream(c10::Stream::DEFAULT, device);
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

c10::Stream StreamBeside(at::Device device) {
  if (device.is_cpu()) return c10::Stream(c10::Stream::DEFAULT, device);
  return c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
}

StreamMark::StreamMark(const c10::Stream& stream) {
  if (stream.device().is_cpu()) return;
  event_ = std::make_unique<c10::Event>(stream.device_type());
  event_->record(stream);
}

void StreamMark::Wait(const std::function<void()>& meanwhile) const {
  while (!Passed()) {
    if (meanwhile) meanwhile();
    std::this_thread::sleep_for(kPoll);
  }
}

}  // namespace itwin::worker
