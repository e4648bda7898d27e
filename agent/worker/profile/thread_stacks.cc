#include "agent/worker/profile/thread_stacks.h"

#include <dirent.h>
#include <execinfo.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace itwin::worker {
namespace {

constexpr int kMaxFrames = 64;
constexpr auto kAnswerTime = std::chrono::milliseconds(500);

int Signal() { return SIGRTMIN + 6; }

// One thread at a time is asked.
std::atomic<int> output{-1};
std::atomic<bool> answered{false};

void OnSignal(int) {
  void* frames[kMaxFrames];
  const int count = backtrace(frames, kMaxFrames);
  // The first two are this function and the signal's frame.
  if (count > 2) backtrace_symbols_fd(frames + 2, count - 2, output.load());
  answered.store(true);
}

std::vector<pid_t> Threads() {
  std::vector<pid_t> threads;
  if (DIR* directory = opendir("/proc/self/task")) {
    while (const dirent* entry = readdir(directory)) {
      const pid_t id = std::atoi(entry->d_name);
      if (id > 0) threads.push_back(id);
    }
    closedir(directory);
  }
  return threads;
}

}  // namespace

void WriteThreadStacks(int fd) {
  void* first[1];
  backtrace(first, 1);  // loads what it needs now, not in a signal handler
  struct sigaction action {}, before {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigaction(Signal(), &action, &before);
  output = fd;
  const auto self = static_cast<pid_t>(syscall(SYS_gettid));
  for (const pid_t thread : Threads()) {
    if (thread == self) continue;
    std::string name;
    std::getline(std::ifstream("/proc/self/task/" + std::to_string(thread) + "/comm"), name);
    dprintf(fd, "thread %d (%s)%s:\n", thread, name.c_str(),
            thread == getpid() ? ", the training thread" : "");
    answered = false;
    if (syscall(SYS_tgkill, getpid(), thread, Signal()) != 0) continue;
    const auto until = std::chrono::steady_clock::now() + kAnswerTime;
    while (!answered && std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
    }
    if (!answered) {
      dprintf(fd, "  does not answer\n");
      break;  // it may yet write; no other shall be asked meanwhile
    }
  }
  // The handler stays: one that is late must not meet the signal's default, which ends the process.
}

}  // namespace itwin::worker
