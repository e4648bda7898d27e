// Random events against the transition table alone: the store must agree with it in every answer, also after reopening.
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "tests/testing/server_fixture.h"

namespace itwin::server {
namespace {

using itwin::testing::TempDirectory;
using testing::Event;
using testing::MakeJob;
using testing::OpenStore;

constexpr uint64_t kSeed = 99;

TEST(StoreModel, AgreesWithTheTable) {
  SCOPED_TRACE(absl::StrCat("seed ", kSeed));
  std::mt19937_64 random(kSeed);
  TempDirectory directory;
  auto store = OpenStore(directory / "itwin.db");
  std::map<JobId, JobRecord> model;
  std::map<JobId, int> events;
  std::vector<JobId> ids;
  int accepted = 0, refused = 0;
  for (int i = 0; i < 8000; ++i) {
    if (ids.size() < 120 && random() % 20 == 0) {
      const auto row = store->Submit(MakeJob(absl::StrCat("r", i), absl::StrCat("owner", random() % 3)));
      ASSERT_OK(row);
      ids.push_back(row->job.id);
      model[row->job.id] = row->job.record;
      events[row->job.id] = 1;
    }
    if (ids.empty()) continue;
    const JobId& id = ids[random() % ids.size()];
    JobRecord& record = model[id];
    JobEvent event = Event(AllEventKinds()[random() % AllEventKinds().size()]);
    event.attempt = random() % 4 == 0 ? 0 : record.attempt + static_cast<int>(random() % 3) - 1;
    if (event.kind == EventKind::kPlaced && random() % 4 != 0) event.attempt = record.attempt + 1;
    event.failure = static_cast<FailureClass>(random() % 8);
    event.progress = random() % 2 == 0;
    event.steps = static_cast<int64_t>(random() % 3);
    event.message = absl::StrCat("event ", i);
    if (random() % 3 == 0) event.not_before = absl::FromUnixMicros(static_cast<int64_t>(1 + random() % 1'000'000'000));
    AttemptUpdate update;
    if (record.attempt > 0 && random() % 3 == 0) update.max_step = static_cast<int64_t>(random() % 1000);

    JobRecord next = record;
    const absl::Status expected = Apply(event, &next);
    const auto got = store->AppendEvent(id, event, update);
    ASSERT_EQ(got.status().code(), expected.code()) << i << " " << Name(event.kind) << " " << got.status();
    if (expected.ok()) {
      ASSERT_EQ(got->record, next) << i << " " << Name(event.kind);
      record = next;
      ++events[id];
      ++accepted;
    } else {
      ++refused;
    }
    if (i % 1600 == 1599) store.reset(), store = OpenStore(directory / "itwin.db");
  }
  ASSERT_OK(store->Verify(true));
  for (const auto& [id, record] : model) {
    EXPECT_EQ(store->GetJob(id)->record, record);
    EXPECT_EQ(static_cast<int>(store->ListEvents(id, 0, 10'000)->size()), events[id]);
    EXPECT_EQ(static_cast<int>(store->ListAttempts(id)->size()), record.attempt);
  }
  // The run was worth something.
  EXPECT_GT(accepted, 300);
  EXPECT_GT(refused, 300);
}

}  // namespace
}  // namespace itwin::server
