#include "server/dispatch/spool_follower.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/log.h"

namespace itwin::server {
namespace {

// Between tries to store, while the disk is full.
constexpr absl::Duration kFirstStoreRetry = absl::Milliseconds(100);
constexpr absl::Duration kMaxStoreRetry = absl::Seconds(5);

}  // namespace

SpoolFollower::SpoolFollower(std::unique_ptr<FollowStream> stream, JobStore* store, Clock* clock, Callbacks callbacks)
    : stream_(std::move(stream)),
      store_(store),
      clock_(clock),
      callbacks_(std::move(callbacks)),
      reader_([this] { Run(); }) {}

SpoolFollower::~SpoolFollower() { Stop(); }

void SpoolFollower::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
  }
  stream_->Cancel();
  absl::MutexLock lock(&join_mu_);
  if (reader_.joinable()) reader_.join();
}

bool SpoolFollower::Add(const AttemptKey& attempt, const agent::v1::SpoolCursor& cursor) {
  {
    absl::MutexLock lock(&mu_);
    std::shared_ptr<Followed>& followed = followed_[attempt];
    if (followed != nullptr) return true;
    followed = std::make_shared<Followed>();
    followed->cursor = cursor;
  }
  agent::v1::FollowRequest request;
  agent::v1::FollowRequest::Add* add = request.add_add();
  add->set_attempt(attempt.text());
  *add->mutable_cursor() = cursor;
  return stream_->Write(request);
}

void SpoolFollower::Drop(const AttemptKey& attempt) {
  {
    absl::MutexLock lock(&mu_);
    if (followed_.erase(attempt) == 0) return;
  }
  agent::v1::FollowRequest request;
  request.add_drop(attempt.text());
  stream_->Write(request);
}

void SpoolFollower::AddAgain(const AttemptKey& attempt, const agent::v1::SpoolCursor& cursor) {
  agent::v1::FollowRequest request;
  request.add_drop(attempt.text());
  stream_->Write(request);
  request.Clear();
  agent::v1::FollowRequest::Add* add = request.add_add();
  add->set_attempt(attempt.text());
  *add->mutable_cursor() = cursor;
  stream_->Write(request);
}

bool SpoolFollower::Drained(const AttemptKey& attempt, const agent::v1::SpoolSizes& sizes) {
  absl::MutexLock lock(&mu_);
  const auto found = followed_.find(attempt);
  if (found == followed_.end()) return false;
  if (ReachedEnd(found->second->cursor, sizes)) return true;
  found->second->awaited = sizes;
  return false;
}

void SpoolFollower::Run() {
  agent::v1::FollowResponse response;
  while (stream_->Read(&response)) {
    // Data first: a status that says ENDED must not overtake it by more than it has to.
    if (response.chunks_size() > 0 && !Store(response)) break;
    if (response.statuses_size() > 0) {
      callbacks_.on_statuses({std::make_move_iterator(response.mutable_statuses()->begin()),
                              std::make_move_iterator(response.mutable_statuses()->end())});
    }
  }
  stream_->Cancel();
  callbacks_.on_end(stream_->Finish());
}

absl::StatusOr<std::vector<SpoolCommit>> SpoolFollower::Commit(const std::vector<SpoolBatch>& batches) {
  absl::Duration wait = kFirstStoreRetry;
  while (true) {
    absl::StatusOr<std::vector<SpoolCommit>> stored = store_->CommitSpool(batches);
    if (stored.ok() || (stored.status().code() != absl::StatusCode::kResourceExhausted &&
                        stored.status().code() != absl::StatusCode::kUnavailable)) {
      return stored;
    }
    if (wait == kFirstStoreRetry) {
      log::Warn("metrics and logs cannot be stored, trying again: {}", std::string(stored.status().message()));
    }
    absl::MutexLock lock(&mu_);
    if (clock_->AwaitUntil(mu_, absl::Condition(&stopped_), clock_->Now() + wait)) return absl::CancelledError("stopped");
    wait = std::min(wait * 2, kMaxStoreRetry);
  }
}

bool SpoolFollower::Store(const agent::v1::FollowResponse& response) {
  std::vector<SpoolBatch> batches;
  std::vector<std::shared_ptr<Followed>> owners;
  // Where each file will stand after the batches before: several chunks of one file may come together.
  absl::flat_hash_map<AttemptKey, agent::v1::SpoolCursor> ahead;
  for (const agent::v1::SpoolChunk& chunk : response.chunks()) {
    const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(chunk.attempt());
    if (!key.ok()) {
      log::Warn("a chunk of the unknown attempt '{}' is left out", chunk.attempt());
      continue;
    }
    std::shared_ptr<Followed> followed;
    agent::v1::SpoolCursor stands;
    {
      absl::MutexLock lock(&mu_);
      const auto found = followed_.find(*key);
      if (found == followed_.end()) continue;  // dropped while this was on its way
      followed = found->second;
      stands = followed->cursor;
    }
    const auto [position, unused] = ahead.try_emplace(*key, stands);
    const int64_t expected = CursorOf(position->second, chunk.file(), chunk.host());
    const int64_t chunk_end = chunk.offset() + static_cast<int64_t>(chunk.data().size());
    if (chunk.offset() < expected && chunk_end <= expected) continue;  // stored before
    if (chunk.offset() != expected && (chunk.offset() < expected || chunk.note().empty())) {
      log::Warn("attempt {}: {} jumps from byte {} to {}; asking again", chunk.attempt(),
                SpoolFileName(chunk.file(), chunk.host()), expected, chunk.offset());
      AddAgain(*key, stands);
      continue;
    }
    ParsedChunk parsed = parser_.Parse(*key, chunk, clock_->Now(), &followed->names);
    if (!chunk.note().empty()) {
      // The range takes in what the agent left out, and says so once.
      parsed.batch.begin_offset = expected;
      ++parsed.batch.bad_lines;
      parsed.complaint = absl::StrCat("line in ", SpoolFileName(chunk.file(), chunk.host()), " skipped: ", chunk.note(),
                                      parsed.complaint.empty() ? "" : ". ", parsed.complaint);
    }
    if (!parsed.complaint.empty() && !std::exchange(followed->complained, true)) {
      callbacks_.on_complaint(*key, std::move(parsed.complaint), parsed.batch.bad_lines);
    }
    SetCursor(chunk.file(), chunk.host(), parsed.batch.end_offset, &position->second);
    batches.push_back(std::move(parsed.batch));
    owners.push_back(std::move(followed));
  }
  if (batches.empty()) return true;

  const absl::StatusOr<std::vector<SpoolCommit>> stored = Commit(batches);
  if (!stored.ok()) {
    if (stored.status().code() != absl::StatusCode::kCancelled) {
      log::Error("metrics and logs cannot be stored: {}", std::string(stored.status().message()));
    }
    return false;
  }
  for (size_t i = 0; i < batches.size() && i < stored->size(); ++i) {
    const SpoolCommit& commit = (*stored)[i];
    if (commit.outcome == SpoolCommit::Outcome::kUnknownAttempt) continue;
    if (commit.refused_points > 0 && !std::exchange(owners[i]->complained, true)) {
      callbacks_.on_complaint(batches[i].attempt, RefusedComplaint(batches[i], commit.refused_points), commit.refused_points);
    }
    bool drained = false;
    agent::v1::SpoolCursor stands;
    {
      absl::MutexLock lock(&mu_);
      Followed& followed = *owners[i];
      SetCursor(batches[i].file, batches[i].host, commit.cursor, &followed.cursor);
      stands = followed.cursor;
      drained = followed.awaited && ReachedEnd(followed.cursor, *followed.awaited);
      if (drained) followed.awaited.reset();
    }
    // Somebody stored part of it before (a crash between commit and here): from where the store stands, then.
    if (commit.outcome == SpoolCommit::Outcome::kSkipped && commit.cursor != batches[i].end_offset) {
      AddAgain(batches[i].attempt, stands);
    }
    if (drained) callbacks_.on_drained(batches[i].attempt);
  }
  return true;
}

}  // namespace itwin::server
