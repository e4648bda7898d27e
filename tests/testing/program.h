// Runs a real program with an environment of its own, for tests that have no absl: starts, signals,
// waits.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <string>
#include <vector>

extern char** environ;

namespace itwin::testing {

// Looks again every few milliseconds until the predicate holds or the time is over. Returns whether
// it held.
inline bool PollUntil(const std::function<bool()>& predicate,
                      std::chrono::seconds limit = std::chrono::seconds(60)) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (!predicate()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    poll(nullptr, 0, 5);
  }
  return true;
}

class Program {
 public:
  // stdout and stderr go to the file `output`.
  Program(std::vector<std::string> argv, std::map<std::string, std::string> extra_environment,
          std::string output)
      : output_(std::move(output)) {
    std::vector<char*> arguments;
    for (std::string& a : argv) arguments.push_back(a.data());
    arguments.push_back(nullptr);
    std::vector<std::string> texts;
    for (char** e = environ; *e != nullptr; ++e) {
      const std::string entry = *e;
      if (!extra_environment.contains(entry.substr(0, entry.find('=')))) texts.push_back(entry);
    }
    for (const auto& [name, value] : extra_environment) texts.push_back(name + "=" + value);
    std::vector<char*> environment;
    for (std::string& t : texts) environment.push_back(t.data());
    environment.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, output_.c_str(), O_WRONLY | O_CREAT | O_APPEND,
                                     0644);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    if (posix_spawnp(&pid_, arguments[0], &actions, nullptr, arguments.data(),
                     environment.data()) != 0)
      pid_ = -1;
    posix_spawn_file_actions_destroy(&actions);
  }
  ~Program() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }
  Program(const Program&) = delete;

  pid_t pid() const { return pid_; }
  void Signal(int signal) const { kill(pid_, signal); }
  // Exit code, 128 + signal, or -1 when it did not end in time (it is killed then).
  int Wait(std::chrono::seconds limit = std::chrono::seconds(60)) {
    int status = 0;
    if (pid_ <= 0) return -1;
    if (!PollUntil([&] { return waitpid(pid_, &status, WNOHANG) == pid_; }, limit)) return -1;
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  std::string Output() const {
    std::ifstream file(output_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

 private:
  const std::string output_;
  pid_t pid_ = -1;
};

}  // namespace itwin::testing
