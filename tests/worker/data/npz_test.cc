#include "agent/worker/data/npz.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

TEST(Npz, ReadsStoredDeflatedAndZip64Members) {
  const Scratch scratch;
  scratch.Python(R"(
import io, numpy as np, zipfile
x, y = np.arange(6, dtype='f4').reshape(2, 3), np.array([1, 0])
np.savez('stored.npz', x=x, y=y)
np.savez_compressed('deflated.npz', x=x, y=y, large=np.zeros((1000, 1000), 'f4'))
with zipfile.ZipFile('zip64.npz', 'w', zipfile.ZIP_DEFLATED) as archive:
    with archive.open('x.npy', 'w', force_zip64=True) as member:
        np.lib.format.write_array(member, x)
    archive.writestr('readme.txt', 'not an array')
    archive.comment = b'a comment of the archive'
)");
  for (const char* name : {"stored.npz", "deflated.npz"}) {
    const NamedArrays arrays = ReadNpz(scratch / name);
    EXPECT_THAT(Values<float>(arrays.at("x")), ElementsAre(0, 1, 2, 3, 4, 5)) << name;
    EXPECT_THAT(arrays.at("x").shape, ElementsAre(2, 3)) << name;
    EXPECT_THAT(Values<int64_t>(arrays.at("y")), ElementsAre(1, 0)) << name;
  }
  EXPECT_EQ(ReadNpz(scratch / "deflated.npz").at("large").size_bytes, 4000000u);
  const NamedArrays arrays = ReadNpz(scratch / "zip64.npz");
  EXPECT_EQ(arrays.size(), 1u);
  EXPECT_THAT(Values<float>(arrays.at("x")), ElementsAre(0, 1, 2, 3, 4, 5));
}

TEST(Npz, LeavesOutWhatItCannotReadUnlessItIsNeeded) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np
np.savez('a.npz', x=np.ones(2, 'f4'), names=np.array(['a', 'b']), waves=np.ones(2, 'c8'), fortran=np.asfortranarray(np.ones((2, 3))))
np.savez('names.npz', names=np.array(['a', 'b']))
)");
  const NamedArrays arrays = ReadNpz(scratch / "a.npz", {"x", "y"});
  EXPECT_EQ(arrays.size(), 1u);
  EXPECT_EQ(arrays.count("x"), 1u);
  const auto error = [&](const std::string& file, const std::set<std::string>& needed) {
    return UserErrorOf([&] { ReadNpz(scratch / file, needed); });
  };
  EXPECT_THAT(error("a.npz", {"waves"}),
              AllOf(HasSubstr("array \"waves.npy\""), HasSubstr("'<c8' is not supported")));
  EXPECT_THAT(error("a.npz", {"fortran"}), HasSubstr("Fortran order"));
  EXPECT_THAT(error("names.npz", {}), HasSubstr("'<U1' is not supported"));
}

TEST(Npz, RefusesInWordsWhatItCannotRead) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np, zipfile
np.savez_compressed('good.npz', x=np.arange(1000))
data = bytearray(open('good.npz', 'rb').read())
open('cut.npz', 'wb').write(data[:len(data) // 2])
at = data.find(b'PK\x01\x02')
open('crc.npz', 'wb').write(data[:at + 16] + b'abcd' + data[at + 20:])
np.savez('flipped.npz', x=np.arange(1000), y=np.arange(3))
stored = bytearray(open('flipped.npz', 'rb').read())
stored[1000] ^= 1
open('flipped.npz', 'wb').write(stored)
open('bomb.npz', 'wb').write(data[:at + 24] + b'\xfe\xff\xff\xff' + data[at + 28:])
open('body.npz', 'wb').write(data[:200] + bytes(50) + data[250:])
with zipfile.ZipFile('lzma.npz', 'w', zipfile.ZIP_LZMA) as archive: archive.writestr('x.npy', 'abc' * 100)
with zipfile.ZipFile('none.npz', 'w') as archive: archive.writestr('readme.txt', 'hello')
)");
  const auto error = [&](const std::string& name) {
    return UserErrorOf([&] { ReadNpz(scratch / name); });
  };
  EXPECT_EQ(error("good.npz"), "");
  EXPECT_THAT(error("cut.npz"), HasSubstr("not a whole .npz archive"));
  EXPECT_THAT(error("crc.npz"),
              AllOf(HasSubstr("crc.npz, array \"x.npy\""), HasSubstr("checksum")));
  EXPECT_THAT(error("flipped.npz"),
              AllOf(HasSubstr("flipped.npz, array \"x.npy\""), HasSubstr("checksum")));
  EXPECT_THAT(error("bomb.npz"), HasSubstr("claims 4294967294 bytes"));
  EXPECT_THAT(error("body.npz"), HasSubstr("damaged"));
  EXPECT_THAT(error("lzma.npz"), HasSubstr("compression method 14"));
  EXPECT_THAT(error("none.npz"), HasSubstr("no arrays"));
  scratch.Write("empty.npz", "");
  EXPECT_THAT(error("empty.npz"), HasSubstr("too short"));
}

}  // namespace
}  // namespace itwin::worker
