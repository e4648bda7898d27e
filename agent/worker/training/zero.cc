#include "agent/worker/training/zero.h"

#include <algorithm>
#include <chrono>

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr size_t kLiveBuckets = 2;  // the one in use and the one that is gathered ahead

// The memory behind a flat tensor goes and comes; views of it stay views. Nothing may read it in
// between.
void FreeStorage(const at::Tensor& flat) {
  c10::StorageImpl* storage = flat.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(at::DataPtr(nullptr, flat.device()));
  storage->set_nbytes(static_cast<size_t>(0));
}
void AllocateStorage(const at::Tensor& flat, bool zero) {
  c10::StorageImpl* storage = flat.storage().unsafeGetStorageImpl();
  const size_t bytes = flat.nbytes();
  storage->set_data_ptr_noswap(c10::GetAllocator(flat.device().type())->allocate(bytes));
  storage->set_nbytes(bytes);
  if (zero) ClearFlat(flat);
}

}  // namespace

// Sees every operator that is about to run, in this thread or in the one in which a device runs its
// backward pass while this thread waits (LibTorch calls back before the kernel).
class Zero::Watch {
  // LibTorch hands callbacks on to the threads of a backward pass, and information of this kind, which
  // nothing in the worker's LibTorch uses otherwise.
  static constexpr auto kKind = c10::DebugInfoKind::INFERENCE_CONTEXT;
  struct Info : c10::DebugInfoBase {
    explicit Info(Watch* w) : watch(w) {}
    Watch* const watch;
  };

 public:
  explicit Watch(Zero& owner) : owner_(owner), current_(kKind, Remember()) {
    for (size_t b = 0; b < owner.units_.size(); ++b) {
      bucket_of_[owner.parameters_.buckets()[b].values.storage().unsafeGetStorageImpl()] = b;
    }
    handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(&Watch::OnStart, &Watch::OnEnd)
            .needsInputs(true)
            .scopes({at::RecordScope::FUNCTION}));
  }
  ~Watch() { at::removeCallback(handle_); }

 private:
  static Watch* Current() {
    const auto* info = static_cast<const Info*>(c10::ThreadLocalDebugInfo::get(kKind));
    return info == nullptr ? nullptr : info->watch;
  }
  std::shared_ptr<Info> Remember() {
    if (Current() != nullptr) throw AppError("two models are split by zero3 in one thread");
    return std::make_shared<Info>(this);
  }
  static std::unique_ptr<at::ObserverContext> OnStart(const at::RecordFunction& function) {
    if (Watch* watch = Current()) watch->Start(function);
    return nullptr;
  }
  static void OnEnd(const at::RecordFunction&, at::ObserverContext*) {
    if (Watch* watch = Current()) watch->End();
  }

  void Start(const at::RecordFunction& function) {
    frames_.push_back(pinned_.size());
    for (const c10::IValue& input : function.inputs()) Visit(input);
    // All of an operator's buckets are pinned first, so that gathering one does not drop another.
    for (size_t i = frames_.back(); i < pinned_.size(); ++i) ++owner_.units_[pinned_[i]].pinned;
    for (size_t i = frames_.back(); i < pinned_.size(); ++i) owner_.Need(pinned_[i]);
  }
  void End() {
    if (frames_.empty()) return;  // of an operator that was under way when the watch began
    for (; pinned_.size() > frames_.back(); pinned_.pop_back())
      --owner_.units_[pinned_.back()].pinned;
    frames_.pop_back();
  }
  void Visit(const c10::IValue& value) {
    if (value.isTensor()) {
      const at::Tensor& tensor = value.toTensor();
      if (!tensor.defined() || !tensor.has_storage()) return;
      const auto found = bucket_of_.find(tensor.storage().unsafeGetStorageImpl());
      if (found != bucket_of_.end()) pinned_.push_back(found->second);
    } else if (value.isList() && !value.isIntList() && !value.isDoubleList() &&
               !value.isBoolList()) {
      for (const c10::IValue& element : value.toListRef()) Visit(element);
    }
  }

  Zero& owner_;
  const c10::DebugInfoGuard current_;
  at::CallbackHandle handle_ = 0;
  std::unordered_map<const c10::StorageImpl*, size_t> bucket_of_;
  std::vector<size_t> frames_, pinned_;  // operators under way, and their buckets
};

Zero::Zero(FlatParameters& parameters, Communicator& communicator, Options options)
    : parameters_(parameters),
      communicator_(communicator),
      options_(options),
      units_(parameters.buckets().size()),
      used_(parameters.parameters().size(), 0),
      hooks_(
          parameters, [this](size_t i) { OnGradientReady(i); },
          [this](size_t i) { NeedGradients(parameters_.parameters()[i].bucket); }) {
  const int rank = communicator.rank(), ranks = communicator.size();
  for (const FlatRange& whole : WholeBuckets(parameters)) {
    communicator_.Broadcast(BufferOfTensor(whole.values), 0)->Wait();
    const int64_t part = whole.values.numel() / ranks;
    if (part * ranks != whole.values.numel()) throw AppError("a bucket cannot be split evenly");
    FlatRange mine{.bucket = whole.bucket, .first = rank * part};
    mine.values = whole.values.narrow(0, mine.first, part);
    if (options_.stage == 3) mine.values = mine.values.clone();
    mine.gradients = at::zeros_like(mine.values);
    ranges_.push_back(std::move(mine));
  }
  for (size_t b = 0; b < units_.size(); ++b) {
    if (options_.stage >= 2) {
      FreeStorage(parameters_.buckets()[b].gradients);
      units_[b].gradients_present = false;
    }
    if (options_.stage == 3) {
      FreeStorage(parameters_.buckets()[b].values);
      units_[b].present = false;
    }
  }
  if (options_.stage == 3) watch_ = std::make_unique<Watch>(*this);
  CountMemory();
}

Zero::~Zero() = default;

void Zero::Wait(std::unique_ptr<Work>& work) {
  if (!work) return;
  const auto start = std::chrono::steady_clock::now();
  work->Wait();
  work.reset();
  waited_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// ---- gradients

void Zero::BeginStep() {
  for (Unit& unit : units_) unit.exchanged = false;
  last_trace_ = std::move(trace_);
  trace_.clear();
}

void Zero::BeginBackward(const StepStatus& status, bool last) {
  last_ = last;
  for (size_t b = 0; b < units_.size(); ++b)
    units_[b].missing = static_cast<int64_t>(parameters_.buckets()[b].parameters.size());
  next_reduce_ = 0;
  if (last) {
    status_.Start(status, communicator_);
  }
}

void Zero::NeedGradients(size_t bucket) {
  if (units_[bucket].gradients_present) return;
  AllocateStorage(parameters_.buckets()[bucket].gradients, /*zero=*/true);
  units_[bucket].gradients_present = true;
  CountMemory();
}

void Zero::OnGradientReady(size_t parameter) {
  used_[parameter] = 1;
  --units_[parameters_.parameters()[parameter].bucket].missing;
  if (options_.overlap || options_.stage >= 2) LaunchReady();
}

void Zero::LaunchReady() {
  if (!last_ && options_.stage == 1) return;  // added up where they are
  // In order, as all ranks must start the same collectives in the same order.
  while (next_reduce_ < units_.size() && units_[next_reduce_].missing <= 0) {
    const size_t b = next_reduce_++;
    Unit& unit = units_[b];
    NeedGradients(b);  // of a bucket that backward did not reach
    const at::Tensor& mine = ranges_[b].gradients;
    if (unit.exchanged) unit.received = at::empty_like(mine);
    const at::Tensor& to = unit.exchanged ? unit.received : mine;
    const at::Tensor& from = parameters_.buckets()[b].gradients;
    unit.reduce = communicator_.ReduceScatter(
        BufferOfTensor(from.narrow(0, 0, parameters_.buckets()[b].values.numel())),
        BufferOfTensor(to), Reduction::kSum);
    unit.exchanged = true;
    // Two buckets' gradients at most are there at a time.
    if (options_.stage >= 2 && b > 0) FinishReduce(b - 1);
  }
}

void Zero::FinishReduce(size_t bucket) {
  Unit& unit = units_[bucket];
  if (!unit.reduce) return;
  Wait(unit.reduce);
  if (unit.received.defined()) {
    ranges_[bucket].gradients.add_(unit.received);
    unit.received.reset();
  }
  const at::Tensor& whole = parameters_.buckets()[bucket].gradients;
  if (options_.stage >= 2) {
    FreeStorage(whole);
    unit.gradients_present = false;
  } else {
    ClearFlat(whole);
  }
}

void Zero::EndBackward() {
  for (Unit& unit : units_) unit.missing = 0;
  LaunchReady();
  if (!last_ && options_.stage >= 2) {
    for (size_t b = 0; b < units_.size(); ++b) FinishReduce(b);
  }
}

void Zero::WaitGradients(size_t range) { FinishReduce(range); }

void Zero::Updated(size_t range) {
  if (options_.stage == 3) {
    Drop(range);  // what was gathered is of the step before
    return;
  }
  units_[range].gather = communicator_.AllGather(
      BufferOfTensor(ranges_[range].values), BufferOfTensor(parameters_.buckets()[range].values));
}

StepStatus Zero::EndStep(bool* agreed) {
  if (options_.stage < 3) {
    for (Unit& unit : units_) Wait(unit.gather);
  }
  *agreed = true;
  const auto start = std::chrono::steady_clock::now();
  const StepStatus status = status_.Finish();
  waited_seconds_ +=
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return status;
}

void Zero::SumOverShards(std::span<double> figures) {
  communicator_.AllReduce(BufferOf(figures), Reduction::kSum)->Wait();
}

// ---- parameters (stage 3)

void Zero::StartGather(size_t bucket) {
  AllocateStorage(parameters_.buckets()[bucket].values, /*zero=*/false);
  units_[bucket].present = true;
  units_[bucket].touched = ++clock_;
  CountMemory();
  units_[bucket].gather = communicator_.AllGather(
      BufferOfTensor(ranges_[bucket].values), BufferOfTensor(parameters_.buckets()[bucket].values));
}

void Zero::Need(size_t bucket) {
  Unit& unit = units_[bucket];
  if (!unit.present) {
    DropOthers(bucket, kLiveBuckets - 1);
    StartGather(bucket);
  }
  Wait(unit.gather);
  unit.touched = ++clock_;
  if (full_ > 0 || (!trace_.empty() && trace_.back() == bucket)) return;
  trace_.push_back(bucket);
  // As in the step before: what came next then is gathered while this one is worked on.
  const size_t next = trace_.size();
  if (!options_.overlap || next >= last_trace_.size() || last_trace_[next - 1] != bucket) return;
  if (units_[last_trace_[next]].present) return;
  DropOthers(bucket, kLiveBuckets - 1);
  StartGather(last_trace_[next]);
}

void Zero::Drop(size_t bucket) {
  Unit& unit = units_[bucket];
  if (!unit.present) return;
  Wait(unit.gather);
  FreeStorage(parameters_.buckets()[bucket].values);
  unit.present = false;
}

// Keeps at most `most` buckets, among them `bucket` and those that an operator uses; the longest
// unused go first.
void Zero::DropOthers(size_t bucket, size_t most) {
  while (full_ == 0) {
    size_t present = 0;
    const Unit* oldest = nullptr;
    for (size_t b = 0; b < units_.size(); ++b) {
      if (!units_[b].present) continue;
      ++present;
      if (b == bucket || units_[b].pinned > 0) continue;
      if (oldest == nullptr || units_[b].touched < oldest->touched) oldest = &units_[b];
    }
    if (present <= most || oldest == nullptr) return;
    Drop(static_cast<size_t>(oldest - units_.data()));
  }
}

void Zero::GatherParameters() {
  if (options_.stage < 3 || full_++ > 0) return;
  for (size_t b = 0; b < units_.size(); ++b) {
    if (!units_[b].present) StartGather(b);
  }
  for (Unit& unit : units_) Wait(unit.gather);
}

void Zero::ReleaseParameters() {
  if (options_.stage < 3 || --full_ > 0) return;
  for (size_t b = 0; b < units_.size(); ++b) {
    // They may have been written, from a checkpoint.
    const at::Tensor& mine = ranges_[b].values;
    CopyFlat(mine, parameters_.buckets()[b].values.narrow(0, ranges_[b].first, mine.numel()));
    Drop(b);
  }
}

std::vector<int> Zero::FindDifferingRanks(Communicator& control) {
  if (options_.stage == 3) return {};  // there is one copy
  return FindDiffering(HashValues(parameters_), control);
}

std::vector<int64_t> Zero::Unused() const {
  std::vector<int64_t> unused;
  for (const int64_t used : used_) unused.push_back(used ? 0 : 1);
  return unused;
}

Strategy::Memory Zero::memory() const {
  Memory memory = memory_;
  memory.parameters = memory.gradients = 0;
  for (size_t b = 0; b < units_.size(); ++b) {
    const FlatParameters::Bucket& bucket = parameters_.buckets()[b];
    const auto mine = static_cast<int64_t>(ranges_[b].values.nbytes());
    if (options_.stage == 3) memory.parameters += mine;
    if (units_[b].present) memory.parameters += static_cast<int64_t>(bucket.values.nbytes());
    memory.gradients += mine;
    if (units_[b].gradients_present)
      memory.gradients += static_cast<int64_t>(bucket.gradients.nbytes());
  }
  return memory;
}

void Zero::CountMemory() {
  const Memory now = memory();
  memory_.peak_parameters = std::max(memory_.peak_parameters, now.parameters);
  memory_.peak_gradients = std::max(memory_.peak_gradients, now.gradients);
}

}  // namespace itwin::worker
