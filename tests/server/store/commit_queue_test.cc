#include "server/store/commit_queue.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>

#include "absl/synchronization/notification.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::server {
namespace {

using itwin::testing::StatusIs;
using itwin::testing::TempDirectory;
using itwin::testing::WaitUntil;
using ::testing::_;

constexpr char kInsert[] = "INSERT INTO t (x) VALUES (?)";
constexpr char kSum[] = "SELECT coalesce(sum(x), 0) FROM t";

class CommitQueueTest : public ::testing::Test {
 protected:
  CommitQueueTest() {
    auto connection = SqliteConnection::Open(directory_ / "q.db", SqliteConnection::Mode::kReadWrite);
    ITWIN_CHECK(connection.ok());
    connection_ = *std::move(connection);
    connection_->Run("PRAGMA journal_mode = WAL; CREATE TABLE t (x INTEGER)");
    queue_ = std::make_unique<CommitQueue>(
        connection_.get(), /*max_waiting=*/8,
        CommitQueue::Hooks{[this](absl::Span<const JobChange> changes) { told_ += static_cast<int>(changes.size()); },
                           [this] { ++rollbacks_; }});
  }
  static absl::Status Insert(WriteContext& w, int x, absl::Status end = absl::OkStatus()) {
    Query(w.connection, kInsert, x).Run();
    w.changes.push_back({.job = {}, .event = true});
    return end;
  }
  int64_t Sum() {
    int64_t sum = 0;
    EXPECT_OK(queue_->Run([&](WriteContext& w) {
      Query q(w.connection, kSum);
      q.Step();
      sum = q.Int(0);
      return absl::OkStatus();
    }));
    return sum;
  }
  // Runs `fill` while the writer is held up, so that all that it hands in forms one group.
  void AsOneGroup(const std::function<void(std::vector<std::thread>*)>& fill, int64_t writes) {
    absl::Notification entered, go;
    std::vector<std::thread> threads;
    threads.emplace_back([&] {
      EXPECT_OK(queue_->Run([&](WriteContext&) {
        entered.Notify();
        go.WaitForNotification();
        return absl::OkStatus();
      }));
    });
    entered.WaitForNotification();
    const int64_t before = queue_->writes();
    fill(&threads);
    EXPECT_TRUE(WaitUntil([&] { return queue_->writes() == before + writes; }));
    go.Notify();
    for (std::thread& thread : threads) thread.join();
  }

  TempDirectory directory_;
  std::unique_ptr<SqliteConnection> connection_;
  static constexpr int64_t kHeldUp = 1;  // the one that holds the writer up
  std::atomic<int> told_ = 0, rollbacks_ = 0;
  std::unique_ptr<CommitQueue> queue_;  // last: its thread uses the rest
};

TEST_F(CommitQueueTest, AFailingBodyTakesBackItsOwnWritesOnly) {
  const int64_t commits = queue_->commits();
  AsOneGroup(
      [&](std::vector<std::thread>* threads) {
        for (const int x : {1, 10, 100, 1000}) {
          threads->emplace_back([&, x] {
            const bool bad = x == 10 || x == 1000;
            const absl::Status status = queue_->Run(
                [&](WriteContext& w) { return Insert(w, x, bad ? absl::NotFoundError("no") : absl::OkStatus()); });
            EXPECT_EQ(status.code(), bad ? absl::StatusCode::kNotFound : absl::StatusCode::kOk);
          });
        }
      },
      4);
  EXPECT_EQ(queue_->commits(), commits + 2);  // the one held up, and one for all four
  EXPECT_EQ(Sum(), 101);
  EXPECT_EQ(told_, 2);
  EXPECT_GE(rollbacks_, 1);
}

TEST_F(CommitQueueTest, ABodyThatIsRefusedBeforeItWritesTakesNothingBack) {
  std::atomic<int> calls = 0;
  AsOneGroup(
      [&](std::vector<std::thread>* threads) {
        for (const int x : {1, 10, 100}) {
          threads->emplace_back([&, x] {
            const absl::Status status = queue_->Run([&](WriteContext& w) {
              ++calls;
              return x == 10 ? absl::NotFoundError("no") : Insert(w, x);
            });
            EXPECT_EQ(status.ok(), x != 10);
          });
        }
      },
      3);
  EXPECT_EQ(Sum(), 101);
  EXPECT_EQ(calls, 3);
  EXPECT_EQ(rollbacks_, 0);
}

TEST_F(CommitQueueTest, SqlErrorsAreStatusesAndStayWithTheirBody) {
  AsOneGroup(
      [&](std::vector<std::thread>* threads) {
        threads->emplace_back([&] {
          EXPECT_THAT(queue_->Run([&](WriteContext& w) {
            Query(w.connection, "INSERT INTO nowhere VALUES (1)").Run();
            return absl::OkStatus();
          }),
                      StatusIs(absl::StatusCode::kInternal, ::testing::HasSubstr("nowhere")));
        });
        threads->emplace_back([&] { EXPECT_OK(queue_->Run([&](WriteContext& w) { return Insert(w, 5); })); });
      },
      2);
  EXPECT_EQ(Sum(), 5);
}

TEST_F(CommitQueueTest, ALostTransactionFailsItsWholeGroupAndTheNextGoesOn) {
  AsOneGroup(
      [&](std::vector<std::thread>* threads) {
        for (int i = 0; i < 3; ++i) {
          threads->emplace_back([&, i] {
            const absl::Status status = queue_->Run([&](WriteContext& w) -> absl::Status {
              if (i != 1) return Insert(w, 1);
              // As SQLite does by itself on some errors.
              Query(w.connection, "ROLLBACK").Run();
              return absl::UnavailableError("lost");
            });
            EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnavailable, _));
          });
          // In this order.
          EXPECT_TRUE(WaitUntil([&] { return queue_->writes() == kHeldUp + i + 1; }));
        }
      },
      3);
  EXPECT_EQ(Sum(), 0);
  EXPECT_EQ(told_, 0);
  EXPECT_OK(queue_->Run([&](WriteContext& w) { return Insert(w, 7); }));
  EXPECT_EQ(Sum(), 7);
}

TEST_F(CommitQueueTest, TooManyWaitingIsRefused) {
  AsOneGroup(
      [&](std::vector<std::thread>* threads) {
        for (int i = 0; i < 8; ++i) {
          threads->emplace_back([&] { EXPECT_OK(queue_->Run([&](WriteContext& w) { return Insert(w, 1); })); });
        }
        EXPECT_TRUE(WaitUntil([&] { return queue_->writes() == kHeldUp + 8; }));
        EXPECT_THAT(queue_->Run([&](WriteContext& w) { return Insert(w, 1); }),
                    StatusIs(absl::StatusCode::kResourceExhausted, _));
      },
      8);
  EXPECT_EQ(Sum(), 8);
}

TEST_F(CommitQueueTest, TheEndRunsWhatWaits) {
  AsOneGroup(
      [&](std::vector<std::thread>* threads) {
        for (int i = 0; i < 4; ++i) {
          threads->emplace_back([&] { EXPECT_OK(queue_->Run([&](WriteContext& w) { return Insert(w, 1); })); });
        }
      },
      4);
  queue_.reset();
  Query q(*connection_, kSum);
  ASSERT_TRUE(q.Step());
  EXPECT_EQ(q.Int(0), 4);
}

}  // namespace
}  // namespace itwin::server
