#include "server/store/sqlite_job_store.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <fstream>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/testing/server_fixture.h"

namespace itwin::server {
namespace {

using itwin::testing::StatusIs;
using itwin::testing::TempDirectory;
using testing::Event;
using testing::LogBatch;
using testing::MakeJob;
using testing::MetricsBatch;
using testing::OpenStore;
using testing::RunningJob;
using ::testing::_;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr size_t kMaxNameForTest = 200;  // bytes of a series name, as docs/worker-contract.md says

class SqliteJobStoreTest : public ::testing::Test {
 protected:
  void Reopen(SqliteJobStore::Options options = {}) {
    store_.reset();
    store_ = OpenStore(path_, options);
  }

  int extra_ = 0;
  TempDirectory directory_;
  const std::string path_ = directory_ / "itwin.db";
  std::unique_ptr<SqliteJobStore> store_ = OpenStore(path_);
};

TEST_F(SqliteJobStoreTest, SubmitIsIdempotentPerOwnerAndSurvivesReopening) {
  NewJob job = MakeJob("r1");
  (*job.spec.mutable_labels())["b"] = "2";
  (*job.spec.mutable_labels())["a"] = "1";
  job.spec.mutable_resources()->set_nodes(2);
  job.spec.mutable_resources()->set_ranks_per_node(4);
  const auto first = store_->Submit(job);
  ASSERT_OK(first);
  EXPECT_FALSE(first->existed);
  EXPECT_EQ(first->job.record.state, JobState::kQueued);
  EXPECT_EQ(first->job.ranks, 8);
  EXPECT_EQ(first->job.version, 1);

  Reopen();
  // The same content built in another order of map entries.
  NewJob again = MakeJob("r1");
  (*again.spec.mutable_labels())["a"] = "1";
  (*again.spec.mutable_labels())["b"] = "2";
  *again.spec.mutable_resources() = job.spec.resources();
  const auto second = store_->Submit(again);
  ASSERT_OK(second);
  EXPECT_TRUE(second->existed);
  EXPECT_EQ(second->job.id, first->job.id);
  EXPECT_EQ(second->job.labels, (std::map<std::string, std::string>{{"a", "1"}, {"b", "2"}}));

  again.spec.set_name("other");
  EXPECT_THAT(store_->Submit(again), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("'r1'")));
  const auto other_owner = store_->Submit(MakeJob("r1", "bob"));
  ASSERT_OK(other_owner);
  EXPECT_FALSE(other_owner->existed);
  const auto spec = store_->GetSpec(first->job.id);
  ASSERT_OK(spec);
  EXPECT_EQ(spec->SerializeAsString().size(), job.spec.SerializeAsString().size());
}

TEST_F(SqliteJobStoreTest, QuotaCountsLiveJobsOnly) {
  SqliteJobStore::Options options;
  options.max_live_jobs_per_owner = 2;
  Reopen(options);
  const auto a = store_->Submit(MakeJob("a"));
  ASSERT_OK(a);
  ASSERT_OK(store_->Submit(MakeJob("b")));
  EXPECT_THAT(store_->Submit(MakeJob("c")), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("'ada' has 2")));
  ASSERT_OK(store_->Submit(MakeJob("a")));            // known: no new job
  ASSERT_OK(store_->Submit(MakeJob("c", "bob")));     // another's quota
  ASSERT_OK(store_->AppendEvent(a->job.id, Event(EventKind::kFailed)));
  ASSERT_OK(store_->Submit(MakeJob("c")));
  EXPECT_EQ(*store_->CountLive("ada"), 2);
  EXPECT_EQ(*store_->CountLive(), 3);
  EXPECT_OK(store_->Verify(true));
}

TEST_F(SqliteJobStoreTest, EventsMoveTheJobAndAttemptAndAreListed) {
  const JobRow running = RunningJob(*store_, "r");
  EXPECT_EQ(running.record.state, JobState::kRunning);
  EXPECT_EQ(running.record.site, "local");
  EXPECT_NE(running.started, absl::InfinitePast());

  AttemptUpdate evidence;
  evidence.exit_code = 0;
  evidence.host = "n1";
  evidence.cpu_seconds = 1.5;
  evidence.final_sizes.emplace().set_metrics(10);
  evidence.result_json = "{}";
  evidence.checkpoint = true;
  ASSERT_OK(store_->AppendEvent(running.id, Event(EventKind::kEnded, 1), evidence));
  AttemptUpdate early, of_before, result;
  early.early_output.emplace().set_path("trace-1.json");
  ASSERT_OK(store_->UpdateAttempt(AttemptKey(running.id, 1), early));
  of_before.outputs.emplace().emplace_back().set_path("partial.pt");
  of_before.outputs->emplace_back().set_path("trace-1.json");  // its attempt had it among its outputs, too
  ASSERT_OK(store_->UpdateAttempt(AttemptKey(running.id, 1), of_before));
  ASSERT_EQ(store_->ListOutputs(running.id)->size(), 2u);
  result.summary.emplace()["test/rmse"] = 0.25;
  result.outputs.emplace().emplace_back().set_path("model.pt");
  result.outputs->back().set_size_bytes(7);
  const auto done = store_->AppendEvent(running.id, Event(EventKind::kSucceeded, 1, "done"), result);
  ASSERT_OK(done);
  EXPECT_NE(done->finished, absl::InfinitePast());

  Reopen();
  const auto row = store_->GetJob(running.id);
  ASSERT_OK(row);
  EXPECT_EQ(row->record, done->record);
  EXPECT_EQ(row->summary.at("test/rmse"), 0.25);
  const auto attempts = store_->ListAttempts(running.id);
  ASSERT_OK(attempts);
  ASSERT_EQ(attempts->size(), 1u);
  const AttemptRow& attempt = attempts->front();
  EXPECT_EQ(attempt.number, 1);
  EXPECT_EQ(attempt.exit_code, 0);
  EXPECT_EQ(attempt.host, "n1");
  EXPECT_EQ(attempt.cpu_seconds, 1.5);
  EXPECT_TRUE(attempt.checkpoint);
  EXPECT_EQ(attempt.final_sizes->metrics(), 10);
  EXPECT_NE(attempt.submitted, absl::InfinitePast());
  EXPECT_NE(attempt.started, absl::InfinitePast());
  EXPECT_NE(attempt.ended, absl::InfinitePast());
  std::vector<std::string> outputs;
  const auto stored = store_->ListOutputs(running.id);
  for (const v1::OutputFile& file : *stored) outputs.push_back(file.path());
  EXPECT_THAT(outputs, ElementsAre("model.pt", "trace-1.json"));  // what came early stays

  const auto events = store_->ListEvents(running.id, 0, 100);
  ASSERT_OK(events);
  std::vector<EventKind> kinds;
  for (const StoredEvent& event : *events) kinds.push_back(event.event.kind);
  EXPECT_THAT(kinds, ElementsAre(EventKind::kSubmitted, EventKind::kPlaced, EventKind::kStaged, EventKind::kAccepted,
                                 EventKind::kStarted, EventKind::kEnded, EventKind::kSucceeded));
  EXPECT_EQ(events->back().sequence, row->version);
  EXPECT_EQ(store_->ListEvents(running.id, (*events)[4].sequence, 1)->front().event.kind, EventKind::kEnded);
}

TEST_F(SqliteJobStoreTest, RefusedEventsLeaveNoTrace) {
  const JobRow running = RunningJob(*store_, "r");
  AttemptUpdate update;
  update.host = "must not be kept";
  EXPECT_THAT(store_->AppendEvent(running.id, Event(EventKind::kSucceeded, 1), update),
              StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr("succeeded"), HasSubstr("RUNNING"))));
  EXPECT_THAT(store_->AppendEvent(running.id, Event(EventKind::kEnded, 7)),
              StatusIs(absl::StatusCode::kFailedPrecondition, _));
  EXPECT_THAT(store_->AppendEvent(JobId::Random(), Event(EventKind::kEnded)), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_EQ(store_->GetJob(running.id)->version, running.version);
  EXPECT_EQ(store_->GetAttempt({running.id, 1})->host, "");
  EXPECT_THAT(store_->GetAttempt({running.id, 2}), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_OK(store_->Verify(true));
}

TEST_F(SqliteJobStoreTest, SpoolRangesCountExactlyOnce) {
  const JobRow job = RunningJob(*store_, "r");
  const AttemptKey key(job.id, 1);
  SpoolBatch first = MetricsBatch(key, 0, 100);
  first.points.push_back({"loss", {1, 2}, {10, 20}, {0.5, 0.25}});
  first.progress.emplace().set_step(2);
  SpoolBatch second = MetricsBatch(key, 100, 150);
  second.points.push_back({"loss", {3}, {30}, {0.125}});
  SpoolBatch node = MetricsBatch(key, 0, 40);
  node.file = agent::v1::SPOOL_FILE_NODE;
  node.host = "n1";
  node.points.push_back({"node/cpu_percent", {0}, {15}, {90}});
  const std::vector<SpoolBatch> batches = {first, second, node, LogBatch(key, 0, "hello "), LogBatch(key, 6, "world")};
  auto stored = store_->CommitSpool(batches);
  ASSERT_OK(stored);
  for (const SpoolCommit& commit : *stored) EXPECT_EQ(commit.outcome, SpoolCommit::Outcome::kStored);

  // Sent again, with a gap, and for attempts that are not.
  std::vector<SpoolBatch> wrong = batches;
  wrong.push_back(MetricsBatch(key, 151, 160));
  wrong.push_back(MetricsBatch({job.id, 2}, 0, 1));
  wrong.push_back(MetricsBatch({JobId::Random(), 1}, 0, 1));
  stored = store_->CommitSpool(wrong);
  ASSERT_OK(stored);
  for (size_t i = 0; i < 6; ++i) EXPECT_EQ((*stored)[i].outcome, SpoolCommit::Outcome::kSkipped) << i;
  EXPECT_EQ((*stored)[5].cursor, 150);
  EXPECT_EQ((*stored)[6].outcome, SpoolCommit::Outcome::kUnknownAttempt);
  EXPECT_EQ((*stored)[7].outcome, SpoolCommit::Outcome::kUnknownAttempt);

  Reopen();
  const auto attempt = store_->GetAttempt(key);
  ASSERT_OK(attempt);
  EXPECT_EQ(attempt->cursor.metrics(), 150);
  EXPECT_EQ(attempt->cursor.stdout_log(), 11);
  EXPECT_EQ(attempt->cursor.nodes().at("n1"), 40);
  EXPECT_EQ(attempt->max_step, 3);
  EXPECT_EQ(store_->GetJob(job.id)->progress.step(), 2);
  const auto log = store_->ReadLog(job.id, 0, v1::LOG_STREAM_STDOUT, 0, 100);
  ASSERT_OK(log);
  EXPECT_EQ(log->data, "hello world");
  EXPECT_FALSE(log->complete);
  const auto points = store_->ListPoints(job.id, 0, {"loss"}, 100);
  ASSERT_OK(points);
  ASSERT_EQ(points->blocks.size(), 1u);
  EXPECT_THAT(points->blocks[0].values(), ElementsAre(0.5, 0.25, 0.125));
}

TEST_F(SqliteJobStoreTest, BadSeriesAreCountedNotFatal) {
  const JobRow job = RunningJob(*store_, "r");
  SpoolBatch batch = MetricsBatch({job.id, 1}, 0, 10);
  batch.points.push_back({std::string(kMaxNameForTest + 1, 'x'), {1, 2}, {1, 2}, {1, 2}});
  batch.points.push_back({"bad\xff", {1}, {1}, {1}});
  batch.points.push_back({"tab\there", {1}, {1}, {1}});
  batch.points.push_back({"", {1}, {1}, {1}});
  batch.points.push_back({std::string(kMaxNameForTest, 'x'), {1}, {1}, {1}});
  batch.bad_lines = 3;
  ASSERT_OK(store_->CommitSpool({batch}));
  EXPECT_EQ(store_->GetAttempt({job.id, 1})->bad_lines, 3 + 2 + 1 + 1 + 1);
  EXPECT_EQ(store_->ListPoints(job.id, 0, {}, 100)->blocks.size(), 1u);

  batch.begin_offset = 10, batch.end_offset = 20;
  batch.points = {{"fresh", {1}, {1}, {1}}, {"loss", {1, 2}, {1}, {1, 2}}};
  EXPECT_THAT(store_->CommitSpool({batch}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("loss")));
  // What was written before the fault was taken back, also in the writer's memory.
  EXPECT_EQ(store_->GetAttempt({job.id, 1})->cursor.metrics(), 10);
  EXPECT_TRUE(store_->ListPoints(job.id, 0, {"fresh"}, 100)->blocks.empty());
  batch.points.pop_back();
  ASSERT_OK(store_->CommitSpool({batch}));
  ASSERT_EQ(store_->ListPoints(job.id, 0, {"fresh"}, 100)->blocks.size(), 1u);
}

TEST_F(SqliteJobStoreTest, LogMirrorIsBoundedAndSaysSo) {
  SqliteJobStore::Options options;
  options.log_mirror_bytes = 100'000;
  Reopen(options);
  const JobRow job = RunningJob(*store_, "r");
  const AttemptKey key(job.id, 1);
  std::string written;
  for (int i = 0; written.size() < 300'000; ++i) {
    const std::string line = absl::StrCat("line ", i, "\n");
    const std::string part = i % 50 == 49 ? std::string(70'000, 'y') : line;
    ASSERT_OK(store_->CommitSpool({LogBatch(key, static_cast<int64_t>(written.size()), part)}));
    written += part;
    if (i > 2000) break;
  }
  std::string read;
  int64_t offset = 0;
  while (true) {
    const auto slice = store_->ReadLog(job.id, 1, v1::LOG_STREAM_STDOUT, offset, 7777);
    ASSERT_OK(slice);
    if (slice->data.empty()) break;
    EXPECT_EQ(slice->offset, offset);
    read += slice->data;
    offset = slice->next_offset;
  }
  EXPECT_EQ(read.substr(0, 100'000), written.substr(0, 100'000));
  EXPECT_THAT(read.substr(100'000), HasSubstr("keeps the first 100000 bytes"));
  const auto tail = store_->ReadLog(job.id, 1, v1::LOG_STREAM_STDOUT, -10, 100);
  EXPECT_EQ(tail->data, read.substr(read.size() - 10));
  EXPECT_EQ(tail->dropped_bytes, static_cast<int64_t>(written.size()) - 100'000);
  EXPECT_EQ(tail->size, static_cast<int64_t>(read.size()));
  EXPECT_EQ(store_->GetAttempt(key)->cursor.stdout_log(), static_cast<int64_t>(written.size()));
  EXPECT_EQ(store_->ReadLog(job.id, 1, v1::LOG_STREAM_STDERR, 5, 10)->data, "");
}

TEST_F(SqliteJobStoreTest, LogIsCompleteWhenAllOfAnEndedAttemptIsHere) {
  const JobRow job = RunningJob(*store_, "r");
  const AttemptKey key(job.id, 1);
  AttemptUpdate ended;
  ended.final_sizes.emplace().set_stdout_log(4);
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1), ended));
  ASSERT_OK(store_->CommitSpool({LogBatch(key, 0, "abc")}));
  EXPECT_FALSE(store_->ReadLog(job.id, 0, v1::LOG_STREAM_STDOUT, 0, 10)->complete);
  EXPECT_TRUE(store_->ReadLog(job.id, 0, v1::LOG_STREAM_STDERR, 0, 10)->complete);
  ASSERT_OK(store_->CommitSpool({LogBatch(key, 3, "d")}));
  EXPECT_TRUE(store_->ReadLog(job.id, 0, v1::LOG_STREAM_STDOUT, 0, 10)->complete);
  const auto queued = store_->Submit(MakeJob("q"));
  EXPECT_THAT(store_->ReadLog(queued->job.id, 0, v1::LOG_STREAM_STDOUT, 0, 10),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("QUEUED")));
}

TEST_F(SqliteJobStoreTest, ListsPageWithoutGapsWhileJobsArrive) {
  std::vector<std::string> made;
  for (int i = 0; i < 25; ++i) {
    NewJob job = MakeJob(absl::StrCat("r", i), i % 2 == 0 ? "ada" : "bob", absl::StrCat("train-", i));
    if (i % 5 == 0) (*job.spec.mutable_labels())["study"] = "s1";
    if (i % 10 == 0) (*job.spec.mutable_labels())["kind"] = "big";
    const auto row = store_->Submit(job);
    ASSERT_OK(row);
    made.push_back(row->job.id.text());
    if (i % 3 == 2) continue;
    ASSERT_OK(store_->AppendEvent(row->job.id, i % 3 == 0 ? Event(EventKind::kFailed) : Event(EventKind::kPlaced, 1)));
  }
  const auto list = [&](JobFilter filter) {
    std::vector<int> out;
    filter.page_size = 4;
    do {
      const auto page = store_->ListJobs(filter);
      EXPECT_OK(page);
      if (!page.ok()) break;
      for (const JobRow& row : page->jobs) {
        const auto it = std::find(made.begin(), made.end(), row.id.text());
        if (it != made.end()) out.push_back(static_cast<int>(it - made.begin()));
      }
      filter.page_token = page->next_page_token;
      // Newer jobs do not move the pages.
      EXPECT_OK(store_->Submit(MakeJob(absl::StrCat("extra", ++extra_), "eve")));
    } while (!filter.page_token.empty());
    return out;
  };
  const auto expected = [&](const std::function<bool(int)>& fits) {
    std::vector<int> out;
    for (int i = 24; i >= 0; --i) {
      if (fits(i)) out.push_back(i);
    }
    return out;
  };
  EXPECT_EQ(list({}), expected([](int) { return true; }));
  EXPECT_EQ(list({.states = {JobState::kFailed}}), expected([](int i) { return i % 3 == 0; }));
  EXPECT_EQ(list({.states = {JobState::kFailed, JobState::kQueued}}), expected([](int i) { return i % 3 != 1; }));
  EXPECT_EQ(list({.live_only = true}), expected([](int i) { return i % 3 != 0; }));
  EXPECT_EQ(list({.states = {JobState::kFailed}, .live_only = true}), std::vector<int>{});
  EXPECT_EQ(list({.site = "local"}), expected([](int i) { return i % 3 == 1; }));
  EXPECT_EQ(list({.name_contains = "train-1"}), expected([](int i) { return i == 1 || i / 10 == 1; }));
  EXPECT_EQ(list({.labels = {{"study", "s1"}}}), expected([](int i) { return i % 5 == 0; }));
  EXPECT_EQ(list({.labels = {{"kind", "big"}, {"study", "s1"}}}), expected([](int i) { return i % 10 == 0; }));
  EXPECT_EQ(list({.states = {JobState::kFailed}, .labels = {{"study", "s1"}}}),
            expected([](int i) { return i % 15 == 0; }));
  EXPECT_EQ(list({.owner = "bob"}), expected([](int i) { return i % 2 == 1; }));
  EXPECT_EQ(list({.states = {JobState::kStaging}, .owner = "bob"}),
            expected([](int i) { return i % 2 == 1 && i % 3 == 1; }));
  EXPECT_THAT(store_->ListJobs({.page_token = "zz"}), StatusIs(absl::StatusCode::kInvalidArgument, _));
}

TEST_F(SqliteJobStoreTest, LiveJobsComeByVersion) {
  const auto a = store_->Submit(MakeJob("a"));
  const auto b = store_->Submit(MakeJob("b"));
  const auto c = store_->Submit(MakeJob("c"));
  ASSERT_OK(store_->AppendEvent(a->job.id, Event(EventKind::kPlaced, 1)));
  ASSERT_OK(store_->AppendEvent(b->job.id, Event(EventKind::kFailed)));
  const auto all = store_->ListLive();
  ASSERT_OK(all);
  ASSERT_EQ(all->size(), 2u);
  EXPECT_EQ((*all)[0].id, c->job.id);
  EXPECT_EQ((*all)[1].id, a->job.id);
  EXPECT_EQ(store_->ListLive("", (*all)[0].version)->size(), 1u);
  EXPECT_EQ(store_->ListLive("local")->size(), 1u);
  EXPECT_EQ(store_->ListLive("vega")->size(), 0u);
}

TEST_F(SqliteJobStoreTest, PrefixesResolveOrSayWhyNot) {
  std::vector<std::string> ids;
  for (int i = 0; i < 40; ++i) ids.push_back(store_->Submit(MakeJob(absl::StrCat(i)))->job.id.text());
  EXPECT_EQ(store_->ResolveJob(ids[7])->text(), ids[7]);
  EXPECT_EQ(store_->ResolveJob(ids[7].substr(0, 12))->text(), ids[7]);
  EXPECT_EQ(store_->ResolveJob(ids[7].substr(0, 12), "ada")->text(), ids[7]);
  EXPECT_THAT(store_->ResolveJob(ids[7].substr(0, 12), "bob"), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_THAT(store_->ResolveJob(ids[7].substr(0, 3)), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("first 4")));
  EXPECT_THAT(store_->ResolveJob("xyzw"), StatusIs(absl::StatusCode::kInvalidArgument, _));
  EXPECT_THAT(store_->ResolveJob(std::string(17, 'a')), StatusIs(absl::StatusCode::kInvalidArgument, _));
  // Some prefix of 4 digits fits two jobs as soon as there are enough jobs.
  std::set<std::string> seen;
  std::string shared;
  for (int i = 0; shared.empty() && i < 3000; ++i) {
    const std::string prefix = store_->Submit(MakeJob(absl::StrCat("m", i)))->job.id.text().substr(0, 4);
    if (!seen.insert(prefix).second) shared = prefix;
  }
  ASSERT_FALSE(shared.empty());
  EXPECT_THAT(store_->ResolveJob(shared), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("several jobs")));
}

TEST_F(SqliteJobStoreTest, ListenersHearOfEachCommit) {
  class Recorder : public CommitListener {
   public:
    void OnCommit(absl::Span<const JobChange> changes) override {
      absl::MutexLock lock(&mu);
      all.insert(all.end(), changes.begin(), changes.end());
    }
    absl::Mutex mu;
    std::vector<JobChange> all;
  } recorder;
  store_->AddListener(&recorder);
  const JobRow job = RunningJob(*store_, "r");
  SpoolBatch batch = MetricsBatch({job.id, 1}, 0, 1);
  batch.points.push_back({"x", {1}, {1}, {1}});
  ASSERT_OK(store_->CommitSpool({batch, LogBatch({job.id, 1}, 0, "x")}));
  EXPECT_FALSE(store_->AppendEvent(job.id, Event(EventKind::kSucceeded)).ok());  // refused: nothing to hear
  store_->RemoveListener(&recorder);
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kNote)));
  absl::MutexLock lock(&recorder.mu);
  ASSERT_EQ(recorder.all.size(), 6u);
  EXPECT_TRUE(recorder.all[0].event);
  EXPECT_TRUE(recorder.all[5].points && recorder.all[5].logs && !recorder.all[5].event);
}

TEST_F(SqliteJobStoreTest, ConcurrentWritesShareCommits) {
  const auto before = store_->statistics();
  std::vector<std::thread> threads;
  for (int t = 0; t < 64; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 10; ++i) EXPECT_OK(store_->Submit(MakeJob(absl::StrCat(t, ".", i))));
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto after = store_->statistics();
  EXPECT_EQ(after.writes - before.writes, 640);
  EXPECT_LT(after.commits - before.commits, 320);
  EXPECT_OK(store_->Verify(true));
}

TEST_F(SqliteJobStoreTest, OneBadWriteDoesNotHurtItsNeighbours) {
  const JobRow job = RunningJob(*store_, "r");
  std::atomic<int> good = 0, refused = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 16; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) {
        if (t % 2 == 0) {
          good += store_->AppendEvent(job.id, Event(EventKind::kNote)).ok();
        } else {
          refused += absl::IsFailedPrecondition(store_->AppendEvent(job.id, Event(EventKind::kPlaced, 9)).status());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 160);
  EXPECT_EQ(refused, 160);
  EXPECT_EQ(store_->ListEvents(job.id, 0, 1000)->size(), 165u);
}

TEST_F(SqliteJobStoreTest, OneGatewayAtATime) {
  SqliteJobStore::Options options;
  options.path = path_;
  EXPECT_THAT(SqliteJobStore::Open(options), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("another")));
  options.exclusive = false;
  const auto beside = SqliteJobStore::Open(options);
  ASSERT_OK(beside);
  TokenRow token;
  token.name = "ada";
  token.sha256 = std::string(64, 'a');
  ASSERT_OK((*beside)->AddToken(token));
  EXPECT_TRUE((*store_->FindToken(token.sha256)).has_value());
}

TEST_F(SqliteJobStoreTest, TokensAreKeptByHash) {
  TokenRow token;
  token.name = "ada";
  token.sha256 = std::string(64, 'a');
  token.role = TokenRole::kAdmin;
  ASSERT_OK(store_->AddToken(token));
  EXPECT_THAT(store_->AddToken(token), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("ada")));
  token.name = "no good";
  EXPECT_THAT(store_->AddToken(token), StatusIs(absl::StatusCode::kInvalidArgument, _));
  EXPECT_THAT(store_->RevokeToken("bob"), StatusIs(absl::StatusCode::kNotFound, _));
  EXPECT_EQ((*store_->FindToken(std::string(64, 'a')))->role, TokenRole::kAdmin);
  ASSERT_OK(store_->RevokeToken("ada"));
  const auto revoked = (*store_->FindToken(std::string(64, 'a')))->revoked;
  EXPECT_LE(revoked, absl::Now());
  ASSERT_OK(store_->RevokeToken("ada"));
  EXPECT_EQ((*store_->FindToken(std::string(64, 'a')))->revoked, revoked);
  EXPECT_EQ(store_->ListTokens()->size(), 1u);
  EXPECT_FALSE((*store_->FindToken(std::string(64, 'b'))).has_value());
}

TEST_F(SqliteJobStoreTest, FilesArePrivate) {
  for (const char* suffix : {"", "-wal", "-shm", ".lock"}) {
    struct stat info;
    ASSERT_EQ(stat((path_ + suffix).c_str(), &info), 0) << suffix;
    EXPECT_EQ(info.st_mode & 0777, 0600u) << suffix;
  }
}

TEST_F(SqliteJobStoreTest, GatewayIdStays) {
  const std::string id = store_->gateway_id();
  EXPECT_EQ(id.size(), 16u);
  Reopen();
  EXPECT_EQ(store_->gateway_id(), id);
}

TEST_F(SqliteJobStoreTest, NewerSchemasAndForeignFilesAreRefused) {
  store_.reset();
  {
    // user_version is the big-endian number at byte 60 of the file.
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(60);
    file.write("\0\0\x03\xe7", 4);
  }
  SqliteJobStore::Options options;
  options.path = path_;
  EXPECT_THAT(SqliteJobStore::Open(options),
              StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr("schema 999"), HasSubstr("newer"))));
  options.path = directory_ / "noise.db";
  std::ofstream(options.path) << std::string(8192, 'n');
  EXPECT_THAT(SqliteJobStore::Open(options), StatusIs(absl::StatusCode::kDataLoss, _));
  options.path = directory_ / "missing/itwin.db";
  EXPECT_FALSE(SqliteJobStore::Open(options).ok());
}

TEST_F(SqliteJobStoreTest, BackupIsACopyOfItsMoment) {
  const JobRow job = RunningJob(*store_, "r");
  ASSERT_OK(store_->Backup(directory_ / "copy.db"));
  EXPECT_FALSE(store_->Backup(directory_ / "copy.db").ok());  // never over an older one
  ASSERT_OK(store_->AppendEvent(job.id, Event(EventKind::kEnded, 1)));
  const auto copy = OpenStore(directory_ / "copy.db");
  EXPECT_EQ(copy->GetJob(job.id)->record.state, JobState::kRunning);
  EXPECT_EQ(copy->gateway_id(), store_->gateway_id());
}

}  // namespace
}  // namespace itwin::server
