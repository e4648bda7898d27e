#include "tests/testing/simulated_gpu.h"

#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>
#include <torch/version.h>

#include "tests/testing/simulated_streams.h"

namespace itwin::worker::testing {
namespace {

constexpr c10::DeviceType kType = at::kXPU;
constexpr auto kCopyTakes = std::chrono::microseconds(200);

// ---- streams

thread_local c10::DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kSimulatedGpus> current_stream{};  // 0: the device's
std::array<std::atomic<c10::StreamId>, kSimulatedGpus> compute_stream{};

c10::Stream StreamOf(c10::StreamId id, c10::DeviceIndex device) {
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, device), id);
}
c10::DeviceIndex IndexOf(c10::Device device) { return device.index() < 0 ? current_device : device.index(); }
c10::Stream Current(c10::Device device) {
  const c10::DeviceIndex index = IndexOf(device);
  const auto at = static_cast<size_t>(index);
  return StreamOf(current_stream[at] != 0 ? current_stream[at] : compute_stream[at].load(), index);
}

struct Streams {
  std::mutex mutex;
  std::map<std::pair<c10::DeviceIndex, c10::StreamId>, SimulatedStream*> made;
  c10::StreamId next = 1;
};
Streams& TheStreams() {
  static auto* streams = new Streams;
  return *streams;
}
SimulatedStream& Queue(const c10::Stream& stream) {
  Streams& streams = TheStreams();
  std::lock_guard lock(streams.mutex);
  SimulatedStream*& made = streams.made[{stream.device_index(), stream.id()}];
  if (made == nullptr) made = new SimulatedStream;
  return *made;
}

using MarkPointer = std::shared_ptr<SimulatedMark>;

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kType, current_device}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = IndexOf(device); }
  c10::Stream getStream(c10::Device device) const noexcept override { return Current(device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return StreamOf(0, IndexOf(device)); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    Streams& streams = TheStreams();
    std::lock_guard lock(streams.mutex);
    return StreamOf(streams.next++, IndexOf(device));
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    const c10::Stream before = Current(stream.device());
    // A device's thread goes back to what the device computes on, which may be another stream next time.
    const auto at = static_cast<size_t>(stream.device_index());
    current_stream[at] = stream.id() == compute_stream[at] ? 0 : stream.id();
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kSimulatedGpus; }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new MarkPointer;
    *static_cast<MarkPointer*>(*event) = Queue(stream).Mark();
  }
  void block(void* event, const c10::Stream& stream) const override {
    Queue(stream).WaitFor(*static_cast<MarkPointer*>(event));
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || (*static_cast<MarkPointer*>(event))->passed();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<MarkPointer*>(event);
  }
  bool queryStream(const c10::Stream& stream) const override { return Queue(stream).Mark()->passed(); }
  void synchronizeStream(const c10::Stream& stream) const override { Queue(stream).Drain(); }
};
C10_REGISTER_GUARD_IMPL(XPU, Guard);

// ---- memory

struct Allocator final : public c10::Allocator {
  static void Free(void* address) { SimulatedFree(reinterpret_cast<uintptr_t>(address)); }
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 3)
  c10::DataPtr allocate(size_t bytes) override { return Take(bytes); }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "not simulated"); }
#else
  c10::DataPtr allocate(size_t bytes) const override { return Take(bytes); }
#endif
  c10::DeleterFnPtr raw_deleter() const override { return &Free; }

 private:
  static c10::DataPtr Take(size_t bytes) {
    const c10::Device device(kType, current_device);
    if (bytes == 0) return {nullptr, device};
    auto* address = reinterpret_cast<void*>(SimulatedAllocate(bytes, Queue(Current(device))));
    return {address, address, &Free, device};
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator);

// What the processor sees of a tensor of the device.
at::Tensor OnHost(const at::Tensor& tensor, const char* what) {
  const size_t bytes = at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize());
  const auto host = SimulatedBytes(tensor.data_ptr(), tensor.numel() == 0 ? 0 : bytes, what);
  at::Tensor seen = at::from_blob(host.get(), tensor.sizes(), tensor.strides(), [host](void*) {},
                                  at::TensorOptions().dtype(tensor.scalar_type()));
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) seen.unsafeGetTensorImpl()->set_wrapped_number(true);
  return seen;
}
at::Tensor ToDevice(const at::Tensor& host, c10::Device device) {
  if (!host.defined()) return host;
  at::Tensor copy = at::empty_strided(host.sizes(), host.strides(), host.options().device(device));
  OnHost(copy, "an operator's result").copy_(host);
  return copy;
}

// Where an operator was to put its result, whose shape is the operator's to choose.
void Put(const at::Tensor& result, const at::Tensor& into) {
  if (into.sizes() != result.sizes()) {
    c10::TensorImpl* impl = into.unsafeGetTensorImpl();
    if (into.numel() < result.numel()) {
      impl->set_storage_keep_dtype(ToDevice(result, into.device()).storage());
      impl->set_storage_offset(0);
    }
    impl->set_sizes_contiguous(result.sizes());
  }
  OnHost(into, "an operator's result").copy_(result);
}

// ---- operators

// The processor's operator on the same memory.
void RunOnHost(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  const std::vector<c10::IValue> given(stack->begin() + static_cast<std::ptrdiff_t>(begin), stack->end());
  const char* name = schema.name().c_str();
  c10::optional<c10::Device> device;
  const auto see = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kType) return tensor;
    TORCH_CHECK(!device || *device == tensor.device(), name, ": tensors of two GPUs");
    if (!device) {
      device = tensor.device();
      Queue(Current(*device)).Drain();
    }
    return OnHost(tensor, name);
  };
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& value = (*stack)[begin + i];
    if (given[i].isTensor() && schema.arguments()[i].is_out()) {
      value = at::empty({0}, see(given[i].toTensor()).options());
    } else if (given[i].isTensor()) {
      value = see(given[i].toTensor());
    } else if (given[i].isTensorList()) {
      c10::List<at::Tensor> seen;
      for (const at::Tensor& tensor : given[i].toTensorVector()) seen.push_back(see(tensor));
      value = seen;
    } else if (given[i].isOptionalTensorList()) {
      c10::List<c10::optional<at::Tensor>> seen;
      for (const c10::IValue& element : given[i].toListRef()) {
        seen.push_back(element.isNone() ? c10::optional<at::Tensor>()
                                        : c10::optional<at::Tensor>(see(element.toTensor())));
      }
      value = seen;
    } else if (given[i].isDevice() && given[i].toDevice().type() == kType) {
      device = given[i].toDevice();
      value = c10::Device(at::kCPU);
    }
  }
  TORCH_CHECK(device, name, ": no tensor of the GPU among the arguments");
  // Kept, as LibTorch drops the arguments before it copies several results that are among them.
  const std::vector<c10::IValue> seen_arguments(stack->begin() + static_cast<std::ptrdiff_t>(begin), stack->end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (size_t r = 0; r < results; ++r) {
    c10::IValue& value = (*stack)[first + r];
    const auto* alias = schema.returns()[r].alias_info();
    if (alias != nullptr) {  // an argument that was written
      TORCH_CHECK(alias->isWrite(), name, ": views are not made by the processor's operators");
      for (size_t i = 0; i < count; ++i) {
        const auto* of_argument = schema.arguments()[i].alias_info();
        if (of_argument == nullptr || !(*of_argument == *alias)) continue;
        if (schema.arguments()[i].is_out()) Put(seen_arguments[i].toTensor(), given[i].toTensor());
        value = given[i];
      }
    } else if (value.isTensor()) {
      value = ToDevice(value.toTensor(), *device);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> made;
      for (const at::Tensor& tensor : value.toTensorVector()) made.push_back(ToDevice(tensor, *device));
      value = made;
    }
  }
}

at::Tensor Empty(at::IntArrayRef size, c10::optional<at::ScalarType> dtype, c10::optional<at::Layout>,
                 c10::optional<at::Device> device, c10::optional<bool>,
                 c10::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(at::Device(kType, current_device)));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::XPU),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor EmptyStrided(at::IntArrayRef size, at::IntArrayRef stride, c10::optional<at::ScalarType> dtype,
                        c10::optional<at::Layout>, c10::optional<at::Device> device, c10::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(at::Device(kType, current_device)));
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::XPU),
                                           c10::dtype_or_default(dtype));
}

// In the order of the device's current stream; the host waits unless it says that it will not.
at::Tensor& Copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const bool to_device = self.device().type() == kType, from_device = source.device().type() == kType;
  SimulatedStream& stream = Queue(Current(to_device ? self.device() : source.device()));
  // Memory of the device is not kept by the copy, memory of the host is: it would be pinned.
  const auto of = [](const at::Tensor& t, bool on_device) {
    return [address = t.data_ptr(), on_device, host = on_device ? at::Tensor() : t, sizes = t.sizes().vec(),
            strides = t.strides().vec(), type = t.scalar_type(), item = t.itemsize(),
            numel = t.numel()]() -> std::pair<at::Tensor, std::shared_ptr<char>> {
      if (!on_device) return {host, nullptr};
      const size_t bytes = numel == 0 ? 0 : at::detail::computeStorageNbytes(sizes, strides, item);
      auto seen = SimulatedBytes(address, bytes, "a copy");
      return {at::from_blob(seen.get(), sizes, strides, at::TensorOptions().dtype(type)), seen};
    };
  };
  const at::Tensor to = self.detach(), from = source.detach();
  stream.Give([to = of(to, to_device), from = of(from, from_device)] {
    std::this_thread::sleep_for(kCopyTakes);
    const at::AutoDispatchBelowAutograd below;
    const auto target = to();
    const auto origin = from();
    target.first.copy_(origin.first);
  });
  if (!non_blocking) stream.Drain();
  return self;
}

void RecordStream(at::Tensor& self, c10::Stream stream) {
  if (self.storage().data() != nullptr)
    SimulatedRecord(reinterpret_cast<uintptr_t>(self.storage().data()), Queue(stream));
}

at::Tensor Convolution(const at::Tensor& input, const at::Tensor& weight,
                       const c10::optional<at::Tensor>& bias, at::IntArrayRef stride,
                       at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  Queue(Current(input.device())).Drain();
  c10::optional<at::Tensor> seen;
  if (bias && bias->defined()) seen = OnHost(*bias, "convolution");
  return ToDevice(at::convolution(OnHost(input, "convolution"), OnHost(weight, "convolution"), seen, stride,
                                  padding, dilation, transposed, output_padding, groups),
                  input.device());
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> ConvolutionBackward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  Queue(Current(input.device())).Drain();
  const auto results = at::convolution_backward(
      OnHost(gradient, "convolution_backward"), OnHost(input, "convolution_backward"),
      OnHost(weight, "convolution_backward"), at::IntArrayRef{weight.size(transposed ? 1 : 0)}, stride,
      padding, dilation, transposed, output_padding, groups, wanted);
  const auto back = [&](const at::Tensor& t) { return ToDevice(t, input.device()); };
  return {back(std::get<0>(results)), back(std::get<1>(results)), back(std::get<2>(results))};
}

// An LSTM's cell in one, which newer versions of LibTorch use here and the processor does not have. The
// workspace holds the gates: input, forget, cell, output.
std::tuple<at::Tensor, at::Tensor, at::Tensor> LstmCell(const at::Tensor& input, const at::Tensor& hidden,
                                                        const at::Tensor& cx,
                                                        const c10::optional<at::Tensor>& input_bias,
                                                        const c10::optional<at::Tensor>& hidden_bias) {
  Queue(Current(input.device())).Drain();
  at::Tensor sum = OnHost(input, "LSTM") + OnHost(hidden, "LSTM");
  for (const auto* bias : {&input_bias, &hidden_bias}) {
    if (*bias && (*bias)->defined()) sum += OnHost(**bias, "LSTM");
  }
  const auto gates = sum.chunk(4, 1);
  const at::Tensor i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
  const at::Tensor cy = f * OnHost(cx, "LSTM") + i * g;
  return {ToDevice(o * cy.tanh(), input.device()), ToDevice(cy, input.device()),
          ToDevice(at::cat({i, f, g, o}, 1), input.device())};
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> LstmCellBackward(const c10::optional<at::Tensor>& of_hy,
                                                                const c10::optional<at::Tensor>& of_cy,
                                                                const at::Tensor& cx, const at::Tensor& cy,
                                                                const at::Tensor& workspace, bool has_bias) {
  Queue(Current(cx.device())).Drain();
  const auto given = [&](const c10::optional<at::Tensor>& gradient) {
    return gradient && gradient->defined() ? OnHost(*gradient, "LSTM") : at::zeros_like(OnHost(cx, "LSTM"));
  };
  const auto gates = OnHost(workspace, "LSTM").chunk(4, 1);
  const at::Tensor &i = gates[0], &f = gates[1], &g = gates[2], &o = gates[3];
  const at::Tensor t = OnHost(cy, "LSTM").tanh(), hy = given(of_hy);
  const at::Tensor c = hy * o * (1 - t * t) + given(of_cy);
  const at::Tensor of_gates = at::cat({c * g * i * (1 - i), c * OnHost(cx, "LSTM") * f * (1 - f),
                                       c * i * (1 - g * g), hy * t * o * (1 - o)},
                                      1);
  return {ToDevice(of_gates, cx.device()), ToDevice(c * f, cx.device()),
          has_bias ? ToDevice(of_gates.sum(0), cx.device()) : at::Tensor()};
}

TORCH_LIBRARY_IMPL(_, XPU, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&RunOnHost>()); }

TORCH_LIBRARY_IMPL(aten, XPU, m) {
  m.impl("empty.memory_format", &Empty);
  m.impl("empty_strided", &EmptyStrided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("copy_", &Copy);
  m.impl("record_stream", &RecordStream);
  m.impl("_thnn_fused_lstm_cell", &LstmCell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", &LstmCellBackward);
  m.impl("convolution_overrideable", &Convolution);
  m.impl("convolution_backward_overrideable", &ConvolutionBackward);
}

}  // namespace

void* NativeStream(const c10::Stream& stream) { return &Queue(stream); }

ComputeStream::ComputeStream(at::Device device) : before_(Current(device)) {
  const Guard guard;
  guard.setDevice(device);
  const c10::Stream mine = guard.getStreamFromGlobalPool(device, false);
  compute_stream[static_cast<size_t>(device.index())] = mine.id();
  guard.exchangeStream(mine);
}
ComputeStream::~ComputeStream() {
  compute_stream[static_cast<size_t>(before_.device_index())] = 0;
  Guard().exchangeStream(before_);
}

}  // namespace itwin::worker::testing
