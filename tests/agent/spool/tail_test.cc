#include "agent/spool/tail.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <random>

#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::HasSubstr;

class TailTest : public ::testing::Test {
 protected:
  void Append(const std::string& text) {
    FileDescriptor file = *OpenFile(path_, O_WRONLY | O_CREAT | O_APPEND);
    ASSERT_OK(WriteAll(file.get(), text, path_));
  }
  TailChunk Read(bool lines, int64_t max = kMaxChunkBytes) {
    auto chunk = ReadTail(path_, lines, max, &position_);
    EXPECT_OK(chunk);
    return chunk.ok() ? *std::move(chunk) : TailChunk();
  }
  TempDirectory directory_;
  std::string path_ = directory_ / "file";
  TailPosition position_;
};

TEST_F(TailTest, AMissingFileIsNotFound) {
  EXPECT_THAT(ReadTail(path_, true, 100, &position_), StatusIs(absl::StatusCode::kNotFound, HasSubstr(path_)));
}

TEST_F(TailTest, ALineCountsWhenItsNewlineIsThere) {
  Append("{\"a\":1}\n{\"b\":");
  EXPECT_EQ(Read(true).data, "{\"a\":1}\n");
  EXPECT_TRUE(Read(true).empty());
  Append("2}\n");
  const TailChunk chunk = Read(true);
  EXPECT_EQ(chunk.data, "{\"b\":2}\n");
  EXPECT_EQ(chunk.offset, 8);
  EXPECT_FALSE(chunk.more);
}

TEST_F(TailTest, RawBytesComeAsTheyAre) {
  Append(std::string("ab\0c", 4));
  EXPECT_EQ(Read(false, 3).data, std::string("ab\0", 3));
  EXPECT_EQ(Read(false, 3).data, "c");
}

TEST_F(TailTest, ALineOfExactlyTheLimitIsKeptAndOneMoreByteIsLeftOut) {
  const std::string fits = std::string(kMaxChunkBytes - 1, 'x') + "\n";
  const std::string too_long = std::string(kMaxChunkBytes, 'y') + "\n";
  Append(fits + too_long + "z\n");
  EXPECT_EQ(Read(true).data, fits);
  std::string rest, notes;
  for (int i = 0; i < 5; ++i) {
    const TailChunk chunk = Read(true);
    rest += chunk.data;
    notes += chunk.note;
    if (!chunk.data.empty()) {
      EXPECT_EQ(chunk.offset, static_cast<int64_t>(fits.size() + too_long.size()));
    }
  }
  EXPECT_EQ(rest, "z\n");
  EXPECT_THAT(notes, HasSubstr("a line of 1048577 bytes was left out"));
}

TEST_F(TailTest, AHugeLineThatIsStillGrowingDoesNotStallWhatFollows) {
  for (int i = 0; i < 9; ++i) {
    Append(std::string(kMaxChunkBytes / 2, 'x'));
    EXPECT_TRUE(Read(true).data.empty());
  }
  Append("\nok\n");
  std::string data;
  for (int i = 0; i < 4; ++i) data += Read(true).data;
  EXPECT_EQ(data, "ok\n");
  EXPECT_TRUE(Read(true).empty());
}

TEST_F(TailTest, ALineLongerThanTheBudgetComesWhole) {
  Append(std::string(1000, 'x') + "\ny\n");
  EXPECT_EQ(Read(true, 100).data.size(), 1001u);
  EXPECT_EQ(Read(true, 100).data, "y\n");
}

TEST_F(TailTest, ACutFileIsSaidOnceAndReadOnFromTheNextLine) {
  Append("one\ntwo\nthree\n");
  EXPECT_EQ(Read(true).data.size(), 14u);
  std::filesystem::resize_file(path_, 4);
  EXPECT_THAT(Read(true).note, HasSubstr("cut to 4 bytes after 14 were read"));
  EXPECT_TRUE(Read(true).empty());
  Append("a long line that runs over the place\nnext\n");
  const TailChunk chunk = Read(true);
  EXPECT_EQ(chunk.data, "next\n");
}

TEST_F(TailTest, RandomAppendsArriveExactlyOnceInOrder) {
  std::mt19937 random(20240711);
  std::string written, lines_read, raw_read;
  TailPosition raw;
  for (int step = 0; step < 3000; ++step) {
    std::string piece;
    for (unsigned n = random() % 40; n > 0; --n) piece += random() % 7 == 0 ? '\n' : static_cast<char>('a' + random() % 26);
    Append(piece);
    written += piece;
    if (random() % 3 == 0) {
      const TailChunk chunk = Read(true, 1 + static_cast<int64_t>(random() % 200));
      if (!chunk.data.empty()) {
        EXPECT_EQ(chunk.offset, static_cast<int64_t>(lines_read.size()));
      }
      lines_read += chunk.data;
      raw_read += ReadTail(path_, false, 1 + static_cast<int64_t>(random() % 200), &raw)->data;
    }
  }
  while (true) {
    const TailChunk chunk = Read(true);
    if (chunk.data.empty()) break;
    lines_read += chunk.data;
  }
  while (raw_read.size() < written.size()) raw_read += ReadTail(path_, false, 1000, &raw)->data;
  EXPECT_EQ(lines_read, written.substr(0, written.rfind('\n') + 1));
  EXPECT_EQ(raw_read, written);
  EXPECT_EQ(WholeLinesSize(path_), static_cast<int64_t>(lines_read.size()));
}

TEST_F(TailTest, ALinkOrPipeIsNotRead) {
  ASSERT_EQ(symlink("/etc/passwd", path_.c_str()), 0);
  EXPECT_FALSE(ReadTail(path_, false, 100, &position_).ok());
}

}  // namespace
}  // namespace itwin::agent
