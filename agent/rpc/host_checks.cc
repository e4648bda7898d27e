#include "agent/rpc/host_checks.h"

#include <fcntl.h>
#include <sys/quota.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "agent/follow_loop.h"
#include "common/files.h"
#include "common/ids.h"

namespace itwin::agent {
namespace {

constexpr int kWrites = 10;
constexpr int64_t kLowBytes = int64_t{1} << 30;
constexpr int64_t kVeryLowBytes = int64_t{64} << 20;
constexpr int64_t kLowFiles = 10'000;
constexpr absl::Duration kSlowWrite = absl::Milliseconds(200);
constexpr int64_t kProbeBytes = int64_t{16} << 20;

v1::CheckResult Result(const char* name, v1::CheckVerdict verdict, std::string found, std::string advice = "") {
  v1::CheckResult out;
  out.set_name(name);
  out.set_verdict(verdict);
  out.set_found(std::move(found));
  out.set_advice(std::move(advice));
  return out;
}

std::string Bytes(int64_t bytes) {
  if (bytes >= int64_t{10} << 30) return absl::StrFormat("%.0f GiB", static_cast<double>(bytes) / (1 << 30));
  return absl::StrFormat("%.0f MiB", static_cast<double>(bytes) / (1 << 20));
}

v1::CheckResult CheckScratch(const std::string& root) {
  const std::string path = absl::StrCat(root, "/.probe-", RandomHex(6));
  absl::Cleanup remove = [&] { unlink(path.c_str()); };
  std::vector<absl::Duration> times;
  for (int i = 0; i < kWrites; ++i) {
    const absl::Time start = absl::Now();
    if (const absl::Status written = WriteFileAtomically(path, std::string(4096, 'x')); !written.ok()) {
      return Result("scratch", v1::CHECK_VERDICT_ERROR, absl::StrCat("cannot write under ", root, ": ", written.message()),
                    "make room, or set another scratch root in the site file");
    }
    times.push_back(absl::Now() - start);
  }
  std::sort(times.begin(), times.end());
  const absl::Duration median = times[times.size() / 2];
  struct statvfs info;
  if (statvfs(root.c_str(), &info) != 0) {
    return Result("scratch", v1::CHECK_VERDICT_WARNING, absl::StrCat(root, ": ", std::string(ErrnoStatus(errno, "statvfs").message())));
  }
  const int64_t room = static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
  const std::string found =
      absl::StrCat(root, IsSharedFileSystem(root) ? " (shared file system)" : "", ": a small file takes ",
                   absl::FormatDuration(absl::Trunc(median, absl::Microseconds(10))), " to write and fsync (slowest of ", kWrites, ": ",
                   absl::FormatDuration(absl::Trunc(times.back(), absl::Microseconds(10))), "), ", Bytes(room), " and ",
                   static_cast<int64_t>(info.f_favail), " files free");
  if (room < kVeryLowBytes) return Result("scratch", v1::CHECK_VERDICT_ERROR, found, "make room, or set another scratch root in the site file");
  if (room < kLowBytes || (info.f_files > 0 && static_cast<int64_t>(info.f_favail) < kLowFiles)) {
    return Result("scratch", v1::CHECK_VERDICT_WARNING, found, "there is little room: inputs, checkpoints and results all lie here");
  }
  if (median > kSlowWrite) {
    return Result("scratch", v1::CHECK_VERDICT_WARNING, found,
                  "writing is slow here, so starting jobs will be; another file system may be better for the scratch root");
  }
  return Result("scratch", v1::CHECK_VERDICT_OK, found);
}

// The device of the root's file system, for the kernel's quota interface; "" for one without.
std::string DeviceOf(const std::string& root) {
  struct stat info;
  if (stat(root.c_str(), &info) != 0) return "";
  const std::string wanted = absl::StrCat(major(info.st_dev), ":", minor(info.st_dev));
  const absl::StatusOr<std::string> mounts = ReadFile("/proc/self/mountinfo", 4 << 20);
  if (!mounts.ok()) return "";
  for (absl::string_view line : absl::StrSplit(*mounts, '\n')) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line, ' ');
    if (fields.size() < 10 || fields[2] != wanted) continue;
    const auto dash = std::find(fields.begin(), fields.end(), "-");
    if (fields.end() - dash > 2 && absl::StartsWith(*(dash + 2), "/")) return std::string(*(dash + 2));
  }
  return "";
}

// By the kernel's records where they can be read; else by taking some room and giving it back, which a full quota refuses.
v1::CheckResult CheckQuota(const std::string& root) {
  const std::string device = DeviceOf(root);
  dqblk quota{};
  if (!device.empty() && quotactl(QCMD(Q_GETQUOTA, USRQUOTA), device.c_str(), static_cast<int>(geteuid()), reinterpret_cast<caddr_t>(&quota)) == 0 &&
      (quota.dqb_bhardlimit > 0 || quota.dqb_ihardlimit > 0)) {
    const int64_t limit = static_cast<int64_t>(quota.dqb_bhardlimit) * 1024, used = static_cast<int64_t>(quota.dqb_curspace);
    const std::string found = absl::StrCat("used ", Bytes(used), " of ", limit > 0 ? Bytes(limit) : "no limit", ", ",
                                           static_cast<int64_t>(quota.dqb_curinodes), " of ",
                                           static_cast<int64_t>(quota.dqb_ihardlimit), " files");
    if (limit > 0 && limit - used < kLowBytes) {
      return Result("quota", limit - used < kVeryLowBytes ? v1::CHECK_VERDICT_ERROR : v1::CHECK_VERDICT_WARNING, found,
                    "remove files, or ask the site for more room");
    }
    return Result("quota", v1::CHECK_VERDICT_OK, found);
  }
  const std::string path = absl::StrCat(root, "/.probe-", RandomHex(6));
  absl::Cleanup remove = [&] { unlink(path.c_str()); };
  const absl::StatusOr<FileDescriptor> file = OpenFile(path, O_WRONLY | O_CREAT | O_EXCL);
  absl::Status written = file.status();
  const std::string block(1 << 20, 'q');
  for (int64_t done = 0; written.ok() && done < kProbeBytes; done += static_cast<int64_t>(block.size())) {
    written = WriteAll(file->get(), block, path);
  }
  if (written.ok() && fsync(file->get()) != 0) written = ErrnoStatus(errno, path);  // where a network file system says it
  if (!written.ok()) {
    return Result("quota", v1::CHECK_VERDICT_ERROR, absl::StrCat("not even ", Bytes(kProbeBytes), " can be written: ", written.message()),
                  "remove files, or ask the site for more room");
  }
  return Result("quota", v1::CHECK_VERDICT_OK, absl::StrCat("no quota can be read here; ", Bytes(kProbeBytes), " could be written"));
}

v1::CheckResult CheckLimits() {
  struct Limit {
    int resource;
    const char* name;
    rlim_t least;
  };
  constexpr Limit kLimits[] = {{RLIMIT_NOFILE, "open files", 1024},
                               {RLIMIT_NPROC, "processes of this user", 256},
                               {RLIMIT_CPU, "seconds of CPU time", RLIM_INFINITY},
                               {RLIMIT_AS, "bytes of address space", rlim_t{2} << 30},
                               {RLIMIT_FSIZE, "bytes in a file", RLIM_INFINITY}};
  std::vector<std::string> low, all;
  for (const Limit& limit : kLimits) {
    rlimit value{};
    if (getrlimit(limit.resource, &value) != 0 || value.rlim_cur == RLIM_INFINITY) continue;
    const std::string words = absl::StrCat(static_cast<uint64_t>(value.rlim_cur), " ", limit.name);
    all.push_back(words);
    if (limit.least == RLIM_INFINITY || value.rlim_cur < limit.least) low.push_back(words);
  }
  std::string memory;
  const absl::StatusOr<std::string> statm = ReadFile("/proc/self/statm", 256);
  if (statm.ok()) {
    const std::vector<std::string> fields = absl::StrSplit(*statm, ' ');
    int64_t pages = 0;
    if (fields.size() > 1 && absl::SimpleAtoi(fields[1], &pages)) memory = absl::StrCat("; this agent uses ", Bytes(pages * sysconf(_SC_PAGESIZE)));
  }
  if (!low.empty()) {
    return Result("host", v1::CHECK_VERDICT_WARNING, absl::StrCat("limits of this host: ", absl::StrJoin(low, ", "), memory),
                  "the agent may be ended by the site; it is started again with the next connection and loses nothing");
  }
  return Result("host", v1::CHECK_VERDICT_OK, absl::StrCat(all.empty() ? "no limits" : absl::StrCat("limits: ", absl::StrJoin(all, ", ")), memory));
}

}  // namespace

std::vector<v1::CheckResult> CheckHost(const std::string& root) { return {CheckLimits(), CheckScratch(root), CheckQuota(root)}; }

}  // namespace itwin::agent
