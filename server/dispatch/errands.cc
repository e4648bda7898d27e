#include "server/dispatch/errands.h"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/sha256.h"
#include "common/spec/spec_document.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "server/dispatch/failure_signs.h"

namespace itwin::server {
namespace {

constexpr size_t kStatBatch = 1000;
constexpr absl::Duration kDefaultTime = absl::Hours(1);
constexpr int kStderrTailBytes = 4000;
constexpr absl::Duration kHashingTime = absl::Minutes(10);  // the agent hashes every output before it lists them

absl::Status SendOne(const ErrandContext& context, const std::string& sha256, const std::string& path,
                     SendingInputs* sending) {
  const auto name = [&](const absl::Status& status) { return Annotate(status, absl::StrCat("input '", path, "'")); };
  absl::StatusOr<BlobStore::Reader> reader = context.blobs->OpenReader(sha256);
  if (!reader.ok()) {
    if (reader.status().code() != absl::StatusCode::kNotFound) return name(reader.status());
    return absl::NotFoundError(absl::StrCat("input '", path, "' (SHA-256 ", sha256,
                                            ") is not among the gateway's artifacts; submit again, so that it is uploaded"));
  }
  if (!sending->Begin(sha256, absl::Now() + context.transfer_stall)) {
    return absl::UnavailableError(absl::StrCat("input '", path, "' is still being sent for another job"));
  }
  const absl::Cleanup end = [&] { sending->End(sha256); };
  // Again, now that nobody else is at it.
  ITWIN_ASSIGN_OR_RETURN(std::vector<agent::v1::InputStatus> there,
                         context.agent->StatInputs({sha256}, absl::Now() + context.call_timeout));
  if (there[0].complete()) return absl::OkStatus();
  int64_t offset = std::clamp<int64_t>(there[0].received_bytes(), 0, reader->size());
  const int64_t begin = offset;
  const auto next = [&]() -> absl::StatusOr<std::string> {
    absl::StatusOr<std::string> chunk = reader->Read(offset, kInputChunkBytes);
    if (chunk.ok()) offset += static_cast<int64_t>(chunk->size());
    return chunk;
  };
  return name(context.agent->PutInput(sha256, reader->size(), begin, next, context.transfer_stall));
}

}  // namespace

bool SendingInputs::Begin(const std::string& sha256, absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  const auto is_free = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !sending_.contains(sha256); };
  if (!mu_.AwaitWithDeadline(absl::Condition(&is_free), deadline)) return false;
  sending_.insert(sha256);
  return true;
}

void SendingInputs::End(const std::string& sha256) {
  absl::MutexLock lock(&mu_);
  sending_.erase(sha256);
}

absl::Status SendInputs(const ErrandContext& context, const JobId& job, SendingInputs* sending) {
  ITWIN_ASSIGN_OR_RETURN(const v1::JobSpec spec, context.store->GetSpec(job));
  std::vector<std::string> hashes;
  std::vector<std::string> paths;
  std::set<std::string> seen;
  for (const v1::InputFile& input : spec.inputs()) {
    if (!seen.insert(input.sha256()).second) continue;
    hashes.push_back(input.sha256());
    paths.push_back(input.path());
  }
  for (size_t begin = 0; begin < hashes.size(); begin += kStatBatch) {
    const size_t end = std::min(hashes.size(), begin + kStatBatch);
    const std::vector<std::string> batch(hashes.begin() + static_cast<ptrdiff_t>(begin),
                                         hashes.begin() + static_cast<ptrdiff_t>(end));
    ITWIN_ASSIGN_OR_RETURN(std::vector<agent::v1::InputStatus> there,
                           context.agent->StatInputs(batch, absl::Now() + context.call_timeout));
    for (size_t i = 0; i < batch.size(); ++i) {
      if (there[i].complete()) continue;
      ITWIN_RETURN_IF_ERROR(SendOne(context, batch[i], paths[begin + i], sending));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<agent::v1::StartAttemptRequest> MakeStartRequest(JobStore* store, const AttemptKey& attempt,
                                                                int64_t log_limit_bytes, const StartSite& site) {
  ITWIN_ASSIGN_OR_RETURN(const v1::JobSpec spec, store->GetSpec(attempt.job()));
  ITWIN_ASSIGN_OR_RETURN(const AttemptRow row, store->GetAttempt(attempt));
  return StartRequestOf(spec, attempt, row.resume_attempt, log_limit_bytes, site);
}

absl::StatusOr<agent::v1::StartAttemptRequest> StartRequestOf(const v1::JobSpec& spec, const AttemptKey& attempt,
                                                              const std::string& resume_attempt, int64_t log_limit_bytes,
                                                              const StartSite& site) {
  agent::v1::StartAttemptRequest request;
  request.set_attempt(attempt.text());
  request.set_spec_json(SpecToJson(spec));
  const v1::Resources& resources = spec.resources();
  request.set_nodes(std::max(1, resources.nodes()));
  request.set_ranks_per_node(std::max(1, resources.ranks_per_node()));
  request.set_cpus_per_rank(resources.cpus_per_rank());
  request.set_gpus_per_node(resources.gpus_per_node());
  request.set_memory_mib_per_node(resources.memory_mib_per_node());
  absl::Duration time = absl::Seconds(resources.time().seconds()) + absl::Nanoseconds(resources.time().nanos());
  if (time <= absl::ZeroDuration()) time = site.settings->default_time;
  if (time <= absl::ZeroDuration()) time = kDefaultTime;
  if (site.slurm != nullptr || site.settings->scheduler == "slurm") {
    ITWIN_ASSIGN_OR_RETURN(SlurmPlan plan, PlanForSlurm(site.name, *site.settings, site.slurm, resources));
    *request.mutable_slurm() = std::move(plan.slurm);
    request.set_memory_mib_per_node(plan.memory_mib_per_node);
    time = plan.time;
  }
  const int64_t seconds = absl::IDivDuration(time, absl::Seconds(1), &time);
  request.mutable_time()->set_seconds(seconds);
  request.mutable_time()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(time)));
  *request.mutable_launch() = site.settings->launch;
  ITWIN_ASSIGN_OR_RETURN(*request.mutable_launch()->mutable_container(), ContainerLine(site.name, *site.settings, spec.image()));
  for (const v1::InputFile& input : spec.inputs()) {
    agent::v1::StagedInput* staged = request.add_inputs();
    staged->set_path(input.path());
    staged->set_sha256(input.sha256());
    staged->set_executable(input.executable());
  }
  request.set_train(spec.has_train());
  if (spec.has_command()) {
    *request.mutable_argv() = spec.command().argv();
    request.set_mpi(spec.command().mpi());
  } else {
    request.set_mpi(true);
  }
  *request.mutable_env() = spec.env();
  request.set_resume_attempt(resume_attempt);
  request.set_log_limit_bytes(log_limit_bytes);
  return request;
}

void AvoidBadNodes(JobStore* store, const agent::v1::SlurmFacts& facts, agent::v1::StartAttemptRequest* request) {
  const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(request->attempt());
  if (!key.ok() || key->number() == 1) return;
  const absl::StatusOr<std::vector<AttemptRow>> attempts = store->ListAttempts(key->job());
  if (!attempts.ok()) {
    log::Warn("attempt {}: starts without knowing bad nodes: {}", key->text(), std::string(attempts.status().message()));
    return;
  }
  std::string site;
  for (const AttemptRow& attempt : *attempts) {
    if (attempt.number == key->number()) site = attempt.site;
  }
  std::vector<std::vector<std::string>> bad;
  for (const AttemptRow& attempt : *attempts) {
    if (attempt.number < key->number() && attempt.site == site) bad.push_back(attempt.bad_nodes);
  }
  int available = 0;
  for (const agent::v1::Partition& partition : facts.partitions()) {
    const std::string& wanted = request->slurm().partition();
    if (wanted.empty() ? partition.is_default() : partition.name() == wanted) available = partition.nodes();
  }
  agent::v1::SlurmSettings* slurm = request->mutable_slurm();
  const std::vector<std::string> asked(slurm->exclude_nodes().begin(), slurm->exclude_nodes().end());
  const std::vector<std::string> all = NodesToAvoid(asked, bad, request->nodes(), available);
  slurm->mutable_exclude_nodes()->Assign(all.begin(), all.end());
}

absl::StatusOr<v1::OutputFile> BringOutput(const ErrandContext& context, const AttemptKey& attempt,
                                           const agent::v1::FileEntry& file) {
  const auto name = [&](const absl::Status& status) { return Annotate(status, absl::StrCat("output '", file.path(), "'")); };
  if (!CheckRelativePath(file.path()).ok() || !IsSha256Hex(file.sha256()) || file.size_bytes() < 0) {
    return absl::DataLossError(absl::StrCat("an output has an unacceptable name, hash or size: '", file.path(), "'"));
  }
  absl::StatusOr<BlobStore::Stat> stat = context.blobs->StatBlob(file.sha256());
  if (!stat.ok()) return name(stat.status());
  if (!stat->complete) {
    absl::StatusOr<std::unique_ptr<BlobStore::Writer>> writer = context.blobs->ResumeWriter(file.sha256(), file.size_bytes());
    if (!writer.ok()) return name(writer.status());
    if (!(*writer)->complete()) {
      const absl::Status read = context.agent->ReadFile(
          attempt.text(), "outputs", file.path(), (*writer)->offset(),
          [&](absl::string_view bytes) { return (*writer)->Append(bytes); }, context.transfer_stall);
      if (!read.ok()) return name(read);
      if (const absl::Status status = (*writer)->Commit(); !status.ok()) return name(status);
    }
  }
  v1::OutputFile output;
  output.set_path(file.path());
  output.set_sha256(file.sha256());
  output.set_size_bytes(file.size_bytes());
  return output;
}

absl::StatusOr<Collected> BringOutputs(const ErrandContext& context, const AttemptKey& attempt) {
  ITWIN_ASSIGN_OR_RETURN(const std::vector<agent::v1::FileEntry> files,
                         context.agent->ListFiles(attempt.text(), "outputs", absl::Now() + kHashingTime));
  if (files.size() > kMaxOutputFiles) {
    return absl::FailedPreconditionError(absl::StrCat("there are ", files.size(), " output files, more than ",
                                                      kMaxOutputFiles, "; pack them into an archive"));
  }
  Collected out;
  for (const agent::v1::FileEntry& file : files) {
    ITWIN_ASSIGN_OR_RETURN(v1::OutputFile output, BringOutput(context, attempt, file));
    out.outputs.push_back(std::move(output));
  }
  const absl::StatusOr<LogSlice> errors = context.store->ReadLog(attempt.job(), attempt.number(), v1::LOG_STREAM_STDERR,
                                                                 -kStderrTailBytes, kStderrTailBytes);
  if (errors.ok()) out.stderr_tail = errors->data;  // without it the reason is only shorter
  return out;
}

}  // namespace itwin::server
