#include "agent/worker/dist/work_thread.h"

#include <utility>

namespace itwin::worker {

class WorkThread::Queued : public Work {
 public:
  Queued(WorkThread& owner, std::shared_ptr<State> state)
      : owner_(owner), state_(std::move(state)) {}
  void Wait() override {
    std::unique_lock lock(owner_.mutex_);
    owner_.finished_.wait(lock, [&] { return state_->done; });
    if (state_->error) std::rethrow_exception(state_->error);
  }

 private:
  WorkThread& owner_;
  std::shared_ptr<State> state_;
};

WorkThread::WorkThread() : thread_([this] { Run(); }) {}

WorkThread::~WorkThread() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  started_.notify_one();
  thread_.join();
}

std::unique_ptr<Work> WorkThread::Start(std::function<void()> work) {
  auto state = std::make_shared<State>();
  state->work = std::move(work);
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(state);
  }
  started_.notify_one();
  return std::make_unique<Queued>(*this, state);
}

void WorkThread::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    started_.wait(lock, [&] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    std::shared_ptr<State> state = queue_.front();
    queue_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      state->work();
    } catch (...) {
      error = std::current_exception();
    }
    state->work = nullptr;  // what it holds goes here, not with the last who waited
    lock.lock();
    state->error = error;
    state->done = true;
    finished_.notify_all();
  }
}

}  // namespace itwin::worker
