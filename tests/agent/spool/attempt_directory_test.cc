#include "agent/spool/attempt_directory.h"

#include <gtest/gtest.h>

#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

// A directory is a checkpoint of our worker from the moment it has its final name.
TEST(AttemptDirectoryTest, OnlyAWholeCheckpointCounts) {
  itwin::testing::TempDirectory root;
  const AttemptDirectory attempt(root.path(), *AttemptKey::Parse("7f3c0a1b2c3d4e5f-1"));
  const std::string at = attempt.checkpoints_path();
  EXPECT_FALSE(attempt.HasCheckpoint());
  ASSERT_OK(MakeDirectories(at + "/step-150.partial"));
  EXPECT_FALSE(attempt.HasCheckpoint());
  ASSERT_OK(WriteFileAtomically(at + "/step-150.partial/manifest.json", "{}"));
  EXPECT_FALSE(attempt.HasCheckpoint()) << "the manifest is there, the name is not";
  ASSERT_OK(MakeDirectories(at + "/step-200"));
  EXPECT_FALSE(attempt.HasCheckpoint()) << "no manifest";
  ASSERT_OK(WriteFileAtomically(at + "/step-200/manifest.json", "{}"));
  EXPECT_TRUE(attempt.HasCheckpoint());
}

TEST(AttemptDirectoryTest, AnyFileOfAnotherProgramCounts) {
  itwin::testing::TempDirectory root;
  const AttemptDirectory attempt(root.path(), *AttemptKey::Parse("7f3c0a1b2c3d4e5f-2"));
  ASSERT_OK(MakeDirectories(attempt.checkpoints_path()));
  ASSERT_OK(WriteFileAtomically(attempt.checkpoints_path() + "/model.tmp", "1"));
  ASSERT_OK(WriteFileAtomically(attempt.checkpoints_path() + "/.hidden", "1"));
  EXPECT_FALSE(attempt.HasCheckpoint());
  ASSERT_OK(WriteFileAtomically(attempt.checkpoints_path() + "/model.pt", "1"));
  EXPECT_TRUE(attempt.HasCheckpoint());
}

}  // namespace
}  // namespace itwin::agent
