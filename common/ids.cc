#include "common/ids.h"

#include <sys/random.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"

namespace itwin {
namespace {

constexpr size_t kJobIdDigits = 16;
constexpr int kMaxAttempt = 999'999;

bool IsLowerHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isdigit(static_cast<unsigned char>(c)) || (c >= 'a' && c <= 'f');
  });
}

}  // namespace

std::string RandomHex(int bytes) {
  std::string raw(static_cast<size_t>(bytes), '\0');
  ITWIN_CHECK(bytes <= 256 && getrandom(raw.data(), raw.size(), 0) == bytes);
  return absl::BytesToHexString(raw);
}

absl::StatusOr<JobId> JobId::Parse(absl::string_view text) {
  if (text.size() != kJobIdDigits || !IsLowerHex(text)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", absl::CHexEscape(text.substr(0, 64)), "' is not a job id (16 hex digits)"));
  }
  return JobId(std::string(text));
}

JobId JobId::Random() { return JobId(RandomHex(kJobIdDigits / 2)); }

absl::StatusOr<AttemptKey> AttemptKey::Parse(absl::string_view text) {
  const size_t dash = text.find('-');
  int number = 0;
  if (dash != absl::string_view::npos && text.size() - dash <= 7 && dash + 1 < text.size() && text[dash + 1] != '0' &&
      absl::SimpleAtoi(text.substr(dash + 1), &number) && number >= 1 && number <= kMaxAttempt) {
    absl::StatusOr<JobId> job = JobId::Parse(text.substr(0, dash));
    // SimpleAtoi takes signs and spaces; the key has one spelling only.
    if (job.ok() && absl::StrCat(job->text(), "-", number) == text) return AttemptKey(*job, number);
  }
  return absl::InvalidArgumentError(absl::StrCat("'", absl::CHexEscape(text.substr(0, 64)),
                                                 "' is not an attempt key (<job id>-<number>)"));
}

std::string AttemptKey::text() const { return absl::StrCat(job_.text(), "-", number_); }

}  // namespace itwin
