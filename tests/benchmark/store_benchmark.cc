// What the store alone can do, against bare SQLite on the same disk in the same run.
//   store_benchmark [NAME...]   all, or: submit points reads lists
// Each figure is a line of JSON (figures.h).
#include <cstdlib>
#include <functional>
#include <iostream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/check.h"
#include "common/ids.h"
#include "common/log.h"
#include "server/store/sqlite_connection.h"
#include "server/store/sqlite_job_store.h"
#include "tests/benchmark/figures.h"
#include "tests/testing/temp_directory.h"

namespace itwin::server {
namespace {

using benchmark::Median;
using benchmark::PrintFigure;
using itwin::testing::TempDirectory;

constexpr int kRuns = 5;
constexpr absl::Duration kRunTime = absl::Milliseconds(1500);

constexpr char kBarePragmas[] =
    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 16000;"
    "CREATE TABLE bare (id INTEGER PRIMARY KEY, series INTEGER, step INTEGER, time INTEGER, value REAL)";
constexpr char kBareInsert[] = "INSERT INTO bare (series, step, time, value) VALUES (?, ?, ?, ?)";
constexpr char kBegin[] = "BEGIN IMMEDIATE";
constexpr char kCommit[] = "COMMIT";

std::unique_ptr<SqliteJobStore> OpenStore(const TempDirectory& directory) {
  SqliteJobStore::Options options;
  options.path = directory / "itwin.db";
  options.max_live_jobs_per_owner = 10'000'000;
  auto store = SqliteJobStore::Open(options);
  ITWIN_CHECK(store.ok());
  return *std::move(store);
}

double Seconds(absl::Duration d) { return absl::ToDoubleSeconds(d); }

// How often a second `body` (which says how much it did) can be done.
double Rate(const std::function<int64_t()>& body) {
  const absl::Time start = absl::Now();
  int64_t done = 0;
  while (absl::Now() - start < kRunTime) done += body();
  return static_cast<double>(done) / Seconds(absl::Now() - start);
}

class BareSqlite {
 public:
  BareSqlite() {
    auto connection = SqliteConnection::Open(directory_ / "bare.db", SqliteConnection::Mode::kReadWrite);
    ITWIN_CHECK(connection.ok());
    connection_ = *std::move(connection);
    connection_->Run(kBarePragmas);
  }
  // One transaction of so many rows.
  int64_t Commit(int rows) {
    Query(*connection_, kBegin).Run();
    for (int i = 0; i < rows; ++i, ++step_) Query(*connection_, kBareInsert, i % 4, step_, step_ * 1000, 0.5).Run();
    Query(*connection_, kCommit).Run();
    return rows;
  }

 private:
  TempDirectory directory_;
  std::unique_ptr<SqliteConnection> connection_;
  int64_t step_ = 0;
};

NewJob MakeJob() {
  NewJob job;
  job.owner = "ada";
  job.request_id = RandomHex(16);
  job.spec.set_name("benchmark");
  job.spec.mutable_command()->add_argv("true");
  job.spec.mutable_resources()->set_nodes(2);
  return job;
}

AttemptKey StartedJob(JobStore& store) {
  const auto submitted = store.Submit(MakeJob());
  ITWIN_CHECK(submitted.ok());
  JobEvent placed;
  placed.kind = EventKind::kPlaced;
  placed.attempt = 1;
  placed.site = "local";
  ITWIN_CHECK(store.AppendEvent(submitted->job.id, placed).ok());
  return AttemptKey(submitted->job.id, 1);
}

void Submits() {
  std::vector<double> single, single_bare, grouped, p50, p99, per_commit;
  for (int run = 0; run < kRuns; ++run) {
    BareSqlite bare;
    single_bare.push_back(Rate([&] { return bare.Commit(1); }));
    TempDirectory directory;
    auto store = OpenStore(directory);
    std::vector<double> latencies;
    single.push_back(Rate([&] {
      const absl::Time start = absl::Now();
      ITWIN_CHECK(store->Submit(MakeJob()).ok());
      latencies.push_back(absl::ToDoubleMicroseconds(absl::Now() - start));
      return 1;
    }));
    std::sort(latencies.begin(), latencies.end());
    p50.push_back(latencies[latencies.size() / 2]);
    p99.push_back(latencies[latencies.size() * 99 / 100]);
    const auto before = store->statistics();
    const absl::Time start = absl::Now();
    std::vector<std::thread> threads;
    for (int t = 0; t < 64; ++t) {
      threads.emplace_back([&] {
        while (absl::Now() - start < kRunTime) ITWIN_CHECK(store->Submit(MakeJob()).ok());
      });
    }
    for (std::thread& thread : threads) thread.join();
    const auto after = store->statistics();
    grouped.push_back(static_cast<double>(after.writes - before.writes) / Seconds(absl::Now() - start));
    per_commit.push_back(static_cast<double>(after.writes - before.writes) / static_cast<double>(after.commits - before.commits));
  }
  PrintFigure("store_submit_1_caller", Median(single), "1/s", Median(single_bare), kRuns);
  PrintFigure("store_submit_1_caller_p50", Median(p50), "us", 0, kRuns);
  PrintFigure("store_submit_1_caller_p99", Median(p99), "us", 0, kRuns);
  PrintFigure("store_submit_64_callers", Median(grouped), "1/s", Median(single_bare), kRuns);
  PrintFigure("store_submit_64_callers_group", Median(per_commit), "writes/commit", 0, kRuns);
}

// `attempts` jobs commit `series` x `points` each, `together` jobs per call.
double PointsRate(int attempts, int series, int points, int together) {
  TempDirectory directory;
  auto store = OpenStore(directory);
  std::vector<AttemptKey> keys;
  for (int i = 0; i < attempts; ++i) keys.push_back(StartedJob(*store));
  std::vector<int64_t> offsets(keys.size(), 0);
  size_t next = 0;
  int64_t step = 0;
  return Rate([&] {
    std::vector<SpoolBatch> batches;
    for (int t = 0; t < together; ++t) {
      SpoolBatch& batch = batches.emplace_back();
      batch.attempt = keys[next];
      batch.file = agent::v1::SPOOL_FILE_METRICS;
      batch.begin_offset = offsets[next];
      batch.end_offset = offsets[next] += 1000;
      for (int s = 0; s < series; ++s) {
        PointColumns columns{absl::StrCat("train/metric-", s), {}, {}, {}};
        for (int p = 0; p < points; ++p) {
          columns.steps.push_back(step + p);
          columns.times_us.push_back(1'700'000'000'000'000 + (step + p) * 1013);
          columns.values.push_back(1.0 / static_cast<double>(1 + step + p));
        }
        batch.points.push_back(std::move(columns));
      }
      step += points;
      next = (next + 1) % keys.size();
    }
    const auto committed = store->CommitSpool(batches);
    ITWIN_CHECK(committed.ok() && committed->back().outcome == SpoolCommit::Outcome::kStored);
    return int64_t{series} * points * together;
  });
}

void Points() {
  std::vector<double> bare_rows, one_job, many_jobs;
  for (int run = 0; run < kRuns; ++run) {
    BareSqlite bare;
    bare_rows.push_back(Rate([&] { return bare.Commit(200); }));
    one_job.push_back(PointsRate(1, 4, 250, 1));
    many_jobs.push_back(PointsRate(1000, 4, 1, 100));
  }
  PrintFigure("store_points_1_job_1000_per_commit", Median(one_job), "points/s", Median(bare_rows), kRuns);
  PrintFigure("store_points_1000_jobs_4_each", Median(many_jobs), "points/s", Median(bare_rows), kRuns);
}

void Reads() {
  TempDirectory directory;
  auto store = OpenStore(directory);
  const AttemptKey key = StartedJob(*store);
  int64_t offset = 0;
  for (int commit = 0; commit < 1000; ++commit) {
    SpoolBatch batch;
    batch.attempt = key;
    batch.file = agent::v1::SPOOL_FILE_METRICS;
    batch.begin_offset = offset;
    batch.end_offset = offset += 1000;
    PointColumns columns{"loss", {}, {}, {}};
    for (int p = 0; p < 1000; ++p) {
      columns.steps.push_back(commit * 1000 + p);
      columns.times_us.push_back(columns.steps.back() * 1000);
      columns.values.push_back(0.5 * p);
    }
    batch.points.push_back(std::move(columns));
    ITWIN_CHECK(store->CommitSpool({batch}).ok());
  }
  std::vector<double> list, plot;
  for (int run = 0; run < kRuns; ++run) {
    absl::Time start = absl::Now();
    int64_t cursor = 0, got = 0;
    for (bool end = false; !end;) {
      const auto page = store->ListPoints(key.job(), cursor, {}, 20'000);
      for (const auto& block : page->blocks) got += block.values_size();
      cursor = page->next_cursor;
      end = page->end;
    }
    ITWIN_CHECK(got == 1'000'000);
    list.push_back(1e6 / Seconds(absl::Now() - start));
    start = absl::Now();
    ITWIN_CHECK(store->QuerySeries(key.job(), {}, 500)->front().points() == 1'000'000);
    plot.push_back(1e3 * Seconds(absl::Now() - start));
  }
  PrintFigure("store_list_points", Median(list), "points/s", 0, kRuns);
  PrintFigure("store_plot_1e6_points_500_buckets", Median(plot), "ms", 0, kRuns);
}

void Lists() {
  constexpr int kFinished = 100'000, kLive = 10'000;
  TempDirectory directory;
  auto store = OpenStore(directory);
  std::vector<std::thread> threads;
  for (int t = 0; t < 64; ++t) {
    threads.emplace_back([&, t] {
      for (int i = t; i < kFinished + kLive; i += 64) {
        const auto job = store->Submit(MakeJob());
        ITWIN_CHECK(job.ok());
        if (i >= kFinished) continue;
        JobEvent failed;
        failed.kind = EventKind::kFailed;
        ITWIN_CHECK(store->AppendEvent(job->job.id, failed).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto milliseconds = [](const std::function<bool()>& body) {
    std::vector<double> runs;
    for (int run = 0; run < 4 * kRuns; ++run) {
      const absl::Time start = absl::Now();
      ITWIN_CHECK(body());
      runs.push_back(1e3 * Seconds(absl::Now() - start));
    }
    return Median(runs);
  };
  std::vector<double> opens;
  for (int run = 0; run < kRuns; ++run) {
    store.reset();
    const absl::Time start = absl::Now();
    store = OpenStore(directory);
    opens.push_back(1e3 * Seconds(absl::Now() - start));
  }
  const std::string prefix = store->ListLive()->front().id.text().substr(0, 12);
  PrintFigure("store_open_100k_finished_10k_live", Median(opens), "ms", 0, kRuns);
  const auto list = [&](JobFilter filter) { return milliseconds([&] { return store->ListJobs(filter).ok(); }); };
  PrintFigure("store_list_newest_50", list({}), "ms", 0, 4 * kRuns);
  PrintFigure("store_list_live_50", list({.live_only = true}), "ms", 0, 4 * kRuns);
  PrintFigure("store_list_live_50_of_owner", list({.live_only = true, .owner = "ada"}), "ms", 0, 4 * kRuns);
  PrintFigure("store_list_running_50_of_owner", list({.states = {JobState::kRunning}, .owner = "ada"}), "ms", 0, 4 * kRuns);
  PrintFigure("store_list_name_nowhere", list({.name_contains = "nowhere"}), "ms", 0, 4 * kRuns);
  PrintFigure("store_list_live_all", milliseconds([&] { return store->ListLive()->size() == kLive; }), "ms", 0, 4 * kRuns);
  PrintFigure("store_resolve_prefix", milliseconds([&] { return store->ResolveJob(prefix).ok(); }), "ms", 0, 4 * kRuns);
}

}  // namespace
}  // namespace itwin::server

int main(int argc, char** argv) {
  if (!itwin::InitLog("store_benchmark", "warning").ok()) return 2;
  const std::set<std::string> wanted(argv + 1, argv + argc);
  const std::vector<std::pair<std::string, void (*)()>> parts = {{"submit", itwin::server::Submits},
                                                                 {"points", itwin::server::Points},
                                                                 {"reads", itwin::server::Reads},
                                                                 {"lists", itwin::server::Lists}};
  for (const auto& [name, part] : parts) {
    if (wanted.empty() || wanted.count(name)) part();
  }
  return 0;
}
