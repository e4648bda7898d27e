#include "agent/spool/spool_files.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::_;

class SpoolFilesTest : public ::testing::Test {
 protected:
  SpoolFilesTest() {
    EXPECT_OK(MakeDirectories(outputs_ + "/deep/er"));
    EXPECT_OK(WriteFileAtomically(directory_ / "secret", "s"));
    EXPECT_OK(WriteFileAtomically(outputs_ + "/a", "1"));
    EXPECT_OK(WriteFileAtomically(outputs_ + "/deep/er/b", "22"));
    EXPECT_EQ(symlink((directory_ / "secret").c_str(), (outputs_ + "/link").c_str()), 0);
    EXPECT_EQ(symlink("..", (outputs_ + "/deep/up").c_str()), 0);
    EXPECT_EQ(symlink("/", (outputs_ + "/root").c_str()), 0);
    EXPECT_EQ(mkfifo((outputs_ + "/pipe").c_str(), 0600), 0);
  }
  itwin::testing::TempDirectory directory_;
  const std::string outputs_ = directory_ / "outputs";
};

TEST_F(SpoolFilesTest, ListsRegularFilesOnlyAndFollowsNoLink) {
  const auto files = ListFilesBeneath(outputs_);
  ASSERT_OK(files);
  ASSERT_EQ(files->size(), 2u);
  EXPECT_EQ((*files)[0].path, "a");
  EXPECT_EQ((*files)[1].path, "deep/er/b");
  EXPECT_EQ((*files)[1].size_bytes, 2);
  EXPECT_TRUE(ListFilesBeneath(directory_ / "none")->empty());
}

TEST_F(SpoolFilesTest, OpensWhatLiesBeneath) {
  EXPECT_OK(OpenBeneath(outputs_, "deep/er/b"));
}

TEST_F(SpoolFilesTest, EveryWayOutIsClosed) {
  for (const char* path : {"../secret", "deep/../../secret", "/etc/passwd", "", ".", "..", "deep//er/b", "a/",
                           "./a"}) {
    EXPECT_THAT(OpenBeneath(outputs_, path).status(), StatusIs(absl::StatusCode::kInvalidArgument, _)) << path;
  }
  for (const char* path : {"link", "deep/up/a", "root/etc/passwd", "pipe", "deep", "none", "a/b"}) {
    EXPECT_THAT(OpenBeneath(outputs_, path).status(), StatusIs(absl::StatusCode::kNotFound, _)) << path;
  }
}

TEST_F(SpoolFilesTest, ADirectoryThatIsItselfALinkIsNotEntered) {
  ASSERT_EQ(symlink("/etc", (directory_ / "fake").c_str()), 0);
  EXPECT_FALSE(OpenBeneath(directory_ / "fake", "passwd").ok());
  EXPECT_TRUE(ListFilesBeneath(directory_ / "fake")->empty());
}

}  // namespace
}  // namespace itwin::agent
