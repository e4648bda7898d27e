#include "client/cli/watch_model.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace itwin::cli {
namespace {

constexpr size_t kMaxSeries = 200;
constexpr size_t kMaxHistory = 256;
constexpr size_t kMaxStates = 6;
constexpr size_t kMaxMetricLines = 4;
constexpr size_t kMaxPlainMetrics = 5;  // on a line of plain output
constexpr int kBarWidth = 28;
constexpr int kSparklineWidth = 12;
constexpr char kNodePrefix[] = "node/";

bool IsLoss(const std::string& name) { return absl::EndsWith(name, "loss"); }
bool OfMachine(const std::string& name) { return absl::StartsWith(name, kNodePrefix); }

}  // namespace

void WatchModel::Add(const v1::JobUpdate& update) {
  for (const v1::JobEvent& event : update.events()) {
    const std::string state = StateText(event.state());
    if (event.state() != v1::JOB_STATE_UNSPECIFIED && (states_.empty() || states_.back() != state)) states_.push_back(state);
  }
  if (update.has_job()) {
    job_ = update.job();
    const std::string state = StateText(job_.state());
    if (states_.empty() || states_.back() != state) states_.push_back(state);
  }
  if (states_.size() > kMaxStates) states_.erase(states_.begin(), states_.end() - kMaxStates);
  for (const v1::PointBlock& block : update.blocks()) {
    for (double value : block.values()) AddValue(block.series(), value);
  }
}

void WatchModel::AddValue(const std::string& name, double value) {
  if (series_.size() >= kMaxSeries && series_.count(name) == 0) return;
  Series& series = series_[name];
  series.moves |= series.points > 0 && value != series.last;
  ++series.points;
  series.last = value;
  series.pending_sum += value;
  if (++series.pending < series.per_entry) return;
  series.history.push_back(series.pending_sum / static_cast<double>(series.pending));
  series.pending_sum = 0;
  series.pending = 0;
  if (series.history.size() < kMaxHistory) return;
  // Full: every two become one, and so do those that follow.
  for (size_t i = 0; i < kMaxHistory / 2; ++i) series.history[i] = (series.history[2 * i] + series.history[2 * i + 1]) / 2;
  series.history.resize(kMaxHistory / 2);
  series.per_entry *= 2;
}

const std::vector<double>& WatchModel::History(const std::string& series) const {
  static const auto* const kNone = new std::vector<double>;
  const auto found = series_.find(series);
  return found == series_.end() ? *kNone : found->second.history;
}

double WatchModel::Fraction() const {
  const v1::Progress& progress = job_.progress();
  if (job_.state() == v1::JOB_STATE_SUCCEEDED) return 1;
  if (progress.steps() > 0) {
    return std::clamp(static_cast<double>(progress.step()) / static_cast<double>(progress.steps()), 0.0, 1.0);
  }
  if (progress.epochs() > 0) return std::clamp((progress.epoch() - 1.0) / progress.epochs(), 0.0, 1.0);
  return 0;
}

std::string WatchModel::ProgressText() const {
  const v1::Progress& progress = job_.progress();
  std::vector<std::string> parts;
  if (progress.epochs() > 0) parts.push_back(absl::StrCat("epoch ", progress.epoch(), "/", progress.epochs()));
  if (progress.steps() > 0) {
    parts.push_back(absl::StrFormat("step %d/%d (%.0f %%)", progress.step(), progress.steps(), 100 * Fraction()));
  } else if (progress.step() > 0) {
    parts.push_back(absl::StrCat("step ", progress.step()));
  }
  if (progress.samples_per_second() > 0) {
    parts.push_back(absl::StrCat(NumberText(progress.samples_per_second()), " samples/s"));
  }
  if (progress.seconds_left() > 0 && std::isfinite(progress.seconds_left()) && !parts.empty()) {
    parts.push_back(absl::StrCat("ETA ", DurationText(absl::Seconds(progress.seconds_left()))));
  }
  return absl::StrJoin(parts, ", ");
}

std::vector<std::string> WatchModel::Ordered() const {
  std::vector<std::string> names;
  for (const auto& [name, series] : series_) {
    if (!OfMachine(name)) names.push_back(name);
  }
  // What moves comes first: the losses, then other metrics; then what was said once, and how fast it went.
  const auto rank = [this](const std::string& name) {
    if (absl::StartsWith(name, "perf/")) return 5;
    if (IsLoss(name)) return absl::StartsWith(name, "train/") ? 0 : 1;
    return series_.at(name).moves ? (absl::StartsWith(name, "train/") ? 3 : 2) : 4;
  };
  std::stable_sort(names.begin(), names.end(), [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  return names;
}

std::string WatchModel::MetricsText() const {
  std::vector<std::string> parts;
  for (const std::string& name : Ordered()) {
    if (parts.size() == kMaxPlainMetrics) break;
    parts.push_back(absl::StrCat(Printable(name), " ", NumberText(series_.at(name).last)));
  }
  return absl::StrJoin(parts, "  ");
}

std::string WatchModel::NodeText() const {
  // Of all nodes: "node/<host>/<what>", or "node/<what>" from a program that names no host.
  struct Sum {
    double total = 0;
    int nodes = 0;
  };
  std::map<std::string, Sum> sums;
  int nodes = 0;
  for (auto it = series_.lower_bound(kNodePrefix); it != series_.end() && OfMachine(it->first); ++it) {
    Sum& sum = sums[it->first.substr(it->first.rfind('/') + 1)];
    sum.total += it->second.last;
    nodes = std::max(nodes, ++sum.nodes);
  }
  std::vector<std::string> parts;
  const auto add = [&](const char* what, bool mean, const auto& text) {
    const auto found = sums.find(what);
    if (found != sums.end()) parts.push_back(text(mean ? found->second.total / found->second.nodes : found->second.total));
  };
  add("cpu_percent", true, [](double v) { return absl::StrFormat("cpu %.0f %%", v); });
  add("gpu_percent", true, [](double v) { return absl::StrFormat("gpu %.0f %%", v); });
  add("memory_bytes", false, [](double v) { return absl::StrCat("memory ", BytesText(static_cast<int64_t>(v))); });
  add("power_watts", false, [](double v) { return absl::StrFormat("%.0f W", v); });
  if (nodes > 1 && !parts.empty()) parts.push_back(absl::StrCat("of ", nodes, " nodes"));
  return absl::StrJoin(parts, "  ");
}

std::string WatchModel::StateLine() const {
  std::string line = absl::StrCat("job ", job_.id().substr(0, 8));
  if (!job_.name().empty() && job_.name() != "unnamed") absl::StrAppend(&line, "  ", Printable(job_.name()));
  absl::StrAppend(&line, "  ", absl::StrJoin(states_, " → "));
  if (!job_.site().empty()) absl::StrAppend(&line, " on ", Printable(job_.site()));
  if (job_.ranks() > 0) absl::StrAppend(&line, " (", job_.ranks(), job_.ranks() == 1 ? " rank)" : " ranks)");
  if (job_.attempt() > 1) absl::StrAppend(&line, ", attempt ", job_.attempt());
  if (job_.cancel_requested() && job_.finished_us() == 0) absl::StrAppend(&line, ", cancelling");
  return line;
}

std::vector<std::string> WatchModel::Lines(int width, Glyphs glyphs) const {
  std::vector<std::string> lines;
  std::string state = StateLine();
  if (!glyphs.unicode) {
    for (size_t at; (at = state.find("→")) != std::string::npos;) state.replace(at, std::string("→").size(), "->");
  }
  lines.push_back(state);
  if (!job_.reason().empty() && job_.state() != v1::JOB_STATE_RUNNING && job_.state() != v1::JOB_STATE_SUCCEEDED) {
    lines.push_back(absl::StrCat("  ", Printable(job_.reason())));
  }
  const v1::Progress& progress = job_.progress();
  if (progress.step() > 0 || progress.epoch() > 0) {
    std::string head, tail = absl::StrFormat(" %2.0f %%", 100 * Fraction());
    if (progress.epochs() > 0) head = absl::StrCat("epoch ", progress.epoch(), "/", progress.epochs(), " ");
    if (progress.seconds_left() >= 0 && std::isfinite(progress.seconds_left()) && job_.finished_us() == 0) {
      absl::StrAppend(&tail, "  ETA ", DurationText(absl::Seconds(progress.seconds_left())));
    }
    if (progress.samples_per_second() > 0) {
      absl::StrAppend(&tail, "  ", NumberText(progress.samples_per_second()), " samples/s");
    }
    const int room = width - DisplayWidth(head) - DisplayWidth(tail);
    lines.push_back(absl::StrCat(head, Bar(Fraction(), std::clamp(room, 0, kBarWidth), glyphs), tail));
  }
  // Cells side by side, as many as fit.
  std::vector<std::string> cells;
  for (const std::string& name : Ordered()) {
    std::string cell = absl::StrCat(Printable(name), " ", NumberText(series_.at(name).last));
    const std::string spark = Sparkline(series_.at(name).history, kSparklineWidth, glyphs);
    if (IsLoss(name) && series_.at(name).history.size() > 1) absl::StrAppend(&cell, " ", spark);
    cells.push_back(std::move(cell));
  }
  if (std::string node = NodeText(); !node.empty()) cells.push_back(std::move(node));
  std::vector<std::string> metric_lines;
  for (const std::string& cell : cells) {
    const bool fits = !metric_lines.empty() && DisplayWidth(metric_lines.back()) + 2 + DisplayWidth(cell) <= width;
    if (fits) {
      absl::StrAppend(&metric_lines.back(), "  ", cell);
    } else if (metric_lines.size() < kMaxMetricLines) {
      metric_lines.push_back(cell);
    } else {
      break;
    }
  }
  lines.insert(lines.end(), metric_lines.begin(), metric_lines.end());
  for (std::string& line : lines) line = Truncated(line, width, glyphs);
  return lines;
}

}  // namespace itwin::cli
