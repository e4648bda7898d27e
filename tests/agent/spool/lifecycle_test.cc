#include "agent/spool/lifecycle.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

TEST(Lifecycle, ReadsWhatItWrote) {
  const std::string text =
      RenderStarted({.time = absl::FromUnixMillis(1500), .host = "n1", .pid = 7, .scheduler_id = "42"}) + "\n" +
      RenderDuplicate(absl::FromUnixMillis(1600), "n2") + "\n" +
      RenderExited({.time = absl::FromUnixMillis(2500), .exit_code = 85, .cpu_seconds = 1.5, .max_rss_bytes = 1024,
                    .cause = "time_limit", .message = "bad \xff text"}) + "\n";
  const Lifecycle out = ParseLifecycle(text);
  ASSERT_EQ(out.started.size(), 1u);
  EXPECT_EQ(out.started[0].scheduler_id, "42");
  EXPECT_EQ(out.started[0].time, absl::FromUnixMillis(1500));
  EXPECT_EQ(out.duplicates, 1);
  ASSERT_TRUE(out.exited.has_value());
  EXPECT_EQ(out.exited->exit_code, 85);
  EXPECT_EQ(out.exited->cause, "time_limit");
  EXPECT_EQ(out.bad_lines, 0);
}

TEST(Lifecycle, BadLinesAreCountedAndTornOnesAreNotThereYet) {
  const Lifecycle out = ParseLifecycle(
      "garbage\n[1]\n{\"event\":\"dance\"}\n{\"event\":\"started\",\"t\":\"x\",\"pid\":1e300}\n\n\xff\xfe\n{\"event\":\"exited\"");
  EXPECT_EQ(out.bad_lines, 4);
  EXPECT_EQ(out.started.size(), 1u);
  EXPECT_FALSE(out.exited.has_value());
}

TEST(AppendLine, ClosesATornLineFirst) {
  const itwin::testing::TempDirectory directory;
  const std::string path = directory / "lifecycle.jsonl";
  ASSERT_OK(WriteFileAtomically(path, "{\"event\":\"sta"));
  ASSERT_OK(AppendLine(path, RenderExited({.exit_code = 1})));
  const Lifecycle out = ReadLifecycle(path);
  EXPECT_EQ(out.bad_lines, 1);
  ASSERT_TRUE(out.exited.has_value());
}

TEST(AppendLine, AFullDiskIsResourceExhausted) {
  EXPECT_THAT(AppendLine("/dev/full", "x"),
              itwin::testing::StatusIs(absl::StatusCode::kResourceExhausted, ::testing::HasSubstr("/dev/full")));
}

}  // namespace
}  // namespace itwin::agent
