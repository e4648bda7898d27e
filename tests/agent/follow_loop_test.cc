#include "agent/follow_loop.h"

#include <fcntl.h>

#include <gtest/gtest.h>
#include <sys/resource.h>

#include "absl/time/clock.h"
#include "agent/scheduler/lease.h"
#include "agent/spool/lifecycle.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

AttemptKey Key(int n) {
  char text[32];
  snprintf(text, sizeof text, "%016x-1", n);
  return *AttemptKey::Parse(text);
}

class RecordingSink : public FollowSink {
 public:
  void Send(v1::FollowResponse response) override { responses.push_back(std::move(response)); }
  std::string Data(v1::SpoolFile file) const {
    std::string out;
    for (const auto& response : responses) {
      for (const auto& chunk : response.chunks()) {
        if (chunk.file() == file) out += chunk.data();
      }
    }
    return out;
  }
  std::vector<v1::FollowResponse> responses;
};

// The loop without its thread: ticks are given by hand, time runs as the test says.
class FollowLoopTest : public ::testing::Test {
 protected:
  explicit FollowLoopTest(bool inotify = false)
      : loop_({.root = root_.path(), .use_inotify = inotify, .on_ended = [this](const AttemptKey&) { ++ended_; }}) {}

  AttemptDirectory Make(const AttemptKey& key) {
    const AttemptDirectory directory(root_.path(), key);
    EXPECT_OK(MakeDirectories(directory.path()));
    EXPECT_OK(WriteFileAtomically(directory.request_path(), ""));
    return directory;
  }
  void Begin(const AttemptDirectory& directory) {
    EXPECT_TRUE(TakeLease(directory, {.nonce = "n"}).value());
    EXPECT_OK(AppendLine(directory.lifecycle_path(), RenderStarted({.time = absl::Now(), .host = "h"})));
  }
  // Everything there is to send, answering as a quick reader would.
  void Drain(RecordingSink* sink, int64_t session) {
    size_t before;
    do {
      before = sink->responses.size();
      now_ += absl::Milliseconds(5);
      loop_.Tick(now_);
      loop_.Writable(session);
    } while (sink->responses.size() != before);
  }

  itwin::testing::TempDirectory root_;
  int ended_ = 0;
  FollowLoop loop_;
  absl::Time now_ = absl::Now();
};

TEST_F(FollowLoopTest, LooksSoonAfterActivityAndSeldomWhenIdle) {
  const AttemptDirectory directory = Make(Key(1));
  Begin(directory);
  loop_.Report(Key(1), {.state = SchedulerState::kRunning});
  ASSERT_OK(AppendLine(directory.metrics_path(), "{}"));
  absl::Time now = absl::Now() + absl::Seconds(2);
  absl::Time wake = loop_.Tick(now);
  EXPECT_LE(wake - now, absl::Milliseconds(5));
  absl::Duration last;
  for (int i = 0; i < 20; ++i) {
    now = wake;
    wake = loop_.Tick(now);
    EXPECT_GE(wake - now, last);
    last = wake - now;
  }
  EXPECT_EQ(last, absl::Seconds(1));
  ASSERT_OK(AppendLine(directory.metrics_path(), "{}"));
  now = wake;
  EXPECT_LE(loop_.Tick(now) - now, absl::Milliseconds(5));
}

TEST_F(FollowLoopTest, HasOneResponseUnderWayPerFollowerAndIsFairBetweenAttempts) {
  RecordingSink sink;
  const int64_t session = loop_.OpenSession(&sink);
  for (int n : {1, 2}) {
    const AttemptDirectory directory = Make(Key(n));
    Begin(directory);
    ASSERT_OK(WriteFileAtomically(directory.stdout_path(), std::string(n == 1 ? 20 << 20 : 1000, 'x')));
    loop_.Report(Key(n), {.state = SchedulerState::kRunning});
    loop_.Follow(session, Key(n), {});
  }
  loop_.Tick(now_ += absl::Seconds(1));
  loop_.Tick(now_ += absl::Seconds(1));
  ASSERT_EQ(sink.responses.size(), 1u) << "nothing more before it was taken";
  EXPECT_LE(sink.responses[0].ByteSizeLong(), size_t{3} << 19);
  bool small_one_came = false;
  for (const auto& chunk : sink.responses[0].chunks()) small_one_came |= chunk.attempt() == Key(2).text();
  EXPECT_TRUE(small_one_came);
  loop_.Writable(session);
  Drain(&sink, session);
  EXPECT_EQ(sink.Data(v1::SPOOL_FILE_STDOUT).size(), (size_t{20} << 20) + 1000);
}

TEST_F(FollowLoopTest, GoesOnFromTheCursorAlsoInNodeFiles) {
  const AttemptDirectory directory = Make(Key(1));
  Begin(directory);
  for (const std::string& path : {directory.metrics_path(), directory.node_path("a"), directory.node_path("b.c")}) {
    ASSERT_OK(WriteFileAtomically(path, "1\n22\n333\n"));
  }
  RecordingSink sink;
  const int64_t session = loop_.OpenSession(&sink);
  v1::SpoolCursor cursor;
  cursor.set_metrics(2);
  (*cursor.mutable_nodes())["a"] = 5;
  loop_.Report(Key(1), {.state = SchedulerState::kRunning});
  loop_.Follow(session, Key(1), cursor);
  Drain(&sink, session);
  EXPECT_EQ(sink.Data(v1::SPOOL_FILE_METRICS), "22\n333\n");
  EXPECT_EQ(sink.Data(v1::SPOOL_FILE_NODE).size(), 4u + 9u);
}

TEST_F(FollowLoopTest, AnEndIsTheEndAndStaysAfterARestart) {
  const AttemptDirectory directory = Make(Key(1));
  Begin(directory);
  loop_.Report(Key(1), {.state = SchedulerState::kEnded});
  EXPECT_EQ(ended_, 1);
  const v1::AttemptStatus status = loop_.Status(Key(1), true);
  EXPECT_EQ(status.cause(), v1::END_CAUSE_LOST);
  // A record that comes too late does not change it, for us or for the next.
  ASSERT_OK(AppendLine(directory.lifecycle_path(), RenderExited({.time = absl::Now(), .exit_code = 0})));
  EXPECT_EQ(loop_.Status(Key(1), true).cause(), v1::END_CAUSE_LOST);
  FollowLoop next({.root = root_.path(), .use_inotify = false});
  EXPECT_EQ(next.Status(Key(1), true).SerializeAsString(), status.SerializeAsString());
}

TEST_F(FollowLoopTest, ABadLineInTheMiddleIsPassedOnForTheGatewayToCount) {
  const AttemptDirectory directory = Make(Key(1));
  Begin(directory);
  const std::string text = "{\"a\":1}\n\xff\xfegarbage\n{\"a\":2}\n";
  ASSERT_OK(WriteFileAtomically(directory.metrics_path(), text));
  RecordingSink sink;
  const int64_t session = loop_.OpenSession(&sink);
  loop_.Report(Key(1), {.state = SchedulerState::kRunning});
  loop_.Follow(session, Key(1), {});
  Drain(&sink, session);
  EXPECT_EQ(sink.Data(v1::SPOOL_FILE_METRICS), text);
}

TEST_F(FollowLoopTest, KeysThatNeverExistedTakeNoMemory) {
  for (int n = 0; n < 100; ++n) EXPECT_EQ(loop_.Status(Key(n), true).phase(), v1::ATTEMPT_PHASE_ABSENT);
  EXPECT_TRUE(loop_.Keys().empty());
}

TEST_F(FollowLoopTest, ThousandsOfIdleAttemptsCostNextToNothing) {
  RecordingSink sink;
  const int64_t session = loop_.OpenSession(&sink);
  for (int n = 1; n <= 2000; ++n) {
    const AttemptDirectory directory(root_.path(), Key(n));
    ASSERT_OK(MakeDirectories(directory.lease_path()));
    FileDescriptor file = *OpenFile(directory.request_path(), O_WRONLY | O_CREAT);
    loop_.Report(Key(n), {.state = SchedulerState::kRunning});
    loop_.Follow(session, Key(n), {});
  }
  Drain(&sink, session);
  absl::Time now = absl::Now() + absl::Minutes(10);
  for (int i = 0; i < 12'000; ++i) now = std::max(now, loop_.Tick(now));
  rusage before, after;
  getrusage(RUSAGE_SELF, &before);
  const absl::Time end = now + absl::Seconds(10);
  int looks = 0;
  for (; now < end; ++looks) now = std::max(now + absl::Microseconds(1), loop_.Tick(now));
  getrusage(RUSAGE_SELF, &after);
  const auto seconds = [](const rusage& u) {
    return static_cast<double>(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           static_cast<double>(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
  };
  const double percent = (seconds(after) - seconds(before)) / 10 * 100;
  std::printf("2,000 followed, idle, polled: %d looks and %.1f %% of a core in 10 s\n", looks, percent);
  EXPECT_LT(looks, 3000);  // 200 a second, however many they are
}

class FollowLoopWithInotify : public FollowLoopTest {
 protected:
  FollowLoopWithInotify() : FollowLoopTest(true) {}
};

TEST_F(FollowLoopWithInotify, LooksOnlyAsASafetyNet) {
  const AttemptDirectory directory = Make(Key(1));
  Begin(directory);
  loop_.Report(Key(1), {.state = SchedulerState::kRunning});
  const absl::Time now = absl::Now() + absl::Seconds(2);
  EXPECT_EQ(loop_.Tick(now) - now, absl::Seconds(1));
}

}  // namespace
}  // namespace itwin::agent
