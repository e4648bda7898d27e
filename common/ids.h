#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace itwin {

// A job of ours: 16 lower-case hex digits.
class JobId {
 public:
  JobId() = default;
  // kInvalidArgument unless 16 lower-case hex digits.
  static absl::StatusOr<JobId> Parse(absl::string_view text);
  static JobId Random();
  const std::string& text() const { return text_; }
  bool empty() const { return text_.empty(); }
  friend bool operator==(const JobId&, const JobId&) = default;
  friend auto operator<=>(const JobId&, const JobId&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const JobId& id) {
    return H::combine(std::move(h), id.text_);
  }

 private:
  explicit JobId(std::string text) : text_(std::move(text)) {}
  std::string text_;
};

// One try at a job; its key "<job>-<number>" names it everywhere: spool, scheduler, result record.
class AttemptKey {
 public:
  AttemptKey() = default;
  AttemptKey(JobId job, int number) : job_(std::move(job)), number_(number) {}
  // kInvalidArgument unless "<16 hex digits>-<1..999999>".
  static absl::StatusOr<AttemptKey> Parse(absl::string_view text);
  const JobId& job() const { return job_; }
  int number() const { return number_; }
  std::string text() const;
  friend bool operator==(const AttemptKey&, const AttemptKey&) = default;
  friend auto operator<=>(const AttemptKey&, const AttemptKey&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const AttemptKey& key) {
    return H::combine(std::move(h), key.job_, key.number_);
  }

 private:
  JobId job_;
  int number_ = 0;
};

// `bytes` random bytes of the operating system as lower-case hex.
std::string RandomHex(int bytes);

}  // namespace itwin
