#include "agent/rpc/root_lock.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "agent/spool/fault_point.h"
#include "agent/spool/spool_files.h"
#include "common/ids.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace itwin::agent {
namespace {

using nlohmann::json;

constexpr int kWatchMs = 100;

std::string RecordPath(const std::string& root) { return root + "/agent.json"; }
std::string BeatPath(const std::string& root) { return root + "/agent.beat"; }
std::string RetirePath(const std::string& root) { return root + "/retire"; }
std::string TermsPath(const std::string& root) { return root + "/terms"; }
std::string TermPath(const std::string& root, int64_t term) { return absl::StrCat(TermsPath(root), "/", term); }

absl::Time SteadyNow() {
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return absl::TimeFromTimespec(now);
}

// Two hosts, or two containers of one host, are two places: a process number of one says nothing in the other.
std::string Place() {
  // For tests of two login nodes on one machine.
  if (const char* place = getenv("ITWIN_TEST_PLACE"); place != nullptr) return place;
  std::error_code error;
  return absl::StrCat(IdentityOf(0).boot_id, " ", std::filesystem::read_symlink("/proc/self/ns/pid", error).string());
}

// 0 when there is none. Reading the directory anew is what a network file system answers from its server.
absl::StatusOr<int64_t> HighestTerm(const std::string& root) {
  std::unique_ptr<DIR, int (*)(DIR*)> directory(opendir(TermsPath(root).c_str()), closedir);
  if (directory == nullptr) {
    if (errno == ENOENT) return 0;
    return ErrnoStatus(errno, TermsPath(root));
  }
  int64_t highest = 0, term = 0;
  while (const dirent* entry = readdir(directory.get())) {
    if (absl::SimpleAtoi(entry->d_name, &term)) highest = std::max(highest, term);
  }
  return highest;
}

json ParseFile(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, 1 << 16);
  return text.ok() ? json::parse(*text, nullptr, /*allow_exceptions=*/false) : json();
}

std::optional<OwnerRecord> RecordFrom(const json& record) {
  if (!record.is_object()) return std::nullopt;
  const auto word = [&](const char* key) {
    const auto it = record.find(key);
    return it != record.end() && it->is_string() ? it->get<std::string>() : std::string();
  };
  const auto number = [&](const char* key) {
    const auto it = record.find(key);
    return it != record.end() && it->is_number_integer() ? it->get<int64_t>() : 0;
  };
  OwnerRecord out{.host = word("host"), .process = {}, .place = word("place"), .term = number("term"), .socket = word("socket"),
                  .version = word("version")};
  out.process = {.boot_id = word("boot_id"), .pid = static_cast<pid_t>(number("pid")), .start_ticks = number("start_ticks")};
  return out;
}

json ToJson(const OwnerRecord& record) {
  return {{"host", record.host}, {"pid", record.process.pid}, {"start_ticks", record.process.start_ticks},
          {"boot_id", record.process.boot_id}, {"place", record.place}, {"term", record.term}, {"socket", record.socket},
          {"version", record.version}};
}

std::string Dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace) + "\n"; }

bool IsReleased(const std::string& root, int64_t term) {
  struct stat info;
  return stat((TermPath(root, term) + "/released").c_str(), &info) == 0;
}

// Makes the term ours. False: somebody else has it.
absl::StatusOr<bool> Claim(const std::string& root, int64_t term, const std::string& nonce) {
  ITWIN_RETURN_IF_ERROR(MakeDirectories(TermsPath(root)));
  const std::string target = TermPath(root, term);
  const std::string mine = absl::StrCat(TermsPath(root), "/.", term, ".", RandomHex(6), ".tmp");
  if (mkdir(mine.c_str(), 0700) != 0) return ErrnoStatus(errno, mine);
  absl::Cleanup remove = [&] { RemoveTree(mine).IgnoreError(); };
  json record = ToJson({.host = HostName(), .process = IdentityOf(0), .place = Place(), .term = term});
  record["nonce"] = nonce;
  ITWIN_RETURN_IF_ERROR(WriteFileAtomically(mine + "/owner.json", Dump(record)));
  FaultPoint("term.before_claim");
  if (rename(mine.c_str(), target.c_str()) != 0) {
    const int error = errno;
    // A reply lost on a network file system makes the client ask again: it may be ours all the same.
    const json there = ParseFile(target + "/owner.json");
    if (there.is_object() && there.value("nonce", "") == nonce) return true;
    if (error == EEXIST || error == ENOTEMPTY || there.is_object()) return false;
    return ErrnoStatus(error, target);
  }
  FaultPoint("term.claimed");
  ITWIN_RETURN_IF_ERROR(FsyncDirectory(TermsPath(root)));
  // The one before stays, so that a slow claimant of it finds it taken.
  std::error_code error;
  std::vector<std::string> old;
  for (std::filesystem::directory_iterator it(TermsPath(root), error), end; !error && it != end; it.increment(error)) {
    int64_t number = 0;
    if (absl::SimpleAtoi(it->path().filename().string(), &number) && number < term - 1) old.push_back(it->path().string());
  }
  for (const std::string& path : old) RemoveTree(path).IgnoreError();
  return true;
}

}  // namespace

std::optional<OwnerRecord> ReadOwnerRecord(const std::string& root) { return RecordFrom(ParseFile(RecordPath(root))); }

bool IsHere(const OwnerRecord& record) { return record.place == Place(); }

bool OwnerLives(const std::string& root, const OwnerRecord& record) {
  if (IsHere(record)) return IsAlive(record.process);
  const absl::StatusOr<int64_t> highest = HighestTerm(root);
  if (highest.ok() && (*highest != record.term || IsReleased(root, record.term))) return false;
  // This host, before it was started again.
  return record.host != HostName() || record.process.boot_id == IdentityOf(0).boot_id;
}

absl::StatusOr<std::unique_ptr<RootLock>> RootLock::Take(const std::string& root, absl::Duration limit,
                                                             const Timing& timing) {
  const absl::Time deadline = SteadyNow() + limit;
  const std::string nonce = RandomHex(16);
  std::string beat;
  int64_t watched = -1;
  absl::Time heard = SteadyNow();
  while (true) {
    ITWIN_ASSIGN_OR_RETURN(const int64_t term, HighestTerm(root));
    const std::optional<OwnerRecord> owner = term == 0 ? std::nullopt : RecordFrom(ParseFile(TermPath(root, term) + "/owner.json"));
    const absl::Time now = SteadyNow();
    bool free = term == 0 || IsReleased(root, term);
    bool elsewhere = false;
    if (!free && owner) {
      if (IsHere(*owner)) {
        free = !IsAlive(owner->process);
      } else if (owner->host == HostName() && owner->process.boot_id != IdentityOf(0).boot_id) {
        free = true;  // before this host was started again
      } else {
        elsewhere = true;
      }
    }
    if (!free && (elsewhere || !owner)) {
      // Watched from here on, by our clock alone.
      const std::string seen = ReadFile(BeatPath(root), 256).value_or("");
      if (watched != term || seen != beat) {
        if (watched != term && elsewhere) {
          log::Info("the agent of {} runs on {}; it is asked to leave", root, owner->host);
          (void)WriteFileAtomically(RetirePath(root), Dump({{"term", term}, {"host", HostName()}}));
        }
        watched = term;
        beat = seen;
        heard = now;
      }
      free = now - heard >= timing.timeout;
      if (free) log::Warn("the agent of {} gave no sign of life for {}; its place is taken", root, absl::FormatDuration(timing.timeout));
    }
    if (free) {
      ITWIN_ASSIGN_OR_RETURN(const bool mine, Claim(root, term + 1, nonce));
      if (!mine) continue;
      unlink(RecordPath(root).c_str());
      unlink(RetirePath(root).c_str());
      std::unique_ptr<RootLock> lock(new RootLock(root, term + 1, nonce, timing));
      (void)lock->Renew();
      return lock;
    }
    if ((owner && !elsewhere) || now >= deadline) {
      return absl::AlreadyExistsError(absl::StrCat(
          "an agent serves ", root, " already", owner ? absl::StrCat(" (process ", owner->process.pid, " on ", owner->host, ")") : "",
          "; stop it there with: itwin-agent stop --root ", root));
    }
    poll(nullptr, 0, kWatchMs);
  }
}

RootLock::RootLock(std::string root, int64_t term, std::string nonce, const Timing& timing)
    : root_(std::move(root)), term_(term), nonce_(std::move(nonce)), timing_(timing), taken_(SteadyNow()),
      renewed_ns_(absl::ToUnixNanos(SteadyNow())) {}

absl::Status RootLock::Publish(OwnerRecord record) {
  record.place = Place();
  record.term = term_;
  ITWIN_RETURN_IF_ERROR(Check());
  return WriteFileAtomically(RecordPath(root_), Dump(ToJson(record)));
}

RootLock::Standing RootLock::Renew() {
  const absl::Time now = SteadyNow();
  const absl::StatusOr<int64_t> highest = HighestTerm(root_);
  if (highest.ok() && *highest > term_) return Standing::kTakenOver;
  if (access(root_.c_str(), F_OK) != 0 && errno == ENOENT) return Standing::kRootGone;
  if (highest.ok() && *highest < term_) return Standing::kRootGone;  // another root under the same path
  if (now >= next_beat_) {
    next_beat_ = now + timing_.renew;
    const absl::StatusOr<FileDescriptor> file = OpenFile(BeatPath(root_), O_WRONLY | O_CREAT);
    // The same length each time: it must also work on a full disk.
    if (highest.ok() && file.ok() &&
        WriteAll(file->get(), absl::StrFormat("%s %012d\n", nonce_, ++beats_), BeatPath(root_)).ok()) {
      renewed_ns_ = absl::ToUnixNanos(now);
    }
  }
  const json request = ParseFile(RetirePath(root_));
  if (request.is_object() && request.contains("term") && request["term"].is_number_integer() &&
      request["term"].get<int64_t>() == term_ && now - taken_ >= timing_.least_tenure) {
    return Standing::kAskedToLeave;
  }
  return Standing::kHeld;
}

absl::Status RootLock::Check() const {
  const absl::StatusOr<int64_t> highest = HighestTerm(root_);
  if (!highest.ok()) return absl::UnavailableError(highest.status().message());
  if (*highest != term_) {
    return absl::UnavailableError(absl::StrCat("another agent has taken this spool over (term ", *highest, ", ours was ", term_, ")"));
  }
  if (SteadyNow() - absl::FromUnixNanos(renewed_ns_) > timing_.timeout * 3 / 4) {
    return absl::UnavailableError("the spool's file system is too slow to tell whether this agent may still act");
  }
  return absl::OkStatus();
}

void RootLock::Withdraw() {
  const absl::StatusOr<int64_t> highest = HighestTerm(root_);
  if (!highest.ok() || *highest != term_) return;
  unlink(RecordPath(root_).c_str());
  unlink(RetirePath(root_).c_str());
  (void)WriteFileAtomically(TermPath(root_, term_) + "/released", "");
}

}  // namespace itwin::agent
