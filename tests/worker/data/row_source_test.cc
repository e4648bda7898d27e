#include "agent/worker/data/row_source.h"

#include <numeric>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/data/netcdf.h"
#include "agent/worker/data/raw.h"
#include "tests/worker/data/array_values.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Scratch;
using testing::UserErrorOf;
using testing::Values;

// Row r holds r * 10 and r * 10 + 1; remembers what was read.
class Counting : public RowSource {
 public:
  Counting(int64_t rows, int64_t per_chunk) : shape_{rows, 2}, per_chunk_(per_chunk) {}
  const std::vector<int64_t>& shape() const override { return shape_; }
  int64_t rows_per_chunk() const override { return per_chunk_; }
  void Read(int64_t first, int64_t count, float* to) const override {
    EXPECT_LE(first + count, shape_[0]);
    reads.emplace_back(first, count);
    for (int64_t i = 0; i < count; ++i) {
      to[2 * i] = static_cast<float>((first + i) * 10);
      to[2 * i + 1] = to[2 * i] + 1;
    }
  }
  mutable std::vector<std::pair<int64_t, int64_t>> reads;

 private:
  const std::vector<int64_t> shape_;
  const int64_t per_chunk_;
};

std::vector<float> Gather(const RowCache& cache, const std::vector<int64_t>& rows) {
  std::vector<float> out(rows.size() * 2);
  cache.Gather(rows, out.data());
  return out;
}

TEST(RowCache, ReadsNeighboursTogetherAndGivesAnyOrder) {
  const auto source = std::make_shared<Counting>(100, 1);
  const RowCache cache(source, 1 << 20);
  EXPECT_THAT(Gather(cache, {7, 5, 6, 5, 90}),
              ElementsAre(70, 71, 50, 51, 60, 61, 50, 51, 900, 901));
  EXPECT_THAT(source->reads, ElementsAre(std::pair(5, 3), std::pair(90, 1)));
  Gather(cache, {6, 8});
  EXPECT_EQ(source->reads.size(), 3u) << "only row 8 was new";
}

TEST(RowCache, ReadsWholeChunksAndStopsAtTheEnd) {
  const auto source = std::make_shared<Counting>(10, 4);
  const RowCache cache(source, 1 << 20);
  EXPECT_THAT(Gather(cache, {9}), ElementsAre(90, 91));
  EXPECT_THAT(source->reads, ElementsAre(std::pair(8, 2)));
  EXPECT_THAT(Gather(cache, {8, 1}), ElementsAre(80, 81, 10, 11));
  EXPECT_THAT(source->reads, ElementsAre(std::pair(8, 2), std::pair(0, 4)));
}

TEST(RowCache, StaysWithinItsMemory) {
  const auto source = std::make_shared<Counting>(1000, 1);
  const RowCache cache(source, 10 * 2 * sizeof(float));  // ten rows
  std::mt19937_64 random(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<int64_t> rows(8);
    for (int64_t& row : rows) row = static_cast<int64_t>(random() % 1000);
    const std::vector<float> values = Gather(cache, rows);
    for (size_t i = 0; i < rows.size(); ++i) {
      EXPECT_EQ(values[2 * i], static_cast<float>(rows[i] * 10));
    }
  }
  EXPECT_GT(cache.rows_read(), 1400) << "more than ten rows were kept";
}

TEST(NetcdfRows, FilesFollowEachOtherAndPiecesEqualTheWhole) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np
from scipy.io import netcdf_file
for name, first, count in (('a.nc', 0, 5), ('b.nc', 5, 3), ('c.nc', 8, 4)):
    with netcdf_file(name, 'w') as f:
        f.createDimension('time', count)
        f.createDimension('x', 3)
        t = f.createVariable('time', 'f8', ('time',))
        t[:] = np.arange(first, first + count)
        t.units = 'days since 1990-01-01'
        for channel, v in enumerate('UV'):
            f.createVariable(v, 'f4', ('time', 'x'))[:] = (
                100 * channel + 10 * np.arange(first, first + count)[:, None] + np.arange(3))
with netcdf_file('wide.nc', 'w') as f:
    f.createDimension('time', 2)
    f.createDimension('x', 4)
    for v in 'UV':
        f.createVariable(v, 'f4', ('time', 'x'))[:] = np.ones((2, 4))
)");
  const std::vector<std::filesystem::path> files = {scratch / "a.nc", scratch / "b.nc",
                                                    scratch / "c.nc"};
  const auto rows = NetcdfRows::Stack(files, {"U", "V"});
  EXPECT_THAT(rows->shape(), ElementsAre(12, 2, 3));
  const std::vector<float> whole = Values<float>(ReadAll(*rows).field);
  EXPECT_EQ(whole[(9 * 2 + 1) * 3 + 2], 192) << "V of row 9 is in the third file";
  for (int64_t first = 0; first < 12; ++first) {
    for (int64_t count = 1; first + count <= 12; ++count) {
      std::vector<float> piece(static_cast<size_t>(count * 6));
      rows->Read(first, count, piece.data());
      EXPECT_TRUE(std::equal(piece.begin(), piece.end(), whole.begin() + first * 6));
    }
  }
  const auto axis = rows->ReadTimeAxis();
  ASSERT_TRUE(axis);
  EXPECT_EQ(axis->seconds.size(), 12u);
  EXPECT_EQ(StepsWithin(*axis, "1990-01-04..1990-01-06", "f"), std::pair(int64_t{3}, int64_t{6}));
  EXPECT_THAT(UserErrorOf([&] {
                NetcdfRows::Stack({scratch / "a.nc", scratch / "wide.nc"}, {"U", "V"});
              }),
              HasSubstr("only the first dimension may differ"));
  const auto one = NetcdfRows::One(files, "V", true);
  EXPECT_THAT(one->shape(), ElementsAre(12, 3));
  EXPECT_EQ(NetcdfRows::One(files, "Z", false), nullptr);
  EXPECT_THAT(UserErrorOf([&] { NetcdfRows::One(files, "Z", true); }), HasSubstr("no variable \"Z\""));
}

TEST(Raw, SizeTellsTheNumberOfSamples) {
  const Scratch scratch;
  const float values[] = {1, 2, 3, 4, 5, 6};
  scratch.Write("a", std::string(reinterpret_cast<const char*>(values), sizeof(values)));
  const Array array = ReadRaw(scratch / "a", "float32", {2});
  EXPECT_THAT(array.shape, ElementsAre(3, 2));
  EXPECT_THAT(Values<float>(array), ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_THAT(ReadRaw(scratch / "a", "int16", {}).shape, ElementsAre(12));
  EXPECT_THAT(UserErrorOf([&] { ReadRaw(scratch / "a", "float32", {4}); }),
              HasSubstr("no whole number of samples of 16 bytes"));
  EXPECT_THAT(UserErrorOf([&] { ReadRaw(scratch / "a", "flaot32", {4}); }),
              HasSubstr("did you mean \"float32\""));
  EXPECT_NE(UserErrorOf([&] { ReadRaw(scratch.Write("e", ""), "float32", {4}); }), "");
  EXPECT_NE(UserErrorOf([&] { ReadRaw(scratch / "a", "float64", {int64_t{1} << 62}); }), "");
}

}  // namespace
}  // namespace itwin::worker
