#include "agent/worker/data/npy.h"

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

std::string Npy(const std::string& header, const std::string& elements, char version = 1) {
  std::string text = std::string("\x93NUMPY") + version + '\0';
  text += static_cast<char>(header.size() & 0xff);
  text += static_cast<char>(header.size() >> 8);
  if (version > 1) text += std::string(2, '\0');
  return text + header + elements;
}

TEST(Npy, ReadsWhatNumpyWrites) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np
for t in ['f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', '?', '>f4', '>i2', '>u2', '>u4']:
    a = np.arange(6).reshape(2, 3).astype(t)
    np.save(t.replace('>', 'big_').replace('?', 'bool') + '.npy', a)
np.save('u2_large.npy', np.array([1, 65535], 'u2'))
np.save('u4_large.npy', np.array([1, 4294967295], 'u4'))
np.save('scalar.npy', np.float32(7))
np.lib.format.write_array(open('v2.npy', 'wb'), np.ones((2, 2), 'f4'), version=(2, 0))
np.lib.format.write_array(open('v3.npy', 'wb'), np.ones((2, 2), 'f4'), version=(3, 0))
np.save('empty.npy', np.zeros((0, 4), 'f4'))
np.save('one_dimension_fortran.npy', np.asfortranarray(np.arange(3, dtype='f4')))
)");
  const auto read = [&](const std::string& name) { return ReadNpy(scratch / (name + ".npy")); };
  EXPECT_THAT(Values<float>(read("f4")), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(read("f4").shape, ElementsAre(2, 3));
  EXPECT_THAT(Values<double>(read("f8")), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_EQ(read("f2").type, ElementType::kFloat16);
  EXPECT_THAT(Values<uint16_t>(read("f2")), ElementsAre(0, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500));
  EXPECT_THAT(Values<int8_t>(read("i1")), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Values<int16_t>(read("i2")), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Values<int32_t>(read("i4")), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Values<int64_t>(read("i8")), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Values<uint8_t>(read("u1")), ElementsAre(0, 1, 2, 3, 4, 5));
  for (const char* type : {"u2", "big_u2"}) {
    EXPECT_EQ(read(type).type, ElementType::kInt32);
    EXPECT_THAT(Values<int32_t>(read(type)), ElementsAre(0, 1, 2, 3, 4, 5)) << type;
  }
  for (const char* type : {"u4", "big_u4"}) {
    EXPECT_EQ(read(type).type, ElementType::kInt64);
    EXPECT_THAT(Values<int64_t>(read(type)), ElementsAre(0, 1, 2, 3, 4, 5)) << type;
  }
  EXPECT_THAT(Values<int32_t>(read("u2_large")), ElementsAre(1, 65535));
  EXPECT_THAT(Values<int64_t>(read("u4_large")), ElementsAre(1, 4294967295));
  EXPECT_EQ(read("bool").type, ElementType::kBool);
  EXPECT_THAT(Values<uint8_t>(read("bool")), ElementsAre(0, 1, 1, 1, 1, 1));
  EXPECT_THAT(Values<float>(read("big_f4")), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Values<int16_t>(read("big_i2")), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(read("scalar").shape, ElementsAre());
  EXPECT_THAT(Values<float>(read("v2")), ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(Values<float>(read("v3")), ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(read("empty").shape, ElementsAre(0, 4));
  EXPECT_THAT(Values<float>(read("one_dimension_fortran")), ElementsAre(0, 1, 2));
}

TEST(Npy, StaysMappedAfterTheReaderIsGone) {
  const Scratch scratch;
  Array array;
  {
    scratch.Write("a.npy", Npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }\n",
                               std::string("\0\0\x80?", 4)));
    array = ReadNpy(scratch / "a.npy");
  }
  EXPECT_THAT(Values<float>(array), ElementsAre(1.0f));
}

TEST(Npy, RefusesInWordsWhatItCannotRead) {
  const Scratch scratch;
  scratch.Python(R"(
import numpy as np
np.save('fortran.npy', np.asfortranarray(np.ones((2, 3))))
np.save('complex.npy', np.ones(2, 'c8'))
np.save('unsigned.npy', np.ones(2, 'u8'))
np.save('records.npy', np.zeros(2, [('a', 'f4'), ('b', 'i4')]))
np.save('objects.npy', np.array([{}, 'x'], object), allow_pickle=True)
)");
  const auto error = [&](const std::string& name) {
    return UserErrorOf([&] { ReadNpy(scratch / (name + ".npy")); });
  };
  EXPECT_THAT(error("fortran"), AllOf(HasSubstr("Fortran order"), HasSubstr("ascontiguousarray")));
  EXPECT_THAT(error("complex"), AllOf(HasSubstr("'<c8' is not supported"), HasSubstr("astype")));
  EXPECT_THAT(error("unsigned"), HasSubstr("'<u8' is not supported"));
  EXPECT_THAT(error("records"), HasSubstr("structured array"));
  EXPECT_THAT(error("objects"), HasSubstr("'|O' is not supported"));
  EXPECT_THAT(error("absent"), HasSubstr("No such file"));
  EXPECT_THAT(UserErrorOf([&] { ReadNpy(scratch.path()); }), HasSubstr("not a regular file"));
}

TEST(Npy, DoesNotBelieveAHeader) {
  const Scratch scratch;
  const auto error = [&](const std::string& bytes) {
    scratch.Write("bad.npy", bytes);
    return UserErrorOf([&] { ReadNpy(scratch / "bad.npy"); });
  };
  const std::string good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n";
  EXPECT_THAT(error(""), HasSubstr("not a .npy array"));
  EXPECT_THAT(error("PK\x03\x04 is a zip archive"), HasSubstr("not a .npy array"));
  EXPECT_THAT(error(Npy(good, "1234567")),
              AllOf(HasSubstr("needs 8 bytes but the file has 7"), HasSubstr("cut off")));
  EXPECT_THAT(error(Npy(good, "12345678", 4)), HasSubstr("version 4"));
  EXPECT_THAT(error(Npy(good, "").substr(0, 30)), HasSubstr("more than there are"));
  EXPECT_THAT(
      error(
          Npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4), }", "")),
      HasSubstr("larger than any memory"));
  EXPECT_THAT(error(Npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }", "12345678")),
              HasSubstr("negative"));
  EXPECT_THAT(
      error(
          Npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }", "")),
      HasSubstr("shape is not a tuple of numbers"));
  EXPECT_THAT(error(Npy("{'descr': '<f4', 'fortran_order': Maybe, 'shape': (2,), }", "")),
              HasSubstr("fortran_order"));
  EXPECT_THAT(error(Npy("{'descr': '<f4'}", "")), HasSubstr("absent"));
  EXPECT_THAT(error(Npy("{'descr': '<f4", "")), HasSubstr("does not end"));
}

}  // namespace
}  // namespace itwin::worker
