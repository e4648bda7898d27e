#include "agent/worker/profile/hang_detector.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <sstream>

#include <nlohmann/json.hpp>

#include "agent/worker/dist/collective_log.h"
#include "agent/worker/profile/thread_stacks.h"

namespace itwin::worker {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr double kLeastInterval = 0.1, kMostInterval = 15;  // seconds between signs
constexpr double kSignsPerTimeout = 8;
constexpr double kStaleIntervals = 4;  // a process that has missed so many does not run

double IntervalOf(double timeout) {
  return std::clamp(timeout / kSignsPerTimeout, kLeastInterval, kMostInterval);
}

// Modification time in seconds, by the file server's clock; negative when there is no such file.
double TimeOf(const fs::path& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) return -1;
  return static_cast<double>(status.st_mtim.tv_sec) +
         static_cast<double>(status.st_mtim.tv_nsec) * 1e-9;
}

std::string Seconds(double seconds) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.0f s", seconds);
  return text;
}

std::string RankText(const RankSign& sign) {
  return "rank " + std::to_string(sign.rank) + " on " + sign.host;
}

}  // namespace

HangVerdict JudgeHang(const std::vector<RankSign>& signs, const std::vector<int>& missing,
                      double seconds_without_step, double stale_seconds) {
  HangVerdict verdict;
  const std::string begin = "no step for " + Seconds(seconds_without_step) + ": ";
  if (!missing.empty()) {
    verdict.rank = missing.front();
    verdict.message = begin + "rank " + std::to_string(missing.front()) + " has given no sign at all";
    return verdict;
  }
  if (signs.empty()) return {.message = begin + "no rank has given a sign"};
  const auto oldest =
      std::max_element(signs.begin(), signs.end(), [](const RankSign& a, const RankSign& b) {
        return a.age_seconds < b.age_seconds;
      });
  const auto blame = [&](const RankSign& sign, const std::string& what) {
    verdict.rank = sign.rank;
    verdict.host = sign.host;
    verdict.message = begin + RankText(sign) + " " + what;
    for (const std::string& text : sign.communicators) verdict.message += "; " + text;
  };
  if (oldest->age_seconds > stale_seconds) {
    blame(*oldest, "has not been running for " + Seconds(oldest->age_seconds) +
                       " (stopped, swapped out, or its node is gone); its last words: step " +
                       std::to_string(oldest->step));
    return verdict;
  }
  const auto behind = [](const RankSign& a, const RankSign& b) {
    return std::pair(a.step, a.collectives) < std::pair(b.step, b.collectives);
  };
  const auto [least, most] = std::minmax_element(signs.begin(), signs.end(), behind);
  if (behind(*least, *most)) {
    blame(*least, "is behind the others (step " + std::to_string(least->step) + ", " +
                      std::to_string(least->collectives) + " collectives started; " +
                      RankText(*most) + ": step " + std::to_string(most->step) + ", " +
                      std::to_string(most->collectives) + ")");
    return verdict;
  }
  // Messages between two ranks count for no one: the stages of a pipeline have different numbers of them.
  const auto computes =
      std::find_if(signs.begin(), signs.end(), [](const RankSign& sign) { return !sign.waits; });
  const auto waiting = std::count_if(signs.begin(), signs.end(), [](const RankSign& sign) { return sign.waits; });
  if (computes != signs.end() && waiting > 0) {
    blame(*computes, "waits for no other rank, and " + std::to_string(waiting) + " wait for it or one like it (step " +
                         std::to_string(computes->step) + ")");
    return verdict;
  }
  verdict.message = begin + "all ranks run and none is behind the others, at step " +
                    std::to_string(least->step) + " with " + std::to_string(least->collectives) +
                    " collectives started; the stacks on stderr tell where they are";
  return verdict;
}

HangDetector::HangDetector(Options options) : options_(std::move(options)) {
  std::error_code ignored;
  fs::create_directories(options_.directory, ignored);
  thread_ = std::thread([this] { Run(); });
}

HangDetector::~HangDetector() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  thread_.join();
  std::error_code ignored;
  fs::remove(PathOf(options_.rank), ignored);
  fs::remove(options_.directory, ignored);  // by the last rank: it is empty then
}

fs::path HangDetector::PathOf(int rank) const {
  return options_.directory / (std::to_string(rank) + ".json");
}

void HangDetector::WriteSign() {
  const Json sign = {{"rank", options_.rank},
                     {"host", options_.host},
                     {"pid", getpid()},
                     {"step", step_.load(std::memory_order_relaxed)},
                     {"collectives", options_.collectives ? options_.collectives() : 0},
                     {"waits", options_.waits && options_.waits()},
                     {"communicators", options_.communicators ? options_.communicators()
                                                              : std::vector<std::string>()}};
  // Renamed into place, so that a reader sees all of it. A full disk is no reason to end the job.
  const fs::path temporary = PathOf(options_.rank).string() + ".tmp";
  std::ofstream(temporary) << sign.dump(-1, ' ', false, Json::error_handler_t::replace);
  std::error_code ignored;
  fs::rename(temporary, PathOf(options_.rank), ignored);
}

void HangDetector::Run() {
  const auto interval = std::chrono::duration<double>(IntervalOf(options_.timeout_seconds));
  int64_t beats = -1;
  double changed = SteadySeconds();
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    lock.unlock();
    WriteSign();
    const double now = SteadySeconds();
    const int64_t seen = beats_.load(std::memory_order_relaxed);
    if (seen != beats) {
      beats = seen;
      changed = now;
    }
    if (now - changed > options_.timeout_seconds) {
      GiveUp(now - changed);
      return;
    }
    lock.lock();
    stop_.wait_for(lock, interval, [&] { return stopping_; });
  }
}

void HangDetector::GiveUp(double seconds) {
  std::string state = "itwin-worker: rank " + std::to_string(options_.rank) + " on " +
                      options_.host + ": no step for " + Seconds(seconds) + " after step " +
                      std::to_string(step_.load()) + "\n";
  if (options_.communicators) {
    for (const std::string& text : options_.communicators()) state += "  " + text + "\n";
  }
  std::fputs(state.c_str(), stderr);
  std::fflush(stderr);
  WriteThreadStacks(STDERR_FILENO);

  // All ranks come here about now. A moment, so that the signs of those that run are fresh.
  const double interval = IntervalOf(options_.timeout_seconds);
  const double stale = kStaleIntervals * interval + 1;
  {
    std::unique_lock lock(mutex_);
    if (stop_.wait_for(lock, std::chrono::duration<double>(interval), [&] { return stopping_; })) {
      return;
    }
  }
  WriteSign();
  const double mine = TimeOf(PathOf(options_.rank));
  std::vector<RankSign> signs;
  std::vector<int> missing;
  for (int rank = 0; rank < options_.ranks; ++rank) {
    std::ifstream file(PathOf(rank));
    std::ostringstream text;
    text << file.rdbuf();
    const Json sign = Json::parse(text.str(), nullptr, /*allow_exceptions=*/false);
    const double time = TimeOf(PathOf(rank));
    if (!sign.is_object() || time < 0) {
      missing.push_back(rank);
      continue;
    }
    try {
      signs.push_back({.rank = rank,
                       .host = sign.at("host").get<std::string>(),
                       .step = sign.at("step").get<int64_t>(),
                       .collectives = sign.at("collectives").get<int64_t>(),
                       .waits = sign.at("waits").get<bool>(),
                       .age_seconds = mine - time,
                       .communicators = sign.at("communicators").get<std::vector<std::string>>()});
    } catch (const nlohmann::json::exception&) {
      missing.push_back(rank);
    }
  }
  const HangVerdict verdict = JudgeHang(signs, missing, seconds, stale);
  WorkerError error(FailureClass::kInfra, verdict.message, step_.load());
  if (verdict.rank >= 0) error.rank = verdict.rank;
  error.host = verdict.host;
  options_.give_up(error);
}

}  // namespace itwin::worker
