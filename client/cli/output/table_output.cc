#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "client/cli/output/output.h"
#include "client/cli/render.h"
#include "client/cli/watch_view.h"
#include "common/spec/spec_document.h"
#include "common/version.h"

namespace itwin::cli {
namespace {

constexpr int kMaxCell = 40;
constexpr int kSparklineWidth = 16;

using Row = std::vector<std::string>;

std::string Age(int64_t micros) {
  return micros == 0 ? "-" : DurationText(absl::Now() - absl::FromUnixMicros(micros));
}

std::string RunTime(const v1::Job& job) {
  if (job.started_us() == 0) return "-";
  const absl::Time end = job.finished_us() != 0 ? absl::FromUnixMicros(job.finished_us()) : absl::Now();
  return DurationText(end - absl::FromUnixMicros(job.started_us()));
}

std::string ProgressCell(const v1::Job& job) {
  const v1::Progress& progress = job.progress();
  if (progress.steps() > 0) {
    return absl::StrFormat("%.0f %%", 100.0 * static_cast<double>(progress.step()) / static_cast<double>(progress.steps()));
  }
  if (progress.epochs() > 0) return absl::StrCat(progress.epoch(), "/", progress.epochs());
  return progress.step() > 0 ? absl::StrCat("step ", progress.step()) : "-";
}

// One line per step: as it goes on a terminal, its verdict alone elsewhere.
class TableSiteView : public SiteView {
 public:
  explicit TableSiteView(const Terminal& terminal) : terminal_(terminal), out_(*terminal.out) {}
  ~TableSiteView() override { Clear(); }

  void OnProgress(const v1::SiteProgress& progress) override {
    const std::string step = absl::StrFormat("%-*s", kStepWidth, Printable(progress.step()));
    if (progress.verdict() == v1::SITE_CHECK_UNSPECIFIED) {
      if (!terminal_.out_is_terminal) return;
      const Glyphs glyphs{terminal_.unicode};
      const std::string bar = progress.fraction() > 0 ? absl::StrCat(" ", Bar(progress.fraction(), kBarWidth, glyphs), " ",
                                                                     static_cast<int>(100 * progress.fraction()), " %") : "";
      const std::string line = absl::StrCat(terminal_.unicode ? "\u2026" : ".", "        ", step, " ", Printable(progress.found()), bar);
      out_ << "\r\x1b[K" << Truncated(line, std::max(1, terminal_.width() - 1), glyphs) << std::flush;
      drawn_ = true;
      return;
    }
    Clear();
    out_ << Verdict(progress.verdict()) << " " << step << " " << Printable(progress.found()) << "\n";
    if (!progress.advice().empty()) out_ << std::string(static_cast<size_t>(kVerdictWidth + kStepWidth + 2), ' ') << "-> " << Printable(progress.advice()) << "\n";
    out_.flush();
  }
  void OnEnd() override { Clear(); }

 private:
  static constexpr int kVerdictWidth = 8;
  static constexpr int kStepWidth = 12;
  static constexpr int kBarWidth = 24;

  std::string Verdict(v1::SiteCheck verdict) const {
    const std::string word = absl::StrFormat("%-*s", kVerdictWidth, SiteCheckText(verdict));
    if (!terminal_.color) return word;
    const char* color = verdict == v1::SITE_CHECK_OK ? "32" : verdict == v1::SITE_CHECK_WARNING ? "33" : verdict == v1::SITE_CHECK_ERROR ? "31" : "2";
    return absl::StrCat("\x1b[", color, "m", word, "\x1b[0m");
  }
  void Clear() {
    if (drawn_) out_ << "\r\x1b[K" << std::flush;
    drawn_ = false;
  }

  const Terminal& terminal_;
  std::ostream& out_;
  bool drawn_ = false;
};

class TableOutput : public Output {
 public:
  explicit TableOutput(const Terminal& terminal) : terminal_(terminal), out_(*terminal.out) {}

  void Job(const v1::Job& job) override {
    const auto line = [&](absl::string_view key, const std::string& value) {
      if (!value.empty()) out_ << absl::StrFormat("%-10s %s\n", key, Printable(value));
    };
    line("job", job.id());
    line("name", job.name());
    out_ << absl::StrFormat("%-10s ", "state") << State(job.state())
         << (job.cancel_requested() && job.finished_us() == 0 ? " (cancel requested)" : "") << "\n";
    line("reason", job.reason());
    line("failure", FailureText(job.failure()));
    line("site", job.site());
    if (job.ranks() > 0) line("ranks", absl::StrCat(job.ranks()));
    line("owner", job.owner());
    line("retry of", job.retry_of());
    line("created", TimeText(job.created_us()));
    if (job.started_us() != 0) line("started", absl::StrCat(TimeText(job.started_us()), " (ran ", RunTime(job), ")"));
    if (job.finished_us() != 0) line("finished", TimeText(job.finished_us()));
    std::vector<std::string> labels;
    for (const auto& [key, value] : std::map(job.labels().begin(), job.labels().end())) {
      labels.push_back(absl::StrCat(key, "=", value));
    }
    line("labels", absl::StrJoin(labels, ", "));
    const v1::Progress& progress = job.progress();
    if (progress.step() > 0 || progress.epoch() > 0) {
      std::string text;
      if (progress.epochs() > 0) absl::StrAppend(&text, "epoch ", progress.epoch(), "/", progress.epochs(), ", ");
      absl::StrAppend(&text, "step ", progress.step());
      if (progress.steps() > 0) absl::StrAppend(&text, "/", progress.steps(), " (", ProgressCell(job), ")");
      line("progress", text);
    }
    for (const auto& [key, value] : std::map(job.summary().begin(), job.summary().end())) {
      out_ << absl::StrFormat("  %s = %s\n", Printable(key), NumberText(value));
    }
    if (!job.attempts().empty()) {
      out_ << "\n";
      std::vector<Row> rows = {{"ATTEMPT", "SITE", "HOST", "STARTED", "RAN", "EXIT", "CPU", "MEMORY", "REASON"}};
      for (const v1::Attempt& attempt : job.attempts()) {
        const std::string exit = attempt.signal() != 0    ? absl::StrCat("signal ", attempt.signal())
                                 : attempt.has_exit_code() ? absl::StrCat(attempt.exit_code())
                                                           : "-";
        const int64_t end = attempt.ended_us();
        rows.push_back({absl::StrCat(attempt.number()), attempt.site(), attempt.host().empty() ? "-" : attempt.host(),
                        TimeText(attempt.started_us()),
                        attempt.started_us() == 0 || end == 0 ? "-" : DurationText(absl::Microseconds(end - attempt.started_us())),
                        exit, attempt.cpu_seconds() > 0 ? DurationText(absl::Seconds(attempt.cpu_seconds())) : "-",
                        attempt.max_rss_bytes() > 0 ? BytesText(attempt.max_rss_bytes()) : "-",
                        attempt.reason().empty() ? "-" : attempt.reason()});
      }
      Table(rows, /*last_is_long=*/true);
    }
    out_.flush();
  }

  void Jobs(const std::vector<v1::Job>& jobs, bool more) override {
    std::vector<std::string> ids;
    for (const v1::Job& job : jobs) ids.push_back(job.id());
    if (terminal_.out_is_terminal) ids = ShortIds(ids);
    std::vector<Row> rows = {{"JOB", "NAME", "STATE", "SITE", "RANKS", "PROGRESS", "AGE", "RAN"}};
    for (size_t i = 0; i < jobs.size(); ++i) {
      const v1::Job& job = jobs[i];
      rows.push_back({ids[i], job.name(), StateText(job.state()), job.site().empty() ? "-" : job.site(),
                      absl::StrCat(job.ranks()), ProgressCell(job), Age(job.created_us()), RunTime(job)});
    }
    if (jobs.empty()) {
      out_ << "no jobs\n" << std::flush;
      return;
    }
    Table(rows);
    if (more) *terminal_.err << "there are more; use --all, or --limit N\n";
  }

  void Submitted(const v1::SubmitJobResponse& response) override {
    out_ << "job " << response.job().id() << (response.existed() ? " existed already (same request id)" : " submitted");
    if (!response.job().retry_of().empty()) out_ << " (repeats " << response.job().retry_of() << ")";
    out_ << std::endl;
  }

  void Cancelled(const std::vector<CancelResult>& results) override {
    for (const CancelResult& result : results) {
      if (!result.status.ok()) continue;  // told as errors
      const bool ended = result.after.finished_us() != 0;
      out_ << "job " << result.after.id() << (ended ? " is " : " will be cancelled; it is ")
           << StateText(result.after.state()) << (ended ? "" : " now") << "\n";
    }
    out_.flush();
  }

  void Validated(const v1::ValidateJobResponse& response, bool by_gateway) override {
    out_ << SpecToYaml(response.spec());
    for (const v1::FileReference& file : response.files()) {
      out_ << "# uses " << Printable(file.value()) << " (" << file.field() << ")\n";
    }
    out_ << (by_gateway ? "# valid, says the gateway\n" : "# valid\n") << std::flush;
  }

  void Events(const std::vector<v1::JobEvent>& events) override {
    std::vector<Row> rows = {{"TIME", "EVENT", "STATE", "ATTEMPT", "BY", "MESSAGE"}};
    for (const v1::JobEvent& event : events) {
      rows.push_back({TimeText(event.time_us()), event.kind(), StateText(event.state()),
                      event.attempt() > 0 ? absl::StrCat(event.attempt()) : "-", event.actor(), event.message()});
    }
    Table(rows, /*last_is_long=*/true);
  }

  void Series(const std::vector<v1::SeriesBuckets>& series) override {
    if (series.empty()) {
      out_ << "no metrics yet\n" << std::flush;
      return;
    }
    std::vector<Row> rows = {{"SERIES", "LAST", "MIN", "MAX", "POINTS", ""}};
    for (const v1::SeriesBuckets& one : series) {
      if (one.last().empty() || one.min_size() != one.last_size() || one.max_size() != one.last_size()) continue;
      rows.push_back({one.series(), NumberText(*one.last().rbegin()),
                      NumberText(*std::min_element(one.min().begin(), one.min().end())),
                      NumberText(*std::max_element(one.max().begin(), one.max().end())), absl::StrCat(one.points()),
                      Sparkline({one.last().begin(), one.last().end()}, kSparklineWidth, Glyphs{terminal_.unicode})});
    }
    Table(rows);
  }

  void Downloaded(const std::vector<DownloadedFile>& files, const std::string& directory) override {
    for (const DownloadedFile& file : files) {
      out_ << Printable(file.path) << "  " << BytesText(file.file.size_bytes()) << "  checksum right\n";
    }
    out_.flush();
  }

  void Traced(const DownloadedFile& trace) override {
    Downloaded({trace}, "");
    out_ << "open it at https://ui.perfetto.dev or chrome://tracing\n" << std::flush;
  }

  void Sites(const std::vector<v1::Site>& sites) override {
    if (sites.empty()) {
      out_ << "the gateway has no site\n" << std::flush;
      return;
    }
    std::vector<Row> rows = {{"SITE", "STATE", "SCHEDULER", "SLOTS", "JOBS", "AGENT", "HOST", "REASON"}};
    for (const v1::Site& site : sites) {
      rows.push_back({site.name(), StateText(site.state()), site.scheduler(),
                      site.slots() > 0 ? absl::StrCat(site.slots_in_use(), "/", site.slots()) : "-",
                      absl::StrCat(site.live_jobs()), site.agent_version().empty() ? "-" : site.agent_version(),
                      site.host().empty() ? "-" : site.host(), site.reason().empty() ? "-" : site.reason()});
    }
    Table(rows, /*last_is_long=*/true);
  }

  void Site(const v1::Site& site) override {
    const auto line = [&](absl::string_view key, const std::string& value) {
      if (!value.empty()) out_ << absl::StrFormat("%-12s %s\n", key, Printable(value));
    };
    line("site", site.name());
    line("state", StateText(site.state()));
    line("reason", site.reason());
    line("address", site.address());
    line("scheduler", site.scheduler());
    line("partitions", absl::StrJoin(site.partitions(), ", "));
    line("login node", site.host());
    line("agent", site.agent_version());
    if (site.slots() > 0) line("slots", absl::StrCat(site.slots_in_use(), " of ", site.slots(), " in use"));
    line("live jobs", absl::StrCat(site.live_jobs()));
    if (site.connected_us() != 0) line("connected", absl::StrCat("for ", Age(site.connected_us())));
    if (site.credentials_expire_us() != 0) line("credentials", absl::StrCat("end ", TimeText(site.credentials_expire_us())));
    if (site.calls_per_minute() > 0) line("calls", absl::StrFormat("%.1f to the scheduler per minute", site.calls_per_minute()));
    if (!site.document().empty()) {
      out_ << "\n";
      for (const absl::string_view text : absl::StrSplit(site.document(), '\n')) out_ << Printable(std::string(text)) << "\n";
    }
    out_.flush();
  }

  void SiteRemoved(const std::string& name) override {
    out_ << "site " << Printable(name) << " is removed; what is installed there stays" << std::endl;
  }

  std::unique_ptr<SiteView> SiteChecks() override { return std::make_unique<TableSiteView>(terminal_); }

  void Version(const v1::GetVersionResponse& gateway) override {
    out_ << "itwin " << kVersion << "\ngateway " << Printable(gateway.version()) << ", API " << gateway.api() << ", up "
         << Age(gateway.started_us()) << std::endl;
  }

  void Error(const absl::Status& status) override {
    const std::vector<std::string> lines = absl::StrSplit(std::string(status.message()), '\n');
    for (const std::string& line : lines) *terminal_.err << "itwin: " << Printable(line) << "\n";
    terminal_.err->flush();
  }

  std::unique_ptr<WatchView> Watch() override {
    return terminal_.out_is_terminal ? MakeLiveView(terminal_) : MakePlainView(terminal_);
  }

 private:
  std::string State(v1::JobState state) const {
    const std::string word = StateText(state);
    if (!terminal_.color) return word;
    const char* color = state == v1::JOB_STATE_SUCCEEDED ? "32" : state == v1::JOB_STATE_FAILED ? "31"
                        : state == v1::JOB_STATE_RUNNING ? "36" : "33";
    return absl::StrCat("\x1b[", color, "m", word, "\x1b[0m");
  }

  // Columns as wide as their widest cell (within reason); on a terminal the last one is cut at the edge.
  void Table(const std::vector<Row>& rows, bool last_is_long = false) {
    const Glyphs glyphs{terminal_.unicode};
    std::vector<Row> cells = rows;
    std::vector<int> widths(rows[0].size(), 0);
    for (Row& row : cells) {
      for (size_t i = 0; i < row.size(); ++i) {
        row[i] = Printable(row[i]);
        const bool last = i + 1 == row.size();
        if (terminal_.out_is_terminal && !(last && last_is_long)) row[i] = Truncated(row[i], kMaxCell, glyphs);
        widths[i] = std::max(widths[i], DisplayWidth(row[i]));
      }
    }
    const int width = terminal_.out_is_terminal ? std::max(20, terminal_.width()) : 1 << 30;
    for (const Row& row : cells) {
      std::string line;
      for (size_t i = 0; i < row.size(); ++i) {
        line += row[i];
        if (i + 1 < row.size()) line.append(static_cast<size_t>(widths[i] - DisplayWidth(row[i]) + 2), ' ');
      }
      while (!line.empty() && line.back() == ' ') line.pop_back();
      out_ << Truncated(line, width, glyphs) << "\n";
    }
    out_.flush();
  }

  const Terminal& terminal_;
  std::ostream& out_;
};

}  // namespace

std::unique_ptr<Output> MakeTableOutput(const Terminal& terminal) { return std::make_unique<TableOutput>(terminal); }

}  // namespace itwin::cli
