#include "agent/worker/data/netcdf_header.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::Scratch;
using testing::UserErrorOf;

TEST(NetcdfHeader, AcceptsWholeFilesAndNoticesEachMissingByte) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np
from scipy.io import netcdf_file
for version in 1, 2:
    with netcdf_file(f'v{version}.nc', 'w', version=version) as f:
        f.createDimension('time', None)
        f.createDimension('lat', 3)
        f.title = 'a title'
        f.createVariable('lat', 'f8', ('lat',))[:] = np.arange(3)
        f.createVariable('A', 'i2', ('time', 'lat'))[:] = np.ones((4, 3))
        f.createVariable('B', 'f4', ('time', 'lat'))[:] = np.ones((4, 3))
)");
  for (const char* name : {"v1.nc", "v2.nc"}) {
    EXPECT_EQ(UserErrorOf([&] { CheckClassicNetcdf(scratch / name); }), "");
    const std::string whole = scratch.Read(name);
    for (size_t size = 4; size < whole.size(); ++size) {
      scratch.Write("cut.nc", whole.substr(0, size));
      EXPECT_NE(UserErrorOf([&] { CheckClassicNetcdf(scratch / "cut.nc"); }), "")
          << name << " cut at " << size;
    }
  }
}

TEST(NetcdfHeader, ReadsTheSixtyFourBitFormat) {
  const Scratch scratch;
  // No dimensions, no attributes, no variables: three absent lists.
  const std::string absent(12, '\0');
  scratch.Write("v5.nc", std::string("CDF\x05") + std::string(8, '\0') + absent + absent + absent);
  EXPECT_EQ(UserErrorOf([&] { CheckClassicNetcdf(scratch / "v5.nc"); }), "");
  scratch.Write("bad.nc", std::string("CDF\x05") + std::string(8, '\0') +
                              std::string("\0\0\0\x0a\x7f", 5) + std::string(7, '\xff') + absent +
                              absent);
  EXPECT_THAT(UserErrorOf([&] { CheckClassicNetcdf(scratch / "bad.nc"); }),
              HasSubstr("beyond its end"));
}

TEST(NetcdfHeader, LeavesOtherFormatsAlone) {
  const Scratch scratch;
  for (const char* text : {"", "CDF", "\x89HDF\r\n", "CDF\x07 what is this"}) {
    scratch.Write("other", text);
    EXPECT_EQ(UserErrorOf([&] { CheckClassicNetcdf(scratch / "other"); }), "") << text;
  }
}

}  // namespace
}  // namespace itwin::worker
