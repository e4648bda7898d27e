#include <algorithm>
#include <iterator>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/cli/commands/commands.h"
#include "client/cli/render.h"
#include "common/spec/nearest_name.h"
#include "common/status_macros.h"

namespace itwin::cli {
namespace {

constexpr int kPageSize = 500;

absl::StatusOr<v1::ListJobsRequest> Filter(const JobsArguments& arguments) {
  v1::ListJobsRequest request;
  std::vector<std::string> names;
  for (int i = 1; i <= v1::JobState_MAX; ++i) names.push_back(StateText(static_cast<v1::JobState>(i)));
  for (const std::string& text : arguments.states) {
    v1::JobState state;
    const std::string name = absl::AsciiStrToUpper(text);
    if (!v1::JobState_Parse(absl::StrCat("JOB_STATE_", name), &state) || state == v1::JOB_STATE_UNSPECIFIED) {
      return absl::InvalidArgumentError(absl::StrCat("--state: '", text, "' is unknown; ", UnknownNameHint(name, names)));
    }
    request.add_states(state);
  }
  for (const std::string& label : arguments.labels) {
    const size_t equals = label.find('=');
    if (equals == std::string::npos || equals == 0) {
      return absl::InvalidArgumentError(absl::StrCat("--label: '", label, "' is not key=value"));
    }
    (*request.mutable_labels())[label.substr(0, equals)] = label.substr(equals + 1);
  }
  request.set_site(arguments.site);
  request.set_name_contains(arguments.name);
  request.set_live_only(arguments.live);
  request.set_page_size(arguments.all ? kPageSize : std::min(kPageSize, arguments.limit));
  return request;
}

}  // namespace

absl::StatusOr<int> Jobs(Session& session, const JobsArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(v1::ListJobsRequest request, Filter(arguments));
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  client::JobPager pager = gateway.List(request);
  std::vector<v1::Job> jobs;
  const size_t limit = static_cast<size_t>(arguments.limit);
  while (!pager.done() && (arguments.all || jobs.size() < limit)) {
    ITWIN_ASSIGN_OR_RETURN(std::vector<v1::Job> page, pager.Next());
    std::move(page.begin(), page.end(), std::back_inserter(jobs));
  }
  bool more = !pager.done();
  if (!arguments.all && jobs.size() > limit) {
    jobs.resize(limit);
    more = true;
  }
  if (arguments.quiet) {
    for (const v1::Job& job : jobs) *session.terminal().out << job.id() << "\n";
    session.terminal().out->flush();
  } else {
    session.output().Jobs(jobs, more);
  }
  return kOk;
}

}  // namespace itwin::cli
