#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "agent/scheduler/launch.h"
#include "agent/scheduler/scheduler.h"
#include "agent/scheduler/slurm/batch_script.h"
#include "agent/scheduler/slurm/job_track.h"
#include "agent/scheduler/slurm/slurm_commands.h"

namespace itwin::agent {

// Runs attempts as SLURM jobs of this user, one job for each attempt, whose name is `itwin-<attempt>`.
//
// Submit records its intent in the spool (slurm.json), looks the name up, and calls sbatch only when there is nothing; a
// failed or silent sbatch is in doubt until a later look clears it. Query is one `squeue` for all attempts, however
// many; sacct is asked only about attempts that the queue has lost, where accounting is on. What follows from a look
// is decided by JobTrack.
//
// Thread-safe, as Scheduler asks of one without a change_fd. The lock is never held during a command.
class SlurmScheduler : public Scheduler {
 public:
  struct Options {
    std::string root = {};
    std::string path = {};            // where SLURM's commands are looked for, as PATH
    std::string name_prefix = "itwin-";
    std::string agent_program = {};   // for the checks that run jobs
    LaunchOptions launch = {};
    JobTrack::Rules rules = {};
    // Asked before each step that changes something at the site; an error stops it (another agent has taken over).
    std::function<absl::Status()> may_act = [] { return absl::OkStatus(); };
  };
  // Asks SLURM nothing yet: its controller may be down. kNotFound: no SLURM on this host.
  static absl::StatusOr<std::unique_ptr<SlurmScheduler>> Create(Options options);

  SchedulerDescription Describe() override;
  void LearnSite() override { (void)KnownFacts(); }
  absl::Status Submit(const Submission& submission) override;
  absl::StatusOr<std::map<AttemptKey, SchedulerReport>> Query(const std::vector<AttemptKey>& keys) override;
  absl::Status Cancel(const AttemptKey& key) override;
  absl::StatusOr<std::string> DefaultLauncher() override;
  SchedulerReport Recall(const AttemptKey& key) override;
  void Forget(const AttemptKey& key) override;
  int change_fd() const override { return -1; }
  void Diagnose(const v1::DiagnoseRequest& request, const std::function<bool(const v1::CheckResult&)>& emit) override;

  // What SLURM said that could not be read: rows, and states nobody has heard of. Since the start.
  int64_t bad_rows() const;
  int64_t unrecognized_states() const;
  int64_t calls() const { return commands_.calls(); }

  // Of the site; read once and again from time to time.
  struct Facts {
    v1::SlurmFacts facts = {};
    BatchSite site = {};
    absl::Time read = absl::InfinitePast();
    std::string preempt_mode = {};
    bool requeue_by_default = false;
  };
  absl::StatusOr<std::shared_ptr<const Facts>> ReadFacts();

 private:
  struct Look {
    absl::Time begun;
    std::map<std::string, std::vector<SlurmJobRow>> by_name;
  };
  using LookPointer = std::shared_ptr<const Look>;

  SlurmScheduler(Options options, SlurmCommands::Programs programs)
      : options_(std::move(options)), commands_(std::move(programs)) {}

  std::string NameOf(const AttemptKey& key) const { return options_.name_prefix + key.text(); }
  AttemptDirectory DirectoryOf(const AttemptKey& key) const { return AttemptDirectory(options_.root, key); }
  absl::Status CheckController();
  absl::StatusOr<LookPointer> LookBegunAfter(absl::Time time);
  absl::StatusOr<LookPointer> TakeLook();
  absl::StatusOr<CommandOutput> RunQueue(bool long_format);
  absl::Status Preflight(const Submission& submission, const std::vector<std::string>& options, const Facts& facts);
  bool NodesAreOutOfUse(const std::string& partition);
  absl::Status RunSbatch(const Submission& submission, const std::vector<std::string>& options, const Facts& facts);
  absl::StatusOr<std::shared_ptr<const Facts>> KnownFacts();
  // Brings the track of an attempt into memory, from the spool if an earlier agent made it; not under the lock.
  void Load(const AttemptKey& key) ABSL_LOCKS_EXCLUDED(mu_);
  JobTrack& TrackOf(const AttemptKey& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::map<std::string, std::vector<SlurmJobRow>> AskAccounting(const std::vector<AttemptKey>& keys);
  std::vector<std::string> FailedOf(const std::vector<std::string>& nodes);
  bool Fence(const AttemptKey& key);
  SpoolView ViewSpool(const AttemptKey& key) const;
  void Record(const AttemptKey& key, const std::string& id, std::optional<absl::Time> submitted);
  v1::CheckResult TryWorker(const v1::DiagnoseRequest& request, const Facts& facts, std::optional<v1::CheckResult>* clock);
  static std::string LastOutput(const AttemptDirectory& directory);
  absl::Status CancelJob(const AttemptKey& key, const std::string& id);

  const Options options_;
  SlurmCommands commands_;

  mutable absl::Mutex mu_;
  std::map<AttemptKey, JobTrack> tracks_ ABSL_GUARDED_BY(mu_);
  LookPointer look_ ABSL_GUARDED_BY(mu_);
  bool looking_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time failed_look_begun_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Status failed_look_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<const Facts> facts_ ABSL_GUARDED_BY(mu_);
  bool reading_facts_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time controller_up_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  std::map<std::string, absl::Time> shapes_ ABSL_GUARDED_BY(mu_);  // that passed a preflight, and when
  bool short_queue_ ABSL_GUARDED_BY(mu_) = false;  // squeue knows no suffixes
  absl::Time next_accounting_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  std::map<std::string, std::vector<SlurmJobRow>> accounting_ ABSL_GUARDED_BY(mu_);  // of the last time it was asked
  int64_t bad_rows_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t unrecognized_states_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace itwin::agent
