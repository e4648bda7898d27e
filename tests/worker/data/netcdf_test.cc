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

}  // namespace
}  // namespace itwin::worker
