#pragma once

#include <cstdint>

// Keys of rows that belong to a job: the job's number first, so that they lie together (see migrations/0001.sql).
namespace itwin::server {

inline constexpr int kAttemptBits = 20;   // attempts per job: 999,999
inline constexpr int kSegmentBits = 28;   // stored blocks of points per job

constexpr int64_t AttemptRowId(int64_t job, int number) { return job << kAttemptBits | number; }
constexpr int AttemptNumber(int64_t row) { return static_cast<int>(row & ((int64_t{1} << kAttemptBits) - 1)); }
constexpr int64_t SegmentRowId(int64_t job, int64_t sequence) { return job << kSegmentBits | sequence; }
constexpr int64_t SegmentSequence(int64_t row) { return row & ((int64_t{1} << kSegmentBits) - 1); }
inline constexpr int64_t kMaxSegmentSequence = (int64_t{1} << kSegmentBits) - 1;

}  // namespace itwin::server
