#include "server/jobs/job_service.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "common/job_state_proto.h"
#include "common/spec/file_references.h"
#include "common/spec/nearest_name.h"
#include "common/spec/spec_document.h"
#include "common/spec/validate.h"
#include "common/status_macros.h"
#include "server/jobs/job_proto.h"
#include "server/jobs/model_archive.h"

namespace itwin::server {
namespace {

constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxReasonBytes = 1000;     // of a cancel request
constexpr int64_t kDefaultTraceSteps = 20;
constexpr int64_t kMaxTraceSteps = 10'000;
constexpr int kDefaultEvents = 1000;
constexpr int kMaxEvents = 10'000;
constexpr int kDefaultPoints = 10'000;
constexpr int kMaxPoints = 100'000;
constexpr int kDefaultBuckets = 500;
constexpr int kMaxBuckets = 10'000;
constexpr int kMaxLogBytes = 1 << 20;
constexpr int kMaxPatterns = 1000;
constexpr size_t kNamedMissing = 5;  // missing inputs that an error names
constexpr char kAnySite[] = "any";
constexpr char kUnnamed[] = "unnamed";

absl::Status CheckRequestId(absl::string_view id) {
  const bool good = !id.empty() && id.size() <= kMaxRequestIdBytes && std::all_of(id.begin(), id.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("request_id: '", absl::CHexEscape(id.substr(0, 40)),
                                                 "' will not do; use 1 to ", kMaxRequestIdBytes,
                                                 " letters, digits, '.', '_', '-'; a UUID is fine"));
}

// `value` within 1..max, or the default for 0.
absl::StatusOr<int> Limit(absl::string_view field, int value, int default_value, int max) {
  if (value == 0) return default_value;
  if (value > 0 && value <= max) return value;
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", value, " is out of range; use 1 to ", max));
}

absl::Status CheckPatterns(const google::protobuf::RepeatedPtrField<std::string>& patterns) {
  if (patterns.size() <= kMaxPatterns) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("series: at most ", kMaxPatterns, " names; use '*' at the end of a name"));
}

std::vector<std::string> Strings(const google::protobuf::RepeatedPtrField<std::string>& field) {
  return {field.begin(), field.end()};
}

v1::SubmitJobResponse ToResponse(const Submitted& submitted) {
  v1::SubmitJobResponse response;
  *response.mutable_job() = ToProto(submitted.job);
  response.set_existed(submitted.existed);
  return response;
}

}  // namespace

absl::Status JobService::CheckSite(absl::string_view site) const {
  if (site.empty() || site == kAnySite || sites_.Exists(site)) return absl::OkStatus();
  std::vector<std::string> names = {kAnySite};
  for (const v1::Site& known : sites_.ListSites()) names.push_back(known.name());
  return absl::InvalidArgumentError(absl::StrCat("site: there is no site '", absl::CHexEscape(site.substr(0, 80)), "'; ",
                                                 UnknownNameHint(site, names)));
}

absl::Status JobService::CheckInputs(const v1::JobSpec& spec) const {
  std::vector<std::string> missing;
  for (const v1::InputFile& input : spec.inputs()) {
    ITWIN_ASSIGN_OR_RETURN(const BlobStore::Stat stat, blobs_.StatBlob(input.sha256()));
    if (stat.complete) continue;
    missing.push_back(absl::StrCat(input.path(), " (", input.sha256(), stat.received_bytes > 0 ? ", only partly here)" : ")"));
  }
  if (missing.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("inputs: upload these files first, then submit again: ", ListNames(missing, kNamedMissing)));
}

absl::Status JobService::CheckPossible(const v1::JobSpec& spec) const {
  ITWIN_RETURN_IF_ERROR(CheckSite(spec.site()));
  ITWIN_RETURN_IF_ERROR(CheckInputs(spec));
  ITWIN_ASSIGN_OR_RETURN(const std::vector<std::string> operators, OperatorsOfJob(blobs_, spec));
  ITWIN_RETURN_IF_ERROR(CheckOperators(operators));
  if (const std::string why = sites_.WhyImpossible(spec, {}); !why.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("resources: ", why));
  }
  const std::string why = operators.empty() ? "" : sites_.WhyImpossible(spec, operators);
  return why.empty() ? absl::OkStatus() : absl::InvalidArgumentError(absl::StrCat("train.model.archive: ", why));
}

absl::StatusOr<v1::ValidateJobResponse> JobService::Validate(const v1::ValidateJobRequest& request) {
  v1::ValidateJobResponse response;
  if (request.has_document()) {
    ITWIN_ASSIGN_OR_RETURN(*response.mutable_spec(), ParseSpecDocument(request.document(), Strings(request.overrides())));
  } else {
    if (request.overrides_size() > 0) {
      return absl::InvalidArgumentError("overrides: they change a document; send one, or change the spec itself");
    }
    *response.mutable_spec() = request.spec();
  }
  ITWIN_RETURN_IF_ERROR(ValidateSpec(response.spec()));
  ITWIN_RETURN_IF_ERROR(CheckSite(response.spec().site()));
  for (v1::FileReference& file : FileReferences(response.spec())) *response.add_files() = std::move(file);
  return response;
}

absl::StatusOr<v1::SubmitJobResponse> JobService::Submit(const Caller& caller, const v1::SubmitJobRequest& request) {
  ITWIN_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  if (!request.has_spec()) return absl::InvalidArgumentError("spec: is missing");
  NewJob job;
  job.owner = caller.name;
  job.request_id = request.request_id();
  job.spec = request.spec();
  if (job.spec.name().empty()) job.spec.set_name(kUnnamed);
  ITWIN_RETURN_IF_ERROR(PlaceArtifacts(&job.spec));
  ITWIN_RETURN_IF_ERROR(ValidateSpec(job.spec));
  ITWIN_RETURN_IF_ERROR(CheckFilesArePlaced(job.spec));
  if (const absl::Status possible = CheckPossible(job.spec); !possible.ok()) {
    // What was accepted once stays accepted, whatever has changed at the sites since.
    ITWIN_ASSIGN_OR_RETURN(const std::optional<JobRow> before, store_.FindSubmitted(job));
    if (before) return ToResponse({*before, /*existed=*/true});
    return possible;
  }
  ITWIN_ASSIGN_OR_RETURN(const Submitted submitted, store_.Submit(job));
  return ToResponse(submitted);
}

absl::StatusOr<JobRow> JobService::Find(const Caller& caller, absl::string_view text) {
  absl::StatusOr<JobId> id = JobId::Parse(text);
  if (!id.ok()) {
    ITWIN_ASSIGN_OR_RETURN(id, store_.ResolveJob(text, caller.admin ? "" : caller.name));
  }
  ITWIN_ASSIGN_OR_RETURN(JobRow row, store_.GetJob(*id));
  if (row.owner != caller.name && !caller.admin) {
    return absl::PermissionDeniedError(
        absl::StrCat("job ", id->text(), " was submitted with another token; use that one, or an admin's"));
  }
  return row;
}

absl::StatusOr<v1::Job> JobService::Get(const Caller& caller, const v1::GetJobRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(const JobRow row, Find(caller, request.job()));
  v1::Job job = ToProto(row);
  ITWIN_ASSIGN_OR_RETURN(*job.mutable_spec(), store_.GetSpec(row.id));
  ITWIN_ASSIGN_OR_RETURN(const std::vector<AttemptRow> attempts, store_.ListAttempts(row.id));
  for (const AttemptRow& attempt : attempts) *job.add_attempts() = ToProto(attempt);
  return job;
}

absl::StatusOr<v1::ListJobsResponse> JobService::List(const Caller& caller, const v1::ListJobsRequest& request) {
  JobFilter filter;
  for (const int state : request.states()) {
    ITWIN_ASSIGN_OR_RETURN(const JobState parsed, FromProto(static_cast<v1::JobState>(state)));
    filter.states.push_back(parsed);
  }
  filter.live_only = request.live_only();
  filter.site = request.site();
  filter.name_contains = request.name_contains();
  filter.labels.insert(request.labels().begin(), request.labels().end());
  if (!caller.admin) filter.owner = caller.name;
  ITWIN_ASSIGN_OR_RETURN(filter.page_size, Limit("page_size", request.page_size(), 50, 1000));
  filter.page_token = request.page_token();
  ITWIN_ASSIGN_OR_RETURN(JobPage page, store_.ListJobs(filter));
  v1::ListJobsResponse response;
  response.mutable_jobs()->Reserve(static_cast<int>(page.jobs.size()));
  for (const JobRow& row : page.jobs) *response.add_jobs() = ToProto(row);
  response.set_next_page_token(page.next_page_token);
  return response;
}

absl::StatusOr<v1::Job> JobService::Cancel(const Caller& caller, const v1::CancelJobRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(JobRow row, Find(caller, request.job()));
  if (request.reason().size() > kMaxReasonBytes) {
    return absl::InvalidArgumentError(absl::StrCat("reason: at most ", kMaxReasonBytes, " bytes"));
  }
  const auto already_over = [&](const JobRow& job) {
    return absl::FailedPreconditionError(
        absl::StrCat("job ", job.id.text(), " is ", Name(job.record.state), ": there is nothing to cancel"));
  };
  if (IsFinal(row.record.state)) return already_over(row);
  JobEvent event;
  event.actor = absl::StrCat("user:", caller.name);
  if (!row.record.cancel_requested) {
    event.kind = EventKind::kCancelRequested;
    event.message = request.reason().empty() ? "cancel requested" : absl::StrCat("cancel requested: ", request.reason());
    absl::StatusOr<JobRow> asked = store_.AppendEvent(row.id, event);
    if (absl::IsFailedPrecondition(asked.status())) {  // it ended meanwhile
      ITWIN_ASSIGN_OR_RETURN(row, store_.GetJob(row.id));
      return already_over(row);
    }
    ITWIN_RETURN_IF_ERROR(asked.status());
    row = *std::move(asked);
  }
  // No site has anything of it, and after the request none will be given it: it can end here and now.
  if (row.record.state == JobState::kQueued) {
    event.kind = EventKind::kCancelled;
    event.message = "cancelled while it waited for a site";
    absl::StatusOr<JobRow> cancelled = store_.AppendEvent(row.id, event);
    if (cancelled.ok()) {
      row = *std::move(cancelled);
    } else if (!absl::IsFailedPrecondition(cancelled.status())) {
      return cancelled.status();
    } else {
      ITWIN_ASSIGN_OR_RETURN(row, store_.GetJob(row.id));
    }
  }
  return ToProto(row);
}

absl::StatusOr<v1::TraceJobResponse> JobService::Trace(const Caller& caller, const v1::TraceJobRequest& request) {
  if (request.steps() < 0 || request.steps() > kMaxTraceSteps) {
    return absl::InvalidArgumentError(absl::StrCat("steps: ", request.steps(), " is not 1 to ", kMaxTraceSteps));
  }
  const int64_t steps = request.steps() == 0 ? kDefaultTraceSteps : request.steps();
  ITWIN_ASSIGN_OR_RETURN(JobRow row, Find(caller, request.job()));
  ITWIN_ASSIGN_OR_RETURN(const v1::JobSpec spec, store_.GetSpec(row.id));
  const auto refuse = [&](const auto&... why) {
    return absl::FailedPreconditionError(absl::StrCat("job ", row.id.text(), " ", why...));
  };
  if (!spec.has_train() || spec.train().has_predict()) return refuse("does not train: there are no steps to trace");
  JobEvent event;
  event.kind = EventKind::kTraceRequested;
  event.actor = absl::StrCat("user:", caller.name);
  event.steps = steps;
  event.message = absl::StrCat("a trace of the next ", steps, steps == 1 ? " step" : " steps", " is asked for");
  for (int round = 0; row.record.trace_steps == 0; ++round) {
    if (row.record.state != JobState::kRunning) {
      return refuse("is ", Name(row.record.state), IsFinal(row.record.state)
                                                       ? ": there are no more steps to trace"
                                                       : ": only a RUNNING job can be traced; to trace from its first steps on, submit "
                                                         "with train.profile.trace_steps");
    }
    event.attempt = row.record.attempt;
    absl::StatusOr<JobRow> asked = store_.AppendEvent(row.id, event);
    if (asked.ok()) {
      row = *std::move(asked);
      break;
    }
    if (!absl::IsFailedPrecondition(asked.status()) || round > 0) return asked.status();
    ITWIN_ASSIGN_OR_RETURN(row, store_.GetJob(row.id));  // it moved meanwhile, or somebody else asked
  }
  if (row.record.trace_steps != steps) {
    return refuse("is being traced for ", row.record.trace_steps, " steps; ask again when that has ended, or for as many");
  }
  v1::TraceJobResponse response;
  *response.mutable_job() = ToProto(row);
  response.set_output(TraceName(row.record.traces));
  return response;
}

absl::StatusOr<v1::SubmitJobResponse> JobService::Retry(const Caller& caller, const v1::RetryJobRequest& request) {
  ITWIN_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  ITWIN_ASSIGN_OR_RETURN(const JobRow row, Find(caller, request.job()));
  if (!IsFinal(row.record.state) || row.record.state == JobState::kSucceeded) {
    return absl::FailedPreconditionError(
        absl::StrCat("job ", row.id.text(), " is ", Name(row.record.state),
                     ": only a FAILED or CANCELLED job can be retried; submit its spec again for another run"));
  }
  NewJob job;
  job.owner = caller.name;
  job.request_id = request.request_id();
  job.retry_of = row.id.text();
  job.message = absl::StrCat("accepted; repeats job ", row.id.text());
  ITWIN_ASSIGN_OR_RETURN(job.spec, store_.GetSpec(row.id));
  if (!row.record.site.empty() && sites_.Exists(row.record.site)) job.spec.set_site(row.record.site);
  if (!request.fresh()) {
    ITWIN_ASSIGN_OR_RETURN(const std::vector<AttemptRow> attempts, store_.ListAttempts(row.id));
    const auto newest = std::find_if(attempts.rbegin(), attempts.rend(), [](const AttemptRow& a) { return a.checkpoint; });
    if (newest != attempts.rend()) {
      // A checkpoint lies where it was written.
      job.resume = AttemptKey(row.id, newest->number);
      job.spec.set_site(newest->site);
      absl::StrAppend(&job.message, ", from the checkpoint of its attempt ", newest->number);
    } else if (row.resume) {
      // It never got further than what it started from itself.
      job.resume = row.resume;
    }
  }
  ITWIN_RETURN_IF_ERROR(CheckSite(job.spec.site()));
  ITWIN_RETURN_IF_ERROR(CheckInputs(job.spec));
  ITWIN_ASSIGN_OR_RETURN(const Submitted submitted, store_.Submit(job));
  return ToResponse(submitted);
}

absl::StatusOr<v1::ListEventsResponse> JobService::ListEvents(const Caller& caller,
                                                              const v1::ListEventsRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(const JobRow row, Find(caller, request.job()));
  ITWIN_ASSIGN_OR_RETURN(const int limit, Limit("limit", request.limit(), kDefaultEvents, kMaxEvents));
  ITWIN_ASSIGN_OR_RETURN(const std::vector<StoredEvent> events,
                         store_.ListEvents(row.id, request.after_sequence(), limit));
  v1::ListEventsResponse response;
  for (const StoredEvent& event : events) *response.add_events() = ToProto(event);
  return response;
}

absl::StatusOr<v1::ListPointsResponse> JobService::ListPoints(const Caller& caller,
                                                              const v1::ListPointsRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(const JobRow row, Find(caller, request.job()));
  ITWIN_ASSIGN_OR_RETURN(const int limit, Limit("limit", request.limit(), kDefaultPoints, kMaxPoints));
  ITWIN_RETURN_IF_ERROR(CheckPatterns(request.series()));
  if (request.cursor() < 0) return absl::InvalidArgumentError("cursor: is negative; use 0 to start");
  ITWIN_ASSIGN_OR_RETURN(PointsPage page, store_.ListPoints(row.id, request.cursor(), Strings(request.series()), limit));
  v1::ListPointsResponse response;
  for (v1::PointBlock& block : page.blocks) *response.add_blocks() = std::move(block);
  response.set_next_cursor(page.next_cursor);
  response.set_end(page.end);
  return response;
}

absl::StatusOr<v1::QuerySeriesResponse> JobService::QuerySeries(const Caller& caller,
                                                                const v1::QuerySeriesRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(const JobRow row, Find(caller, request.job()));
  ITWIN_ASSIGN_OR_RETURN(const int buckets, Limit("buckets", request.buckets(), kDefaultBuckets, kMaxBuckets));
  ITWIN_RETURN_IF_ERROR(CheckPatterns(request.series()));
  ITWIN_ASSIGN_OR_RETURN(std::vector<v1::SeriesBuckets> series,
                         store_.QuerySeries(row.id, Strings(request.series()), buckets));
  v1::QuerySeriesResponse response;
  for (v1::SeriesBuckets& one : series) *response.add_series() = std::move(one);
  return response;
}

absl::StatusOr<v1::ReadLogResponse> JobService::ReadLog(const Caller& caller, const v1::ReadLogRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(const JobRow row, Find(caller, request.job()));
  ITWIN_ASSIGN_OR_RETURN(const int limit, Limit("limit", request.limit(), kMaxLogBytes, kMaxLogBytes));
  if (request.attempt() < 0) return absl::InvalidArgumentError("attempt: is negative; use 0 for the newest");
  const v1::LogStream stream =
      request.stream() == v1::LOG_STREAM_STDERR ? v1::LOG_STREAM_STDERR : v1::LOG_STREAM_STDOUT;
  ITWIN_ASSIGN_OR_RETURN(LogSlice slice, store_.ReadLog(row.id, request.attempt(), stream, request.offset(), limit));
  v1::ReadLogResponse response;
  response.set_data(std::move(slice.data));
  response.set_offset(slice.offset);
  response.set_next_offset(slice.next_offset);
  response.set_size(slice.size);
  response.set_complete(slice.complete);
  response.set_dropped_bytes(slice.dropped_bytes);
  response.set_attempt(slice.attempt);
  return response;
}

absl::StatusOr<v1::ListOutputsResponse> JobService::ListOutputs(const Caller& caller,
                                                                const v1::ListOutputsRequest& request) {
  ITWIN_ASSIGN_OR_RETURN(const JobRow row, Find(caller, request.job()));
  ITWIN_ASSIGN_OR_RETURN(std::vector<v1::OutputFile> outputs, store_.ListOutputs(row.id));
  v1::ListOutputsResponse response;
  for (v1::OutputFile& file : outputs) *response.add_outputs() = std::move(file);
  return response;
}

}  // namespace itwin::server
