#include "client/src/retry.h"

#include <gmock/gmock.h>

#include "tests/testing/status_matchers.h"

namespace itwin::client {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Le;

// Time that passes only by the pauses asked for.
struct FakeTime {
  absl::Time now = absl::UnixEpoch();
  std::vector<absl::Duration> delays;
  double random = 1 - 1e-9;  // the longest delays
  Pacing pacing() {
    return {.now = [this] { return now; },
            .pause = [this](absl::Duration d) { delays.push_back(d); now += d; return true; },
            .random = [this] { return random; }};
  }
};

TEST(RetryLoop, ReturnsSuccessAndLastingErrorsAtOnce) {
  FakeTime time;
  int calls = 0;
  for (const absl::Status& status : {absl::OkStatus(), absl::NotFoundError("x"), absl::InvalidArgumentError("x"),
                                     absl::UnauthenticatedError("x"), absl::DataLossError("x"), absl::InternalError("x"),
                                     absl::FailedPreconditionError("x"), absl::PermissionDeniedError("x")}) {
    EXPECT_EQ(RetryLoop({}, Idempotency::kIdempotent, time.pacing(), nullptr, [&] { ++calls; return status; }), status);
  }
  EXPECT_EQ(calls, 8);
  EXPECT_TRUE(time.delays.empty());
}

TEST(RetryLoop, WaitsLongerEachTimeUntilSuccess) {
  FakeTime time;
  int calls = 0;
  EXPECT_OK(RetryLoop({.initial_delay = absl::Milliseconds(100), .max_delay = absl::Milliseconds(300), .multiplier = 2},
                      Idempotency::kIdempotent, time.pacing(), nullptr,
                      [&] { return ++calls < 6 ? absl::UnavailableError("down") : absl::OkStatus(); }));
  std::vector<int64_t> ms;
  for (absl::Duration d : time.delays) ms.push_back(absl::ToInt64Milliseconds(d + absl::Microseconds(1)));
  EXPECT_THAT(ms, ElementsAre(100, 200, 300, 300, 300));
}

TEST(RetryLoop, JitterTakesUpToHalfAway) {
  FakeTime time;
  time.random = 0;
  int calls = 0;
  EXPECT_OK(RetryLoop({.initial_delay = absl::Milliseconds(100)}, Idempotency::kIdempotent, time.pacing(), nullptr,
                      [&] { return ++calls < 2 ? absl::UnavailableError("down") : absl::OkStatus(); }));
  EXPECT_THAT(time.delays, ElementsAre(absl::Milliseconds(50)));
}

TEST(RetryLoop, GivesUpAtTheEndOfItsTime) {
  FakeTime time;
  std::vector<std::string> told;
  const absl::Status status =
      RetryLoop({.give_up_after = absl::Seconds(10)}, Idempotency::kIdempotent, time.pacing(),
                [&](const absl::Status& why, absl::Duration) { told.emplace_back(why.message()); },
                [] { return absl::UnavailableError("down"); });
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_LE(time.now, absl::UnixEpoch() + absl::Seconds(10));
  EXPECT_GE(time.now, absl::UnixEpoch() + absl::Seconds(6));
  EXPECT_EQ(told.size(), time.delays.size());
  EXPECT_THAT(time.delays, Each(Le(absl::Seconds(3))));
}

TEST(RetryLoop, NeverRepeatsWhatIsNotIdempotent) {
  FakeTime time;
  int calls = 0;
  for (absl::StatusCode code : {absl::StatusCode::kUnavailable, absl::StatusCode::kDeadlineExceeded,
                                absl::StatusCode::kAborted, absl::StatusCode::kResourceExhausted}) {
    EXPECT_EQ(RetryLoop({}, Idempotency::kNotIdempotent, time.pacing(), nullptr,
                        [&] { ++calls; return absl::Status(code, "x"); }).code(), code);
    EXPECT_TRUE(IsTransient(code, Idempotency::kIdempotent));
  }
  EXPECT_EQ(calls, 4);
}

TEST(RetryLoop, AsksForAQuotaOnlyAFewTimes) {
  FakeTime time;
  int calls = 0;
  EXPECT_EQ(RetryLoop({.max_exhausted = 3}, Idempotency::kIdempotent, time.pacing(), nullptr,
                      [&] { ++calls; return absl::ResourceExhaustedError("quota"); }).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(calls, 3);
}

TEST(RetryLoop, EndsWhenTheWaitIsCutShort) {
  FakeTime time;
  Pacing pacing = time.pacing();
  pacing.pause = [](absl::Duration) { return false; };
  int calls = 0;
  EXPECT_FALSE(RetryLoop({}, Idempotency::kIdempotent, pacing, nullptr, [&] { ++calls; return absl::UnavailableError("x"); }).ok());
  EXPECT_EQ(calls, 1);
}

TEST(Backoff, StartsAgainAfterAReset) {
  Backoff backoff({.initial_delay = absl::Seconds(1), .max_delay = absl::Seconds(8), .multiplier = 2}, [] { return 1.0; });
  EXPECT_EQ(backoff.Next(), absl::Seconds(1));
  EXPECT_EQ(backoff.Next(), absl::Seconds(2));
  backoff.Reset();
  EXPECT_EQ(backoff.Next(), absl::Seconds(1));
}

}  // namespace
}  // namespace itwin::client
