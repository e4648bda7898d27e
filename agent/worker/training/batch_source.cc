#include "agent/worker/training/batch_source.h"

#include <chrono>

#include "agent/worker/training/compute_threads.h"

namespace itwin::worker {
namespace {

constexpr int kMeasuredBatches = 12;       // then it is decided
constexpr double kWorthwhileShare = 0.03;  // of the step
constexpr double kWorthwhileSeconds =
    2e-4;  // a hand-over between threads costs some tens of microseconds

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

BatchSource::~BatchSource() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

BatchSource::Item BatchSource::Gather(int64_t g) const {
  Item item;
  const std::span<const int64_t> indices = order_->OfRank(g, rank_, ranks_);
  item.local_samples = static_cast<int64_t>(indices.size());
  item.global_samples = order_->size(g);
  if (indices.empty()) {
    if (stand_in_) item.batch = dataset_.Gather(Split::kTrain, {order_->OfRank(g, 0, ranks_)[0]});
  } else {
    item.batch =
        dataset_.Gather(Split::kTrain, std::vector<int64_t>(indices.begin(), indices.end()));
  }
  return item;
}

void BatchSource::Start(const EpochOrder& order, int64_t first) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !busy_ && wanted_ < 0; });
  order_ = &order;
  next_ = first;
  ready_.reset();
  error_ = nullptr;
  last_returned_ = 0;
  if (thread_.joinable() && next_ < order.batches()) {
    wanted_ = next_;
    changed_.notify_all();
  }
}

BatchSource::Item BatchSource::Next() {
  const double start = Seconds();
  const int64_t g = next_++;
  Item item;
  if (!thread_.joinable()) {
    item = Gather(g);
    const double now = Seconds();
    if (last_returned_ > 0) Decide(now - start, start - last_returned_);
    last_returned_ = now;
    waited_seconds_ += now - start;
    return item;
  }
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return ready_ || error_ || (wanted_ < 0 && !busy_); });
  if (error_) std::rethrow_exception(error_);
  if (ready_) {
    item = std::move(*ready_);
    ready_.reset();
  } else {  // the thread has just been started
    item = Gather(g);
  }
  if (next_ < order_->batches()) {
    wanted_ = next_;
    changed_.notify_all();
  }
  waited_seconds_ += Seconds() - start;
  return item;
}

void BatchSource::Decide(double gather_seconds, double between_seconds) {
  if (measured_ >= kMeasuredBatches) return;
  gather_seconds_ += gather_seconds;
  between_seconds_ += between_seconds;
  if (++measured_ < kMeasuredBatches) return;
  if (gather_seconds_ > kWorthwhileShare * between_seconds_ &&
      gather_seconds_ > kWorthwhileSeconds * kMeasuredBatches) {
    UseThread();
  }
}

void BatchSource::UseThread() {
  if (!thread_.joinable()) thread_ = std::thread([this] { Run(); });
}

void BatchSource::WaitIdle() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !busy_ && wanted_ < 0; });
}

void BatchSource::Run() {
  UseOneComputeThreadHere();
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || wanted_ >= 0; });
    if (stopping_) return;
    const int64_t g = wanted_;
    wanted_ = -1;
    busy_ = true;
    lock.unlock();
    std::optional<Item> item;
    std::exception_ptr error;
    try {
      item = Gather(g);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    ready_ = std::move(item);
    error_ = error;
    busy_ = false;
    changed_.notify_all();
  }
}

}  // namespace itwin::worker
