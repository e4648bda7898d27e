#include "agent/worker/data/idx.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/data/array_values.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Scratch;
using testing::UserErrorOf;
using testing::Values;

std::string Idx(char type, std::vector<unsigned> sizes, const std::string& elements) {
  std::string text = {0, 0, type, static_cast<char>(sizes.size())};
  for (const unsigned size : sizes) {
    for (int shift = 24; shift >= 0; shift -= 8) text += static_cast<char>(size >> shift & 0xff);
  }
  return text + elements;
}

TEST(Idx, ReadsBytesAndTurnsWideElementsRound) {
  const Scratch scratch;
  const Array bytes = ReadIdx(scratch.Write("a", Idx(8, {2, 3}, "abcdef")));
  EXPECT_THAT(bytes.shape, ElementsAre(2, 3));
  EXPECT_THAT(Values<char>(bytes), ElementsAre('a', 'b', 'c', 'd', 'e', 'f'));
  EXPECT_THAT(
      Values<int16_t>(ReadIdx(scratch.Write("b", Idx(11, {2}, std::string("\1\2\0\3", 4))))),
      ElementsAre(0x102, 3));
  EXPECT_THAT(Values<float>(ReadIdx(scratch.Write("c", Idx(13, {1}, std::string("?\x80\0\0", 4))))),
              ElementsAre(1.0f));
}

TEST(Idx, RefusesInWordsWhatItCannotRead) {
  const Scratch scratch;
  const auto error = [&](const std::string& bytes) {
    scratch.Write("bad", bytes);
    return UserErrorOf([&] { ReadIdx(scratch / "bad"); });
  };
  EXPECT_THAT(error(""), HasSubstr("not an IDX file"));
  EXPECT_THAT(error("hello"), HasSubstr("not an IDX file"));
  EXPECT_THAT(error("\x1f\x8b\x08 and so on"), HasSubstr("gunzip"));
  EXPECT_THAT(error(Idx(7, {1}, "a")), HasSubstr("type 7"));
  EXPECT_THAT(error(Idx(8, {2, 3}, "abcde")), HasSubstr("needs 6 bytes but the file has 5"));
  EXPECT_THAT(error(std::string("\0\0\x08\x03\0\0", 6)), HasSubstr("ends inside its IDX header"));
  EXPECT_THAT(error(Idx(8, {0xffffffff, 0xffffffff, 0xffffffff}, "")),
              HasSubstr("larger than any memory"));
}

}  // namespace
}  // namespace itwin::worker
