// The live view on a real pseudo-terminal, seen through a small emulator that wraps lines as terminals do.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <poll.h>
#include <pty.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <iostream>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/cli/render.h"
#include "client/cli/watch_view.h"
#include "common/files.h"
#include "tests/testing/status_matchers.h"

namespace itwin::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// Rows of characters with a cursor; knows "\r", "\n", cursor up, erase below, colours. Wraps at the width it has now.
class Screen {
 public:
  explicit Screen(int width) : width_(width) { rows_.emplace_back(); }
  void Resize(int width) {
    // What most terminals do: long rows are wrapped again.
    std::vector<std::vector<std::string>> rows;
    for (const auto& row : rows_) {
      size_t at = 0;
      do {
        rows.emplace_back(row.begin() + static_cast<long>(at),
                          row.begin() + static_cast<long>(std::min(row.size(), at + static_cast<size_t>(width))));
        at += static_cast<size_t>(width);
      } while (at < row.size());
    }
    rows_ = rows;
    y_ = rows_.size() - 1;
    width_ = width;
  }
  void Write(const std::string& bytes) {
    for (size_t i = 0; i < bytes.size();) {
      const unsigned char c = static_cast<unsigned char>(bytes[i]);
      if (c == '\r') {
        x_ = 0;
        ++i;
      } else if (c == '\n') {
        NewRow();
        x_ = 0;
        ++i;
      } else if (c == 0x1b) {
        const size_t end = bytes.find_first_of("AJKm", i);
        Escape(bytes.substr(i + 2, end - i - 2), bytes[end]);
        i = end + 1;
      } else {
        const size_t n = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc0 ? 2 : 1;
        Put(bytes.substr(i, n));
        i += n;
      }
    }
  }
  std::vector<std::string> Lines() const {
    std::vector<std::string> out;
    for (const auto& row : rows_) {
      std::string line;
      for (const std::string& cell : row) line += cell;
      while (!line.empty() && line.back() == ' ') line.pop_back();
      out.push_back(line);
    }
    while (!out.empty() && out.back().empty()) out.pop_back();
    return out;
  }
  int wraps() const { return wraps_; }

 private:
  void NewRow() {
    if (++y_ == rows_.size()) rows_.emplace_back();
  }
  void Put(const std::string& cell) {
    if (x_ == static_cast<size_t>(width_)) {
      ++wraps_;
      NewRow();
      x_ = 0;
    }
    auto& row = rows_[y_];
    if (row.size() <= x_) row.resize(x_ + 1, " ");
    row[x_++] = cell;
  }
  void Escape(const std::string& argument, char kind) {
    int n = 1;
    (void)absl::SimpleAtoi(argument, &n);
    if (kind == 'A') y_ -= std::min(y_, static_cast<size_t>(n));
    if (kind == 'J') {
      rows_.resize(y_ + 1);
      rows_[y_].resize(std::min(rows_[y_].size(), x_));
    }
    if (kind == 'K') rows_[y_].resize(std::min(rows_[y_].size(), x_));
  }

  int width_;
  int wraps_ = 0;
  size_t x_ = 0, y_ = 0;
  std::vector<std::vector<std::string>> rows_;
};

// A pair of a terminal and the screen behind it.
class Pty {
 public:
  explicit Pty(int width) : screen_(width) {
    int master = -1, slave = -1;
    EXPECT_EQ(openpty(&master, &slave, nullptr, nullptr, nullptr), 0);
    master_ = FileDescriptor(master);
    slave_ = FileDescriptor(slave);
    termios raw;
    tcgetattr(slave, &raw);
    cfmakeraw(&raw);
    tcsetattr(slave, TCSANOW, &raw);
    SetWidth(width);
    EXPECT_TRUE(isatty(slave));
  }
  void SetWidth(int width) {
    winsize size{};
    size.ws_col = static_cast<unsigned short>(width);
    size.ws_row = 24;
    EXPECT_EQ(ioctl(master_.get(), TIOCSWINSZ, &size), 0);
  }
  void Resize(int width) {
    Drain();
    screen_.Resize(width);
    SetWidth(width);
  }
  Terminal terminal() {
    Terminal terminal;
    terminal.out = &out_;
    terminal.err = &out_;
    terminal.out_is_terminal = true;
    terminal.unicode = true;
    terminal.width = [this] {
      winsize size{};
      ioctl(slave_.get(), TIOCGWINSZ, &size);
      return static_cast<int>(size.ws_col);
    };
    return terminal;
  }
  // Moves what was printed through the terminal onto the screen.
  Screen& Drain() {
    const std::string text = out_.str();
    out_.str("");
    EXPECT_OK(WriteAll(slave_.get(), text, "pty"));
    std::string got;
    while (got.size() < text.size()) {
      pollfd entry{master_.get(), POLLIN, 0};
      if (poll(&entry, 1, 5'000) <= 0) break;
      char buffer[4096];
      const ssize_t n = read(master_.get(), buffer, sizeof buffer);
      if (n <= 0) break;
      got.append(buffer, static_cast<size_t>(n));
    }
    EXPECT_EQ(got, text);
    screen_.Write(got);
    return screen_;
  }

 private:
  FileDescriptor master_, slave_;
  std::ostringstream out_;
  Screen screen_;
};

v1::JobUpdate Update(v1::JobState state, int step) {
  v1::JobUpdate update;
  v1::Job* job = update.mutable_job();
  job->set_id("7f3c0a1b2c3d4e5f");
  job->set_name("wind-downscaling-with-a-longish-name");
  job->set_site("local");
  job->set_ranks(2);
  job->set_state(state);
  job->mutable_progress()->set_step(step);
  job->mutable_progress()->set_steps(100);
  job->mutable_progress()->set_epoch(step / 10 + 1);
  job->mutable_progress()->set_epochs(10);
  job->mutable_progress()->set_seconds_left(100 - step);
  v1::JobEvent* event = update.add_events();  // draws at once
  event->set_state(state);
  v1::PointBlock* block = update.add_blocks();
  block->set_series("train/loss");
  block->add_values(1.0 / (1 + step));
  return update;
}

TEST(LiveView, RedrawsInPlace) {
  Pty pty(70);
  const Terminal terminal = pty.terminal();
  std::unique_ptr<WatchView> view = MakeLiveView(terminal);
  for (int step = 1; step < 100; ++step) {
    view->OnUpdate(Update(v1::JOB_STATE_RUNNING, step));
    ASSERT_EQ(pty.Drain().Lines().size(), 3u) << step;
  }
  EXPECT_THAT(pty.Drain().Lines(), ElementsAre(StartsWith("job 7f3c0a1b  wind"), HasSubstr("epoch 10/10 ━━"), StartsWith("train/loss 0.01")));
  view->OnReconnect(absl::UnavailableError("x"), absl::Seconds(1));
  EXPECT_THAT(pty.Drain().Lines().back(), StartsWith("connection lost; the job goes on"));
  view->OnUpdate(Update(v1::JOB_STATE_SUCCEEDED, 100));
  EXPECT_EQ(pty.Drain().Lines().size(), 3u);  // the note is gone
  v1::Job last = Update(v1::JOB_STATE_SUCCEEDED, 100).job();
  view->OnEnd(last);
  EXPECT_THAT(pty.Drain().Lines().back(), HasSubstr("itwin get 7f3c0a1b2c3d4e5f"));
  EXPECT_EQ(pty.Drain().wraps(), 0);
}

TEST(LiveView, FollowsTheWidthOfTheTerminal) {
  for (int width : {200, 80, 40, 25, 12, 5, 2}) {
    Pty pty(120);
    const Terminal terminal = pty.terminal();
    std::unique_ptr<WatchView> view = MakeLiveView(terminal);
    view->OnUpdate(Update(v1::JOB_STATE_RUNNING, 1));
    pty.Resize(width);
    for (int step = 2; step < 20; ++step) {
      view->OnUpdate(Update(v1::JOB_STATE_RUNNING, step));
      const std::vector<std::string> lines = pty.Drain().Lines();
      EXPECT_EQ(lines.size(), 3u) << "width " << width << " step " << step;
      for (const std::string& line : lines) EXPECT_LE(DisplayWidth(line), width);
    }
    EXPECT_EQ(pty.Drain().wraps(), 0);
    pty.Resize(100);  // and back
    view->OnUpdate(Update(v1::JOB_STATE_RUNNING, 21));
    EXPECT_EQ(pty.Drain().Lines().size(), 3u) << width;
  }
}

}  // namespace
}  // namespace itwin::cli
