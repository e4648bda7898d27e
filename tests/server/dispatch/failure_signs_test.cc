#include "server/dispatch/failure_signs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace itwin::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

const std::vector<std::string> kTwo = {"n1", "n2"};

TEST(ReadSigns, FindsTheFirstRankThatALauncherComplainsOf) {
  struct Row {
    const char* text;
    std::optional<int> rank;
    const char* host;
  };
  const Row rows[] = {
      {"srun: error: n2: task 3: Exited with exit code 1\nsrun: error: n1: task 0: Terminated", 3, "n2"},
      {"srun: error: gpu-07.cluster: tasks 4-7: Killed", 4, "gpu-07.cluster"},
      {"mpirun noticed that process rank 1 with PID 12 on node n2 exited on signal 9 (Killed).", 1, "n2"},
      {"MPI_ABORT was invoked on rank 5 in communicator MPI_COMM_WORLD", 5, ""},
      {"srun: error: Unable to create step for job 7: Job/step already completing or completed", std::nullopt, ""},
      {"the program failed in task 3 on its own", std::nullopt, ""},
      {"", std::nullopt, ""},
  };
  for (const Row& row : rows) {
    const FailureSigns signs = ReadSigns(row.text, kTwo);
    EXPECT_EQ(signs.rank, row.rank) << row.text;
    EXPECT_EQ(signs.host, row.host) << row.text;
    EXPECT_EQ(signs.hardware, "") << row.text;
  }
}

TEST(ReadSigns, BrokenHardwareIsToldFromABrokenProgram) {
  for (const char* broken :
       {"RuntimeError: CUDA error: uncorrectable ECC error encountered", "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.",
        "NCCL WARN unhandled cuda error (run with NCCL_DEBUG=INFO for details)", "ncclUnhandledCudaError: Unhandled System Error",
        "[n2:01234] Signal: Bus error (7)", "./run.sh: line 3:   812 Bus error               (core dumped) ./a.out",
        "Bus error (core dumped)", "Bus error"}) {
    const FailureSigns signs = ReadSigns(std::string("epoch 3\n") + broken + "\nbye", {"n1"});
    EXPECT_EQ(signs.hardware, broken);
    EXPECT_EQ(signs.bad_node, "n1") << "the only one there was";
  }
  for (const char* fine : {"ValueError: the school bus error rate is 3 %", "error: ECC is off", "out of memory", "Segmentation fault"}) {
    EXPECT_EQ(ReadSigns(fine, {"n1"}).hardware, "") << fine;
  }
}

TEST(ReadSigns, BlamesTheNodeThatTheLineNamesAndNoneWhenNobodyDoes) {
  EXPECT_EQ(ReadSigns("n2: uncorrectable ECC error", kTwo).bad_node, "n2");
  EXPECT_EQ(ReadSigns("n22: uncorrectable ECC error", kTwo).bad_node, "") << "n22 is not n2";
  EXPECT_EQ(ReadSigns("uncorrectable ECC error", kTwo).bad_node, "");
  EXPECT_EQ(ReadSigns("uncorrectable ECC error\nsrun: error: n1: task 0: Exited with exit code 1", kTwo).bad_node, "n1");
  EXPECT_EQ(ReadSigns("srun: error: n1: task 0: Bus error (core dumped)", kTwo).bad_node, "n1");
  EXPECT_THAT(ReadSigns(std::string(5000, 'x') + " uncorrectable ecc", {}).hardware, SizeIs(200));
}

TEST(NodesToAvoid, NewestFirstCappedAndNeverTooMany) {
  EXPECT_THAT(NodesToAvoid({}, {{"n1"}, {}, {"n2", "n1"}}, 1, 0), ElementsAre("n2", "n1"));
  EXPECT_THAT(NodesToAvoid({"n9"}, {{"n1"}, {"n9"}}, 1, 0), ElementsAre("n9", "n1"));
  EXPECT_THAT(NodesToAvoid({}, {{"n1"}, {"n2"}}, 2, 3), ElementsAre("n2")) << "two have to be left";
  EXPECT_THAT(NodesToAvoid({}, {{"n1"}}, 3, 3), IsEmpty());
  EXPECT_THAT(NodesToAvoid({"n3"}, {{"n1"}}, 1, 2), ElementsAre("n3")) << "the user's own stay, whatever is left";
  std::vector<std::string> many;
  for (int i = 0; i < 100; ++i) many.push_back("n" + std::to_string(i));
  EXPECT_THAT(NodesToAvoid({}, {many}, 1, 0), SizeIs(kMaxAvoidedNodes));
}

}  // namespace
}  // namespace itwin::server
