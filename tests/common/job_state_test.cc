#include "common/job_state.h"

#include <gmock/gmock.h>

#include <fstream>
#include <map>
#include <random>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "tests/testing/status_matchers.h"

namespace itwin {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::HasSubstr;

JobEvent Event(EventKind kind, int attempt = 0) {
  JobEvent event;
  event.kind = kind;
  event.attempt = attempt;
  event.message = "because";
  return event;
}

// A record in `state` with attempt 1, as if events had led there.
JobRecord In(JobState state) {
  JobRecord record;
  record.state = state;
  record.attempt = 1;
  return record;
}

// The table as the header's comment has it: event -> (from states, to). The comment is the contract; this reads it.
struct TableRow {
  std::set<std::string> from;
  std::string to;
};
std::map<std::string, TableRow> TableOfTheHeader() {
  std::ifstream in(absl::StrCat(getenv("ITWIN_SOURCE"), "/common/job_state.h"));
  std::map<std::string, TableRow> table;
  std::string line;
  std::set<std::string> open_from;
  std::string open_event;
  std::set<std::string> states;
  for (JobState state : AllJobStates()) states.insert(std::string(Name(state)));
  while (std::getline(in, line)) {
    if (line.rfind("//   ", 0) != 0) continue;
    std::vector<std::string> words = absl::StrSplit(line.substr(2), ' ', absl::SkipEmpty());
    if (words.empty() || words[0] == "event") continue;
    if (line[5] != ' ') {
      open_event = words[0];
      open_from.clear();
      words.erase(words.begin());
    }
    if (open_event.empty()) continue;
    std::vector<std::string> found;
    // The target column starts at a fixed place; what stands before it are the sources.
    const size_t kTarget = 69;
    std::istringstream sources(line.substr(0, kTarget));
    std::string word;
    while (sources >> word) {
      if (states.count(word)) open_from.insert(word);
    }
    std::istringstream target(line.size() > kTarget ? line.substr(kTarget) : "");
    if (target >> word && (states.count(word) || word == "unchanged")) {
      table[open_event] = {open_from, word};
      open_event.clear();
    }
  }
  return table;
}

TEST(JobState, FollowsTheTableOfItsHeader) {
  const std::map<std::string, TableRow> table = TableOfTheHeader();
  ASSERT_EQ(table.size(), AllEventKinds().size());
  for (EventKind kind : AllEventKinds()) {
    const std::string name(Name(kind));
    ASSERT_EQ(table.count(name), 1u) << name;
    TableRow row = table.at(name);
    if (name == "cancel_requested" || name == "note") {
      for (JobState state : AllJobStates()) {
        if (name == "note" || !IsFinal(state)) row.from.insert(std::string(Name(state)));
      }
    }
    for (JobState state : AllJobStates()) {
      JobRecord record = In(state);
      record.cancel_requested = kind == EventKind::kCancelled;
      record.trace_steps = kind == EventKind::kTraced ? 5 : 0;
      const JobRecord before = record;
      JobEvent event = Event(kind, kind == EventKind::kPlaced ? 2 : 1);
      event.steps = kind == EventKind::kTraceRequested ? 5 : 0;
      const absl::Status status = Apply(event, &record);
      SCOPED_TRACE(absl::StrCat(name, " in ", Name(state)));
      if (row.from.count(std::string(Name(state)))) {
        ASSERT_OK(status);
        EXPECT_EQ(Name(record.state), row.to == "unchanged" ? Name(state) : absl::string_view(row.to));
      } else {
        EXPECT_THAT(status, StatusIs(absl::StatusCode::kFailedPrecondition,
                                     HasSubstr(absl::StrCat("'", name, "' cannot happen in state ", Name(state)))));
        EXPECT_EQ(record, before);  // unchanged on error
      }
    }
  }
}

TEST(JobState, BeginsWithSubmitted) {
  JobRecord record;
  ASSERT_OK(ApplyFirst(Event(EventKind::kSubmitted), &record));
  EXPECT_EQ(record.state, JobState::kQueued);
  EXPECT_EQ(record.attempt, 0);
  for (EventKind kind : AllEventKinds()) {
    if (kind == EventKind::kSubmitted) continue;
    EXPECT_THAT(ApplyFirst(Event(kind), &record), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("begins with")));
  }
}

TEST(JobState, RunsThroughAWholeLife) {
  JobRecord record;
  ASSERT_OK(ApplyFirst(Event(EventKind::kSubmitted), &record));
  JobEvent placed = Event(EventKind::kPlaced, 1);
  placed.site = "vega";
  ASSERT_OK(Apply(placed, &record));
  EXPECT_EQ(record.site, "vega");
  for (EventKind kind : {EventKind::kStaged, EventKind::kAccepted, EventKind::kStarted, EventKind::kEnded}) {
    ASSERT_OK(Apply(Event(kind, 1), &record));
  }
  JobEvent requeued = Event(EventKind::kRequeued, 1);
  requeued.failure = FailureClass::kInfra;
  requeued.not_before = absl::UnixEpoch();
  ASSERT_OK(Apply(requeued, &record));
  EXPECT_EQ(record.retries_infra, 1);
  EXPECT_EQ(record.not_before, absl::UnixEpoch());
  ASSERT_OK(Apply(Event(EventKind::kPlaced, 2), &record));
  EXPECT_EQ(record.attempt, 2);
  EXPECT_EQ(record.not_before, absl::InfinitePast());
  for (EventKind kind : {EventKind::kStaged, EventKind::kStarted, EventKind::kEnded, EventKind::kSucceeded}) {
    ASSERT_OK(Apply(Event(kind, 2), &record));
  }
  EXPECT_TRUE(IsFinal(record.state));
}

TEST(JobState, RefusesStaleAttempts) {
  JobRecord record = In(JobState::kRunning);
  record.attempt = 3;
  EXPECT_THAT(Apply(Event(EventKind::kEnded, 2), &record), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("attempt 2")));
  EXPECT_OK(Apply(Event(EventKind::kEnded, 3), &record));
  record = In(JobState::kQueued);
  EXPECT_FALSE(Apply(Event(EventKind::kPlaced, 1), &record).ok());
  EXPECT_FALSE(Apply(Event(EventKind::kPlaced, 3), &record).ok());
  EXPECT_OK(Apply(Event(EventKind::kPlaced, 2), &record));
}

TEST(JobState, CancelWinsOverRetryAndAResultOverCancel) {
  JobRecord record = In(JobState::kCollecting);
  EXPECT_THAT(Apply(Event(EventKind::kCancelled, 1), &record),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("without a cancel request")));
  ASSERT_OK(Apply(Event(EventKind::kCancelRequested), &record));
  EXPECT_EQ(record.state, JobState::kCollecting);
  EXPECT_THAT(Apply(Event(EventKind::kRequeued, 1), &record),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("after a cancel request")));
  JobRecord queued = In(JobState::kQueued);
  ASSERT_OK(Apply(Event(EventKind::kCancelRequested), &queued));
  EXPECT_FALSE(Apply(Event(EventKind::kPlaced, 2), &queued).ok());
  EXPECT_OK(Apply(Event(EventKind::kSucceeded, 1), &record));
}

TEST(JobState, OneTraceIsWantedAtATime) {
  JobRecord record = In(JobState::kRunning);
  const auto ask = [&](int64_t steps) {
    JobEvent event = Event(EventKind::kTraceRequested, 1);
    event.steps = steps;
    return Apply(event, &record);
  };
  EXPECT_THAT(Apply(Event(EventKind::kTraced, 1), &record),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no trace is wanted")));
  EXPECT_THAT(ask(0), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("names no steps")));
  ASSERT_OK(ask(7));
  EXPECT_EQ(record.trace_steps, 7);
  EXPECT_THAT(ask(7), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("another trace")));
  ASSERT_OK(Apply(Event(EventKind::kTraced, 1), &record));
  ASSERT_OK(ask(3));
  EXPECT_EQ(record.traces, 2);
  EXPECT_EQ(TraceName(record.traces), "trace-2.json");
  ASSERT_OK(Apply(Event(EventKind::kEnded, 1), &record));
  EXPECT_EQ(record.trace_steps, 0) << "the attempt that was asked is over";
}

TEST(JobState, CountsRetriesByClassAndProgress) {
  JobRecord record = In(JobState::kCollecting);
  const auto requeue = [&](FailureClass failure, bool progress) {
    record.state = JobState::kCollecting;
    JobEvent event = Event(EventKind::kRequeued, 1);
    event.failure = failure;
    event.progress = progress;
    ASSERT_OK(Apply(event, &record));
  };
  requeue(FailureClass::kPreempted, false);
  requeue(FailureClass::kPreempted, false);
  EXPECT_EQ(record.retries_preempted, 2);
  EXPECT_EQ(record.attempts_without_progress, 0) << "only continuations can stand still";
  requeue(FailureClass::kLimit, false);
  requeue(FailureClass::kInfra, false);
  EXPECT_EQ(record.attempts_without_progress, 1);
  EXPECT_EQ(record.retries_infra, 1);
  requeue(FailureClass::kApp, true);
  EXPECT_EQ(record.retries_app, 1);
  EXPECT_EQ(record.attempts_without_progress, 0);
  requeue(FailureClass::kLimit, true);
  EXPECT_EQ(record.retries_infra, 0) << "a continuation that got further gives the budget back";
  requeue(FailureClass::kNone, true);
  EXPECT_EQ(record.retries_other, 1);
  EXPECT_EQ(record.retries_preempted, 2);
}

TEST(JobState, AnyOrderOfEventsStaysInsideTheTable) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 random(seed);
    JobRecord record;
    ASSERT_OK(ApplyFirst(Event(EventKind::kSubmitted), &record));
    bool was_final = false;
    for (int i = 0; i < 200; ++i) {
      const EventKind kind = AllEventKinds()[random() % AllEventKinds().size()];
      JobEvent event = Event(kind, static_cast<int>(random() % 4) + record.attempt - 1);
      event.failure = static_cast<FailureClass>(random() % 8);
      event.steps = static_cast<int64_t>(random() % 3);
      const JobRecord before = record;
      if (!Apply(event, &record).ok()) {
        ASSERT_EQ(record, before);
      }
      ASSERT_GE(record.attempt, before.attempt);
      ASSERT_TRUE(!before.cancel_requested || record.cancel_requested);
      if (was_final) {
        ASSERT_EQ(record.state, before.state);
      }
      was_final = IsFinal(record.state);
    }
  }
}

TEST(JobState, NamesAreUniqueAndStable) {
  std::set<std::string> names;
  for (JobState state : AllJobStates()) names.insert(std::string(Name(state)));
  EXPECT_EQ(names.size(), 13u);
  std::set<std::string> kinds;
  for (EventKind kind : AllEventKinds()) kinds.insert(std::string(Name(kind)));
  EXPECT_EQ(kinds.size(), 19u);
  // stored numbers
  EXPECT_EQ(static_cast<int>(JobState::kQueued), 1);
  EXPECT_EQ(static_cast<int>(JobState::kCancelled), 13);
  EXPECT_EQ(static_cast<int>(EventKind::kSubmitted), 1);
  EXPECT_EQ(static_cast<int>(EventKind::kNote), 17);
  EXPECT_EQ(static_cast<int>(EventKind::kTraced), 19);
  EXPECT_EQ(static_cast<int>(FailureClass::kUnknown), 7);
}

TEST(JobState, KnowsWhatMayBeAtTheSite) {
  for (JobState state : AllJobStates()) {
    const bool before_or_after = state == JobState::kQueued || state == JobState::kStaging || IsFinal(state);
    EXPECT_EQ(MayBeAtSite(state), !before_or_after) << Name(state);
  }
}

}  // namespace
}  // namespace itwin
