#include "client/cli/watch_view.h"

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "client/cli/watch_model.h"

namespace itwin::cli {
namespace {

constexpr absl::Duration kRedrawInterval = absl::Milliseconds(80);
constexpr absl::Duration kPlainInterval = absl::Seconds(10);

std::string SummaryText(const v1::Job& job) {
  std::vector<std::string> parts;
  for (const auto& [name, value] : std::map(job.summary().begin(), job.summary().end())) {
    parts.push_back(absl::StrCat(Printable(name), " ", NumberText(value)));
  }
  return absl::StrJoin(parts, "  ");
}

// What there is to say at the end: result, reason, next step.
std::vector<std::string> EndLines(const v1::Job& job) {
  std::vector<std::string> lines;
  const int64_t begin = job.started_us() != 0 ? job.started_us() : job.created_us();
  const std::string took =
      job.finished_us() > begin ? absl::StrCat(" after ", DurationText(absl::Microseconds(job.finished_us() - begin))) : "";
  lines.push_back(absl::StrCat("job ", job.id(), " ", StateText(job.state()), took));
  if (!job.reason().empty() && job.state() != v1::JOB_STATE_SUCCEEDED) lines.push_back("  " + Printable(job.reason()));
  if (std::string summary = SummaryText(job); !summary.empty()) lines.push_back("  " + summary);
  if (job.state() == v1::JOB_STATE_SUCCEEDED) {
    lines.push_back(absl::StrCat("  fetch the results: itwin get ", job.id()));
  } else if (job.state() == v1::JOB_STATE_FAILED) {
    lines.push_back(absl::StrCat("  look closer: itwin logs ", job.id(), " --stderr; itwin events ", job.id()));
  }
  return lines;
}

bool IsFinal(v1::JobState state) {
  return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED || state == v1::JOB_STATE_CANCELLED;
}

class LiveView : public WatchView {
 public:
  explicit LiveView(const Terminal& terminal) : terminal_(terminal) {}

  void OnUpdate(const v1::JobUpdate& update) override {
    model_.Add(update);
    note_.clear();
    const absl::Time now = absl::Now();
    const bool final = IsFinal(model_.job().state());
    if (now - drawn_at_ < kRedrawInterval && !final && update.events().empty()) return;
    drawn_at_ = now;
    Draw();
  }
  void OnReconnect(const absl::Status&, absl::Duration) override {
    note_ = "connection lost; the job goes on, and so does this watch as soon as the gateway answers";
    Draw();
  }
  void OnEnd(const v1::Job& job) override {
    note_.clear();
    Draw();
    if (!IsFinal(job.state())) return;
    std::vector<std::string> lines = EndLines(job);
    for (const std::string& line : lines) *terminal_.out << line << "\n";
    terminal_.out->flush();
  }

 private:
  void Draw() {
    const int width = std::max(1, terminal_.width());
    const Glyphs glyphs{terminal_.unicode};
    std::vector<std::string> lines = model_.Lines(width, glyphs);
    if (!note_.empty()) lines.push_back(Truncated(note_, width, glyphs));
    std::string out;
    // A narrower terminal has wrapped the lines of the old drawing.
    int rows = 0;
    for (int columns : drawn_) rows += std::max(1, (columns + width - 1) / width);
    if (rows > 0) absl::StrAppend(&out, "\x1b[", rows, "A");
    absl::StrAppend(&out, "\r\x1b[J");
    drawn_.clear();
    for (const std::string& line : lines) {
      absl::StrAppend(&out, Colored(line), "\n");
      drawn_.push_back(DisplayWidth(line));
    }
    *terminal_.out << out << std::flush;
  }

  std::string Colored(const std::string& line) const {
    if (!terminal_.color) return line;
    const v1::JobState state = model_.job().state();
    const char* color = state == v1::JOB_STATE_SUCCEEDED ? "32" : state == v1::JOB_STATE_FAILED ? "31"
                        : state == v1::JOB_STATE_RUNNING ? "36" : "33";
    const std::string word = StateText(state);
    const size_t at = line.rfind("job ", 0) == 0 ? line.rfind(word) : std::string::npos;
    if (at == std::string::npos) return line;
    return absl::StrCat(line.substr(0, at), "\x1b[", color, "m", word, "\x1b[0m", line.substr(at + word.size()));
  }

  const Terminal& terminal_;
  WatchModel model_;
  std::string note_;
  absl::Time drawn_at_ = absl::InfinitePast();
  std::vector<int> drawn_;  // columns of each line on the screen
};

class PlainView : public WatchView {
 public:
  explicit PlainView(const Terminal& terminal) : terminal_(terminal) {}

  void OnUpdate(const v1::JobUpdate& update) override {
    const v1::JobState before = model_.job().state();
    const int epoch_before = model_.job().progress().epoch();
    model_.Add(update);
    const v1::Job& job = model_.job();
    if (!update.events().empty()) {
      for (const v1::JobEvent& event : update.events()) {
        Print(event.time_us(), absl::StrCat(StateText(event.state()), event.message().empty() ? "" : ": ",
                                            Printable(event.message())));
      }
    } else if (update.has_job() && job.state() != before) {
      Print(absl::ToUnixMicros(absl::Now()), StateText(job.state()));
    }
    const std::string progress = model_.ProgressText();
    if (progress.empty() || IsFinal(job.state())) return;
    const absl::Time now = absl::Now();
    const bool due = job.progress().epoch() != epoch_before || now - printed_at_ >= kPlainInterval;
    const std::string metrics = model_.MetricsText();
    if (!due || progress == printed_) return;
    printed_at_ = now;
    printed_ = progress;
    Print(job.progress().updated_us(), absl::StrCat(progress, metrics.empty() ? "" : "  ", metrics));
  }
  void OnReconnect(const absl::Status& why, absl::Duration) override {
    if (lost_) return;
    lost_ = true;
    *terminal_.err << "connection lost (" << Printable(why.message()) << "); trying again until it is back\n" << std::flush;
  }
  void OnEnd(const v1::Job& job) override {
    if (!IsFinal(job.state())) return;
    for (const std::string& line : EndLines(job)) *terminal_.out << line << "\n";
    terminal_.out->flush();
  }

 private:
  void Print(int64_t micros, const std::string& text) {
    if (lost_) *terminal_.err << "connected again\n" << std::flush;
    lost_ = false;
    if (!introduced_) *terminal_.out << "job " << model_.job().id() << "\n";
    introduced_ = introduced_ || !model_.job().id().empty();
    const absl::Time time = micros == 0 ? absl::Now() : absl::FromUnixMicros(micros);
    *terminal_.out << absl::FormatTime("%H:%M:%S", time, absl::LocalTimeZone()) << " " << text << std::endl;
  }

  const Terminal& terminal_;
  WatchModel model_;
  absl::Time printed_at_ = absl::InfinitePast();
  std::string printed_;
  bool lost_ = false;
  bool introduced_ = false;
};

}  // namespace

std::unique_ptr<WatchView> MakeLiveView(const Terminal& terminal) { return std::make_unique<LiveView>(terminal); }
std::unique_ptr<WatchView> MakePlainView(const Terminal& terminal) { return std::make_unique<PlainView>(terminal); }

}  // namespace itwin::cli
