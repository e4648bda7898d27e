#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "client/cli/output/output.h"
#include "client/cli/render.h"
#include "common/spec/spec_document.h"
#include "common/version.h"

namespace itwin::cli {
namespace {

using Json = nlohmann::ordered_json;

// Text that is not UTF-8 is repaired, never a reason to fail.
std::string Dump(const Json& json, int indent) {
  return json.dump(indent, ' ', false, Json::error_handler_t::replace);
}

Json SpecJson(const v1::JobSpec& spec) { return Json::parse(SpecToJson(spec), nullptr, false); }

template <typename Map>
Json MapJson(const Map& map) {
  Json out = Json::object();
  for (const auto& [key, value] : std::map(map.begin(), map.end())) out[key] = value;
  return out;
}

Json ToJson(const v1::Progress& progress) {
  return {{"step", progress.step()},
          {"steps", progress.steps()},
          {"epoch", progress.epoch()},
          {"epochs", progress.epochs()},
          {"samples_per_second", progress.samples_per_second()},
          {"seconds_left", progress.seconds_left()},
          {"updated_us", progress.updated_us()}};
}

Json ToJson(const v1::Attempt& attempt) {
  Json out = {{"number", attempt.number()},
              {"site", attempt.site()},
              {"scheduler_id", attempt.scheduler_id()},
              {"host", attempt.host()},
              {"submitted_us", attempt.submitted_us()},
              {"started_us", attempt.started_us()},
              {"ended_us", attempt.ended_us()},
              {"exit_code", nullptr},
              {"signal", attempt.signal()},
              {"failure", FailureText(attempt.failure())},
              {"reason", attempt.reason()},
              {"cpu_seconds", attempt.cpu_seconds()},
              {"max_rss_bytes", attempt.max_rss_bytes()}};
  if (attempt.has_exit_code()) out["exit_code"] = attempt.exit_code();
  return out;
}

Json ToJson(const v1::Job& job) {
  Json out = {{"id", job.id()},
              {"name", job.name()},
              {"state", StateText(job.state())},
              {"reason", job.reason()},
              {"failure", FailureText(job.failure())},
              {"site", job.site()},
              {"ranks", job.ranks()},
              {"attempt", job.attempt()},
              {"cancel_requested", job.cancel_requested()},
              {"owner", job.owner()},
              {"created_us", job.created_us()},
              {"started_us", job.started_us()},
              {"finished_us", job.finished_us()},
              {"version", job.version()},
              {"retry_of", job.retry_of()},
              {"labels", MapJson(job.labels())},
              {"progress", ToJson(job.progress())},
              {"summary", MapJson(job.summary())}};
  if (!job.attempts().empty()) {
    out["attempts"] = Json::array();
    for (const v1::Attempt& attempt : job.attempts()) out["attempts"].push_back(ToJson(attempt));
  }
  if (job.has_spec()) out["spec"] = SpecJson(job.spec());
  return out;
}

Json ToJson(const v1::JobEvent& event) {
  return {{"sequence", event.sequence()}, {"time_us", event.time_us()},
          {"attempt", event.attempt()},   {"kind", event.kind()},
          {"state", StateText(event.state())}, {"message", event.message()},
          {"actor", event.actor()},       {"failure", FailureText(event.failure())}};
}

Json PointJson(const v1::PointBlock& block, int i) {
  return {{"series", block.series()},
          {"attempt", block.attempt()},
          {"step", block.steps(i)},
          {"time_us", block.times_us(i)},
          {"value", block.values(i)}};  // null when not finite: JSON has no other word
}

Json ErrorJson(const absl::Status& status) {
  return {{"code", absl::StatusCodeToString(status.code())}, {"message", std::string(status.message())}};
}

Json ToJson(const DownloadedFile& file) {
  return {{"output", file.file.path()}, {"path", file.path}, {"size_bytes", file.file.size_bytes()}, {"sha256", file.file.sha256()}};
}

Json ToJson(const v1::Site& site) {
  Json partitions = Json::array();
  for (const std::string& partition : site.partitions()) partitions.push_back(partition);
  return {{"name", site.name()}, {"state", StateText(site.state())}, {"reason", site.reason()},
          {"scheduler", site.scheduler()}, {"slots", site.slots()}, {"slots_in_use", site.slots_in_use()},
          {"live_jobs", site.live_jobs()}, {"agent_version", site.agent_version()}, {"host", site.host()},
          {"connected_us", site.connected_us()}, {"address", site.address()},
          {"credentials_expire_us", site.credentials_expire_us()}, {"partitions", std::move(partitions)},
          {"calls_per_minute", site.calls_per_minute()}};
}

template <typename List>
Json ListJson(const List& list) {
  Json out = Json::array();
  for (const auto& item : list) out.push_back(ToJson(item));
  return out;
}

// One line per step.
class JsonSiteView : public SiteView {
 public:
  explicit JsonSiteView(const Terminal& terminal) : out_(*terminal.out) {}
  void OnProgress(const v1::SiteProgress& progress) override {
    out_ << Dump({{"step", progress.step()}, {"verdict", SiteCheckText(progress.verdict())}, {"found", progress.found()},
                  {"advice", progress.advice()}, {"fraction", progress.fraction()}}, -1) << std::endl;
  }
  void OnEnd() override {}

 private:
  std::ostream& out_;
};

// One line per update.
class JsonWatch : public WatchView {
 public:
  explicit JsonWatch(const Terminal& terminal) : out_(*terminal.out) {}
  void OnUpdate(const v1::JobUpdate& update) override {
    Json line = Json::object();
    if (update.has_job()) line["job"] = ToJson(update.job());
    if (!update.events().empty()) line["events"] = ListJson(update.events());
    Json points = Json::array();
    for (const v1::PointBlock& block : update.blocks()) {
      for (int i = 0; i < block.values_size(); ++i) points.push_back(PointJson(block, i));
    }
    if (!points.empty()) line["points"] = std::move(points);
    if (!line.empty()) out_ << Dump(line, -1) << std::endl;
  }
  void OnReconnect(const absl::Status&, absl::Duration) override {}
  void OnEnd(const v1::Job&) override {}

 private:
  std::ostream& out_;
};

class JsonOutput : public Output {
 public:
  explicit JsonOutput(const Terminal& terminal) : terminal_(terminal) {}

  void Job(const v1::Job& job) override { Print(ToJson(job)); }
  void Jobs(const std::vector<v1::Job>& jobs, bool more) override { Print({{"jobs", ListJson(jobs)}, {"more", more}}); }
  void Submitted(const v1::SubmitJobResponse& response) override {
    Json out = ToJson(response.job());
    out["existed"] = response.existed();
    // One line: `submit --watch` goes on with lines of updates.
    *terminal_.out << Dump(out, -1) << std::endl;
  }
  void Cancelled(const std::vector<CancelResult>& results) override {
    Json out = Json::array();
    for (const CancelResult& result : results) {
      if (result.status.ok()) {
        out.push_back({{"id", result.after.id()}, {"state", StateText(result.after.state())}, {"error", nullptr}});
      } else {
        out.push_back({{"id", result.job}, {"state", nullptr}, {"error", ErrorJson(result.status)}});
      }
    }
    Print(out);
  }
  void Validated(const v1::ValidateJobResponse& response, bool by_gateway) override {
    Json files = Json::array();
    for (const v1::FileReference& file : response.files()) files.push_back({{"field", file.field()}, {"value", file.value()}});
    Print({{"valid", true}, {"by_gateway", by_gateway}, {"spec", SpecJson(response.spec())}, {"files", files}});
  }
  void Events(const std::vector<v1::JobEvent>& events) override { Print(ListJson(events)); }
  void Series(const std::vector<v1::SeriesBuckets>& series) override {
    Json out = Json::array();
    for (const v1::SeriesBuckets& one : series) {
      Json buckets = Json::array();
      for (int i = 0; i < one.last_size(); ++i) {
        buckets.push_back({{"first_step", one.first_step(i)}, {"last_step", one.last_step(i)},
                           {"min", one.min(i)}, {"max", one.max(i)}, {"last", one.last(i)}});
      }
      out.push_back({{"series", one.series()}, {"points", one.points()}, {"buckets", std::move(buckets)}});
    }
    Print(out);
  }
  void Downloaded(const std::vector<DownloadedFile>& files, const std::string& directory) override {
    Json list = Json::array();
    for (const DownloadedFile& file : files) list.push_back(ToJson(file));
    Print({{"directory", directory}, {"files", list}});
  }
  void Traced(const DownloadedFile& trace) override { Print(ToJson(trace)); }
  void Sites(const std::vector<v1::Site>& sites) override {
    Print(ListJson(sites));
  }
  void Site(const v1::Site& site) override {
    Json out = ToJson(site);
    out["document"] = site.document();
    Print(out);
  }
  void SiteRemoved(const std::string& name) override { Print({{"removed", name}}); }
  std::unique_ptr<SiteView> SiteChecks() override { return std::make_unique<JsonSiteView>(terminal_); }
  void Version(const v1::GetVersionResponse& gateway) override {
    Print({{"client", kVersion}, {"gateway", gateway.version()}, {"api", gateway.api()}, {"started_us", gateway.started_us()}});
  }
  void Error(const absl::Status& status) override {
    *terminal_.err << Dump({{"error", ErrorJson(status)}}, -1) << std::endl;
  }
  std::unique_ptr<WatchView> Watch() override { return std::make_unique<JsonWatch>(terminal_); }

 private:
  void Print(const Json& json) { *terminal_.out << Dump(json, 2) << std::endl; }
  const Terminal& terminal_;
};

class JsonPoints : public PointSink {
 public:
  explicit JsonPoints(const Terminal& terminal) : out_(*terminal.out) {}
  void OnBlock(const v1::PointBlock& block) override {
    for (int i = 0; i < block.values_size(); ++i) {
      out_ << (first_ ? "[\n" : ",\n") << Dump(PointJson(block, i), -1);
      first_ = false;
    }
  }
  void OnEnd() override { out_ << (first_ ? "[]" : "\n]") << std::endl; }

 private:
  std::ostream& out_;
  bool first_ = true;
};

}  // namespace

std::unique_ptr<Output> MakeJsonOutput(const Terminal& terminal) { return std::make_unique<JsonOutput>(terminal); }
std::unique_ptr<PointSink> MakeJsonPoints(const Terminal& terminal) { return std::make_unique<JsonPoints>(terminal); }

}  // namespace itwin::cli
