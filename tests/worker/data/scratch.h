// A directory for one test's files, and the system's Python to write them with.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "agent/worker/error.h"

namespace itwin::worker::testing {

class Scratch {
 public:
  Scratch() {
    std::string name = ::testing::TempDir() + "itwin-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    directory_ = name;
  }
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }
  Scratch(const Scratch&) = delete;

  const std::filesystem::path& path() const { return directory_; }
  std::filesystem::path operator/(const std::string& name) const { return directory_ / name; }

  std::filesystem::path Write(const std::string& name, const std::string& bytes) const {
    std::ofstream(directory_ / name, std::ios::binary) << bytes;
    return directory_ / name;
  }
  std::string Read(const std::string& name) const {
    std::ifstream file(directory_ / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  // Runs a script in the directory with Debian's interpreter, the one that has NumPy and PyTorch.
  void Python(const std::string& script) const {
    Write("script.py", script);
    const std::string command = "cd '" + directory_.string() +
                                "' && /usr/bin/python3 -W ignore script.py > script.log 2>&1";
    if (std::system(command.c_str()) != 0)
      throw std::runtime_error("python: " + Read("script.log"));
  }

 private:
  std::filesystem::path directory_;
};

// The message of the UserError that `action` throws; "" when it throws none.
inline std::string UserErrorOf(const std::function<void()>& action) {
  try {
    action();
  } catch (const WorkerError& error) {
    EXPECT_EQ(error.failure, FailureClass::kUser) << error.what();
    return error.what();
  }
  return "";
}

}  // namespace itwin::worker::testing
