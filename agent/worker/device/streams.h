// Streams and events of any device, without the headers of one. On a CPU everything is done when the
// call returns: there is nothing to order, and all of this does nothing.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>

namespace itwin::worker {

// Whether copies to and from the device want memory that CUDA has pinned.
inline bool WantsPinnedMemory(at::Device device) { return device.is_cuda(); }

// The stream that this thread gives work to, and one beside it for copies or computing.
c10::Stream CurrentStream(at::Device device);
c10::Stream StreamBeside(at::Device device);

// Makes the stream the thread's current one while it lives.
class StreamScope {
 public:
  explicit StreamScope(const c10::Stream& stream) {
    if (!stream.device().is_cpu()) guard_.emplace(stream);
  }

 private:
  std::optional<c10::StreamGuard> guard_;
};

// A place in a stream: all that it had been given by then.
class StreamMark {
 public:
  explicit StreamMark(const c10::Stream& stream);
  bool Passed() const { return !event_ || event_->query(); }
  // What the other stream is given from now on comes after this.
  void HoldBack(const c10::Stream& stream) const {
    if (event_) event_->block(stream);
  }
  // Blocks the caller; `meanwhile` is called again and again, and may throw.
  void Wait(const std::function<void()>& meanwhile = {}) const;

 private:
  std::unique_ptr<c10::Event> event_;  // null: of a CPU
};

}  // namespace itwin::worker
