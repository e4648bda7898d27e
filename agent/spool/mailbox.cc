#include "agent/spool/mailbox.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include "common/check.h"

namespace itwin::agent {

Mailbox::Mailbox() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) { ITWIN_CHECK(event_.valid()); }

bool Mailbox::Post(std::function<void()> task) {
  absl::MutexLock lock(&mu_);
  if (closed_) return false;
  tasks_.push_back(std::move(task));
  if (tasks_.size() == 1) {
    const uint64_t one = 1;
    ITWIN_CHECK(write(event_.get(), &one, sizeof one) == sizeof one);
  }
  return true;
}

int Mailbox::RunPosted() {
  std::vector<std::function<void()>> tasks;
  {
    absl::MutexLock lock(&mu_);
    uint64_t count;
    (void)!read(event_.get(), &count, sizeof count);
    tasks.swap(tasks_);
  }
  for (auto& task : tasks) task();
  return static_cast<int>(tasks.size());
}

void Mailbox::Close() {
  std::vector<std::function<void()>> dropped;
  absl::MutexLock lock(&mu_);
  closed_ = true;
  dropped.swap(tasks_);
}

}  // namespace itwin::agent
