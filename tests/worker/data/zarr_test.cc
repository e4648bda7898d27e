// Stores written by Debian's zarr-python.
#include "agent/worker/data/zarr.h"

#include <cmath>
#include <numeric>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/data/npz.h"
#include "agent/worker/error.h"
#include "tests/worker/data/array_values.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Scratch;
using testing::UserErrorOf;
using testing::Values;

std::vector<float> Rows(const ZarrRows& rows, int64_t first, int64_t count) {
  int64_t elements = count;
  for (size_t d = 1; d < rows.shape().size(); ++d) elements *= rows.shape()[d];
  std::vector<float> values(static_cast<size_t>(elements));
  rows.Read(first, count, values.data());
  return values;
}
std::vector<float> All(const ZarrRows& rows) { return Rows(rows, 0, rows.shape()[0]); }

// Stores of version 2, whichever version of the package writes them.
const std::string kZarrInPython = R"(
import json, numcodecs, numpy as np, os, zarr
packages = int(zarr.__version__.split('.')[0])
root = zarr.open_group('s.zarr', mode='a', **({'zarr_format': 2} if packages > 2 else {}))
def create(name, **options):
    if packages > 2 and 'dimension_separator' in options:
        options['chunk_key_encoding'] = {'name': 'v2', 'separator': options.pop('dimension_separator')}
    return root.create_dataset(name, **options)
def put(name, values, **options):
    array = create(name, shape=values.shape, dtype=values.dtype, **options)
    array[...] = values
    return array
)";

class Zarr : public ::testing::Test {
 protected:
  void Script(const std::string& body) {
    scratch_.Python(kZarrInPython + body);
  }
  std::shared_ptr<const ZarrRows> Open(const std::string& name) const {
    return ZarrRows::Open(scratch_ / "s.zarr", name, /*must_exist=*/true);
  }
  std::string ErrorOf(const std::string& name) const {
    return UserErrorOf([&] { All(*Open(name)); });
  }
  const Scratch scratch_;
};

TEST_F(Zarr, ReadsWhatPythonWroteWithEveryCompressorAndType) {
  Script(R"(
compressors = {'none': None, 'zlib': numcodecs.Zlib(3), 'gzip': numcodecs.GZip(3), 'zstd': numcodecs.Zstd(3),
               'lz4': numcodecs.Blosc('lz4', 5, numcodecs.Blosc.SHUFFLE), 'bzstd': numcodecs.Blosc('zstd', 3, numcodecs.Blosc.BITSHUFFLE)}
types = ['<f2', '<f4', '>f4', '<f8', '>f8', '|i1', '|u1', '<i2', '>i2', '<u2', '<i4', '<u4', '<i8', '>u8', '|b1']
out = {}
for c, compressor in compressors.items():
    for t in types:
        values = (np.arange(11 * 3 * 5).reshape(11, 3, 5) * 7 % 120 - (0 if t[1] in 'ub' else 60)).astype(t)
        name = c + '/' + t[1:] + ('big' if t[0] == '>' else '')
        put(name, values, chunks=(4, 2, 5), compressor=compressor)
        out[name.replace('/', '-')] = values.astype('<f4')
np.savez('expected.npz', **out)
)");
  const NamedArrays expected = ReadNpz(scratch_ / "expected.npz");
  ASSERT_EQ(expected.size(), 6u * 15);
  for (const auto& [name, array] : expected) {
    std::string path = name;
    path.replace(path.find('-'), 1, "/");
    const auto rows = Open(path);
    EXPECT_THAT(rows->shape(), ElementsAre(11, 3, 5));
    EXPECT_EQ(rows->rows_per_chunk(), 4);
    const std::vector<float> wanted = Values<float>(array);
    EXPECT_EQ(All(*rows), wanted) << path;
    for (const auto& [first, count] : {std::pair{3, 1}, {2, 7}, {10, 1}, {4, 4}}) {
      const std::vector<float> part(wanted.begin() + first * 15, wanted.begin() + (first + count) * 15);
      EXPECT_EQ(Rows(*rows, first, count), part) << path << " from " << first;
    }
    const bool is_float = path.find("/f") != std::string::npos;
    EXPECT_EQ(rows->is_integer(), !is_float) << path;
    if (is_float) continue;
    const std::vector<int64_t> integers = Values<int64_t>(rows->ReadIntegers());
    EXPECT_EQ(std::vector<float>(integers.begin(), integers.end()), wanted) << path;
  }
}

TEST_F(Zarr, ChunksWithoutFilesAreFillAndFillMayMeanMissing) {
  Script(R"(
def sparse(name, dtype, fill, **options):
    array = create(name, shape=(6, 2), chunks=(2, 2), dtype=dtype, fill_value=fill, **options)
    array[2:4] = [[1, 2], [3, 4]]
    return array
sparse('zero', '<f4', 0)
sparse('nan', '<f8', float('nan'))
sparse('far', '<f4', 1e20)[4:6] = [[1e20, 5], [6, 7]]
sparse('count', '<i2', 9)
packed = sparse('packed', '<i2', -1)
packed[4:6] = [[-1, 10], [0, 20]]
packed.attrs.update(scale_factor=0.5, add_offset=100.0)
sparse('slashes', '<f4', 8, dimension_separator='/')
create('none', shape=(4,), chunks=(2,), dtype='<f4', fill_value=None)[0:2] = 1
for name, fill in {'bare': float('nan'), 'least': float('-inf')}.items():  # as json writes them, in every version of zarr
    os.makedirs('s.zarr/' + name)
    json.dump({'zarr_format': 2, 'shape': [2], 'chunks': [2], 'dtype': '<f4', 'compressor': None, 'fill_value': fill, 'order': 'C',
               'filters': None, 'comment': 'a \\" NaN'}, open('s.zarr/' + name + '/.zarray', 'w'))
)");
  EXPECT_THAT(All(*Open("zero")), ElementsAre(0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0));
  const auto is_nan = ::testing::IsNan();
  EXPECT_THAT(All(*Open("bare")), ElementsAre(is_nan, is_nan));
  EXPECT_THAT(All(*Open("least")), ElementsAre(is_nan, is_nan));  // missing, as every fill value but 0
  EXPECT_THAT(Rows(*Open("nan"), 1, 2), ElementsAre(is_nan, is_nan, 1, 2));
  EXPECT_THAT(All(*Open("far")), ElementsAre(is_nan, is_nan, is_nan, is_nan, 1, 2, 3, 4, is_nan, 5, 6, 7));
  EXPECT_THAT(Values<int64_t>(Open("count")->ReadIntegers()), ElementsAre(9, 9, 9, 9, 1, 2, 3, 4, 9, 9, 9, 9));
  EXPECT_FALSE(Open("packed")->is_integer());
  EXPECT_THAT(Rows(*Open("packed"), 2, 4), ElementsAre(100.5f, 101.0f, 101.5f, 102.0f, is_nan, 105.0f, 100.0f, 110.0f));
  EXPECT_THAT(Rows(*Open("slashes"), 2, 1), ElementsAre(1, 2));
  EXPECT_TRUE(std::filesystem::exists(scratch_ / "s.zarr/slashes/1/0"));
  EXPECT_THAT(ErrorOf("none"), HasSubstr("lacks the chunk 1 and has no fill_value"));
}

TEST_F(Zarr, AttributesMarkMissingCells) {
  Script(R"(
def marked(name, dtype, values, fill=0, **attributes):
    put(name, np.array(values, dtype), chunks=(2,), fill_value=fill).attrs.update(attributes)
marked('list', '<f4', [0, -99.9, 1, 1e30], missing_value=[-99.9, 1e30])
marked('zero', '<i2', [0, 1, 2, -9], _FillValue=0, missing_value=-9)
marked('word', '<f4', [0, 1, 2, 3], _FillValue='NaN')
marked('packed', '<i2', [0, 1, 2, -9], fill=-9, missing_value=2, scale_factor=0.5, add_offset=10.0)
marked('ranged', '<i2', [0, 1, 2, -9], fill=None, valid_range=[0, 1], scale_factor=0.5)
marked('above', '<f8', [0, 1, 2, -9], valid_min=1)
marked('half', '<f2', [0, -99.9, 2, -9], missing_value=-99.9)
marked('unsigned', '|i1', [0, -128, -1, 3], _Unsigned='true', _FillValue=-1)
marked('text', '<f4', [0, 1], _FillValue='none')
marked('texts', '<f4', [0, 1], missing_value=[1, 'x'])
marked('three', '<f4', [0, 1], valid_range=[1, 2, 3])
marked('labels', '<i2', [0, 1, 2, -9])
)");
  const auto missing = ::testing::IsNan();
  EXPECT_THAT(All(*Open("list")), ElementsAre(0, missing, 1, missing));
  EXPECT_THAT(All(*Open("zero")), ElementsAre(missing, 1, 2, missing));
  EXPECT_FALSE(Open("zero")->is_integer());
  EXPECT_TRUE(Open("labels")->is_integer());
  EXPECT_THAT(All(*Open("word")), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(All(*Open("packed")), ElementsAre(10, 10.5f, missing, missing));
  EXPECT_THAT(All(*Open("ranged")), ElementsAre(0, 0.5f, missing, missing));
  EXPECT_THAT(All(*Open("above")), ElementsAre(missing, 1, 2, missing));
  EXPECT_THAT(All(*Open("half")), ElementsAre(0, missing, 2, -9));
  EXPECT_THAT(All(*Open("unsigned")), ElementsAre(0, 128, missing, 3));
  EXPECT_THAT(ErrorOf("text"), HasSubstr("has \"none\" as _FillValue in its .zattrs"));
  EXPECT_THAT(ErrorOf("texts"), HasSubstr("as missing_value in its .zattrs"));
  EXPECT_THAT(ErrorOf("three"), HasSubstr("as valid_range in its .zattrs"));
}

TEST_F(Zarr, FindsTheTimeAxisByTheNamesOfItsDimensions) {
  Script(R"(
def named(name, values, dimensions, **attributes):
    put(name, values, chunks=(2,) * values.ndim).attrs.update(_ARRAY_DIMENSIONS=dimensions, **attributes)
named('t2m', np.zeros((4, 3), 'f4'), ['time', 'x'])
named('time', np.array([0, 6, 12, 2**40]), ['time'], units='hours since 1982-01-01', calendar='noleap')
named('g/t2m', np.zeros((3, 3), 'f4'), ['time', 'x'])
named('g/time', np.array([1.5, 2.5, 3.5]), ['time'], units='Days Since 1982-01-01')
named('g/h/t2m', np.zeros((3, 3), 'f4'), ['time', 'x'])
named('plain', np.zeros((4, 3), 'f4'), ['sample', 'x'])
named('sample', np.arange(4), ['sample'], units='1')
named('short', np.zeros((5, 3), 'f4'), ['time', 'x'])
put('unnamed', np.zeros((4, 3), 'f4'))
)");
  const double begin = CfSeconds(0, "days since 1982-01-01", "noleap", "t");
  const auto axis = Open("t2m")->ReadTimeAxis();
  ASSERT_TRUE(axis);
  EXPECT_EQ(axis->calendar, "noleap");
  EXPECT_THAT(axis->seconds, ElementsAre(begin, begin + 6 * 3600, begin + 12 * 3600, begin + 3600.0 * 1099511627776));
  for (const std::string name : {"g/t2m", "g/h/t2m"}) {
    const auto of_group = Open(name)->ReadTimeAxis();
    ASSERT_TRUE(of_group) << name;
    EXPECT_EQ(of_group->seconds[2] - of_group->seconds[0], 2 * 86400) << name;
  }
  EXPECT_FALSE(Open("plain")->ReadTimeAxis());
  EXPECT_FALSE(Open("unnamed")->ReadTimeAxis());
  EXPECT_THAT(UserErrorOf([&] { Open("short")->ReadTimeAxis(); }), HasSubstr("has 4 steps, the data 5"));
}

TEST_F(Zarr, SaysWhatItDoesNotRead) {
  Script(R"(
x = np.zeros((4, 3), 'f4')
put('group/temperature', x)
put('fortran', x, order='F')
put('filtered', x, filters=[numcodecs.FixedScaleOffset(0, 10, 'f4')])
put('bz2', x, compressor=numcodecs.BZ2())
put('complex', x.astype('c8'))
put('text', np.array(['a', 'b'], dtype='U4'))
os.makedirs('s.zarr/time')
json.dump({'zarr_format': 2, 'shape': [3], 'chunks': [3], 'dtype': '<M8[ns]', 'compressor': None, 'fill_value': 0, 'order': 'C',
           'filters': None}, open('s.zarr/time/.zarray', 'w'))
create('scalar', shape=(), dtype='f4')
os.makedirs('v3'); open('v3/zarr.json', 'w').write('{}')
os.makedirs('empty')
)");
  EXPECT_EQ(ZarrRows::Open(scratch_ / "s.zarr", "temperature", /*must_exist=*/false), nullptr);
  EXPECT_THAT(ErrorOf("group/temperatur"), AllOf(HasSubstr("has no array \"group/temperatur\""),
                                                 HasSubstr("did you mean \"group/temperature\"?"), HasSubstr("fortran")));
  EXPECT_THAT(ErrorOf("../s.zarr/fortran"), HasSubstr("has no array"));
  EXPECT_THAT(ErrorOf("fortran"), HasSubstr("order=\"C\""));
  EXPECT_THAT(ErrorOf("filtered"), HasSubstr("has filters"));
  EXPECT_THAT(ErrorOf("bz2"), HasSubstr("has the compressor \"bz2\"; known: null, zlib, gzip, blosc, zstd"));
  EXPECT_THAT(ErrorOf("complex"), HasSubstr("elements of type \"<c8\""));
  EXPECT_THAT(ErrorOf("text"), HasSubstr("elements of type \"<U4\""));
  EXPECT_THAT(ErrorOf("time"), HasSubstr("elements of type \"<M8[ns]\""));
  EXPECT_THAT(ErrorOf("scalar"), HasSubstr("is a single number"));
  EXPECT_THAT(UserErrorOf([&] { ZarrRows::Open(scratch_ / "v3", "x", true); }), HasSubstr("zarr_format=2"));
  EXPECT_THAT(UserErrorOf([&] { ZarrRows::Open(scratch_ / "empty", "x", true); }), HasSubstr("is no Zarr store"));
}

// Bytes changed and cut at random, in headers and in chunks: read or refused as the user's matter, nothing else.
TEST_F(Zarr, RefusesDamage) {
  Script(R"(
x = np.arange(4 * 30, dtype='<f4').reshape(4, 30)
for name, compressor in {'none': None, 'zlib': numcodecs.Zlib(3), 'zstd': numcodecs.Zstd(3), 'blosc': numcodecs.Blosc('lz4')}.items():
    put(name, x, chunks=(4, 30), compressor=compressor).attrs['scale_factor'] = 2.0
)");
  std::mt19937_64 random(20260101);
  int refused = 0;
  for (const std::string array : {"none", "zlib", "zstd", "blosc"}) {
    EXPECT_EQ(Rows(*Open(array), 0, 1)[3], 6);
    for (const std::string file : {".zarray", ".zattrs", "0.0"}) {
      const std::string name = "s.zarr/" + array + "/" + file, whole = scratch_.Read(name);
      ASSERT_GT(whole.size(), 10u);
      for (int round = 0; round < 150; ++round) {
        std::string bytes = whole;
        if (round % 5 == 0) {
          bytes.resize(random() % whole.size());
        } else {
          for (uint64_t change = 0; change < 1 + random() % 3; ++change) bytes[random() % bytes.size()] = static_cast<char>(random());
        }
        scratch_.Write(name, bytes);
        try {
          const auto rows = Open(array);
          if (rows->shape()[0] > 0 && ReadAllRows(*rows, "x").size_bytes == 0) ++refused;
        } catch (const WorkerError& error) {
          EXPECT_NE(error.failure, FailureClass::kApp) << error.what();
          ++refused;
        }
      }
      scratch_.Write(name, whole);
    }
  }
  EXPECT_GT(refused, 900);
}

}  // namespace
}  // namespace itwin::worker
