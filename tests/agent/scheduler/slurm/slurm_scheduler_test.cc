// The contract of every Scheduler, against SlurmScheduler on a real cluster. Runs on a login node as an ordinary user;
// tests/e2e/slurm_agent_test.py brings up the cluster and runs it. ITWIN_TEST_SLURM_ROOT: a directory all nodes see.
#include "agent/scheduler/slurm/slurm_scheduler.h"

#include <filesystem>

#include "absl/strings/str_cat.h"
#include "common/ids.h"
#include "tests/contract/scheduler_contract.h"

namespace itwin::testing {
namespace {

using agent::SchedulerReport;
using agent::SchedulerState;

// Submits with what leaves room for `slots` at once on the cluster, and, as the control loop does, again what SLURM turned out not
// to have.
class PersistentScheduler : public agent::Scheduler {
 public:
  PersistentScheduler(std::unique_ptr<agent::SlurmScheduler> slurm, int slots) : slurm_(std::move(slurm)), slots_(slots) {}

  agent::SchedulerDescription Describe() override { return slurm_->Describe(); }
  absl::Status Submit(const agent::Submission& submission) override {
    agent::Submission ours = submission;
    ours.time = absl::Minutes(5);
    // One node of four CPUs.
    ours.slurm.add_options("--nodelist=n1");
    if (ours.ranks_per_node <= 4) ours.cpus_per_rank = 4 / slots_;
    absl::Status status;
    WaitUntil([&] {
      status = slurm_->Submit(ours);
      if (!absl::IsUnavailable(status)) return true;
      (void)slurm_->Query({ours.directory.key()});
      return false;
    }, absl::Seconds(60));
    return status;
  }
  absl::StatusOr<std::map<AttemptKey, SchedulerReport>> Query(const std::vector<AttemptKey>& keys) override {
    absl::StatusOr<std::map<AttemptKey, SchedulerReport>> reports;
    WaitUntil([&] { return (reports = slurm_->Query(keys)).ok(); }, absl::Seconds(30));
    return reports;
  }
  absl::Status Cancel(const AttemptKey& key) override { return slurm_->Cancel(key); }
  int change_fd() const override { return -1; }
  void Diagnose(const agent::v1::DiagnoseRequest&, const std::function<bool(const agent::v1::CheckResult&)>&) override {}

 private:
  std::unique_ptr<agent::SlurmScheduler> slurm_;
  const int slots_;
};

class SlurmHarness : public SchedulerHarness {
 public:
  // `path`: where SLURM's commands are looked for first.
  SlurmHarness(int slots, std::string path)
      : slots_(slots), path_(std::move(path)), prefix_("itwin-" + RandomHex(4) + "-"),
        root_(absl::StrCat(getenv("ITWIN_TEST_SLURM_ROOT"), "/", RandomHex(6))) {
    EXPECT_OK(MakeDirectories(root_));
    Restart();
  }
  ~SlurmHarness() override {
    for (const AttemptKey& key : agent::ListAttemptDirectories(root_).value_or(std::vector<AttemptKey>())) {
      (void)scheduler_->Cancel(key);
    }
  }
  agent::Scheduler& scheduler() override { return *scheduler_; }
  void Restart() override {
    auto made = agent::SlurmScheduler::Create({.root = root_, .path = path_, .name_prefix = prefix_});
    ITWIN_CHECK(made.ok());
    scheduler_ = std::make_unique<PersistentScheduler>(*std::move(made), slots_);
  }
  const std::string& root() const override { return root_; }

 private:
  const int slots_;
  const std::string path_;
  const std::string prefix_;  // names of other tests stay in the queue for a while
  const std::string root_;
  std::unique_ptr<PersistentScheduler> scheduler_;
};

// Every second sbatch does its work and loses its answer; every fifth squeue fails.
std::string FaultyCommands() {
  const std::string directory = absl::StrCat(getenv("ITWIN_TEST_SLURM_ROOT"), "/faulty-", RandomHex(4));
  EXPECT_OK(MakeDirectories(directory));
  const auto write = [&](const std::string& name, int every, const std::string& harm) {
    EXPECT_OK(WriteFileAtomically(absl::StrCat(directory, "/", name),
                                  absl::StrCat("#!/bin/bash\ncase \" $* \" in *\" --test-only \"*) exec /usr/bin/", name, " \"$@\";; esac\n",
                                               "echo x >> ", directory, "/", name, ".count\nn=$(wc -l < ", directory, "/", name,
                                               ".count)\nif [ $((n % ", every, ")) = 0 ]; then\n", harm, "\nfi\nexec /usr/bin/", name, " \"$@\"\n"),
                                  0700));
  };
  write("sbatch", 2, "/usr/bin/sbatch \"$@\" > /dev/null; echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1");
  write("squeue", 5, "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1");
  return directory;
}

INSTANTIATE_TEST_SUITE_P(
    Real, SchedulerContract,
    ::testing::Values(SchedulerContractParam{"Slurm", [](int slots) { return std::make_unique<SlurmHarness>(slots, "/usr/bin"); }},
                      SchedulerContractParam{"SlurmWithFaults",
                                             [](int slots) { return std::make_unique<SlurmHarness>(slots, FaultyCommands()); }}),
    [](const auto& param) { return param.param.name; });

}  // namespace
}  // namespace itwin::testing
