#pragma once

#include <string>
#include <vector>

#include "absl/time/time.h"
#include "agent/scheduler/scheduler.h"
#include "agent/scheduler/slurm/slurm_text.h"

namespace itwin::agent {

// What the spool of an attempt says about whether it began, lives and has ended.
struct SpoolView {
  bool lease = false;
  int lease_restart = 0;   // the life of the SLURM job that took it
  bool exited = false;     // the script's own exit record is there
  bool cancelled = false;  // we were asked to end it
  int duplicates = 0;      // later lives that found the lease taken
  bool over_memory = false;  // the job's output has SLURM's word that it used more memory than it asked for
  std::string beat = {};   // the supervisor's sign of life; differs whenever it gave one
};

// What follows from a look at the queue, and what has to be done first.
struct Judgement {
  SchedulerReport report = {};
  // The report concludes that the attempt never began: it may be told only once its lease was taken for nobody, so that
  // this stays true.
  bool fence = false;
  bool cancel = false;           // SLURM would never start it, or start it a second time: out of its queue
  bool ask_accounting = false;   // it is gone from the queue: accounting may know more
  bool ask_nodes = false;        // which of its nodes failed
  bool record = false;           // its id is certain now
  std::vector<std::string> surplus = {};  // ids of further waiting jobs under its name
};

// One attempt as SLURM's job: a state machine over looks at the queue. No I/O, and time is an argument (of a clock that
// does not jump). Its rules:
//
//   - The name is the identity. An id is trusted when it was seen under our name in two looks `between` apart.
//   - An sbatch without an answer leaves doubt. It ends when the name turns up, or when two looks, the later one `settle`
//     after sbatch had ended, do not show it: then nothing is there, and it is submitted again.
//   - An id that vanishes before it is trusted was forgotten by the controller (killed before its state was safe).
//   - Absence from the queue is never a verdict by itself. A job that was trusted, or took its lease, and is gone, is ended
//     by its exit record, else by accounting, else it is UNKNOWN; LOST only when it is missing in two looks and no sign of
//     life came for `lost_after` of both absence and observation.
//   - A terminal state without exit record waits `record_grace` for the record (a slow file system).
//   - An attempt that never took its lease is concluded only behind a fence (see Judgement).
//   - A later life of the same job (requeue) is not the attempt any more: it is taken out of the queue.
class JobTrack {
 public:
  struct Rules {
    absl::Duration between = absl::Seconds(2);
    absl::Duration settle = absl::Seconds(10);
    absl::Duration record_grace = absl::Seconds(15);
    absl::Duration lost_after = absl::Seconds(60);
  };
  JobTrack(AttemptKey key, const Rules& rules) : key_(std::move(key)), rules_(rules) {}

  // sbatch was begun at some time; `id` when its number was trusted (both from the spool's record).
  void Restore(const std::string& id, absl::Time now);
  void Tried() { tried_ = true; }
  void NoAnswer(absl::Time ended);
  void Submitted(const std::string& id, absl::Time ended);
  void Refused() { *this = JobTrack(key_, rules_); }

  // `queue` and `accounting`: rows under our name. The look was begun at `look`; `now` is later.
  Judgement Judge(const std::vector<SlurmJobRow>& queue, const std::vector<SlurmJobRow>& accounting, const SpoolView& spool,
                  absl::Time look, absl::Time now);
  // What was told last; `told` by the caller once it is.
  const SchedulerReport& last() const { return last_; }
  void Told(const SchedulerReport& report) { last_ = report; }

  const AttemptKey& key() const { return key_; }
  const std::string& id() const { return id_; }
  bool tried() const { return tried_; }
  bool trusted() const { return trusted_; }
  bool in_doubt() const { return tried_ && id_.empty(); }
  absl::Time answered() const { return answered_; }
  std::optional<absl::Time> submitted() const { return submitted_; }  // as SLURM dates it

 private:
  Judgement Present(const SlurmJobRow& row, const SpoolView& spool, absl::Time now);
  Judgement Waiting(const SlurmJobRow& row, const SpoolView& spool, absl::Time now);
  Judgement Ended(const SlurmJobRow& row, const SpoolView& spool, absl::Time now);
  Judgement Requeued(const SlurmJobRow& row, const SpoolView& spool, absl::Time now);
  Judgement Absent(const std::vector<SlurmJobRow>& accounting, const SpoolView& spool, absl::Time look, absl::Time now);
  bool Silent(const SpoolView& spool, absl::Time since, absl::Time now);
  SchedulerReport ReportOf(SchedulerState state, std::string reason) const;
  SchedulerReport ReportOf(SchedulerState state, const SlurmJobRow& row, std::string reason) const;

  AttemptKey key_;
  Rules rules_;
  bool tried_ = false;
  std::string id_;
  bool trusted_ = false;
  absl::Time answered_ = absl::InfinitePast();  // when the last sbatch had ended
  std::optional<absl::Time> submitted_;
  absl::Time first_seen_ = absl::InfiniteFuture();
  absl::Time first_absent_ = absl::InfiniteFuture();
  int absent_looks_ = 0;
  absl::Time ended_since_ = absl::InfiniteFuture();
  absl::Time permanent_since_ = absl::InfiniteFuture();
  absl::Time last_look_ = absl::InfinitePast();
  std::string beat_;
  absl::Time beat_since_ = absl::InfiniteFuture();
  std::vector<std::string> nodes_;
  SchedulerReport last_;
};

}  // namespace itwin::agent
