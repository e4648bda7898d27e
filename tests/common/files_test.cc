#include "common/files.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin {
namespace {

using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::HasSubstr;

TEST(Files, AreWrittenWholeAndReadBack) {
  TempDirectory directory;
  const std::string path = directory / "a";
  ASSERT_OK(WriteFileAtomically(path, "one"));
  ASSERT_OK(WriteFileAtomically(path, "two", 0644));
  EXPECT_EQ(ReadFile(path).value(), "two");
  struct stat info;
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0644u);
  // no temporary file stays
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 1);
}

TEST(Files, LeaveNothingBehindWhenTheWriteFails) {
  TempDirectory directory;
  std::filesystem::create_directory(directory / "taken");
  std::filesystem::create_directory(directory / "taken/x");
  EXPECT_FALSE(WriteFileAtomically(directory / "taken", "x").ok());  // a directory is in the way
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(directory.path()), {}), 1);
  EXPECT_THAT(WriteFileAtomically(directory / "no/such/file", "x"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("no/such")));
}

TEST(Files, SayWhatIsWrong) {
  TempDirectory directory;
  EXPECT_THAT(ReadFile(directory / "missing"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("missing: No such file")));
  EXPECT_THAT(ReadFileRange(directory.path(), 0, 10), StatusIs(absl::StatusCode::kNotFound, HasSubstr("is a directory")));
  ASSERT_OK(WriteFileAtomically(directory / "big", std::string(100, 'x')));
  EXPECT_OK(ReadFile(directory / "big", 100));
  EXPECT_THAT(ReadFile(directory / "big", 99), StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("larger than 99")));
}

TEST(Files, MapErrorsOfTheSystemToCodes) {
  EXPECT_EQ(ErrnoStatus(ENOSPC, "f").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrnoStatus(EDQUOT, "f").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrnoStatus(EACCES, "f").code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(ErrnoStatus(ENOENT, "f").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(ErrnoStatus(EEXIST, "f").code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(ErrnoStatus(EIO, "f").code(), absl::StatusCode::kUnavailable);
  // the disk is really full
  absl::StatusOr<FileDescriptor> full = OpenFile("/dev/full", O_WRONLY);
  ASSERT_OK(full);
  EXPECT_THAT(WriteAll(full->get(), "x", "/dev/full"),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("/dev/full: No space left")));
}

TEST(Files, AreReadByRange) {
  TempDirectory directory;
  const std::string path = directory / "r";
  ASSERT_OK(WriteFileAtomically(path, "0123456789"));
  EXPECT_EQ(ReadFileRange(path, 3, 4).value(), "3456");
  EXPECT_EQ(ReadFileRange(path, 8, 100).value(), "89");
  EXPECT_EQ(ReadFileRange(path, 10, 5).value(), "");
  EXPECT_EQ(ReadFileRange(path, 99, 5).value(), "");
  EXPECT_EQ(ReadFileRange(path, 0, 0).value(), "");
}

TEST(Files, AreReadInChunksUntilTheSinkSaysNo) {
  TempDirectory directory;
  ASSERT_OK(WriteFileAtomically(directory / "c", "aabbc"));
  std::vector<std::string> chunks;
  ASSERT_OK(ReadFileChunks(directory / "c", 2, [&](absl::string_view chunk) {
    chunks.emplace_back(chunk);
    return absl::OkStatus();
  }));
  EXPECT_THAT(chunks, ::testing::ElementsAre("aa", "bb", "c"));
  EXPECT_THAT(ReadFileChunks(directory / "c", 2, [&](absl::string_view) { return absl::AbortedError("enough"); }),
              StatusIs(absl::StatusCode::kAborted, HasSubstr("enough")));
}

TEST(Files, DirectoriesAreMadeWithParents) {
  TempDirectory directory;
  EXPECT_OK(MakeDirectories(directory / "a/b/c"));
  EXPECT_OK(MakeDirectories(directory / "a/b/c"));
  EXPECT_TRUE(std::filesystem::is_directory(directory / "a/b/c"));
  ASSERT_OK(WriteFileAtomically(directory / "file", "x"));
  EXPECT_FALSE(MakeDirectories(directory / "file").ok());
  EXPECT_FALSE(MakeDirectories(directory / "file/x").ok());
}

TEST(FileDescriptor, ClosesOnceAndMoves) {
  TempDirectory directory;
  FileDescriptor file = std::move(OpenFile(directory / "x", O_WRONLY | O_CREAT)).value();
  const int fd = file.get();
  FileDescriptor other = std::move(file);
  EXPECT_EQ(other.get(), fd);
  EXPECT_GE(fcntl(fd, F_GETFD), 0);
  EXPECT_TRUE(fcntl(fd, F_GETFD) & FD_CLOEXEC);
  other = FileDescriptor();
  EXPECT_EQ(fcntl(fd, F_GETFD), -1);
}

TEST(CheckRelativePath, AcceptsWhatIsSafeBelowADirectory) {
  for (const char* path : {"a", "a/b", "a.b", "...", "..a", "a..", "model.pt", "é/ü", " ", "a b", "-x"}) {
    EXPECT_OK(CheckRelativePath(path)) << path;
  }
  EXPECT_OK(CheckRelativePath(std::string(255, 'a')));
}

TEST(CheckRelativePath, RefusesTheRestAndSaysWhy) {
  const std::pair<std::string, const char*> kTable[] = {
      {"", "is empty"},
      {"/etc/passwd", "starts with '/'"},
      {"..", "'.' or '..'"},
      {"../x", "'.' or '..'"},
      {"a/../b", "'.' or '..'"},
      {"a/..", "'.' or '..'"},
      {"./a", "'.' or '..'"},
      {"a//b", "empty part"},
      {"a/", "empty part"},
      {"a\nb", "control character"},
      {std::string("a\0b", 3), "control character"},
      {"a\x7f", "control character"},
      {"\xff", "not valid UTF-8"},
      {std::string(256, 'a'), "longer than 255"},
      {std::string(1025, '/'), "longer than 1024"},
  };
  for (const auto& [path, why] : kTable) {
    EXPECT_THAT(CheckRelativePath(path), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(why))) << path;
  }
}

TEST(IsValidUtf8, FollowsTheStandard) {
  for (const char* good : {"", "abc", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xf4\x8f\xbf\xbf", "\xef\xbf\xbf"}) {
    EXPECT_TRUE(IsValidUtf8(good)) << good;
  }
  for (const char* bad : {"\x80", "\xc3", "\xc0\x80", "\xc1\xbf", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
                          "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "\xe2\x82", "a\xffz", "\xc3("}) {
    EXPECT_FALSE(IsValidUtf8(bad)) << bad;
  }
}

}  // namespace
}  // namespace itwin
