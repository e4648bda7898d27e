#include "server/store/point_codec.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <random>

#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using itwin::testing::StatusIs;
using ::testing::_;

std::vector<uint64_t> Bits(const std::vector<double>& values) {
  std::vector<uint64_t> out;
  for (const double v : values) out.push_back(std::bit_cast<uint64_t>(v));
  return out;
}

void ExpectRoundTrip(const PointColumns& points) {
  std::vector<int64_t> steps, times;
  std::vector<double> values;
  ASSERT_OK(DecodePoints(EncodePoints(points, 0, points.values.size()), &steps, &times, &values));
  EXPECT_EQ(steps, points.steps);
  EXPECT_EQ(times, points.times_us);
  EXPECT_EQ(Bits(values), Bits(points.values));
}

TEST(PointCodec, KeepsEveryBit) {
  const double nan_with_payload = std::bit_cast<double>(uint64_t{0x7ff8'0000'dead'beef});
  const double inf = std::numeric_limits<double>::infinity();
  ExpectRoundTrip({"s", {}, {}, {}});
  ExpectRoundTrip({"s",
                   {0, INT64_MAX, INT64_MIN, -1, 1, 0},
                   {INT64_MIN, INT64_MAX, 0, 1, -1, 5},
                   {nan_with_payload, inf, -inf, -0.0, std::numeric_limits<double>::denorm_min(), 1e308}});
}

TEST(PointCodec, RoundTripsRandomColumns) {
  const uint64_t seed = 20261123;
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < 200; ++round) {
    PointColumns points;
    const size_t count = random() % 300;
    uint64_t step = 0;  // wraps
    for (size_t i = 0; i < count; ++i) {
      step += round % 2 == 0 ? 1 : random();
      points.steps.push_back(static_cast<int64_t>(step));
      points.times_us.push_back(static_cast<int64_t>(random()));
      points.values.push_back(std::bit_cast<double>(random()));
    }
    ExpectRoundTrip(points);
  }
}

TEST(PointCodec, RegularStepsCostAByte) {
  PointColumns points;
  for (int i = 0; i < 1000; ++i) {
    points.steps.push_back(i * 10);
    points.times_us.push_back(1'700'000'000'000'000 + i * 1000);
    points.values.push_back(i);
  }
  EXPECT_LT(EncodePoints(points, 0, 1000).size(), 1000 * 11.5);
}

TEST(PointCodec, DamagedBytesAreAnErrorAndNeverMore) {
  PointColumns points{"s", {1, 2, 3}, {10, 20, 30}, {1, 2, 3}};
  const std::string good = EncodePoints(points, 0, 3);
  std::vector<int64_t> steps, times;
  std::vector<double> values;
  for (size_t length = 0; length < good.size(); ++length) {
    EXPECT_THAT(DecodePoints(absl::string_view(good).substr(0, length), &steps, &times, &values),
                StatusIs(absl::StatusCode::kDataLoss, _))
        << length;
  }
  EXPECT_THAT(DecodePoints(good + "x", &steps, &times, &values), StatusIs(absl::StatusCode::kDataLoss, _));
  // A count that would ask for 16 EiB.
  const std::string huge = std::string("\x01") + std::string(9, '\xff') + "\x01" + std::string(64, 'x');
  EXPECT_THAT(DecodePoints(huge, &steps, &times, &values), StatusIs(absl::StatusCode::kDataLoss, _));
}

}  // namespace
}  // namespace itwin::server
