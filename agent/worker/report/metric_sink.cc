#include "agent/worker/report/metric_sink.h"

#include <charconv>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "agent/worker/checkpoint/durable_file.h"

namespace itwin::worker {
namespace {

constexpr auto kWriteInterval = std::chrono::milliseconds(10);  // at most one write(2) in this time
constexpr size_t kMaxBufferedBytes = 4 << 20;  // beyond, the training waits for the disk

class LineFile : public MetricSink {
 public:
  explicit LineFile(const std::filesystem::path& path)
      : file_(path, /*append=*/true), thread_([this] { Run(); }) {}
  ~LineFile() override {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void Write(int64_t step, const Values& values) override {
    std::string& line = line_;
    line.clear();
    Start(line);
    line += ",\"step\":";
    line += std::to_string(step);
    line += ",\"metrics\":{";
    bool first = true;
    for (const auto& [name, value] : values) {
      if (!first) line += ',';
      first = false;
      AppendJsonString(line, name);
      line += ':';
      AppendJsonNumber(line, value);
    }
    line += "}}\n";
    Append(line);
  }

  void Write(const Progress& progress) override {
    std::string& line = line_;
    line.clear();
    Start(line);
    line += ",\"progress\":{\"step\":" + std::to_string(progress.step);
    line += ",\"steps\":" + std::to_string(progress.steps);
    line += ",\"epoch\":" + std::to_string(progress.epoch);
    line += ",\"epochs\":" + std::to_string(progress.epochs);
    line += ",\"samples_per_second\":";
    AppendJsonNumber(line, progress.samples_per_second);
    if (progress.seconds_left) {
      line += ",\"seconds_left\":";
      AppendJsonNumber(line, *progress.seconds_left);
    }
    line += "}}\n";
    Append(line);
  }

  void Flush() override {
    std::unique_lock lock(mutex_);
    flushing_ = true;
    changed_.notify_all();
    written_.wait(lock, [&] { return (buffer_.empty() && !writing_) || error_; });
    flushing_ = false;
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static void Start(std::string& line) {
    char text[40];
    const auto end =
        std::to_chars(text, text + sizeof(text), Now(), std::chars_format::fixed, 3).ptr;
    line += "{\"t\":";
    line.append(text, end);
  }

  void Append(const std::string& line) {
    std::unique_lock lock(mutex_);
    if (buffer_.size() > kMaxBufferedBytes) {
      written_.wait(lock, [&] { return buffer_.size() <= kMaxBufferedBytes || error_; });
    }
    if (error_) std::rethrow_exception(error_);
    const bool idle = buffer_.empty() && waiting_;
    buffer_ += line;
    lock.unlock();
    if (idle) changed_.notify_all();
  }

  void Run() {
    std::unique_lock lock(mutex_);
    std::string taken;
    while (true) {
      waiting_ = true;
      changed_.wait(lock, [&] { return stopping_ || !buffer_.empty(); });
      waiting_ = false;
      if (buffer_.empty() || error_) return;
      taken.clear();
      taken.swap(buffer_);
      writing_ = true;
      lock.unlock();
      std::exception_ptr error;
      try {
        file_.Write(taken);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      writing_ = false;
      error_ = error;
      written_.notify_all();
      if (error_) return;
      changed_.wait_for(lock, kWriteInterval, [&] { return stopping_ || flushing_; });
    }
  }

  OutputFile file_;
  std::string line_;  // the training thread's

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_, written_;
  std::string buffer_;
  bool stopping_ = false, flushing_ = false, writing_ = false, waiting_ = false;
  std::exception_ptr error_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace

double Now() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

void AppendJsonNumber(std::string& text, double value) {
  if (std::isnan(value)) {
    text += "\"NaN\"";
  } else if (std::isinf(value)) {
    text += value > 0 ? "\"Infinity\"" : "\"-Infinity\"";
  } else {
    char digits[40];
    text.append(digits, std::to_chars(digits, digits + sizeof(digits), value).ptr);
  }
}

void AppendJsonString(std::string& text, std::string_view value) {
  text += '"';
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      constexpr char kHex[] = "0123456789abcdef";
      text += "\\u00";
      text += kHex[c >> 4];
      text += kHex[c & 15];
    } else {
      text += c;
    }
  }
  text += '"';
}

std::unique_ptr<MetricSink> OpenMetricFile(const std::filesystem::path& path) {
  return std::make_unique<LineFile>(path);
}

}  // namespace itwin::worker
