// kill -9 in the middle of commits, and disks that fill up: nothing is ever half there.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/files.h"
#include "common/subprocess.h"
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

constexpr char kChildVariable[] = "ITWIN_TEST_CHILD_DATABASE";
constexpr int kPointsPerBatch = 10;
constexpr int kPointsPerLargeBatch = 500;

// Points [begin, begin + count) and as many bytes of log, in one commit.
std::vector<SpoolBatch> Range(const AttemptKey& key, int64_t begin, int count = kPointsPerBatch) {
  SpoolBatch batch = MetricsBatch(key, begin, begin + count);
  PointColumns columns;
  columns.series = "x";
  for (int i = 0; i < count; ++i) {
    columns.steps.push_back(begin + i);
    columns.times_us.push_back(begin + i);
    columns.values.push_back(static_cast<double>(begin + i));
  }
  batch.points.push_back(std::move(columns));
  return {batch, LogBatch(key, begin, std::string(static_cast<size_t>(count), static_cast<char>('a' + begin / count % 26)))};
}

// What the process that gets killed does: writes as fast as it can and says what it was promised.
TEST(StoreCrash, Child) {
  const char* path = std::getenv(kChildVariable);
  if (path == nullptr) GTEST_SKIP() << "only as a child of the next test";
  auto store = OpenStore(path);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1'000'000; ++i) {
        const JobRow job = RunningJob(*store, RandomHex(8));
        for (int64_t n = 1; n <= 5; ++n) {
          ITWIN_CHECK(store->CommitSpool(Range({job.id, 1}, (n - 1) * kPointsPerBatch)).ok());
          const std::string line = absl::StrCat(job.id.text(), " ", n * kPointsPerBatch, "\n");
          ITWIN_CHECK(WriteAll(STDOUT_FILENO, line, "stdout").ok());
        }
        ITWIN_CHECK(store->AppendEvent(job.id, Event(EventKind::kEnded, 1)).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(StoreCrash, KillLosesNothingPromisedAndLeavesNothingHalf) {
  TempDirectory directory;
  const std::string path = directory / "itwin.db";
  std::map<std::string, int64_t> promised;  // job -> offset
  for (int round = 0; round < 6; ++round) {
    int ends[2];
    ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
    FileDescriptor read_end(ends[0]), write_end(ends[1]);
    SubprocessOptions options;
    options.argv = {std::filesystem::read_symlink("/proc/self/exe").string(), "--gtest_filter=StoreCrash.Child"};
    options.env = {{kChildVariable, path}};
    options.stdout_fd = write_end.get();
    auto child = Subprocess::Start(options);
    ASSERT_OK(child);
    write_end.Reset();
    std::string text;
    char buffer[4096];
    const size_t enough = 4000 + static_cast<size_t>(round) * 777;
    ssize_t got;
    while (text.size() < enough && (got = read(read_end.get(), buffer, sizeof buffer)) > 0) {
      text.append(buffer, static_cast<size_t>(got));
    }
    ASSERT_GE(text.size(), enough) << "the child ended by itself: " << text;
    child->Kill(SIGKILL, /*group=*/false);
    while ((got = read(read_end.get(), buffer, sizeof buffer)) > 0) text.append(buffer, static_cast<size_t>(got));
    ASSERT_TRUE(child->Wait(absl::Now() + absl::Seconds(10)).has_value());
    std::vector<std::string> lines = absl::StrSplit(text, '\n');
    lines.pop_back();  // after the last newline: cut off or empty
    for (const std::string& line : lines) {
      const std::vector<std::string> words = absl::StrSplit(line, ' ');
      int64_t offset = 0;
      if (words.size() == 2 && words[0].size() == 16 && absl::SimpleAtoi(words[1], &offset)) {
        promised[words[0]] = std::max(promised[words[0]], offset);
      }
    }

    auto store = OpenStore(path);
    ASSERT_OK(store->Verify(true));
    for (const auto& [id, offset] : promised) {
      const JobId job = *JobId::Parse(id);
      const auto attempt = store->GetAttempt({job, 1});
      ASSERT_OK(attempt);
      const int64_t stored = attempt->cursor.metrics();
      EXPECT_GE(stored, offset);
      EXPECT_EQ(attempt->cursor.stdout_log(), stored);
      EXPECT_EQ(store->ReadLog(job, 1, v1::LOG_STREAM_STDOUT, 0, 10'000)->size, stored);
      const auto page = store->ListPoints(job, 0, {}, 1'000'000);
      ASSERT_OK(page);
      ASSERT_EQ(page->blocks.size(), 1u);
      ASSERT_EQ(page->blocks[0].steps_size(), stored);
      for (int i = 0; i < stored; ++i) ASSERT_EQ(page->blocks[0].steps(i), i);
    }
  }
  EXPECT_GT(promised.size(), 20u);
}

// Writes until the store refuses; checks that what is there is whole. Returns the offset reached.
int64_t FillUntilRefused(SqliteJobStore& store, const AttemptKey& key) {
  int64_t offset = store.GetAttempt(key)->cursor.metrics();
  for (int i = 0; i < 100'000; ++i) {
    const auto committed = store.CommitSpool(Range(key, offset, kPointsPerLargeBatch));
    if (!committed.ok()) {
      EXPECT_THAT(committed, StatusIs(absl::StatusCode::kResourceExhausted, ::testing::HasSubstr("full")));
      EXPECT_EQ(store.GetAttempt(key)->cursor.metrics(), offset);
      EXPECT_EQ(store.ReadLog(key.job(), 1, v1::LOG_STREAM_STDOUT, 0, 10)->size, offset);
      return offset;
    }
    offset += kPointsPerLargeBatch;
  }
  ADD_FAILURE() << "the disk never got full";
  return offset;
}

TEST(StoreDiskFull, SizeLimitRefusesAndLaterRoomHeals) {
  TempDirectory directory;
  SqliteJobStore::Options options;
  options.max_database_bytes = 512 << 10;
  auto store = OpenStore(directory / "itwin.db", options);
  const JobRow job = RunningJob(*store, "r");
  const int64_t offset = FillUntilRefused(*store, {job.id, 1});
  EXPECT_GT(offset, 0);
  EXPECT_THAT(store->Submit(MakeJob("big")), ::testing::AnyOf(itwin::testing::IsOk(), StatusIs(absl::StatusCode::kResourceExhausted, _)));
  store.reset();
  store = OpenStore(directory / "itwin.db");
  ASSERT_OK(store->Verify(true));
  ASSERT_OK(store->CommitSpool(Range({job.id, 1}, offset)));
  EXPECT_EQ(store->ListPoints(job.id, 0, {}, 1'000'000)->blocks[0].steps_size(), offset + kPointsPerBatch);
}

TEST(StoreDiskFull, AFullDiskRefusesAndTheSameStoreGoesOnWhenThereIsRoom) {
  TempDirectory directory;
  auto store = OpenStore(directory / "itwin.db");
  const JobRow job = RunningJob(*store, "r");
  // The kernel refuses to let files of this process grow, as a full disk or a quota does.
  signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 600 << 10;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const int64_t offset = FillUntilRefused(*store, {job.id, 1});
  EXPECT_OK(store->GetJob(job.id));  // reading goes on
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  ASSERT_OK(store->CommitSpool(Range({job.id, 1}, offset)));
  ASSERT_OK(store->AppendEvent(job.id, Event(EventKind::kEnded, 1)));
  ASSERT_OK(store->Verify(true));
  const auto page = store->ListPoints(job.id, 0, {}, 1'000'000);
  ASSERT_EQ(page->blocks[0].steps_size(), offset + kPointsPerBatch);
  for (int i = 0; i < page->blocks[0].steps_size(); ++i) ASSERT_EQ(page->blocks[0].steps(i), i);
}

}  // namespace
}  // namespace itwin::server
