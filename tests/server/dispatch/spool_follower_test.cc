// What a Follow stream brings, into the real database: once, in order, whatever the stream does.
#include "server/dispatch/spool_follower.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/store/sqlite_job_store.h"
#include "tests/testing/server_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::server {
namespace {

using ::itwin::testing::WaitUntil;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// A stream that says what the test tells it to, and keeps what it was asked.
class ScriptedStream : public FollowStream {
 public:
  struct Script {
    absl::Mutex mu;
    std::deque<agent::v1::FollowResponse> responses ABSL_GUARDED_BY(mu);
    std::vector<agent::v1::FollowRequest> requests ABSL_GUARDED_BY(mu);
    int reads ABSL_GUARDED_BY(mu) = 0;
    bool over ABSL_GUARDED_BY(mu) = false;
  };
  explicit ScriptedStream(std::shared_ptr<Script> script) : script_(std::move(script)) {}
  bool Write(const agent::v1::FollowRequest& request) override {
    absl::MutexLock lock(&script_->mu);
    script_->requests.push_back(request);
    return !script_->over;
  }
  bool Read(agent::v1::FollowResponse* response) override {
    absl::MutexLock lock(&script_->mu);
    ++script_->reads;
    const auto ready = [this] {
      script_->mu.AssertHeld();
      return script_->over || !script_->responses.empty();
    };
    script_->mu.Await(absl::Condition(&ready));
    if (script_->over) return false;
    *response = std::move(script_->responses.front());
    script_->responses.pop_front();
    return true;
  }
  void Cancel() override {
    absl::MutexLock lock(&script_->mu);
    script_->over = true;
  }
  absl::Status Finish() override { return absl::UnavailableError("over"); }

 private:
  const std::shared_ptr<Script> script_;
};

class SpoolFollowerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    store_ = testing::OpenStore(directory_ / "gateway.db");
    NewJob job;
    job.owner = "alice";
    job.request_id = "r";
    job.spec.mutable_command()->add_argv("true");
    const auto submitted = store_->Submit(job);
    ASSERT_OK(submitted);
    JobEvent placed;
    placed.kind = EventKind::kPlaced;
    placed.attempt = 1;
    placed.site = "local";
    ASSERT_OK(store_->AppendEvent(submitted->job.id, placed));
    key_ = AttemptKey(submitted->job.id, 1);
    Connect({});
  }
  // A new stream that goes on from `cursor`.
  void Connect(const agent::v1::SpoolCursor& cursor) {
    follower_.reset();
    script_ = std::make_shared<ScriptedStream::Script>();
    follower_ = std::make_unique<SpoolFollower>(
        std::make_unique<ScriptedStream>(script_), store_.get(), &clock_,
        SpoolFollower::Callbacks{
            .on_statuses = [](std::vector<agent::v1::AttemptStatus>) {},
            .on_drained = [this](const AttemptKey&) { Count(&drained_); },
            .on_complaint =
                [this](const AttemptKey&, std::string complaint, int64_t) {
                  absl::MutexLock lock(&mu_);
                  complaints_.push_back(std::move(complaint));
                },
            .on_end = [this](absl::Status) { Count(&ends_); }});
    ASSERT_TRUE(follower_->Add(key_, cursor));
  }
  void TearDown() override { follower_.reset(); }

  void Count(int* counter) {
    absl::MutexLock lock(&mu_);
    ++*counter;
  }
  static std::string Line(int step) { return absl::StrCat("{\"step\":", step, ",\"metrics\":{\"x\":", step, "}}\n"); }
  agent::v1::SpoolChunk Chunk(int64_t offset, const std::string& data, const std::string& note = "") {
    agent::v1::SpoolChunk chunk;
    chunk.set_attempt(key_.text());
    chunk.set_file(agent::v1::SPOOL_FILE_METRICS);
    chunk.set_offset(offset);
    chunk.set_data(data);
    chunk.set_note(note);
    return chunk;
  }
  void Send(const std::vector<agent::v1::SpoolChunk>& chunks) {
    absl::MutexLock lock(&script_->mu);
    agent::v1::FollowResponse& response = script_->responses.emplace_back();
    for (const agent::v1::SpoolChunk& chunk : chunks) *response.add_chunks() = chunk;
  }
  // All that was sent has been dealt with: the reader has come back for more.
  void Settle() {
    ASSERT_TRUE(WaitUntil([&] {
      absl::MutexLock lock(&script_->mu);
      return script_->responses.empty();
    }));
    int reads;
    {
      absl::MutexLock lock(&script_->mu);
      reads = script_->reads;
    }
    Send({});
    ASSERT_TRUE(WaitUntil([&] {
      absl::MutexLock lock(&script_->mu);
      return script_->reads > reads;
    }));
  }
  std::vector<int64_t> Steps() {
    std::vector<int64_t> out;
    const auto page = store_->ListPoints(key_.job(), 0, {}, 100'000);
    EXPECT_OK(page);
    for (const v1::PointBlock& block : page->blocks) out.insert(out.end(), block.steps().begin(), block.steps().end());
    return out;
  }
  std::vector<agent::v1::FollowRequest> Requests() {
    absl::MutexLock lock(&script_->mu);
    return script_->requests;
  }

  itwin::testing::TempDirectory directory_;
  SystemClock clock_;
  std::unique_ptr<SqliteJobStore> store_;
  std::shared_ptr<ScriptedStream::Script> script_;
  AttemptKey key_;
  absl::Mutex mu_;
  int drained_ ABSL_GUARDED_BY(mu_) = 0;
  int ends_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<std::string> complaints_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<SpoolFollower> follower_;
};

TEST_F(SpoolFollowerTest, SeveralChunksOfOneFileInOneMessage) {
  const std::string one = Line(1), two = Line(2);
  Send({Chunk(0, one), Chunk(static_cast<int64_t>(one.size()), two)});
  Settle();
  EXPECT_THAT(Steps(), ElementsAre(1, 2));
}

TEST_F(SpoolFollowerTest, WhatIsSentTwiceCountsOnce) {
  const std::string one = Line(1), two = Line(2);
  Send({Chunk(0, one)});
  Send({Chunk(0, one)});
  Send({Chunk(static_cast<int64_t>(one.size()), two)});
  Settle();
  EXPECT_THAT(Steps(), ElementsAre(1, 2));
  EXPECT_THAT(Requests(), SizeIs(1)) << "nothing had to be asked for again";
}

TEST_F(SpoolFollowerTest, AGapIsAskedForAgain) {
  const std::string one = Line(1), two = Line(2);
  Send({Chunk(static_cast<int64_t>(one.size()), two)});
  Settle();
  EXPECT_THAT(Steps(), SizeIs(0));
  ASSERT_THAT(Requests(), SizeIs(3));
  EXPECT_EQ(Requests()[1].drop(0), key_.text());
  EXPECT_EQ(Requests()[2].add(0).cursor().metrics(), 0);
  Send({Chunk(0, one + two)});
  Settle();
  EXPECT_THAT(Steps(), ElementsAre(1, 2));
}

TEST_F(SpoolFollowerTest, AnOverlapIsAskedForFromWhereTheStoreStands) {
  const std::string one = Line(1), two = Line(2);
  Send({Chunk(0, one)});
  Send({Chunk(0, one + two)});
  Settle();
  ASSERT_THAT(Requests(), SizeIs(3));
  EXPECT_EQ(Requests()[2].add(0).cursor().metrics(), static_cast<int64_t>(one.size()));
}

TEST_F(SpoolFollowerTest, WhatTheAgentLeftOutIsToldAndSteppedOver) {
  Send({Chunk(2'000'000, Line(7), "a line of 2000000 bytes is longer than 1 MiB")});
  Settle();
  EXPECT_THAT(Steps(), ElementsAre(7));
  absl::MutexLock lock(&mu_);
  EXPECT_THAT(complaints_, ElementsAre(HasSubstr("longer than 1 MiB")));
}

TEST_F(SpoolFollowerTest, OneComplaintPerAttempt) {
  Send({Chunk(0, "bad\n")});
  Send({Chunk(4, "worse\n")});
  Settle();
  EXPECT_EQ(store_->GetAttempt(key_)->bad_lines, 2);
  absl::MutexLock lock(&mu_);
  EXPECT_THAT(complaints_, ElementsAre(HasSubstr("bad")));
}

TEST_F(SpoolFollowerTest, TheLimitOfSeriesIsTheJobsAndOutlivesTheConnection) {
  std::string data;
  for (int i = 0; i < kMaxSeriesPerJob + 5; ++i) absl::StrAppend(&data, "{\"metrics\":{\"s", i, "\":1}}\n");
  absl::StrAppend(&data, "{\"metrics\":{\"s0\":2}}\n");  // those known go on
  Send({Chunk(0, data)});
  Settle();
  EXPECT_THAT(Steps(), SizeIs(kMaxSeriesPerJob + 1));
  EXPECT_EQ(store_->GetAttempt(key_)->bad_lines, 5);
  Connect(store_->GetAttempt(key_)->cursor);
  Send({Chunk(static_cast<int64_t>(data.size()), "{\"metrics\":{\"new\":1,\"s0\":3}}\n")});
  Settle();
  EXPECT_THAT(Steps(), SizeIs(kMaxSeriesPerJob + 2));
  EXPECT_EQ(store_->GetAttempt(key_)->bad_lines, 6);
  absl::MutexLock lock(&mu_);
  EXPECT_THAT(complaints_, ElementsAre(HasSubstr("5 points in metrics.jsonl belong to series beyond the limit of 10000"),
                                       HasSubstr("1 points")));
}

TEST_F(SpoolFollowerTest, SaysWhenTheLastByteIsStored) {
  agent::v1::SpoolSizes sizes;
  EXPECT_TRUE(follower_->Drained(key_, sizes));
  sizes.set_metrics(static_cast<int64_t>(Line(1).size()));
  EXPECT_FALSE(follower_->Drained(key_, sizes));
  Send({Chunk(0, Line(1))});
  EXPECT_TRUE(WaitUntil([&] {
    absl::MutexLock lock(&mu_);
    return drained_ == 1;
  }));
  EXPECT_TRUE(follower_->Drained(key_, sizes));
}

TEST_F(SpoolFollowerTest, ForeignAndDroppedAttemptsAreLeftOut) {
  agent::v1::SpoolChunk foreign = Chunk(0, Line(1));
  foreign.set_attempt("not a key");
  follower_->Drop(key_);
  Send({foreign, Chunk(0, Line(2))});
  Settle();
  EXPECT_THAT(Steps(), SizeIs(0));
}

TEST_F(SpoolFollowerTest, StopEndsTheReaderOnce) {
  follower_->Stop();
  follower_->Stop();
  absl::MutexLock lock(&mu_);
  EXPECT_EQ(ends_, 1);
}

TEST_F(SpoolFollowerTest, ManyPointsAtOnceAllReachTheDatabase) {
  constexpr int kChunks = 8;
  constexpr int kLines = 4000;
  int64_t offset = 0;
  int step = 0;
  std::vector<agent::v1::SpoolChunk> chunks;
  for (int i = 0; i < kChunks; ++i) {
    std::string data;
    for (int line = 0; line < kLines; ++line) {
      ++step;
      absl::StrAppend(&data, "{\"t\":1732370000.123,\"step\":", step, ",\"metrics\":{\"train/loss\":0.0", step, ",\"lr\":0.001}}\n");
    }
    chunks.push_back(Chunk(offset, data));
    offset += static_cast<int64_t>(data.size());
  }
  agent::v1::SpoolSizes sizes;
  sizes.set_metrics(offset);
  follower_->Drained(key_, sizes);
  for (const agent::v1::SpoolChunk& chunk : chunks) Send({chunk});
  ASSERT_TRUE(WaitUntil([&] {
    absl::MutexLock lock(&mu_);
    return drained_ == 1;
  }, absl::Seconds(50)));
  std::map<std::string, int64_t> next;  // by series
  int64_t cursor = 0;
  for (bool end = false; !end;) {
    const auto page = store_->ListPoints(key_.job(), cursor, {}, 10'000);
    ASSERT_OK(page);
    for (const v1::PointBlock& block : page->blocks) {
      for (const int64_t at : block.steps()) ASSERT_EQ(at, ++next[block.series()]);
    }
    cursor = page->next_cursor;
    end = page->end;
  }
  EXPECT_EQ(next, (std::map<std::string, int64_t>{{"lr", step}, {"train/loss", step}}));
}

}  // namespace
}  // namespace itwin::server
