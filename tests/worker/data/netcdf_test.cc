#include "agent/worker/data/netcdf.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netcdf.h>

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

void Check(int result) { ASSERT_EQ(result, NC_NOERR) << nc_strerror(result); }

// time 3, lat 2, lon 2: float U (0..11, cell 5 missing), packed short V, double W(time, lon), text
// NAME.
void WriteFile(const std::filesystem::path& path, int mode) {
  int file = 0, time = 0, lat = 0, lon = 0, u = 0, v = 0, w = 0, name = 0;
  Check(nc_create(path.c_str(), mode, &file));
  Check(nc_def_dim(file, "time", NC_UNLIMITED, &time));
  Check(nc_def_dim(file, "lat", 2, &lat));
  Check(nc_def_dim(file, "lon", 2, &lon));
  const int dims[] = {time, lat, lon};
  const int flat[] = {time, lon};
  Check(nc_def_var(file, "U", NC_FLOAT, 3, dims, &u));
  Check(nc_def_var(file, "V", NC_SHORT, 3, dims, &v));
  Check(nc_def_var(file, "W", NC_DOUBLE, 2, flat, &w));
  Check(nc_def_var(file, "NAME", NC_CHAR, 1, dims + 1, &name));
  const float missing = -99.9f;
  const short fill = -1;
  const double scale = 0.5, offset = 10;
  Check(nc_put_att_float(file, u, "missing_value", NC_FLOAT, 1, &missing));
  Check(nc_put_att_short(file, v, "_FillValue", NC_SHORT, 1, &fill));
  Check(nc_put_att_double(file, v, "scale_factor", NC_DOUBLE, 1, &scale));
  Check(nc_put_att_double(file, v, "add_offset", NC_DOUBLE, 1, &offset));
  Check(nc_enddef(file));
  float us[12];
  short vs[12];
  double ws[6];
  for (int i = 0; i < 12; ++i) us[i] = i == 5 ? missing : static_cast<float>(i);
  for (int i = 0; i < 12; ++i) vs[i] = i == 7 ? fill : static_cast<short>(2 * i);
  for (int i = 0; i < 6; ++i) ws[i] = i;
  const size_t start[] = {0, 0, 0}, count[] = {3, 2, 2}, flat_count[] = {3, 2};
  Check(nc_put_vara_float(file, u, start, count, us));
  Check(nc_put_vara_short(file, v, start, count, vs));
  Check(nc_put_vara_double(file, w, start, flat_count, ws));
  Check(nc_close(file));
}

class NetcdfFormats : public ::testing::TestWithParam<int> {};

TEST_P(NetcdfFormats, StacksVariablesAsChannels) {
  const Scratch scratch;
  WriteFile(scratch / "a.nc", GetParam());
  const NetcdfField read = ReadNetcdf(scratch / "a.nc", {"V", "U"});
  EXPECT_THAT(read.field.shape, ElementsAre(3, 2, 2, 2));
  EXPECT_EQ(read.missing_cells, 2);
  const auto values = Values<float>(read.field);
  // [time, channel, lat, lon]: V of time 0, U of time 0, V of time 1, …
  EXPECT_THAT(std::vector<float>(values.begin(), values.begin() + 8),
              ElementsAre(10, 11, 12, 13, 0, 1, 2, 3));
  EXPECT_EQ(values[8 + 4], 4);
  EXPECT_TRUE(std::isnan(values[8 + 5]));  // U's missing_value
  EXPECT_TRUE(std::isnan(values[8 + 3]));  // V's _FillValue
  EXPECT_EQ(values[8 + 2], 16);            // 12 * 0.5 + 10

  const NetcdfField flat = ReadNetcdf(scratch / "a.nc", {"W"});
  EXPECT_THAT(flat.field.shape, ElementsAre(3, 1, 2));
  EXPECT_THAT(Values<float>(flat.field), ElementsAre(0, 1, 2, 3, 4, 5));
}

TEST_P(NetcdfFormats, TakesTheLargestVariablesWhenNoneIsNamed) {
  const Scratch scratch;
  WriteFile(scratch / "a.nc", GetParam());
  EXPECT_THAT(ReadNetcdf(scratch / "a.nc", {}).variables, ElementsAre("U", "V"));
}

TEST_P(NetcdfFormats, NamesWhatIsWrong) {
  const Scratch scratch;
  const auto path = scratch / "a.nc";
  WriteFile(path, GetParam());
  EXPECT_THAT(UserErrorOf([&] {
                ReadNetcdf(path, {"U", "Z"});
              }),
              AllOf(HasSubstr("no variable \"Z\""), HasSubstr("U[3, 2, 2], V[3, 2, 2], W[3, 2]")));
  EXPECT_THAT(UserErrorOf([&] { ReadNetcdf(path, {"NAMES"}); }),
              HasSubstr("did you mean \"NAME\""));
  EXPECT_THAT(UserErrorOf([&] { ReadNetcdf(path, {"NAME"}); }), HasSubstr("not numeric"));
  EXPECT_THAT(UserErrorOf([&] {
                ReadNetcdf(path, {"U", "W"});
              }),
              AllOf(HasSubstr("U (time 3, lat 2, lon 2)"), HasSubstr("W (time 3, lon 2)")));
}

INSTANTIATE_TEST_SUITE_P(All, NetcdfFormats,
                         ::testing::Values(NC_CLOBBER, NC_CLOBBER | NC_64BIT_OFFSET, NC_NETCDF4));

TEST(Netcdf, RefusesFilesThatAreNoneOrCutOff) {
  const Scratch scratch;
  EXPECT_THAT(
      UserErrorOf([&] { ReadNetcdf(scratch.Write("text.nc", "hello, this is not it"), {}); }),
      HasSubstr("Unknown file format"));
  EXPECT_NE(UserErrorOf([&] { ReadNetcdf(scratch.Write("empty.nc", ""), {}); }), "");
  EXPECT_THAT(UserErrorOf([&] { ReadNetcdf(scratch / "absent.nc", {}); }),
              HasSubstr("No such file"));
  scratch.Python(R"(
import numpy as np
from scipy.io import netcdf_file
with netcdf_file('whole.nc', 'w') as f:
    f.createDimension('time', 50)
    f.createDimension('lat', 20)
    f.createVariable('U', 'f4', ('time', 'lat'))[:] = np.ones((50, 20))
data = open('whole.nc', 'rb').read()
open('cut.nc', 'wb').write(data[:-1000])
)");
  EXPECT_EQ(Values<float>(ReadNetcdf(scratch / "whole.nc", {"U"}).field).back(), 1.0f);
  EXPECT_THAT(UserErrorOf([&] { ReadNetcdf(scratch / "cut.nc", {"U"}); }), HasSubstr("cut off"));
}

// Variables [time 3, x 2] with each of CF's ways to mark cells.
TEST(Netcdf, MarksMissingCellsAsCfSays) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np
from scipy.io import netcdf_file
with netcdf_file('a.nc', 'w') as f:
    f.createDimension('time', 3)
    f.createDimension('x', 2)
    def put(name, dtype, values, **attributes):
        v = f.createVariable(name, dtype, ('time', 'x'))
        v[:] = np.array(values, dtype).reshape(3, 2)
        for key, value in attributes.items(): setattr(v, key, value)
    put('many', 'f4', [1, -99.9, 2, 1e30, 3, 4], missing_value=np.array([-99.9, 1e30], 'f4'))
    put('ranged', 'i2', [0, 100, 101, -1, 50, 7], valid_range=np.array([0, 100], 'i2'), scale_factor=0.5, add_offset=10.0)
    put('above', 'f4', [0.1, 0.05, 5, -1, 0.2, 1e9], valid_min=np.float32(0.1))
    put('below', 'f4', [0.1, 0.05, 5, -1, 0.2, 1e9], valid_max=np.float32(0.1))
    put('bytes', 'i1', [0, 127, -128, -1, -2, 3], _Unsigned='true', _FillValue=np.int8(-1))
    put('shorts', 'i2', [0, 32767, -32768, -1, -2, 3], _Unsigned='true', valid_range=np.array([1, -2], 'i2'))
    put('signed', 'i1', [0, 127, -128, -1, -2, 3], _Unsigned='false')
    put('labels', 'i1', [0, 127, -128, -1, -2, 3], _Unsigned='true')
    put('double_fill', 'f4', [0, -99.9, 1, 2, 3, 4], _FillValue=np.float64(-99.9))
)");
  const auto read = [&](const char* name) {
    return Values<float>(ReadNetcdf(scratch / "a.nc", {name}).field);
  };
  const auto missing = ::testing::IsNan();
  EXPECT_THAT(read("many"), ElementsAre(1, missing, 2, missing, 3, 4));
  EXPECT_THAT(read("ranged"), ElementsAre(10, 60, missing, missing, 35, 13.5f));
  EXPECT_THAT(read("above"), ElementsAre(0.1f, missing, 5, missing, 0.2f, 1e9f));
  EXPECT_THAT(read("below"), ElementsAre(0.1f, 0.05f, missing, -1, missing, missing));
  EXPECT_THAT(read("bytes"), ElementsAre(0, 127, 128, missing, 254, 3));
  EXPECT_THAT(read("shorts"), ElementsAre(missing, 32767, 32768, missing, 65534, 3));
  EXPECT_THAT(read("signed"), ElementsAre(0, 127, -128, -1, -2, 3));
  EXPECT_THAT(read("double_fill"), ElementsAre(0, missing, 1, 2, 3, 4));
  const auto labels = NetcdfRows::One({scratch / "a.nc"}, "labels", true);
  ASSERT_TRUE(labels->is_integer());
  EXPECT_THAT(Values<int64_t>(labels->ReadIntegers()), ElementsAre(0, 127, 128, 255, 254, 3));
  EXPECT_FALSE(NetcdfRows::One({scratch / "a.nc"}, "shorts", true)->is_integer());
}

TEST(Netcdf, NamesAnAttributeThatMarksNothing) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np
from scipy.io import netcdf_file
with netcdf_file('a.nc', 'w') as f:
    f.createDimension('time', 2)
    f.createDimension('x', 1)
    def put(name, dtype, **attributes):
        v = f.createVariable(name, dtype, ('time', 'x'))
        v[:] = np.zeros((2, 1), dtype)
        for key, value in attributes.items(): setattr(v, key, value)
    put('text', 'f4', _FillValue='-99')
    put('wide', 'i2', _FillValue=np.float32(1e20))
    put('byte', 'i1', _FillValue=np.int16(255))
    put('broken', 'i2', missing_value=np.array([1, np.nan]))
    put('fills', 'i2', _FillValue=np.array([1, 2], 'i2'))
    put('scale', 'i2', scale_factor='0.1')
    put('scales', 'i2', scale_factor=np.array([0.1, 0.2]))
    put('range', 'f4', valid_range=np.array([0, 1, 2], 'f4'))
)");
  const auto error = [&](const char* name) {
    return UserErrorOf([&] { ReadNetcdf(scratch / "a.nc", {name}); });
  };
  EXPECT_THAT(error("text"), AllOf(HasSubstr("a.nc, variable text, attribute _FillValue"),
                                   HasSubstr("\"-99\", a text")));
  EXPECT_THAT(error("wide"), AllOf(HasSubstr("variable wide, attribute _FillValue"),
                                   HasSubstr("no number of the variable's type, short")));
  EXPECT_THAT(error("byte"),
              AllOf(HasSubstr("attribute _FillValue"), HasSubstr("255"), HasSubstr("type, byte")));
  EXPECT_THAT(error("broken"), HasSubstr("variable broken, attribute missing_value"));
  EXPECT_THAT(error("fills"), HasSubstr("attribute _FillValue has 2 numbers; it must have 1"));
  EXPECT_THAT(error("scale"), HasSubstr("variable scale, attribute scale_factor"));
  EXPECT_THAT(error("scales"), HasSubstr("attribute scale_factor has 2 numbers; it must have 1"));
  EXPECT_THAT(error("range"), HasSubstr("attribute valid_range has 3 numbers; it must have 2"));
}

}  // namespace
}  // namespace itwin::worker
