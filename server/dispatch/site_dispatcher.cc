#include "server/dispatch/site_dispatcher.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "server/dispatch/failure_signs.h"
#include "server/jobs/model_archive.h"

namespace itwin::server {
namespace {

constexpr int kProtocol = 1;
constexpr int kMaxRecordsInARow = 16;      // of one job: more is a mistake of ours, not work
constexpr int kMaxLooksPerPlacement = 512;
constexpr size_t kListBatch = 500;
constexpr absl::Duration kFirstErrandRetry = absl::Milliseconds(250);
constexpr absl::Duration kMaxErrandRetry = absl::Seconds(30);
constexpr absl::Duration kFirstReconnect = absl::Milliseconds(200);
constexpr absl::Duration kStoreRetry = absl::Seconds(1);  // while the database cannot take an event
constexpr absl::Duration kGoodConnection = absl::Seconds(10);  // one that lasted so long resets the back-off
constexpr absl::Duration kCleanInterval = absl::Hours(1);
constexpr absl::Duration kLookAgain = absl::Seconds(5);
constexpr absl::Duration kIdle = absl::Seconds(30);
constexpr absl::Duration kClocksAgree = absl::Seconds(5);  // a smaller difference is left alone
constexpr size_t kToldPerTurn = 50;                        // each is a commit
constexpr absl::Duration kSameStart = absl::Minutes(2);    // an estimate that moves less is the same

bool IsWaiting(JobState state) {
  return state == JobState::kStaging || state == JobState::kSubmitting || state == JobState::kSubmitUnknown ||
         state == JobState::kPending || state == JobState::kHeld;
}

absl::Duration RetryDelay(int failures, absl::Duration first, absl::Duration most, double jitter) {
  absl::Duration wait = first;
  for (int i = 1; i < failures && wait < most; ++i) wait *= 2;
  return std::min(wait, most) * (0.75 + 0.5 * jitter);
}

// Moments by the site's clock become moments by ours.
void ShiftTimes(absl::Duration ahead, agent::v1::AttemptStatus* status) {
  const int64_t by = absl::ToInt64Microseconds(ahead);
  if (by == 0) return;
  if (status->submitted_us() != 0) status->set_submitted_us(status->submitted_us() - by);
  if (status->started_us() != 0) status->set_started_us(status->started_us() - by);
  if (status->ended_us() != 0) status->set_ended_us(status->ended_us() - by);
  if (status->expected_start_us() != 0) status->set_expected_start_us(status->expected_start_us() - by);
}

}  // namespace

SiteDispatcher::SiteDispatcher(SiteOptions options, Dependencies dependencies)
    : options_(std::move(options)),
      store_(dependencies.store),
      blobs_(dependencies.blobs),
      board_(dependencies.board),
      clock_(dependencies.clock),
      connect_(std::move(dependencies.connect)),
      cancel_connect_(std::move(dependencies.cancel_connect)),
      credentials_expire_(std::move(dependencies.credentials_expire)),
      gateway_id_(std::move(dependencies.gateway_id)),
      gateway_version_(std::move(dependencies.gateway_version)),
      gateway_place_(std::move(dependencies.gateway_place)),
      gateway_label_(std::move(dependencies.gateway_label)),
      renew_(std::move(dependencies.renew)),
      random_(options_.seed),
      adopts_strays_(options_.adopts_strays),
      paused_(options_.paused),
      calls_(std::move(dependencies.calls)),
      transfers_(std::move(dependencies.transfers)) {
  site_.set_name(options_.name);
  site_.set_state(v1::SITE_STATE_CONNECTING);
  site_.set_reason("connecting for the first time");
  site_.set_scheduler(options_.settings.scheduler);
  site_.set_address(options_.address);
}

SiteDispatcher::~SiteDispatcher() { Stop(); }

absl::Status SiteDispatcher::Open() {
  store_->AddListener(this);  // first: what happens meanwhile is then read twice rather than never
  ITWIN_RETURN_IF_ERROR(LoadLive());
  PublishSite();
  if (placed_ > 0) log::Info("site {}: {} live jobs are there from before", options_.name, placed_);
  return absl::OkStatus();
}

absl::Status SiteDispatcher::LoadLive() {
  ITWIN_ASSIGN_OR_RETURN(const std::vector<JobRow> rows, store_->ListLive());
  for (const JobRow& row : rows) {
    if (!Mine(row)) continue;
    SetRow(row);
    Wake(row.id);
  }
  return absl::OkStatus();
}

void SiteDispatcher::Start() {
  loop_ = std::thread([this] {
    while (true) {
      const absl::Time wake = RunOnce();
      absl::MutexLock lock(&mu_);
      clock_->AwaitUntil(mu_, absl::Condition(this, &SiteDispatcher::HasMail), wake);
      if (stopping_) return;
    }
  });
}

void SiteDispatcher::Stop() {
  std::shared_ptr<AgentClient> opening;
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    opening = open_client_;
  }
  if (cancel_connect_) cancel_connect_();
  if (opening) opening->Close();  // also frees a loop that waits in a write
  if (loop_.joinable()) loop_.join();
  store_->RemoveListener(this);
  if (client_) client_->Close();
  if (follower_) follower_->Stop();
  calls_->Stop();
  transfers_->Stop();
  follower_.reset();
  client_.reset();
  absl::MutexLock lock(&mu_);
  mail_.clear();
  open_client_.reset();
}

// ---- mail ----

void SiteDispatcher::Post(std::function<void()> mail) {
  absl::MutexLock lock(&mu_);
  mail_.push_back(std::move(mail));
}

void SiteDispatcher::Pause(const std::string& reason) {
  absl::MutexLock lock(&mu_);
  paused_ = reason;
  mail_.push_back([] {});  // so that the board is told
}

void SiteDispatcher::Resume() {
  absl::MutexLock lock(&mu_);
  paused_.reset();
  mail_.push_back([this] { place_ = true; });
}

void SiteDispatcher::AdoptStrays() {
  Post([this] {
    adopts_strays_ = true;
    if (const absl::Status status = LoadLive(); !status.ok()) {
      log::Error("site {}: live jobs cannot be read: {}", options_.name, std::string(status.message()));
    }
  });
}

void SiteDispatcher::Reconnect() {
  Post([this] {
    next_connect_ = absl::InfinitePast();
    if (client_) Disconnect(absl::UnavailableError("asked to connect anew"));
    next_connect_ = absl::InfinitePast();
  });
}

void SiteDispatcher::OnCommit(absl::Span<const JobChange> changes) {
  absl::MutexLock lock(&mu_);
  for (const JobChange& change : changes) {
    if (change.event) changed_[change.job] = change.row;  // in the order of versions
  }
}

void SiteDispatcher::TakeMail() {
  std::vector<std::function<void()>> mail;
  absl::flat_hash_map<JobId, std::shared_ptr<const JobRow>> changed;
  absl::flat_hash_map<std::string, agent::v1::AttemptStatus> statuses;
  {
    absl::MutexLock lock(&mu_);
    mail.swap(mail_);
    changed.swap(changed_);
    statuses.swap(statuses_);
  }
  // Before the tasks, which may move jobs past what was told.
  for (const auto& [id, row] : changed) row ? Take(*row) : Refresh(id);
  for (const std::function<void()>& task : mail) task();
  for (const auto& [attempt, status] : statuses) OnStatus(status, clock_->Now());
}

// ---- one turn ----

absl::Time SiteDispatcher::RunOnce() {
  TakeMail();
  absl::Time now = clock_->Now();
  while (!timers_.empty() && timers_.top().first <= now) {
    const auto [when, id] = timers_.top();
    timers_.pop();
    const auto found = jobs_.find(id);
    if (found == jobs_.end() || found->second->wake_at != when) continue;  // was moved
    found->second->wake_at = absl::InfiniteFuture();
    Wake(id);
  }
  if (!client_ && !connecting_ && now >= next_connect_) Connect();
  if (client_ && !listing_ && now >= next_list_) List();
  if (client_ && now >= next_clean_ && options_.spool_retention > absl::ZeroDuration()) CleanSpools();

  std::vector<JobId> awake(awake_.begin(), awake_.end());
  awake_.clear();
  for (const JobId& id : awake) Step(id);
  if (now >= next_place_) place_ = true;
  if (place_ && client_) {
    PublishSite();
    Place();
  }
  PublishSite();
  const bool more_to_tell = TellOutage(now);

  if (!awake_.empty() || more_to_tell) return absl::InfinitePast();
  absl::Time wake = now + kIdle;
  if (outage_ == 0 && outage_since_ != absl::InfinitePast()) wake = std::min(wake, outage_since_ + options_.tell_outage_after);
  if (!timers_.empty()) wake = std::min(wake, timers_.top().first);
  if (!client_ && !connecting_) wake = std::min(wake, next_connect_);
  if (client_ && !listing_) wake = std::min(wake, next_list_);
  if (client_) wake = std::min(wake, next_place_);
  return wake;
}

// ---- connection ----

void SiteDispatcher::Connect() {
  connecting_ = true;
  calls_->Submit([this] {
    // A second round after the agent was replaced by another version.
    for (const bool may_renew : {true, false}) {
      const absl::Time deadline = absl::Now() + options_.connect_timeout;
      absl::StatusOr<std::unique_ptr<AgentClient>> made = connect_(deadline);
      if (!made.ok()) {
        Post([this, status = made.status()] { OnConnected(status, nullptr); });
        return;
      }
      const std::shared_ptr<AgentClient> client = *std::move(made);
      {
        absl::MutexLock lock(&mu_);
        if (stopping_) return;
        open_client_ = client;
      }
      absl::StatusOr<Greeting> greeting = SayHello(client.get(), deadline);
      if (greeting.ok() && renew_ && may_renew) {
        const absl::StatusOr<bool> renewed = renew_(client.get(), greeting->hello);
        if (!renewed.ok()) log::Warn("site {}: its agent was not renewed: {}", options_.name, std::string(renewed.status().message()));
        if (renewed.ok() && *renewed) {
          client->Close();
          continue;
        }
      }
      if (!greeting.ok()) {
        client->Close();
        const std::string words = client->Diagnostics();
        if (!words.empty()) {
          greeting = absl::Status(greeting.status().code(),
                                  absl::StrCat(greeting.status().message(), "; the far side says: ", words));
        }
      }
      Post([this, client, greeting = std::move(greeting)] { OnConnected(greeting, client); });
      return;
    }
  });
}

absl::StatusOr<SiteDispatcher::Greeting> SiteDispatcher::SayHello(AgentClient* client, absl::Time deadline) {
  agent::v1::HelloRequest request;
  request.set_protocol(kProtocol);
  request.set_gateway_version(gateway_version_);
  request.set_gateway_id(gateway_id_);
  request.set_gateway_place(gateway_place_);
  request.set_gateway_label(gateway_label_);
  request.set_scheduler(options_.settings.scheduler);
  if (options_.query_interval > absl::ZeroDuration()) {
    absl::Duration rest = options_.query_interval;
    request.mutable_query_interval()->set_seconds(absl::IDivDuration(rest, absl::Seconds(1), &rest));
    request.mutable_query_interval()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(rest)));
  }
  Greeting out;
  const absl::Time asked = clock_->Now();
  ITWIN_ASSIGN_OR_RETURN(out.hello, client->Hello(request, deadline));
  if (out.hello.protocol() != kProtocol) {
    return absl::FailedPreconditionError(
        absl::StrCat("the agent speaks protocol ", out.hello.protocol(), ", this gateway ", kProtocol, "; update the ",
                     out.hello.protocol() < kProtocol ? "agent" : "gateway"));
  }
  ITWIN_RETURN_IF_ERROR(CheckSpool(out.hello));
  if (out.hello.time_us() != 0) {
    const absl::Time answered = clock_->Now();
    const absl::Duration ahead = absl::FromUnixMicros(out.hello.time_us()) - (asked + (answered - asked) / 2);
    if (absl::AbsDuration(ahead) >= kClocksAgree) out.clock_ahead = absl::Floor(ahead + absl::Milliseconds(500), absl::Seconds(1));
  }
  return out;
}

absl::Status SiteDispatcher::CheckSpool(const agent::v1::HelloResponse& hello) {
  if (hello.spool_id().empty()) return absl::OkStatus();  // an agent that does not know of ids
  ITWIN_ASSIGN_OR_RETURN(const std::string known, store_->PinSpool(options_.name, hello.spool_id()));
  if (known == hello.spool_id()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(
      hello.host(), ":", hello.spool(), " is another spool than before (id ", hello.spool_id(), ", not ", known,
      "): the file system that holds it may not be mounted. Mount it; jobs wait until then. If the spool was made anew on "
      "purpose and what was there is given up, run at the gateway: itwin-gateway accept-spool ", options_.name));
}

void SiteDispatcher::OnConnected(absl::StatusOr<Greeting> greeting, std::shared_ptr<AgentClient> client) {
  connecting_ = false;
  const absl::Time now = clock_->Now();
  absl::StatusOr<std::unique_ptr<FollowStream>> stream = absl::UnavailableError("not connected");
  if (greeting.ok()) stream = client->Follow();
  if (!greeting.ok() || !stream.ok()) {
    const absl::Status why = greeting.ok() ? stream.status() : greeting.status();
    const bool auth = why.code() == absl::StatusCode::kUnauthenticated || why.code() == absl::StatusCode::kPermissionDenied;
    if (connect_failures_ == 0 || why.message() != site_.reason()) {
      log::Warn("site {} cannot be reached: {}", options_.name, std::string(why.message()));
    }
    ++connect_failures_;
    const bool other_spool = absl::IsDataLoss(why);
    site_.set_state(auth          ? v1::SITE_STATE_PAUSED_AUTH
                    : other_spool ? v1::SITE_STATE_PAUSED
                                  : v1::SITE_STATE_UNREACHABLE);
    site_.set_reason(std::string(why.message()));
    site_.set_connected_us(0);
    if (outage_since_ == absl::InfinitePast()) outage_since_ = now;
    next_connect_ = now + RetryDelay(connect_failures_, kFirstReconnect, options_.max_connect_backoff,
                                     std::uniform_real_distribution<>(0, 1)(random_));
    return;
  }
  outage_since_ = absl::InfinitePast();
  next_hello_ = now + options_.hello_interval;
  clock_ahead_ = greeting->clock_ahead;
  if (clock_ahead_ != absl::ZeroDuration()) {
    log::Warn("site {}: its clock is {} {} ours; times are told by ours", options_.name,
              absl::FormatDuration(absl::AbsDuration(clock_ahead_)), clock_ahead_ > absl::ZeroDuration() ? "ahead of" : "behind");
  }
  hello_ = std::move(greeting->hello);
  known_ = true;
  client_ = std::move(client);
  connected_at_ = now;
  const int64_t generation = ++generation_;
  follower_ = std::make_unique<SpoolFollower>(
      *std::move(stream), store_, clock_,
      SpoolFollower::Callbacks{
          .on_statuses =
              [this](std::vector<agent::v1::AttemptStatus> statuses) {
                absl::MutexLock lock(&mu_);
                for (agent::v1::AttemptStatus& status : statuses) {
                  std::string key = status.attempt();
                  statuses_[std::move(key)] = std::move(status);
                }
              },
          .on_drained =
              [this](const AttemptKey& attempt) {
                Post([this, attempt] { Wake(attempt.job()); });
              },
          .on_complaint =
              [this](const AttemptKey& attempt, std::string complaint, int64_t lines) {
                Post([this, attempt, complaint = std::move(complaint), lines] {
                  LiveJob* job = Find(attempt);
                  if (job == nullptr || job->noted_lines > 0) return;
                  JobEvent note;
                  note.time = clock_->Now();
                  note.attempt = attempt.number();
                  note.message = complaint;
                  note.actor = absl::StrCat("site:", options_.name);
                  job->noted_lines = lines;
                  Append(job, note, {});
                });
              },
          .on_end =
              [this, generation](absl::Status why) {
                Post([this, generation, why] {
                  if (generation == generation_ && client_) Disconnect(why);
                });
              }});
  site_.set_state(v1::SITE_STATE_READY);
  site_.clear_reason();
  site_.set_scheduler(hello_.scheduler());
  site_.set_slots(hello_.slots());
  site_.set_agent_version(hello_.agent_version());
  site_.set_host(hello_.host());
  site_.set_calls_per_minute(hello_.calls_per_minute());
  site_.set_connected_us(absl::ToUnixMicros(now));
  site_.clear_partitions();
  for (const agent::v1::Partition& partition : hello_.slurm().partitions()) site_.add_partitions(partition.name());
  log::Info("site {}: connected to agent {} of {}@{}, scheduler {}, {} slots", options_.name, hello_.agent_version(),
            hello_.user(), hello_.host(), hello_.scheduler(), hello_.slots());
  next_list_ = now;
  next_clean_ = std::max(next_clean_, now + absl::Minutes(1));
  place_ = true;
  for (const auto& [id, job] : jobs_) {
    if (job->row.record.state != JobState::kQueued) Wake(id);
  }
}

void SiteDispatcher::Disconnect(const absl::Status& why) {
  const std::shared_ptr<AgentClient> client = std::exchange(client_, nullptr);
  client->Close();
  follower_->Stop();
  follower_.reset();
  const absl::Time now = clock_->Now();
  const std::string words = client->Diagnostics();
  const std::string reason = absl::StrCat("the connection broke", why.ok() ? "" : absl::StrCat(": ", why.message()),
                                          words.empty() ? "" : absl::StrCat("; the far side says: ", words));
  log::Warn("site {}: {}", options_.name, reason);
  site_.set_state(v1::SITE_STATE_UNREACHABLE);
  site_.set_reason(reason);
  site_.set_connected_us(0);
  site_.set_calls_per_minute(0);  // nobody counts them for us now
  outage_since_ = now;
  connect_failures_ = now - connected_at_ >= kGoodConnection ? 0 : connect_failures_ + 1;
  next_connect_ = now + RetryDelay(connect_failures_, kFirstReconnect, options_.max_connect_backoff,
                                   std::uniform_real_distribution<>(0, 1)(random_));
  for (const auto& [id, job] : jobs_) {
    job->followed = false;
    job->absences = 0;
    job->first_absence = absl::InfiniteFuture();
    job->last_absence = absl::InfinitePast();
    // What failed for want of a connection is tried at once on the next.
    for (Errand* errand : {&job->staging, &job->start, &job->cancel, &job->collect, &job->tracing}) {
      errand->not_before = absl::InfinitePast();
    }
  }
}

void SiteDispatcher::List() {
  listing_ = true;
  next_list_ = clock_->Now() + options_.list_interval;
  auto keys = std::make_shared<std::vector<std::string>>();
  for (const auto& [id, job] : jobs_) {
    const JobRecord& record = job->row.record;
    const bool ended = job->seen && job->seen->phase() == agent::v1::ATTEMPT_PHASE_ENDED;
    if (MayBeAtSite(record.state) && !ended) keys->push_back(AttemptKey(id, record.attempt).text());
  }
  const absl::Time asked = clock_->Now();
  const bool greet = asked >= next_hello_;
  if (greet) next_hello_ = asked + options_.hello_interval;
  calls_->Submit([this, client = client_, keys, asked, greet] {
    absl::StatusOr<std::vector<agent::v1::AttemptStatus>> all = std::vector<agent::v1::AttemptStatus>();
    if (greet) {
      const absl::StatusOr<Greeting> greeting = SayHello(client.get(), absl::Now() + options_.list_timeout);
      if (greeting.ok()) {
        Post([this, client, greeting] {
          if (client != client_) return;
          clock_ahead_ = greeting->clock_ahead;
          site_.set_calls_per_minute(greeting->hello.calls_per_minute());
        });
      } else {
        all = greeting.status();
      }
    } else if (keys->empty()) {
      // Nothing to ask for, but is anybody there?
      const auto answer = client->StatInputs({}, absl::Now() + options_.list_timeout);
      if (!answer.ok()) all = answer.status();
    }
    for (size_t begin = 0; begin < keys->size() && all.ok(); begin += kListBatch) {
      const std::vector<std::string> batch(
          keys->begin() + static_cast<ptrdiff_t>(begin),
          keys->begin() + static_cast<ptrdiff_t>(std::min(keys->size(), begin + kListBatch)));
      absl::StatusOr<std::vector<agent::v1::AttemptStatus>> some =
          client->ListAttempts(batch, absl::Now() + options_.list_timeout);
      if (some.ok()) {
        all->insert(all->end(), std::make_move_iterator(some->begin()), std::make_move_iterator(some->end()));
      } else {
        all = some.status();
      }
    }
    // An agent that does not answer is gone: ending the connection here also frees a loop that waits in a write.
    if (!all.ok()) client->Close();
    Post([this, client, asked, all = std::move(all)] {
      listing_ = false;
      if (client != client_) return;
      OnListed(asked, all);
    });
  });
}

void SiteDispatcher::OnListed(absl::Time asked, absl::StatusOr<std::vector<agent::v1::AttemptStatus>> statuses) {
  if (!statuses.ok()) {
    // A refusal is an answer: another gateway has taken our place.
    const bool refused = statuses.status().code() == absl::StatusCode::kFailedPrecondition;
    Disconnect(refused ? statuses.status() : Annotate(statuses.status(), "no answer"));
    return;
  }
  for (const agent::v1::AttemptStatus& status : *statuses) OnStatus(status, asked);
}

// Spools of jobs that ended long ago are removed; their checkpoints could be gone on from until then.
void SiteDispatcher::CleanSpools() {
  next_clean_ = clock_->Now() + kCleanInterval;
  const absl::Time ended_before = clock_->Now() - options_.spool_retention;
  transfers_->Submit([this, client = client_, ended_before] {
    const auto all = client->ListAttempts({}, absl::Now() + options_.list_timeout);
    if (!all.ok()) return;  // next time
    int removed = 0;
    for (const agent::v1::AttemptStatus& status : *all) {
      const auto key = AttemptKey::Parse(status.attempt());
      if (!key.ok()) continue;
      // A job that is not ours belongs to another gateway on the same spool.
      const auto row = store_->GetJob(key->job());
      if (!row.ok() || !IsFinal(row->record.state) || row->finished > ended_before) continue;
      if (client->RemoveAttempt(status.attempt(), absl::Now() + options_.call_timeout).ok()) ++removed;
    }
    if (removed > 0) log::Info("site {}: removed {} spools of jobs that ended long ago", options_.name, removed);
  });
}

void SiteDispatcher::PublishSite() {
  site_.set_slots_in_use(ranks_running_);
  site_.set_live_jobs(placed_);
  const absl::Time expire = credentials_expire_ ? credentials_expire_() : absl::InfiniteFuture();
  site_.set_credentials_expire_us(expire == absl::InfiniteFuture() ? 0 : absl::ToUnixMicros(expire));
  SiteOffer offer;
  offer.name = options_.name;
  offer.ready = client_ != nullptr;
  offer.known = known_;
  offer.slots = hello_.slots();
  offer.free_slots = hello_.slots() - ranks_placed_;
  offer.trains = std::find(hello_.capabilities().begin(), hello_.capabilities().end(), "train") !=
                 hello_.capabilities().end();
  offer.waiting = waiting_;
  if (hello_.has_slurm()) offer.slurm = hello_.slurm();
  offer.settings = options_.settings;
  const std::optional<std::string> paused = Paused();
  if (!paused) {
    board_->Update(site_, offer);
    return;
  }
  offer.ready = false;
  v1::Site shown = site_;
  shown.set_state(v1::SITE_STATE_PAUSED);
  shown.set_reason(absl::StrCat(*paused, client_ ? "" : absl::StrCat("; besides: ", site_.reason()),
                                "; go on with: itwin site resume ", options_.name));
  board_->Update(shown, offer);
}

std::optional<std::string> SiteDispatcher::Paused() {
  absl::MutexLock lock(&mu_);
  return paused_;
}

std::string SiteDispatcher::OutageWords(absl::Time now) {
  const std::string since = absl::FormatTime("%H:%M UTC", std::min(now, outage_since_), absl::UTCTimeZone());
  if (const std::optional<std::string> paused = Paused()) {
    return absl::StrCat("site ", options_.name, " is paused by an administrator", paused->empty() ? "" : ": ", *paused,
                        "; it goes on after `itwin site resume ", options_.name, "`");
  }
  switch (static_cast<int>(site_.state())) {
    case v1::SITE_STATE_PAUSED:
      return absl::StrCat("site ", options_.name, " is paused since ", since, ": ", site_.reason());
    case v1::SITE_STATE_PAUSED_AUTH:
      return absl::StrCat("site ", options_.name, " does not accept the gateway's credentials since ", since, ": ",
                          site_.reason(), "; renew them, and everything goes on by itself; what runs there is not harmed");
    default:
      return absl::StrCat("site ", options_.name, " cannot be reached since ", since, ": ", site_.reason(),
                          "; what runs there goes on, and everything is picked up again by itself once the site answers");
  }
}

bool SiteDispatcher::TellOutage(absl::Time now) {
  const bool by_admin = Paused().has_value();
  const bool paused = by_admin || site_.state() == v1::SITE_STATE_PAUSED;
  const bool auth = site_.state() == v1::SITE_STATE_PAUSED_AUTH;
  const bool away = paused || auth || site_.state() == v1::SITE_STATE_UNREACHABLE;
  if (away && outage_ == 0) {
    if (outage_since_ == absl::InfinitePast()) outage_since_ = now;
    if (!paused && !auth && now < outage_since_ + options_.tell_outage_after) return false;
    outage_ = ++outages_;
    tell_ = true;
  } else if (!away) {
    tell_ |= outage_ != 0;
    outage_ = 0;
    if (client_) outage_since_ = absl::InfinitePast();
  }
  if (!tell_) return false;
  std::vector<JobId> concerned;
  for (const auto& [id, job] : jobs_) {
    if (job->told_outage == outage_) continue;
    const bool queued = job->row.record.state == JobState::kQueued;
    // A job that may go anywhere does not wait for this site; a pause lets go on what is there.
    if (outage_ != 0 && (queued ? job->row.requested_site != options_.name : by_admin)) continue;
    concerned.push_back(id);
    if (concerned.size() == kToldPerTurn) break;
  }
  tell_ = concerned.size() == kToldPerTurn;
  for (const JobId& id : concerned) {
    const auto found = jobs_.find(id);
    if (found == jobs_.end()) continue;
    LiveJob* job = found->second.get();
    job->told_outage = outage_;
    JobEvent note;
    note.time = now;
    note.attempt = job->row.record.attempt;
    note.actor = "gateway";
    note.message = outage_ != 0 ? OutageWords(now) : absl::StrCat("site ", options_.name, " is back");
    AttemptUpdate update;
    update.waiting = outage_ != 0 ? note.message : "";
    job->told_waiting.clear();
    Append(job, note, update);
  }
  return tell_;
}

// ---- jobs ----

bool SiteDispatcher::Mine(const JobRow& row) const {
  if (IsFinal(row.record.state)) return false;
  if (row.record.state != JobState::kQueued) return row.record.site == options_.name;
  const std::string& site = row.requested_site;
  return site.empty() || site == "any" || site == options_.name || (adopts_strays_ && !board_->Exists(site));
}

void SiteDispatcher::Count(const JobRow& row, int sign) {
  const JobState state = row.record.state;
  if (state == JobState::kQueued || IsFinal(state)) return;
  placed_ += sign;
  ranks_placed_ += sign * row.ranks;
  if (state == JobState::kRunning) ranks_running_ += sign * row.ranks;
  if (IsWaiting(state)) waiting_ += sign;
  int& of_owner = placed_by_owner_[row.owner];
  of_owner += sign;
  if (of_owner == 0) placed_by_owner_.erase(row.owner);
}

void SiteDispatcher::SetRow(const JobRow& row) {
  std::unique_ptr<LiveJob>& job = jobs_[row.id];
  if (!job) {
    job = std::make_unique<LiveJob>();
    job->row = row;
    Count(row, 1);
    tell_ |= outage_ != 0;
  } else {
    if (row.version < job->row.version) return;  // an older read
    if (row.record.attempt != job->row.record.attempt) {
      // Everything known was about the attempt before.
      if (follower_ && job->followed) follower_->Drop(AttemptKey(row.id, job->row.record.attempt));
      auto fresh = std::make_unique<LiveJob>();
      fresh->wish = std::move(job->wish);
      fresh->queued = job->queued;
      fresh->queue_owner = job->queue_owner;
      fresh->wake_at = job->wake_at;
      fresh->told_outage = job->told_outage;
      fresh->row = job->row;
      job = std::move(fresh);
    }
    Count(job->row, -1);
    if (IsWaiting(job->row.record.state) && !IsWaiting(row.record.state)) place_ = true;
    if (job->row.record.state != JobState::kQueued && row.record.state == JobState::kQueued) place_ = true;
    job->row = row;
    Count(row, 1);
  }
  const bool at_site = MayBeAtSite(row.record.state) && row.record.state != JobState::kSubmitting;
  if (!at_site) {
    job->at_site_since = absl::InfiniteFuture();
  } else if (job->at_site_since == absl::InfiniteFuture()) {
    job->at_site_since = clock_->Now();
  }
  // In the queue exactly while it may be placed.
  const bool queue = row.record.state == JobState::kQueued && !row.record.cancel_requested &&
                     row.record.not_before <= clock_->Now();
  if (queue && !job->queued) {
    queue_[row.owner].insert({row.created, row.id});
    job->queue_owner = row.owner;
    place_ = true;
  } else if (!queue && job->queued) {
    auto& line = queue_[job->queue_owner];
    line.erase({row.created, row.id});
    if (line.empty()) queue_.erase(job->queue_owner);
  }
  job->queued = queue;
}

void SiteDispatcher::Forget(const JobId& id) {
  const auto found = jobs_.find(id);
  if (found == jobs_.end()) return;
  LiveJob& job = *found->second;
  if (follower_ && job.followed) follower_->Drop(AttemptKey(id, job.row.record.attempt));
  if (job.queued) {
    auto& line = queue_[job.queue_owner];
    line.erase({job.row.created, id});
    if (line.empty()) queue_.erase(job.queue_owner);
  }
  Count(job.row, -1);
  jobs_.erase(found);
  place_ = true;
}

void SiteDispatcher::Refresh(const JobId& id) {
  const absl::StatusOr<JobRow> row = store_->GetJob(id);
  if (!row.ok()) {
    if (row.status().code() == absl::StatusCode::kNotFound) {
      Forget(id);
      return;
    }
    log::Error("job {} cannot be read: {}", id.text(), std::string(row.status().message()));
    if (const auto found = jobs_.find(id); found != jobs_.end()) {
      WakeAt(found->second.get(), clock_->Now() + kStoreRetry);
    } else {
      // Not known yet: asked for again with the next mail.
      absl::MutexLock lock(&mu_);
      changed_.try_emplace(id);
    }
    return;
  }
  Take(*row);
}

void SiteDispatcher::Take(const JobRow& row) {
  const auto found = jobs_.find(row.id);
  // Our own event coming back, or what was told of an older one.
  if (found != jobs_.end() && found->second->row.version >= row.version) return;
  if (!Mine(row)) {
    Forget(row.id);
    return;
  }
  SetRow(row);
  Wake(row.id);
}

SiteDispatcher::LiveJob* SiteDispatcher::Find(const AttemptKey& key) {
  const auto found = jobs_.find(key.job());
  if (found == jobs_.end() || found->second->row.record.attempt != key.number()) return nullptr;
  return found->second.get();
}

void SiteDispatcher::WakeAt(LiveJob* job, absl::Time when) {
  if (when >= job->wake_at) return;
  job->wake_at = when;
  timers_.push({when, job->row.id});
}

void SiteDispatcher::OnStatus(agent::v1::AttemptStatus status, absl::Time asked) {
  ShiftTimes(clock_ahead_, &status);
  const auto key = AttemptKey::Parse(status.attempt());
  if (!key.ok()) return;
  LiveJob* job = Find(*key);
  if (job == nullptr) return;
  if (status.starts() > 1) {
    log::Error("attempt {} was started {} times: its journal says so", status.attempt(), status.starts());
    if (!std::exchange(job->noted_starts, true)) {
      JobEvent note;
      note.time = clock_->Now();
      note.attempt = key->number();
      note.actor = absl::StrCat("site:", options_.name);
      note.message = absl::StrCat("this attempt was started ", status.starts(),
                                  " times, by its own journal, which must not happen: check its results, and report it");
      Append(job, note, {});
      job = Find(*key);
      if (job == nullptr) return;
    }
  }
  if (status.phase() == agent::v1::ATTEMPT_PHASE_UNSPECIFIED) return;
  const bool ended = job->seen && job->seen->phase() == agent::v1::ATTEMPT_PHASE_ENDED;
  if (status.phase() == agent::v1::ATTEMPT_PHASE_ABSENT) {
    // Counts when it was asked for after we knew that it was there, and when nothing final is known.
    if (ended || asked <= job->at_site_since) return;
    ++job->absences;
    job->first_absence = std::min(job->first_absence, asked);
    job->last_absence = std::max(job->last_absence, asked);
    next_list_ = std::min(next_list_, clock_->Now() + kAbsencesApart + absl::Milliseconds(100));
    Wake(key->job());
    return;
  }
  job->absences = 0;
  job->first_absence = absl::InfiniteFuture();
  job->last_absence = absl::InfinitePast();
  if (ended && status.phase() != agent::v1::ATTEMPT_PHASE_ENDED) return;  // late news
  const bool news = !job->seen || job->seen->phase() != status.phase() || job->seen->reason() != status.reason() ||
                    job->seen->checkpoint() != status.checkpoint();
  const bool other_reason = job->seen && job->seen->phase() == status.phase() && job->seen->reason() != status.reason();
  job->seen = status;
  KeepWaitingWords(job);
  if (other_reason && status.phase() != agent::v1::ATTEMPT_PHASE_ENDED) {
    AttemptUpdate update;
    update.reason = status.reason();
    const absl::Status stored = store_->UpdateAttempt(*key, update);
    if (!stored.ok()) log::Warn("attempt {}: its reason is not stored: {}", status.attempt(), std::string(stored.message()));
  }
  if (news || ended) Wake(key->job());
}

// While it waits, the job shows what its scheduler says now, without an event for each change of mind.
void SiteDispatcher::KeepWaitingWords(LiveJob* job) {
  const JobState state = job->row.record.state;
  if (state != JobState::kPending && state != JobState::kHeld) return;
  const agent::v1::AttemptStatus& status = *job->seen;
  const bool waits = status.phase() == agent::v1::ATTEMPT_PHASE_PENDING || status.phase() == agent::v1::ATTEMPT_PHASE_HELD;
  if (!waits) return;
  const absl::Time now = clock_->Now();
  const absl::Duration moved = absl::AbsDuration(absl::Microseconds(status.expected_start_us() - job->told_start_us));
  const absl::Duration left = absl::FromUnixMicros(status.expected_start_us()) - now;
  const bool other_start = (status.expected_start_us() == 0) != (job->told_start_us == 0) ||
                           moved > std::max(kSameStart, absl::AbsDuration(left) / 10);
  if (status.reason() == job->told_waiting && !other_start) return;
  AttemptUpdate update;
  update.waiting = WaitingWords(status, now);
  const absl::Status stored = store_->UpdateAttempt(AttemptKey(job->row.id, job->row.record.attempt), update);
  if (!stored.ok()) {
    log::Warn("attempt {}: why it waits is not stored: {}", status.attempt(), std::string(stored.message()));
    return;
  }
  job->told_waiting = status.reason();
  job->told_start_us = status.expected_start_us();
}

bool SiteDispatcher::LoadAttempts(LiveJob* job) {
  const absl::StatusOr<std::vector<AttemptRow>> attempts = store_->ListAttempts(job->row.id);
  if (!attempts.ok()) {
    log::Error("attempts of job {} cannot be read: {}", job->row.id.text(), std::string(attempts.status().message()));
    return false;
  }
  job->max_step_before = 0;
  job->older_checkpoint = job->row.resume.has_value();
  for (const AttemptRow& attempt : *attempts) {
    if (attempt.number < job->row.record.attempt) {
      job->max_step_before = std::max(job->max_step_before, attempt.max_step);
      job->older_checkpoint |= attempt.checkpoint;
    }
    if (attempt.number == job->row.record.attempt) {
      job->max_step = attempt.max_step;
      if (!job->attempts_read) job->noted_lines = attempt.bad_lines;
    }
  }
  job->attempts_read = true;
  return true;
}

// Follows what the site knows, and notices when an ended attempt is stored to its last byte.
void SiteDispatcher::FollowAndDrain(LiveJob* job) {
  const JobRecord& record = job->row.record;
  if (!client_ || !job->seen || !MayBeAtSite(record.state)) return;
  const AttemptKey key(job->row.id, record.attempt);
  if (!job->followed) {
    // From where the store stands now: the connection before may have stored more than we knew.
    const absl::StatusOr<AttemptRow> attempt = store_->GetAttempt(key);
    if (!attempt.ok()) {
      log::Error("attempt {} cannot be read: {}", key.text(), std::string(attempt.status().message()));
      WakeAt(job, clock_->Now() + kStoreRetry);
      return;
    }
    job->followed = follower_->Add(key, attempt->cursor);
  }
  if (job->seen->phase() != agent::v1::ATTEMPT_PHASE_ENDED || job->drained) return;
  if (!follower_->Drained(key, job->seen->sizes())) return;
  if (!LoadAttempts(job)) {
    WakeAt(job, clock_->Now() + kStoreRetry);
    return;
  }
  job->drained = true;
  const absl::StatusOr<AttemptRow> attempt = store_->GetAttempt(key);
  if (attempt.ok() && attempt->bad_lines > job->noted_lines) {
    JobEvent note;
    note.time = clock_->Now();
    note.attempt = record.attempt;
    note.actor = absl::StrCat("site:", options_.name);
    note.message = absl::StrCat("in all, ", attempt->bad_lines,
                                " lines that this attempt wrote for metrics could not be read and were skipped");
    job->noted_lines = attempt->bad_lines;
    Append(job, note, {});
  }
}

JobSnapshot SiteDispatcher::Snapshot(const LiveJob& job) {
  JobSnapshot out;
  out.id = job.row.id;
  out.record = job.row.record;
  if (job.wish) {  // always, once it has been placed
    out.train = job.wish->train;
    out.retry = job.wish->retry;
  }
  out.max_step = job.max_step;
  out.max_step_before = job.max_step_before;
  out.older_checkpoint = job.older_checkpoint;
  out.connected = client_ != nullptr;
  out.seen = job.seen;
  out.absences = job.absences;
  out.first_absence = job.first_absence;
  out.last_absence = job.last_absence;
  out.drained = job.drained;
  out.barred = job.barred;
  out.collected = job.collected;
  out.staging = job.staging;
  out.start = job.start;
  out.cancel = job.cancel;
  out.collect = job.collect;
  out.tracing = job.tracing;
  if (job.trace && job.trace->path() == TraceName(job.row.record.traces)) out.trace = job.trace;
  out.jitter = std::uniform_real_distribution<>(0, 1)(random_);
  return out;
}

bool SiteDispatcher::Append(LiveJob* job, const JobEvent& event, const AttemptUpdate& update) {
  const absl::StatusOr<JobRow> row = store_->AppendEvent(job->row.id, event, update);
  if (row.ok()) {
    log::Info("job {} attempt {}: {} -> {}: {}", job->row.id.text(), event.attempt, std::string(Name(event.kind)),
              std::string(Name(row->record.state)), event.message.substr(0, 300));
    if ((event.kind == EventKind::kAccepted || event.kind == EventKind::kHeld) && job->seen) {
      job->told_waiting = job->seen->reason();  // the event says it
      job->told_start_us = job->seen->expected_start_us();
    }
    if (event.kind == EventKind::kTraced) job->tracing = Errand{};  // the next trace is another errand
    SetRow(*row);
    return true;
  }
  if (row.status().code() == absl::StatusCode::kFailedPrecondition) {
    // Somebody else moved the job (a cancel, another site): look again.
    log::Debug("job {}: '{}' came too late: {}", job->row.id.text(), std::string(Name(event.kind)),
               std::string(row.status().message()));
    const JobId id = job->row.id;
    Refresh(id);
    Wake(id);
    return false;
  }
  log::Warn("job {}: '{}' cannot be stored, trying again: {}", job->row.id.text(), std::string(Name(event.kind)),
            std::string(row.status().message()));
  WakeAt(job, clock_->Now() + kStoreRetry);
  return false;
}

void SiteDispatcher::Step(const JobId& id) {
  for (int round = 0; round < kMaxRecordsInARow; ++round) {
    const auto found = jobs_.find(id);
    if (found == jobs_.end()) return;
    LiveJob* job = found->second.get();
    if (!Mine(job->row)) {
      Forget(id);
      return;
    }
    const absl::Time now = clock_->Now();
    if (job->row.record.attempt > 0 && !job->attempts_read && !LoadAttempts(job)) {
      WakeAt(job, now + kStoreRetry);
      return;
    }
    if (!job->wish && job->row.record.state != JobState::kQueued && !RequestOf(job)) {
      WakeAt(job, now + kStoreRetry);
      return;
    }
    if (job->row.record.state == JobState::kQueued) {
      SetRow(JobRow(job->row));  // its back-off may be over
      job = jobs_.find(id)->second.get();
      if (job->row.record.not_before > now) WakeAt(job, job->row.record.not_before);
    }
    FollowAndDrain(job);
    if (!jobs_.contains(id)) return;
    job = jobs_.find(id)->second.get();
    const std::vector<Action> actions = Reconcile(Snapshot(*job), now);
    if (actions.empty()) {
      for (const Errand* errand : {&job->staging, &job->start, &job->cancel, &job->collect, &job->tracing}) {
        if (!errand->under_way && !errand->done && errand->not_before > now) WakeAt(job, errand->not_before);
      }
      return;
    }
    bool recorded = false;
    for (const Action& action : actions) {
      if (const Record* record = std::get_if<Record>(&action)) {
        recorded = true;
        if (!Append(job, record->event, record->update)) return;
        const auto still = jobs_.find(id);  // SetRow may have made it anew
        if (still == jobs_.end()) return;
        job = still->second.get();
      } else {
        RunErrand(job, action);
      }
    }
    if (!recorded) return;
  }
  log::Error("job {} moves without end; looking again later", id.text());
  if (const auto found = jobs_.find(id); found != jobs_.end()) WakeAt(found->second.get(), clock_->Now() + kIdle);
}

void SiteDispatcher::FinishErrand(Errand* errand, LiveJob* job, const absl::Status& status) {
  errand->under_way = false;
  Wake(job->row.id);
  if (status.ok()) {
    errand->failures = 0;
    return;
  }
  ++errand->failures;
  errand->last = status;
  errand->not_before = clock_->Now() + RetryDelay(errand->failures, kFirstErrandRetry, kMaxErrandRetry,
                                                  std::uniform_real_distribution<>(0, 1)(random_));
}

void SiteDispatcher::RunErrand(LiveJob* job, const Action& action) {
  const AttemptKey key(job->row.id, job->row.record.attempt);
  const auto context = [this](AgentClient* agent) {
    return ErrandContext{store_, blobs_, agent, options_.call_timeout, options_.transfer_stall};
  };
  if (std::holds_alternative<StageInputs>(action)) {
    job->staging.under_way = true;
    transfers_->Submit([this, context, key, client = client_] {
      const absl::Status status = SendInputs(context(client.get()), key.job(), &sending_);
      Post([this, key, status] {
        LiveJob* of = Find(key);
        if (of == nullptr) return;
        FinishErrand(&of->staging, of, status);
        of->staging.done = status.ok();
        if (!status.ok()) log::Warn("attempt {}: inputs not sent: {}", key.text(), std::string(status.message()));
      });
    });
  } else if (std::holds_alternative<StartTheAttempt>(action)) {
    job->start.under_way = true;
    const auto slurm = hello_.has_slurm() ? std::make_shared<const agent::v1::SlurmFacts>(hello_.slurm()) : nullptr;
    calls_->Submit([this, key, slurm, client = client_] {
      absl::StatusOr<agent::v1::AttemptStatus> status;
      auto request = MakeStartRequest(store_, key, options_.log_limit_bytes, {options_.name, &options_.settings, slurm.get()});
      if (request.ok() && slurm) AvoidBadNodes(store_, *slurm, &*request);
      if (request.ok()) {
        status = client->StartAttempt(*request, absl::Now() + options_.call_timeout);
      } else if (request.status().code() == absl::StatusCode::kFailedPrecondition) {
        status = request.status();  // the site's rules changed since it was placed: the same as its refusal
      } else {
        // Our own trouble says nothing about the site.
        status = absl::UnavailableError(request.status().message());
      }
      Post([this, key, status] {
        LiveJob* of = Find(key);
        if (of == nullptr) return;
        const bool there = status.ok() && status->phase() != agent::v1::ATTEMPT_PHASE_ABSENT &&
                           status->phase() != agent::v1::ATTEMPT_PHASE_UNSPECIFIED;
        FinishErrand(&of->start, of,
                     there          ? absl::OkStatus()
                     : status.ok() ? absl::UnavailableError("the agent does not say where it is")
                                   : status.status());
        of->start.done = there;
        if (status.ok()) {
          OnStatus(*status, clock_->Now());
        } else {
          log::Warn("attempt {}: start: {}", key.text(), std::string(status.status().message()));
        }
      });
    });
  } else if (std::holds_alternative<CancelTheAttempt>(action)) {
    job->cancel.under_way = true;
    const absl::Time asked = clock_->Now();
    calls_->Submit([this, key, asked, client = client_] {
      const auto status = client->CancelAttempt(key.text(), "cancelled on request", absl::Now() + options_.call_timeout);
      Post([this, key, asked, status] {
        LiveJob* of = Find(key);
        if (of == nullptr) return;
        FinishErrand(&of->cancel, of, status.ok() ? absl::OkStatus() : status.status());
        if (!status.ok()) {
          log::Warn("attempt {}: cancel: {}", key.text(), std::string(status.status().message()));
          return;
        }
        of->cancel.not_before = clock_->Now() + kCancelInterval;
        if (status->phase() == agent::v1::ATTEMPT_PHASE_ABSENT) of->barred = true;
        OnStatus(*status, asked);
      });
    });
  } else if (std::holds_alternative<TakeTrace>(action)) {
    job->tracing.under_way = true;
    const auto done = [this, key](const absl::StatusOr<std::optional<v1::OutputFile>>& trace) {
      Post([this, key, trace] {
        LiveJob* of = Find(key);
        if (of == nullptr) return;
        FinishErrand(&of->tracing, of, trace.status());
        if (!trace.ok()) {
          log::Warn("attempt {}: trace: {}", key.text(), std::string(trace.status().message()));
        } else if (*trace) {
          of->trace = **trace;
        } else {
          of->tracing.not_before = clock_->Now() + kTraceInterval;
        }
      });
    };
    calls_->Submit([this, context, key, client = client_, done, steps = job->row.record.trace_steps,
                    name = TraceName(job->row.record.traces)] {
      const auto file = client->TraceAttempt(key.text(), steps, name, absl::Now() + options_.call_timeout);
      if (!file.ok()) return done(file.status());
      if (!*file) return done(std::nullopt);
      transfers_->Submit([context, key, client, done, file = **file] {
        done(BringOutput(context(client.get()), key, file));
      });
    });
  } else if (std::holds_alternative<CollectOutputs>(action)) {
    job->collect.under_way = true;
    transfers_->Submit([this, context, key, client = client_] {
      const absl::StatusOr<Collected> collected = BringOutputs(context(client.get()), key);
      Post([this, key, collected] {
        LiveJob* of = Find(key);
        if (of == nullptr) return;
        FinishErrand(&of->collect, of, collected.ok() ? absl::OkStatus() : collected.status());
        if (collected.ok()) {
          of->collected = *collected;
        } else {
          log::Warn("attempt {}: outputs not brought back: {}", key.text(), std::string(collected.status().message()));
        }
      });
    });
  }
}

// ---- placement ----

std::optional<PlacementRequest> SiteDispatcher::RequestOf(LiveJob* job) {
  if (!job->wish) {
    const absl::StatusOr<v1::JobSpec> spec = store_->GetSpec(job->row.id);
    if (!spec.ok()) {
      log::Error("the spec of job {} cannot be read: {}", job->row.id.text(), std::string(spec.status().message()));
      return std::nullopt;
    }
    Wish& wish = job->wish.emplace();
    wish.train = spec->has_train();
    wish.image = spec->image();
    wish.retry = spec->retry();
    wish.resources = spec->resources();
    if (absl::StatusOr<std::vector<std::string>> operators = OperatorsOfJob(*blobs_, *spec); operators.ok()) {
      wish.operators = *std::move(operators);
    } else {
      log::Warn("job {}: {}", job->row.id.text(), std::string(operators.status().message()));  // the worker will say it
    }
  }
  PlacementRequest request;
  request.site = job->row.requested_site;
  request.ranks = job->row.ranks;
  request.train = job->wish->train;
  request.image = job->wish->image;
  request.resources = job->wish->resources;
  request.operators = job->wish->operators;
  return request;
}

void SiteDispatcher::Place() {
  place_ = false;
  next_place_ = absl::InfiniteFuture();
  {
    absl::MutexLock lock(&mu_);
    if (paused_) return;
  }
  int looks = 0;
  absl::flat_hash_set<JobId> passed;  // not for us, or not now
  std::vector<SiteOffer> offers = board_->Offers();
  while (waiting_ < options_.max_waiting && looks < kMaxLooksPerPlacement) {
    // The owner with the fewest jobs at the site comes next; among equals the one who has waited longest.
    const std::pair<absl::Time, JobId>* next = nullptr;
    int fewest = 0;
    for (const auto& [owner, line] : queue_) {
      const auto placed = placed_by_owner_.find(owner);
      const int count = placed == placed_by_owner_.end() ? 0 : placed->second;
      const auto first = std::find_if(line.begin(), line.end(), [&](const auto& entry) { return !passed.contains(entry.second); });
      if (first == line.end()) continue;
      if (next == nullptr || count < fewest || (count == fewest && first->first < next->first)) {
        next = &*first;
        fewest = count;
      }
    }
    if (next == nullptr) return;
    ++looks;
    const JobId id = next->second;
    LiveJob* job = jobs_.find(id)->second.get();
    passed.insert(id);
    std::optional<PlacementRequest> request = RequestOf(job);
    if (!request) {
      WakeAt(job, clock_->Now() + kStoreRetry);
      continue;
    }
    const JobRow row = job->row;
    const int number = row.record.attempt + 1;
    AttemptUpdate update;
    std::set<std::string> bad_nodes;
    if (row.record.attempt > 0 || row.resume) {
      const absl::StatusOr<std::vector<AttemptRow>> attempts = store_->ListAttempts(id);
      if (!attempts.ok()) {
        WakeAt(job, clock_->Now() + kStoreRetry);
        continue;
      }
      for (const AttemptRow& attempt : *attempts) {
        if (attempt.site == options_.name) bad_nodes.insert(attempt.bad_nodes.begin(), attempt.bad_nodes.end());
      }
      const std::string resume = ResumeFrom(id, *attempts, number, row.resume);
      update.resume_attempt = resume;
      if (const auto key = AttemptKey::Parse(resume); key.ok()) {
        const absl::StatusOr<AttemptRow> from = store_->GetAttempt(*key);
        if (from.ok()) request->bound_site = from->site;
      }
    }
    for (SiteOffer& offer : offers) {
      if (offer.name != options_.name) continue;
      offer.free_slots = hello_.slots() - ranks_placed_;
      offer.waiting = waiting_;
    }
    JobEvent event;
    event.time = clock_->Now();
    event.actor = "gateway";
    const std::string impossible = WhyImpossible(*request, offers);
    if (!impossible.empty()) {
      event.kind = EventKind::kFailed;
      event.failure = FailureClass::kUser;
      event.message = impossible;
      Append(job, event, {});
      Wake(id);
      continue;
    }
    const std::optional<size_t> choice = ChooseSite(*request, offers);
    if (!choice || offers[*choice].name != options_.name) {
      next_place_ = clock_->Now() + kLookAgain;  // another site is better now; that may change
      continue;
    }
    event.kind = EventKind::kPlaced;
    event.attempt = number;
    event.site = options_.name;
    event.message = absl::StrCat("placed at site ", options_.name);
    if (!bad_nodes.empty()) absl::StrAppend(&event.message, "; nodes that failed it before: ", absl::StrJoin(bad_nodes, ", "));
    Append(job, event, update);
    Wake(id);
  }
}

}  // namespace itwin::server
