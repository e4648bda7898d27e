#include "server/store/point_codec.h"

#include <bit>
#include <cstring>

namespace itwin::server {
namespace {

constexpr char kFormat = 1;
constexpr size_t kMaxVarintBytes = 10;
static_assert(std::endian::native == std::endian::little, "values are stored as they lie in memory");

uint64_t ZigZag(uint64_t difference) {
  return (difference << 1) ^ (0 - (difference >> 63));
}
uint64_t UnZigZag(uint64_t value) { return (value >> 1) ^ (0 - (value & 1)); }

char* PutVarint(char* out, uint64_t value) {
  while (value >= 0x80) {
    *out++ = static_cast<char>(value | 0x80);
    value >>= 7;
  }
  *out++ = static_cast<char>(value);
  return out;
}

// Advances `bytes`; false when they end too early.
bool GetVarint(absl::string_view* bytes, uint64_t* value) {
  *value = 0;
  for (unsigned shift = 0; shift < 70 && !bytes->empty(); shift += 7) {
    const auto byte = static_cast<unsigned char>(bytes->front());
    bytes->remove_prefix(1);
    *value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

}  // namespace

// Differences wrap around in unsigned arithmetic: every int64 survives.
std::string EncodePoints(const PointColumns& points, size_t first, size_t last) {
  const size_t count = last - first;
  std::string out;
  out.resize(1 + kMaxVarintBytes * (1 + 2 * count) + sizeof(double) * count);
  char* p = out.data();
  *p++ = kFormat;
  p = PutVarint(p, count);
  uint64_t previous = 0, previous_difference = 0;
  for (size_t i = first; i < last; ++i) {
    const uint64_t difference = static_cast<uint64_t>(points.steps[i]) - previous;
    p = PutVarint(p, ZigZag(difference - previous_difference));
    previous = static_cast<uint64_t>(points.steps[i]);
    previous_difference = difference;
  }
  previous = 0;
  for (size_t i = first; i < last; ++i) {
    p = PutVarint(p, ZigZag(static_cast<uint64_t>(points.times_us[i]) - previous));
    previous = static_cast<uint64_t>(points.times_us[i]);
  }
  if (count > 0) std::memcpy(p, points.values.data() + first, sizeof(double) * count);
  p += sizeof(double) * count;
  out.resize(static_cast<size_t>(p - out.data()));
  return out;
}

absl::Status DecodePoints(absl::string_view bytes, std::vector<int64_t>* steps, std::vector<int64_t>* times_us,
                          std::vector<double>* values) {
  const absl::Status damaged = absl::DataLossError("a stored block of points is damaged");
  if (bytes.empty() || bytes.front() != kFormat) return damaged;
  bytes.remove_prefix(1);
  uint64_t count = 0;
  // A point has at least ten bytes: so a damaged count cannot ask for much memory.
  if (!GetVarint(&bytes, &count) || count > bytes.size() / (sizeof(double) + 2)) return damaged;
  uint64_t value = 0, previous = 0, difference = 0;
  for (uint64_t i = 0; i < count; ++i) {
    if (!GetVarint(&bytes, &value)) return damaged;
    difference += UnZigZag(value);
    previous += difference;
    steps->push_back(static_cast<int64_t>(previous));
  }
  previous = 0;
  for (uint64_t i = 0; i < count; ++i) {
    if (!GetVarint(&bytes, &value)) return damaged;
    previous += UnZigZag(value);
    times_us->push_back(static_cast<int64_t>(previous));
  }
  if (bytes.size() != count * sizeof(double)) return damaged;
  const size_t old = values->size();
  values->resize(old + count);
  if (count > 0) std::memcpy(values->data() + old, bytes.data(), bytes.size());
  return absl::OkStatus();
}

}  // namespace itwin::server
