#include "agent/scheduler/oom_counter.h"

#include <gtest/gtest.h>

#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

class OomCounterTest : public ::testing::Test {
 protected:
  void Write(const std::string& path, const std::string& text) {
    const std::string whole = directory_ / path;
    ASSERT_OK(MakeDirectories(whole.substr(0, whole.rfind('/'))));
    ASSERT_OK(WriteFileAtomically(whole, text));
  }
  OomCounter Counter() { return OomCounter(directory_ / "proc", directory_ / "cgroup"); }

  testing::TempDirectory directory_;
};

TEST_F(OomCounterTest, CountsTheOwnGroupOfVersion2) {
  Write("proc/self/cgroup", "0::/user.slice/job\n");
  Write("proc/vmstat", "oom_kill 99\n");
  Write("cgroup/user.slice/job/memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n");
  EXPECT_EQ(Counter().Read(), 2);
  EXPECT_TRUE(Counter().of_group());
}

TEST_F(OomCounterTest, CountsTheOwnGroupOfVersion1) {
  Write("proc/self/cgroup", "5:cpu:/x\n4:memory:/job\n0::/\n");
  Write("cgroup/memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n");
  EXPECT_EQ(Counter().Read(), 7);
}

TEST_F(OomCounterTest, FindsTheGroupOfAContainerAtTheRoot) {
  Write("proc/self/cgroup", "0::/docker/0123\n");
  Write("cgroup/memory.events", "oom_kill 4\n");
  EXPECT_EQ(Counter().Read(), 4);
}

TEST_F(OomCounterTest, FallsBackToTheMachineAndToNothing) {
  Write("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(Counter().Read(), 0);
  Write("proc/vmstat", "nr_free_pages 1\noom_kill 5\n");
  EXPECT_EQ(Counter().Read(), 5);
  EXPECT_FALSE(Counter().of_group());
}

}  // namespace
}  // namespace itwin::agent
