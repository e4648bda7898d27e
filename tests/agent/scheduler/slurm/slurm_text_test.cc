#include "agent/scheduler/slurm/slurm_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/files.h"

namespace itwin::agent {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string Captured(const std::string& path) {
  const auto text = ReadFile(absl::StrCat(getenv("ITWIN_SOURCE"), "/tests/data/slurm/", path));
  EXPECT_TRUE(text.ok()) << path;
  return text.value_or("");
}

const SlurmJobRow* Named(const SlurmRows& rows, const std::string& name) {
  for (const SlurmJobRow& row : rows.rows) {
    if (row.name == name) return &row;
  }
  return nullptr;
}

void ExpectTheCapturedQueue(const SlurmRows& rows, bool with_more) {
  EXPECT_EQ(rows.bad, 0);
  EXPECT_EQ(rows.unrecognized, 0);
  EXPECT_EQ(rows.rows.size(), 14u);
  const SlurmJobRow* strange = Named(rows, "strange | name = with spaces, and \"quotes\"");
  ASSERT_NE(strange, nullptr);
  EXPECT_THAT(strange->nodes, ElementsAre("n1", "n2"));
  EXPECT_EQ(strange->state, SlurmState::kRunning);
  const SlurmJobRow* waits = Named(rows, "itwin-00000000000000a9-1");
  EXPECT_EQ(waits->reason, "Resources");
  EXPECT_GT(waits->started, waits->submitted);
  const SlurmJobRow* never = Named(rows, "itwin-00000000000000ab-1");
  EXPECT_EQ(never->reason, "PartitionNodeLimit");
  EXPECT_FALSE(never->started.has_value());
  const SlurmJobRow* refused = Named(rows, "itwin-00000000000000aa-1");
  EXPECT_EQ(refused->state, SlurmState::kFailed);
  EXPECT_EQ(refused->reason, "BadConstraints");
  EXPECT_THAT(refused->nodes, IsEmpty());
  if (!with_more) return;
  EXPECT_EQ(Named(rows, "itwin-00000000000000a5-1")->exit, (SlurmExit{3, 0}));
  EXPECT_EQ(Named(rows, "itwin-00000000000000a6-1")->exit, (SlurmExit{0, 9}));
  EXPECT_EQ(Named(rows, "itwin-00000000000000a8-1")->exit, (SlurmExit{0, 15}));
}

TEST(SlurmQueue, ReadsWhatSqueuePrints) {
  ExpectTheCapturedQueue(ParseQueueLong(Captured("22.05.8/squeue-O.txt")), true);
  ExpectTheCapturedQueue(ParseQueueShort(Captured("22.05.8/squeue-o.txt")), false);
}

TEST(SlurmQueue, ABadRowCostsOnlyItself) {
  const std::string good = "7\x1fitwin-a\x1fRUNNING\x1fNone\x1f" "10\x1f" "11\x1f" "12\x1fn1\x1fmain\x1f" "2\x1f" "0\x1f\n";
  const std::string torn = "8\x1fitwin-b\x1fRUNN";
  const std::string newline = "9\x1fname with\nnewline\x1fRUNNING\x1fNone\x1f" "10\x1f" "11\x1f" "12\x1fn1\x1fmain\x1f" "0\x1f" "0\x1f\n";
  const SlurmRows rows = ParseQueueLong(newline + good + torn);
  ASSERT_EQ(rows.rows.size(), 1u);
  EXPECT_EQ(rows.rows[0].id, "7");
  EXPECT_EQ(rows.rows[0].restarts, 2);
  EXPECT_EQ(rows.bad, 3);
}

TEST(SlurmQueue, ANewWordKeepsItsTextAndIsCounted) {
  const SlurmRows rows = ParseQueueLong("7\x1fx\x1fHIBERNATING\x1fNone\x1f\x1f\x1f\x1f\x1fmain\x1f" "0\x1f" "0:0\x1f\n");
  ASSERT_EQ(rows.rows.size(), 1u);
  EXPECT_EQ(rows.unrecognized, 1);
  EXPECT_EQ(rows.rows[0].word, "HIBERNATING");
  EXPECT_FALSE(IsTerminal(rows.rows[0].state));
}

TEST(SlurmQueue, ExitsOfAllVersions) {
  EXPECT_EQ(ParseExit("0:9"), (SlurmExit{0, 9}));
  EXPECT_EQ(ParseExit("139:0"), (SlurmExit{139, 0}));
  EXPECT_EQ(ParseExit("768"), (SlurmExit{3, 0}));  // raw wait status, before 23.02
  EXPECT_EQ(ParseExit("9"), (SlurmExit{0, 9}));
  for (const char* bad : {"", ":", "a:b", "1:", "-1:0", "99999999", "1:2:3"}) EXPECT_FALSE(ParseExit(bad)) << bad;
}

TEST(SlurmAccounting, ReadsLivesAndSteps) {
  const SlurmRows rows = ParseAccounting(Captured("hand-made/sacct.txt"));
  ASSERT_EQ(rows.rows.size(), 6u);
  EXPECT_EQ(rows.bad, 1);
  EXPECT_EQ(rows.rows[0].state, SlurmState::kNodeFail);
  EXPECT_EQ(rows.rows[1].state, SlurmState::kCancelled);  // "CANCELLED by 1000"
  EXPECT_TRUE(rows.rows[3].step);
  EXPECT_EQ(rows.rows[3].state, SlurmState::kOutOfMemory);
  EXPECT_EQ(rows.rows[3].id, "13");
  EXPECT_THAT(rows.rows[5].nodes, ElementsAre("n1", "n2", "n3"));
}

TEST(SlurmAccounting, ReadsWhatSacctPrints) {
  const SlurmRows rows = ParseAccounting(Captured("22.05.8/sacct.txt"));
  EXPECT_EQ(rows.bad, 0);
  EXPECT_EQ(rows.unrecognized, 0);
  EXPECT_EQ(rows.rows.size(), 12u);
  EXPECT_EQ(Named(rows, "itwin-00000000000000a5-1")->exit, (SlurmExit{3, 0}));
  EXPECT_EQ(Named(rows, "itwin-00000000000000a6-1")->exit, (SlurmExit{0, 9}));
  EXPECT_EQ(Named(rows, "itwin-00000000000000a8-1")->state, SlurmState::kCancelled);
  EXPECT_FALSE(Named(rows, "itwin-00000000000000a9-1")->ended.has_value());
  EXPECT_THAT(Named(rows, "itwin-00000000000000aa-1")->nodes, IsEmpty());  // "None assigned"
}

TEST(SlurmSubmit, FindsTheIdAmongABanner) {
  EXPECT_EQ(ParseSubmitted("17\n")->id, "17");
  EXPECT_EQ(ParseSubmitted("17;alpha\n")->cluster, "alpha");
  EXPECT_EQ(ParseSubmitted("Welcome to 2026\n42 nodes are free\n17;alpha\nbye\n")->id, "17");
  EXPECT_EQ(ParseSubmitted("5\n17\n")->id, "17");
  for (const char* bad : {"", "Submitted batch job 17", "-17", "17;", "1 7", "123456789012345678901"}) {
    EXPECT_FALSE(ParseSubmitted(bad)) << bad;
  }
}

TEST(SlurmHosts, AreExpanded) {
  EXPECT_THAT(ExpandHostList("n1"), ElementsAre("n1"));
  EXPECT_THAT(ExpandHostList("n[1-3,7],m2"), ElementsAre("m2", "n1", "n2", "n3", "n7"));
  EXPECT_THAT(ExpandHostList("jwb[0098-0101]"), ElementsAre("jwb0098", "jwb0099", "jwb0100", "jwb0101"));
  EXPECT_THAT(ExpandHostList("r[1-2]n[1-2]"), ElementsAre("r1n1", "r1n2", "r2n1", "r2n2"));
  for (const char* odd : {"n[1-", "n]1[", "n[a-b]", "n[3-1]", "n[[1]]"}) EXPECT_THAT(ExpandHostList(odd), ElementsAre(odd)) << odd;
  EXPECT_LE(ExpandHostList("n[1-2000000000]", 100).size(), 100u);
  EXPECT_LE(ExpandHostList("a[1-99999]b[1-99999]c[1-99999]", 1000).size(), 1000u);
}

TEST(SlurmSite, ReadsConfigPartitionsAndNodes) {
  auto config = ParseConfig(Captured("22.05.8/config.txt"));
  EXPECT_EQ(config["ClusterName"], "alpha");
  EXPECT_EQ(ParseVersion(config["SLURM_VERSION"]), "22.05.8");
  EXPECT_EQ(ParseConfigSeconds(config["MinJobAge"]), absl::Seconds(20));
  EXPECT_EQ(ParseConfigSeconds(config["KillWait"]), absl::Seconds(5));
  auto partitions = ParsePartitions(Captured("22.05.8/partitions.txt"));
  ASSERT_EQ(partitions.size(), 3u);
  EXPECT_TRUE(partitions[0].is_default());
  EXPECT_EQ(partitions[0].max_time().seconds(), 3600);
  EXPECT_EQ(partitions[1].name(), "short");
  AddNodeSizes(Captured("22.05.8/sinfo.txt"), &partitions);
  EXPECT_EQ(partitions[0].cpus_per_node(), 4);
  EXPECT_EQ(partitions[0].memory_mib_per_node(), 8192);

  partitions = ParsePartitions(Captured("hand-made/partitions-23.02.txt"));
  ASSERT_EQ(partitions.size(), 2u);
  EXPECT_FALSE(partitions[0].has_max_time());
  EXPECT_FALSE(partitions[1].up());
  EXPECT_EQ(partitions[1].max_nodes_per_job(), 16);
  EXPECT_EQ(partitions[1].max_time().seconds(), 86400);
  AddNodeSizes("booster\x1f" "900\x1f" "48+\x1f" "515000+\x1fgpu:a100:4(S:0-3),tmpfs:9\n", &partitions);
  EXPECT_EQ(partitions[0].gpus_per_node(), 4);
  EXPECT_EQ(partitions[0].cpus_per_node(), 48);
}

TEST(SlurmSite, KnowsNodesThatTakeNoJobForNow) {
  EXPECT_FALSE(AnyNodeOutOfUse(""));
  EXPECT_FALSE(AnyNodeOutOfUse("idle\nmixed\nallocated\ncompleting\nreserved\n"));
  EXPECT_FALSE(AnyNodeOutOfUse("idle~\nmixed-\nidle#\nallocated+\n"));  // SLURM wakes or frees them
  for (const char* state : {"down", "down*", "idle*", "drained", "draining*", "maint", "idle$", "fail", "unknown", "blocked", "idle@"}) {
    EXPECT_TRUE(AnyNodeOutOfUse(absl::StrCat("idle\n", state, "\nidle\n"))) << state;
  }
}

TEST(SlurmSite, VersionsCompare) {
  EXPECT_EQ(VersionNumber("22.05.8"), 220508);
  EXPECT_EQ(VersionNumber("20.11.9-1.el8"), 201109);
  EXPECT_GT(VersionNumber("23.11.0-0rc1"), VersionNumber("23.02.7"));
  EXPECT_EQ(VersionNumber("slurm"), 0);
  EXPECT_EQ(ParseVersion("slurm 25.05.1\n"), "25.05.1");
}

TEST(SlurmSite, MpiPluginsOfAllVersions) {
  EXPECT_THAT(ParseMpiPlugins(Captured("22.05.8/mpi-list.txt")), ElementsAre("cray_shasta", "none", "pmi2", "pmix", "pmix_v4"));
  EXPECT_THAT(ParseMpiPlugins(Captured("hand-made/mpi-list-20.11.txt")), ElementsAre("cray_shasta", "none", "pmi2", "pmix", "pmix_v3"));
}

TEST(SlurmSite, PingOfAllVersions) {
  EXPECT_TRUE(ParsePing(Captured("22.05.8/ping.txt")));
  EXPECT_TRUE(ParsePing("Slurmctld(primary) at a is DOWN\nSlurmctld(backup) at b is UP\n"));
  EXPECT_FALSE(ParsePing("Slurmctld(primary) at login is DOWN\n"));
  EXPECT_FALSE(ParsePing(""));
}

TEST(SlurmTimes, LimitsOfAllForms) {
  EXPECT_EQ(ParseTimeLimit("1-02:03:04"), absl::Hours(26) + absl::Minutes(3) + absl::Seconds(4));
  EXPECT_EQ(ParseTimeLimit("02:00:00"), absl::Hours(2));
  EXPECT_EQ(ParseTimeLimit("1:30"), absl::Seconds(90));
  EXPECT_EQ(ParseTimeLimit("7-00:00:00"), absl::Hours(168));
  EXPECT_EQ(ParseTimeLimit("2-0"), absl::Hours(48));
  EXPECT_EQ(ParseTimeLimit("5"), absl::Minutes(5));
  for (const char* none : {"UNLIMITED", "INFINITE", "NONE", "", "x", "1:2:3:4", "-5"}) EXPECT_FALSE(ParseTimeLimit(none)) << none;
}

TEST(SlurmReasons, SayWhatTheUserCanDo) {
  EXPECT_EQ(ExplainPending("Priority").kind, ReasonKind::kWaiting);
  EXPECT_THAT(ExplainPending("Resources").words, HasSubstr("(Resources)"));
  EXPECT_EQ(ExplainPending("JobHeldAdmin").kind, ReasonKind::kHeld);
  EXPECT_EQ(ExplainPending("launch failed requeued held").kind, ReasonKind::kHeld);
  for (const char* word : {"BadConstraints", "PartitionTimeLimit", "PartitionNodeLimit", "QOSMaxWallDurationPerJobLimit",
                           "AssocMaxCpuPerJobLimit", "InvalidQOS"}) {
    EXPECT_EQ(ExplainPending(word).kind, ReasonKind::kPermanent) << word;
    EXPECT_THAT(ExplainPending(word).words, HasSubstr(word));
  }
  for (const char* word : {"QOSMaxJobsPerUserLimit", "AssocGrpCpuLimit", "QOSGrpNodeLimit", "ReqNodeNotAvail, UnavailableNodes:n[1-2]",
                           "SomethingNew", ""}) {
    EXPECT_EQ(ExplainPending(word).kind, ReasonKind::kWaiting) << word;
  }
}

TEST(SlurmEnds, TellAKillAsAKill) {
  EXPECT_EQ(DescribeEnd("FAILED", "JobLaunchFailure", SlurmExit{0, 9}), "SLURM says FAILED, ended by signal 9 (KILL)");
  EXPECT_EQ(DescribeEnd("FAILED", "NonZeroExitCode", SlurmExit{3, 0}), "SLURM says FAILED (NonZeroExitCode), exit code 3");
  EXPECT_EQ(DescribeEnd("NODE_FAIL", "None", std::nullopt), "SLURM says NODE_FAIL");
  EXPECT_EQ(CauseOfState(SlurmState::kCancelled, false), v1::END_CAUSE_CANCELLED_EXTERNALLY);
  EXPECT_EQ(CauseOfState(SlurmState::kCancelled, true), v1::END_CAUSE_CANCELLED);
  EXPECT_EQ(CauseOfState(SlurmState::kTimeout, false), v1::END_CAUSE_TIME_LIMIT);
  EXPECT_EQ(CauseOfState(SlurmState::kDeadline, false), v1::END_CAUSE_DEADLINE) << "never goes on";
  EXPECT_EQ(ParseSlurmState("CANCELLED by 1000"), SlurmState::kCancelled);
  EXPECT_EQ(ParseSlurmState("CANCELLED+"), SlurmState::kCancelled);
}

TEST(SlurmRefusals, AreToldFromDoubt) {
  EXPECT_TRUE(IsRefusal("Batch job submission failed: Requested node configuration is not available"));
  EXPECT_TRUE(IsRefusal("Batch job submission failed: Invalid account or account/partition combination specified"));
  EXPECT_FALSE(IsRefusal("Batch job submission failed: Socket timed out on send/recv operation"));
  EXPECT_FALSE(IsRefusal("Unable to contact slurm controller (connect failure)"));
  EXPECT_TRUE(IsRefusedForNow("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"));
  EXPECT_FALSE(IsRefusal("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"));
}

// Random bytes, and captured text with bytes changed, cut and doubled: every parser returns, and no row is made of
// anything but a whole line with the right number of fields.
TEST(SlurmFuzz, NothingBreaksAParser) {
  const unsigned seed = 20261125;
  std::mt19937 random(seed);
  const std::vector<std::string> seeds = {
      Captured("22.05.8/squeue-O.txt"), Captured("22.05.8/squeue-o.txt"), Captured("22.05.8/config.txt"),
      Captured("22.05.8/partitions.txt"), Captured("22.05.8/sinfo.txt"), Captured("22.05.8/mpi-list.txt"),
      Captured("hand-made/sacct.txt"), Captured("22.05.8/ping.txt"), "17;alpha\n", "n[1-3,08-10],m2", ""};
  for (int round = 0; round < 4000; ++round) {
    std::string text = seeds[random() % seeds.size()];
    const int changes = static_cast<int>(random() % 20);
    for (int i = 0; i < changes && !text.empty(); ++i) {
      const size_t at = random() % text.size();
      switch (random() % 4) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, random() % 40);
          break;
        case 2:
          text.insert(at, text.substr(random() % text.size(), random() % 60));
          break;
        default:
          text.insert(at, 1, "\x1f\n[],-=:;| %"[random() % 11]);
      }
    }
    if (text.empty()) {
      for (int i = 0; i < 300; ++i) text.push_back(static_cast<char>(random()));
    }
    for (const SlurmRows& rows : {ParseQueueLong(text), ParseQueueShort(text), ParseAccounting(text)}) {
      for (const SlurmJobRow& row : rows.rows) {
        EXPECT_FALSE(row.id.empty()) << "seed " << seed << " round " << round;
        EXPECT_EQ(row.name.find('\n'), std::string::npos);
        EXPECT_GE(row.restarts, 0);
        EXPECT_LE(row.nodes.size(), 10'000u);
        if (row.state == SlurmState::kUnrecognized) {
          EXPECT_FALSE(IsTerminal(row.state));
        }
        (void)ExplainPending(row.reason);
        (void)DescribeEnd(row.word, row.reason, row.exit);
      }
    }
    (void)ParseConfig(text);
    std::vector<v1::Partition> partitions = ParsePartitions(text);
    AddNodeSizes(text, &partitions);
    (void)ParseMpiPlugins(text);
    (void)ParsePing(text);
    (void)ParseVersion(text);
    (void)ParseSubmitted(text);
    (void)ParseTimeLimit(text);
    (void)ExpandHostList(text, 1000);
  }
}

}  // namespace
}  // namespace itwin::agent
