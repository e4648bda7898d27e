#include "agent/scheduler/slurm/job_track.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace itwin::agent {
namespace {

bool NeverStarted(const SlurmJobRow& row) { return row.nodes.empty(); }

// The one that is or was running before one that waits, before one that is over; among those the newest.
bool BetterThan(const SlurmJobRow& a, const SlurmJobRow& b) {
  const auto rank = [](const SlurmJobRow& row) {
    if (IsTerminal(row.state)) return 0;
    return row.state == SlurmState::kPending || row.state == SlurmState::kHeld ? 1 : 2;
  };
  if (rank(a) != rank(b)) return rank(a) > rank(b);
  return a.submitted.value_or(absl::InfinitePast()) > b.submitted.value_or(absl::InfinitePast());
}

}  // namespace

void JobTrack::Restore(const std::string& id, absl::Time now) {
  tried_ = true;
  id_ = id;
  trusted_ = !id.empty();
  answered_ = now;
}

void JobTrack::NoAnswer(absl::Time ended) {
  answered_ = ended;
  first_absent_ = absl::InfiniteFuture();
  absent_looks_ = 0;
}

void JobTrack::Submitted(const std::string& id, absl::Time ended) {
  NoAnswer(ended);
  id_ = id;
  trusted_ = false;
  first_seen_ = absl::InfiniteFuture();
  last_ = ReportOf(SchedulerState::kPending, "given to SLURM");
}

SchedulerReport JobTrack::ReportOf(SchedulerState state, std::string reason) const {
  SchedulerReport out{.state = state, .id = id_, .reason = std::move(reason)};
  out.nodes = nodes_;
  return out;
}

SchedulerReport JobTrack::ReportOf(SchedulerState state, const SlurmJobRow& row, std::string reason) const {
  SchedulerReport out = ReportOf(state, std::move(reason));
  out.word = row.word;
  if (state == SchedulerState::kPending) out.expected_start = row.started;
  return out;
}

// Whether no sign of life has come since `since`, for as long as it takes to conclude something from that.
bool JobTrack::Silent(const SpoolView& spool, absl::Time since, absl::Time now) {
  if (spool.beat != beat_ || beat_since_ == absl::InfiniteFuture()) {
    beat_ = spool.beat;
    beat_since_ = now;
  }
  return now - std::max(since, beat_since_) >= rules_.lost_after;
}

Judgement JobTrack::Judge(const std::vector<SlurmJobRow>& queue, const std::vector<SlurmJobRow>& accounting,
                          const SpoolView& spool, absl::Time look, absl::Time now) {
  const bool new_look = look > last_look_;
  last_look_ = std::max(look, last_look_);
  const SlurmJobRow* mine = nullptr;
  for (const SlurmJobRow& row : queue) {
    if (!id_.empty() && row.id == id_) {
      mine = &row;
      break;
    }
  }
  if (mine == nullptr && !trusted_) {
    for (const SlurmJobRow& row : queue) {
      if (mine == nullptr || BetterThan(row, *mine)) mine = &row;
    }
  }
  if (mine == nullptr) {
    if (new_look && look > answered_) {
      first_absent_ = std::min(first_absent_, look);
      ++absent_looks_;
    }
    return Absent(accounting, spool, look, now);
  }
  tried_ = true;
  if (id_ != mine->id) {
    id_ = mine->id;
    first_seen_ = absl::InfiniteFuture();
  }
  absent_looks_ = 0;
  first_absent_ = absl::InfiniteFuture();
  first_seen_ = std::min(first_seen_, look);
  if (!mine->nodes.empty()) nodes_ = mine->nodes;
  const bool newly_trusted = !trusted_ && look - first_seen_ >= rules_.between;
  if (newly_trusted) trusted_ = true;
  if (mine->submitted) submitted_ = mine->submitted;
  Judgement out = Present(*mine, spool, now);
  out.record = newly_trusted;
  for (const SlurmJobRow& row : queue) {
    if (&row != mine && row.id != mine->id && (row.state == SlurmState::kPending || row.state == SlurmState::kHeld)) {
      out.surplus.push_back(row.id);
    }
  }
  return out;
}

Judgement JobTrack::Present(const SlurmJobRow& row, const SpoolView& spool, absl::Time now) {
  if (spool.lease && row.restarts > spool.lease_restart) return Requeued(row, spool, now);
  if (IsTerminal(row.state)) return Ended(row, spool, now);
  ended_since_ = absl::InfiniteFuture();
  if (row.state == SlurmState::kPending) return Waiting(row, spool, now);
  Judgement out;
  const LiveState live = LiveStateOf(row.state);
  if (row.state == SlurmState::kUnrecognized && last_.state != SchedulerState::kUnknown) {
    out.report = last_;  // a word nobody has heard of changes nothing
    out.report.word = row.word;
  } else if (row.state == SlurmState::kUnrecognized) {
    out.report = ReportOf(live.state, row, absl::StrCat("SLURM says '", row.word, "'"));
  } else if (row.state == SlurmState::kHeld) {
    out.report = ReportOf(live.state, row, absl::StrCat(live.words, " (", row.word, ", ", row.reason, ")"));
  } else {
    out.report = ReportOf(live.state, row, live.words.empty() ? "" : absl::StrCat(live.words, " (", row.word, ")"));
  }
  return out;
}

Judgement JobTrack::Waiting(const SlurmJobRow& row, const SpoolView& spool, absl::Time now) {
  Judgement out;
  PendingReason why = ExplainPending(row.reason);
  if (row.restarts > 0) why.words = absl::StrCat("put back into the queue by SLURM; ", why.words);
  if (why.kind != ReasonKind::kPermanent) {
    permanent_since_ = absl::InfiniteFuture();
    out.report = ReportOf(why.kind == ReasonKind::kHeld ? SchedulerState::kHeld : SchedulerState::kPending, row, why.words);
    return out;
  }
  permanent_since_ = std::min(permanent_since_, now);
  if (now - permanent_since_ < rules_.between || spool.lease) {
    out.report = ReportOf(SchedulerState::kPending, row, why.words);
    return out;
  }
  out.report = ReportOf(SchedulerState::kEnded, row, absl::StrCat("SLURM would never start it: ", why.words));
  out.report.cause = v1::END_CAUSE_LAUNCH_FAILED;
  out.fence = out.cancel = true;
  return out;
}

Judgement JobTrack::Requeued(const SlurmJobRow& row, const SpoolView& spool, absl::Time now) {
  Judgement out;
  out.cancel = !IsTerminal(row.state);
  const std::string words = "SLURM or an administrator put it back into the queue; what was started is over, and is not started twice";
  ended_since_ = std::min(ended_since_, now);
  const bool silent = Silent(spool, ended_since_, now);
  if (spool.exited || silent) {
    out.report = ReportOf(SchedulerState::kEnded, row, words);
    out.report.cause = spool.cancelled ? v1::END_CAUSE_CANCELLED : v1::END_CAUSE_PREEMPTED;
  } else {
    out.report = ReportOf(SchedulerState::kUnknown, row, absl::StrCat(words, "; waiting for its exit record"));
  }
  return out;
}

Judgement JobTrack::Ended(const SlurmJobRow& row, const SpoolView& spool, absl::Time now) {
  ended_since_ = std::min(ended_since_, now);
  Judgement out;
  const std::string words = DescribeEnd(row.word, row.reason, row.exit);
  const v1::EndCause cause = CauseOfState(row.state, spool.cancelled);
  const bool node_failed = cause == v1::END_CAUSE_NODE_FAILED;
  out.ask_nodes = node_failed;
  if (spool.exited) {
    out.report = ReportOf(SchedulerState::kEnded, row, words);
    out.report.cause = cause;
    return out;
  }
  const bool waited = now - ended_since_ >= rules_.record_grace;
  if (!spool.lease) {
    const bool refused = row.state == SlurmState::kFailed && row.reason == "BadConstraints" && NeverStarted(row);
    if (!waited && row.state != SlurmState::kCancelled && !refused) {
      out.report = ReportOf(SchedulerState::kRunning, row, absl::StrCat(words, "; looking for its records"));
      return out;
    }
    out.report = ReportOf(SchedulerState::kEnded, row,
                          refused ? "SLURM refused it: no nodes of the site can ever satisfy what it asks for (BadConstraints)"
                                  : absl::StrCat(words, " before it had begun"));
    out.report.cause = cause != v1::END_CAUSE_UNSPECIFIED ? cause : v1::END_CAUSE_LAUNCH_FAILED;
    out.fence = true;
    return out;
  }
  if (!waited && !node_failed) {
    out.report = ReportOf(SchedulerState::kRunning, row, absl::StrCat(words, "; waiting for its exit record"));
    return out;
  }
  if (spool.duplicates > 0 && cause == v1::END_CAUSE_UNSPECIFIED && !Silent(spool, ended_since_, now)) {
    // What SLURM says may be about a second life, which left at once.
    out.report = ReportOf(SchedulerState::kUnknown, row, absl::StrCat(words, ", but that may be a second start; looking for signs of life"));
    return out;
  }
  if (cause == v1::END_CAUSE_UNSPECIFIED && spool.over_memory) {
    // Without cgroups SLURM 22.05 kills all of it and says FAILED by signal 9; why stands in the job's own output.
    out.report = ReportOf(SchedulerState::kEnded, row, absl::StrCat("SLURM ended it for using more memory than it asked for (", words, ")"));
    out.report.cause = v1::END_CAUSE_OUT_OF_MEMORY;
    return out;
  }
  out.report = ReportOf(SchedulerState::kEnded, row, absl::StrCat(words, "; it left no exit record"));
  out.report.cause = cause != v1::END_CAUSE_UNSPECIFIED ? cause : spool.cancelled ? v1::END_CAUSE_CANCELLED : v1::END_CAUSE_LOST;
  return out;
}

Judgement JobTrack::Absent(const std::vector<SlurmJobRow>& accounting, const SpoolView& spool, absl::Time look, absl::Time now) {
  Judgement out;
  if (!tried_ && !spool.lease) {
    out.report = ReportOf(SchedulerState::kAbsent, "");
    return out;
  }
  // Accounting confirms an end; it may be late, so nothing else is believed of it.
  const SlurmJobRow* row = nullptr;
  bool memory = false;
  for (const SlurmJobRow& candidate : accounting) {
    if (!id_.empty() && candidate.id != id_) continue;
    if (candidate.step) {
      memory |= candidate.state == SlurmState::kOutOfMemory;
    } else if (row == nullptr || candidate.submitted.value_or(absl::InfinitePast()) >= row->submitted.value_or(absl::InfinitePast())) {
      row = &candidate;
    }
  }
  if (row != nullptr && IsTerminal(row->state)) {
    SlurmJobRow ended = *row;
    if (memory && ended.state == SlurmState::kFailed) {
      ended.state = SlurmState::kOutOfMemory;
      ended.word = "OUT_OF_MEMORY";
    }
    if (id_.empty()) id_ = ended.id;
    if (!ended.nodes.empty()) nodes_ = ended.nodes;
    trusted_ = true;
    return Ended(ended, spool, now);
  }
  if (spool.exited) {
    out.report = ReportOf(SchedulerState::kEnded, "");
    if (!trusted_) out.report.reason = "it left SLURM's queue";
    out.ask_accounting = true;  // who killed it, where the record does not say
    return out;
  }
  const bool twice = absent_looks_ >= 2;
  if (!trusted_ && !spool.lease) {
    if (id_.empty() ? twice && look - answered_ >= rules_.settle : twice && look - first_absent_ >= rules_.between) {
      const std::string words = id_.empty()
                                    ? "the answer of sbatch was lost, and SLURM has nothing of it"
                                    : absl::StrCat("SLURM has forgotten job ", id_, " (its controller was ended before that was safe)");
      Refused();
      out.report = ReportOf(SchedulerState::kAbsent, absl::StrCat(words, "; it is submitted again"));
      return out;
    }
    out.report = id_.empty() ? ReportOf(SchedulerState::kUnknown, "sbatch gave no clear answer; looking whether SLURM has it")
                             : ReportOf(SchedulerState::kPending, "given to SLURM");
    out.ask_accounting = id_.empty();
    return out;
  }
  out.ask_accounting = true;
  const bool silent = Silent(spool, first_absent_, now);
  const bool may_conclude = twice && (silent || (spool.cancelled && !spool.lease && look - first_absent_ >= rules_.between));
  if (!may_conclude) {
    out.report = ReportOf(SchedulerState::kUnknown, "SLURM's queue does not show it any more; waiting for its records");
    return out;
  }
  out.report = ReportOf(SchedulerState::kEnded, "");
  out.report.cause = spool.cancelled     ? v1::END_CAUSE_CANCELLED
                     : spool.over_memory ? v1::END_CAUSE_OUT_OF_MEMORY
                                         : v1::END_CAUSE_LOST;
  out.report.reason =
      spool.cancelled     ? "cancelled"
      : spool.over_memory ? "SLURM ended it for using more memory than it asked for"
      : spool.lease   ? absl::StrCat("SLURM's queue does not show it any more, it left no exit record, and it gave no sign of life for ",
                                     absl::FormatDuration(rules_.lost_after))
                      : "it left SLURM's queue without having begun, and SLURM keeps no record of why";
  out.fence = !spool.lease;
  return out;
}

}  // namespace itwin::agent
