#include "absl/strings/str_cat.h"
#include "client/cli/commands/commands.h"
#include "common/status_macros.h"

namespace itwin::cli {
namespace {

void NoteDropped(Session& session, int64_t bytes) {
  if (bytes <= 0) return;
  *session.terminal().err << "itwin: the program wrote " << bytes
                          << " more bytes than the limit of the log; they were not kept\n";
}

absl::StatusOr<int> Print(Session& session, client::Client& gateway, const LogsArguments& arguments) {
  v1::ReadLogRequest request;
  request.set_job(arguments.job);
  request.set_stream(arguments.from_stderr ? v1::LOG_STREAM_STDERR : v1::LOG_STREAM_STDOUT);
  request.set_attempt(arguments.attempt);
  while (true) {
    ITWIN_ASSIGN_OR_RETURN(v1::ReadLogResponse response, gateway.ReadLog(request));
    *session.terminal().out << response.data() << std::flush;
    const bool at_end = response.next_offset() <= request.offset() || response.next_offset() >= response.size();
    if (at_end) {
      NoteDropped(session, response.dropped_bytes());
      return kOk;
    }
    request.set_offset(response.next_offset());
    request.set_attempt(response.attempt());  // the same one, if a new attempt begins meanwhile
  }
}

absl::StatusOr<int> Follow(Session& session, client::Client& gateway, const LogsArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(const v1::Job known, gateway.Get(arguments.job));  // an error now, not a wait for ever
  client::WatchOptions options;
  options.points = false;
  options.logs = true;
  int attempt = 0;
  std::ostream& out = *session.terminal().out;
  ITWIN_ASSIGN_OR_RETURN(v1::Job job, gateway.Watch(known.id(), options, [&](const v1::JobUpdate& update) {
    const int now = update.cursor().log_attempt();
    if (attempt != 0 && now != attempt && now != 0) *session.terminal().err << "itwin: attempt " << now << " begins\n";
    if (now != 0) attempt = now;
    out << (arguments.from_stderr ? update.stderr_data() : update.stdout_data()) << std::flush;
    return static_cast<bool>(out);  // a closed pipe ends it
  }));
  return kOk;
}

}  // namespace

absl::StatusOr<int> Logs(Session& session, const LogsArguments& arguments) {
  if (arguments.follow && arguments.attempt != 0) {
    return absl::InvalidArgumentError("--follow shows the newest attempt; leave --attempt out");
  }
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  return arguments.follow ? Follow(session, gateway, arguments) : Print(session, gateway, arguments);
}

}  // namespace itwin::cli
