#include "server/sites/site_registry.h"

#include <errno.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/files.h"
#include "common/log.h"
#include "common/spec/nearest_name.h"
#include "common/status_macros.h"
#include "common/version.h"
#include "server/dispatch/worker_pool.h"
#include "server/sites/site_link.h"
#include "server/sites/site_survey.h"

namespace itwin::server {
namespace {

constexpr size_t kMaxSites = 100;
constexpr int64_t kMaxPauseReasonBytes = 4096;
constexpr absl::Duration kSshConnectTimeout = absl::Seconds(60);  // several login nodes, and the start of the agent there

}  // namespace

SiteRegistry::SiteRegistry(Options options, Dependencies dependencies) : options_(std::move(options)), dependencies_(dependencies) {}

SiteRegistry::~SiteRegistry() { Stop(); }

std::string SiteRegistry::FileOf(const std::string& name, const char* ending) const {
  return absl::StrCat(options_.directory, "/", name, ending);
}

absl::StatusOr<std::unique_ptr<SiteRegistry::LiveSite>> SiteRegistry::Make(SiteFile file, std::string document) {
  auto live = std::make_unique<LiveSite>();
  live->file = std::move(file);
  live->document = std::move(document);
  ITWIN_ASSIGN_OR_RETURN(live->tunnel, MakeTunnel(live->file));
  live->renewal = std::make_unique<AgentRenewal>(live->file, dependencies_.programs);
  Tunnel* const tunnel = live->tunnel.get();
  AgentRenewal* const renewal = live->renewal.get();

  SiteOptions site;
  site.name = live->file.name;
  site.max_waiting = live->file.max_waiting;
  site.spool_retention = live->file.spool_retention;
  site.query_interval = live->file.query_interval;
  if (auto operators = dependencies_.programs->OperatorsOf(live->file); operators.ok()) {
    live->file.settings.worker_operators = *std::move(operators);
  } else {  // AddSite refuses it; a site that runs jobs goes on
    log::Warn("site {}: {}", live->file.name, std::string(operators.status().message()));
  }
  site.settings = live->file.settings;
  site.address = tunnel->description();
  if (live->file.ssh) site.connect_timeout = kSshConnectTimeout;
  if (absl::StatusOr<std::string> paused = ReadFile(FileOf(site.name, ".paused"), kMaxPauseReasonBytes); paused.ok()) {
    site.paused = std::string(absl::StripAsciiWhitespace(*paused));
  }
  dependencies_.board->Add(site.name, site.settings);
  live->dispatcher = std::make_unique<SiteDispatcher>(
      std::move(site), SiteDispatcher::Dependencies{
                           .store = dependencies_.store,
                           .blobs = dependencies_.blobs,
                           .board = dependencies_.board,
                           .clock = dependencies_.clock,
                           .connect = [tunnel](absl::Time deadline) -> absl::StatusOr<std::unique_ptr<AgentClient>> {
                             ITWIN_ASSIGN_OR_RETURN(std::unique_ptr<TunnelStream> stream, tunnel->Open(deadline));
                             return MakeGrpcAgentClient(std::move(stream));
                           },
                           .cancel_connect = [tunnel] { tunnel->Cancel(); },
                           .credentials_expire = [tunnel] { return tunnel->CredentialsExpire(); },
                           .gateway_id = options_.gateway_id,
                           .gateway_version = kVersion,
                           .gateway_place = options_.gateway_place,
                           .gateway_label = options_.gateway_label,
                           .calls = std::make_unique<WorkerPool>(options_.call_threads),
                           .transfers = std::make_unique<WorkerPool>(options_.transfer_threads),
                           .renew = [renewal](AgentClient* agent, const agent::v1::HelloResponse& hello) { return renewal->Renew(agent, hello); }});
  if (const absl::Status opened = live->dispatcher->Open(); !opened.ok()) {
    return Annotate(opened, absl::StrCat("site ", live->file.name));
  }
  return live;
}

void SiteRegistry::End(LiveSite* site) {
  site->tunnel->Cancel();  // an attempt to connect ends now
  site->dispatcher->Stop();
}

void SiteRegistry::ChooseAdopter() {
  if (sites_.contains(adopter_)) return;
  adopter_ = sites_.contains("local") ? "local" : sites_.empty() ? "" : sites_.begin()->first;
  if (!adopter_.empty()) sites_.at(adopter_)->dispatcher->AdoptStrays();
}

absl::Status SiteRegistry::Open(std::vector<SiteFile> configured) {
  absl::MutexLock lock(&mu_);
  for (SiteFile& file : configured) {
    const std::string name = file.name;
    ITWIN_ASSIGN_OR_RETURN(std::unique_ptr<LiveSite> live, Make(std::move(file), ""));
    sites_[name] = std::move(live);
  }
  std::error_code error;
  std::vector<std::string> files;
  for (std::filesystem::directory_iterator it(options_.directory, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() == ".yaml" && it->is_regular_file()) files.push_back(it->path().string());
  }
  std::sort(files.begin(), files.end());
  for (const std::string& path : files) {
    // One bad file must not keep the gateway from its other sites.
    const absl::StatusOr<std::string> document = ReadFile(path);
    absl::StatusOr<SiteFile> file = document.ok() ? ParseSiteFile(*document, path) : absl::StatusOr<SiteFile>(document.status());
    if (file.ok() && FileOf(file->name, ".yaml") != path) file = absl::InvalidArgumentError(absl::StrCat(path, ": holds site '", file->name, "'; the file must be named like it"));
    if (file.ok() && sites_.contains(file->name)) file = absl::InvalidArgumentError(absl::StrCat(path, ": a site of that name stands in gateway.yaml"));
    if (!file.ok()) {
      log::Error("this site is left out: {}", std::string(file.status().message()));
      continue;
    }
    const std::string name = file->name;
    absl::StatusOr<std::unique_ptr<LiveSite>> live = Make(*std::move(file), *document);
    if (!live.ok()) {
      dependencies_.board->Remove(name);
      log::Error("site {} is left out: {}", name, std::string(live.status().message()));
      continue;
    }
    sites_[name] = *std::move(live);
  }
  ChooseAdopter();
  return absl::OkStatus();
}

void SiteRegistry::Start() {
  absl::MutexLock lock(&mu_);
  started_ = true;
  for (const auto& [name, site] : sites_) site->dispatcher->Start();
}

void SiteRegistry::EndSurveys() {
  absl::MutexLock lock(&mu_);
  stopped_ = true;
  for (SiteSurvey* survey : surveys_) survey->Cancel();
}

absl::Status SiteRegistry::Run(SiteSurvey* survey) {
  {
    absl::MutexLock lock(&mu_);
    if (stopped_) return absl::UnavailableError("the gateway is stopping");
    surveys_.insert(survey);
  }
  const absl::Status status = survey->Run();
  absl::MutexLock lock(&mu_);
  surveys_.erase(survey);
  return status;
}

void SiteRegistry::Stop() {
  std::map<std::string, std::unique_ptr<LiveSite>> sites;
  {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
    sites.swap(sites_);
  }
  for (const auto& [name, site] : sites) End(site.get());
}

absl::StatusOr<SiteRegistry::LiveSite*> SiteRegistry::Find(const std::string& name) {
  const auto found = sites_.find(name);
  if (found != sites_.end()) return found->second.get();
  std::vector<std::string> names;
  for (const auto& [known, site] : sites_) names.push_back(known);
  return absl::NotFoundError(absl::StrCat("there is no site '", name, "'", names.empty() ? "" : "; " + UnknownNameHint(name, names)));
}

v1::Site SiteRegistry::Shown(const std::string& name) const {
  for (v1::Site& site : dependencies_.board->ListSites()) {
    if (site.name() == name) return std::move(site);
  }
  v1::Site site;
  site.set_name(name);
  return site;
}

absl::StatusOr<v1::Site> SiteRegistry::GetSite(const std::string& name) {
  absl::MutexLock lock(&mu_);
  ITWIN_ASSIGN_OR_RETURN(const LiveSite* live, Find(name));
  v1::Site site = Shown(name);
  site.set_document(live->document);
  return site;
}

absl::Status SiteRegistry::AddSite(const v1::AddSiteRequest& request, const OnProgress& on_progress) {
  ITWIN_ASSIGN_OR_RETURN(SiteFile site, ParseSiteFile(request.document(), "site file"));
  const std::string name = site.name;
  {
    absl::MutexLock lock(&mu_);
    if (stopped_) return absl::UnavailableError("the gateway is stopping");
    if (!changing_.insert(name).second) return absl::AbortedError(absl::StrCat("site ", name, " is being added or removed by somebody else"));
  }
  const absl::Cleanup done = [&] {
    absl::MutexLock lock(&mu_);
    changing_.erase(name);
  };
  {
    absl::MutexLock lock(&mu_);
    const auto found = sites_.find(name);
    if (found != sites_.end() && !found->second->kept()) {
      return absl::FailedPreconditionError(absl::StrCat("site ", name, name == "local" ? " is the embedded one; take another name" : " stands in gateway.yaml; change it there"));
    }
    if (found != sites_.end() && !request.replace()) {
      return absl::AlreadyExistsError(absl::StrCat("there is a site ", name, " already; change it with --replace, or take another name"));
    }
    if (found == sites_.end() && sites_.size() >= kMaxSites) return absl::ResourceExhaustedError(absl::StrCat("there are ", kMaxSites, " sites already"));
  }
  return AddChecked(request, std::move(site), on_progress);
}

absl::Status SiteRegistry::AddChecked(const v1::AddSiteRequest& request, SiteFile site, const OnProgress& on_progress) {
  const std::string name = site.name;
  bool replaces;
  {
    absl::MutexLock lock(&mu_);
    replaces = sites_.contains(name);
  }
  const auto tell = [&](const char* step, v1::SiteCheck verdict, const std::string& found) {
    v1::SiteProgress progress;
    progress.set_step(step);
    progress.set_verdict(verdict);
    progress.set_found(found);
    return on_progress(progress);
  };
  ITWIN_RETURN_IF_ERROR(dependencies_.programs->OperatorsOf(site).status());
  tell("site file", v1::SITE_CHECK_OK, absl::StrCat(name, ": ", site.address(), site.settings.scheduler.empty() ? "" : ", scheduler " + site.settings.scheduler));

  SiteSurvey::Options options{.site = site,
                              .programs = dependencies_.programs,
                              .gateway_id = options_.gateway_id,
                              .install = true,
                              .run_jobs = !request.without_jobs(),
                              .accepted_fingerprints = {}};
  for (const auto fingerprint : absl::StrSplit(request.accept_fingerprint(), ',', absl::SkipWhitespace())) {
    options.accepted_fingerprints.emplace_back(absl::StripAsciiWhitespace(fingerprint));
  }
  SiteSurvey survey(std::move(options), on_progress);
  absl::Status status = Run(&survey);
  if (status.ok() && survey.errors() > 0) {
    status = absl::FailedPreconditionError(absl::StrCat(survey.errors(), survey.errors() == 1 ? " check" : " checks",
                                                        " failed; site ", name, replaces ? " stays as it was" : " is not added"));
  }
  std::string document = request.document();
  if (status.ok() && !survey.newly_trusted().empty()) {
    absl::StatusOr<std::string> with = WithFingerprints(document, survey.newly_trusted());
    if (with.ok()) {
      document = *std::move(with);
      absl::StatusOr<SiteFile> again = ParseSiteFile(document, "site file");
      status = again.status();
      if (again.ok()) site = *std::move(again);
    } else {
      status = with.status();
    }
  }
  if (!status.ok()) {
    if (!replaces) survey.EndAgent();
    return status;
  }

  // From here on it is kept.
  std::unique_ptr<LiveSite> old;
  {
    absl::MutexLock lock(&mu_);
    if (stopped_) return absl::UnavailableError("the gateway is stopping");
    if (const auto found = sites_.find(name); found != sites_.end()) {
      old = std::move(found->second);
      sites_.erase(found);
    }
  }
  if (old) End(old.get());
  const absl::Status written = WriteFileAtomically(FileOf(name, ".yaml"), document);
  absl::StatusOr<std::unique_ptr<LiveSite>> live = Make(written.ok() ? site : old ? old->file : site, written.ok() ? document : old ? old->document : "");
  absl::MutexLock lock(&mu_);
  if (stopped_) return absl::UnavailableError("the gateway is stopping");
  if (!live.ok() || (!written.ok() && !old)) {
    dependencies_.board->Remove(name);
    return written.ok() ? live.status() : written;
  }
  LiveSite* const fresh = live->get();
  sites_[name] = *std::move(live);
  if (adopter_ == name) fresh->dispatcher->AdoptStrays();
  ChooseAdopter();
  if (started_) fresh->dispatcher->Start();
  ITWIN_RETURN_IF_ERROR(written);
  log::Info("site {} was {}: {}", name, replaces ? "replaced" : "added", site.address());
  tell("kept", v1::SITE_CHECK_OK, absl::StrCat("site ", name, " takes jobs now"));
  return absl::OkStatus();
}

absl::Status SiteRegistry::DoctorSite(const v1::DoctorSiteRequest& request, const OnProgress& on_progress) {
  SiteSurvey::Options options{.site = {},
                              .programs = dependencies_.programs,
                              .gateway_id = options_.gateway_id,
                              .install = false,
                              .run_jobs = !request.without_jobs(),
                              .accepted_fingerprints = {}};
  {
    absl::MutexLock lock(&mu_);
    ITWIN_ASSIGN_OR_RETURN(const LiveSite* live, Find(request.name()));
    options.site = live->file;
  }
  SiteSurvey survey(std::move(options), on_progress);
  const absl::Status status = Run(&survey);
  // What was found has been told.
  return status.code() == absl::StatusCode::kCancelled || status.message() == "the gateway is stopping" ? status : absl::OkStatus();
}

absl::StatusOr<v1::Site> SiteRegistry::PauseSite(const std::string& name, const std::string& actor, const std::string& reason) {
  absl::MutexLock lock(&mu_);
  ITWIN_ASSIGN_OR_RETURN(const LiveSite* live, Find(name));
  const std::string words = absl::StrCat("paused by ", actor, reason.empty() ? "" : ": ", reason.substr(0, kMaxPauseReasonBytes / 2));
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(FileOf(name, ".paused"), words + "\n"));
  live->dispatcher->Pause(words);
  log::Info("site {}: {}", name, words);
  v1::Site site = Shown(name);
  site.set_state(v1::SITE_STATE_PAUSED);  // as its loop will show it
  site.set_reason(words);
  return site;
}

absl::StatusOr<v1::Site> SiteRegistry::ResumeSite(const std::string& name) {
  absl::MutexLock lock(&mu_);
  ITWIN_ASSIGN_OR_RETURN(const LiveSite* live, Find(name));
  if (unlink(FileOf(name, ".paused").c_str()) != 0 && errno != ENOENT) return ErrnoStatus(errno, FileOf(name, ".paused"));
  live->dispatcher->Resume();
  log::Info("site {}: resumed", name);
  v1::Site site = Shown(name);
  if (site.state() == v1::SITE_STATE_PAUSED) {
    site.set_state(site.connected_us() != 0 ? v1::SITE_STATE_READY : v1::SITE_STATE_CONNECTING);
    site.clear_reason();
  }
  return site;
}

absl::Status SiteRegistry::RemoveSite(const std::string& name) {
  std::unique_ptr<LiveSite> old;
  {
    absl::MutexLock lock(&mu_);
    ITWIN_ASSIGN_OR_RETURN(const LiveSite* live, Find(name));
    if (!live->kept()) {
      return absl::FailedPreconditionError(absl::StrCat("site ", name, name == "local" ? " is the embedded one; switch it off in gateway.yaml (local.enabled: false)"
                                                                                       : " stands in gateway.yaml; remove it there"));
    }
    if (changing_.contains(name)) return absl::AbortedError(absl::StrCat("site ", name, " is being added or removed by somebody else"));
    ITWIN_ASSIGN_OR_RETURN(const std::vector<JobRow> rows, dependencies_.store->ListLive());
    const auto there = std::count_if(rows.begin(), rows.end(), [&](const JobRow& row) {
      return row.record.state == JobState::kQueued ? row.requested_site == name : row.record.site == name;
    });
    if (there > 0) {
      return absl::FailedPreconditionError(absl::StrCat(there, there == 1 ? " job is" : " jobs are", " still at site ", name,
                                                        " or waiting for it; pause it and let them end, or cancel them: itwin jobs --live --site ", name));
    }
    if (unlink(FileOf(name, ".yaml").c_str()) != 0 && errno != ENOENT) return ErrnoStatus(errno, FileOf(name, ".yaml"));
    unlink(FileOf(name, ".paused").c_str());
    // A site that comes back under this name may have a spool made anew.
    dependencies_.store->ForgetSpool(name).IgnoreError();  // then accept-spool is asked for, as ever
    changing_.insert(name);
    old = std::move(sites_[name]);
    sites_.erase(name);
    dependencies_.board->Remove(name);
  }
  End(old.get());
  dependencies_.board->Remove(name);  // its loop may have written once more
  absl::MutexLock lock(&mu_);
  changing_.erase(name);
  ChooseAdopter();
  // A job that was submitted for it meanwhile is seen by whoever answers for sites that are not there.
  if (!adopter_.empty()) sites_.at(adopter_)->dispatcher->AdoptStrays();
  log::Info("site {} was removed; what is installed there stays", name);
  return absl::OkStatus();
}

}  // namespace itwin::server
