#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "client/cli/commands/commands.h"
#include "common/files.h"
#include "common/status_macros.h"

namespace itwin::cli {
namespace {

constexpr int64_t kMaxFileBytes = 256 << 10;

// A path as one word of a shell, for a command that is to be copied.
std::string AsWord(const std::string& path) {
  const bool plain = !path.empty() && path.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=@,:~") == std::string::npos;
  return plain ? path : absl::StrCat("'", absl::StrReplaceAll(path, {{"'", "'\\''"}}), "'");
}

}  // namespace

absl::StatusOr<int> AddSite(Session& session, const SiteArguments& arguments) {
  v1::AddSiteRequest request;
  ITWIN_ASSIGN_OR_RETURN(*request.mutable_document(), ReadFile(arguments.file == "-" ? "/dev/stdin" : arguments.file, kMaxFileBytes));
  request.set_accept_fingerprint(arguments.fingerprint);
  request.set_replace(arguments.replace);
  request.set_without_jobs(arguments.without_jobs);
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  const std::unique_ptr<SiteView> view = session.output().SiteChecks();
  // The gateway knows neither the file's name nor the other options; its advice is to be copied as it is.
  const std::string command = absl::StrCat("itwin site add ", AsWord(arguments.file), arguments.replace ? " --replace" : "",
                                           arguments.without_jobs ? " --without-jobs" : "", " --accept-host-key");
  const auto exact = [&](absl::string_view words) {
    return absl::StrReplaceAll(words, {{"itwin site add FILE --accept-host-key", command}});
  };
  std::string last_error;
  const absl::Status status = gateway.AddSite(request, [&](const v1::SiteProgress& progress) {
    v1::SiteProgress shown = progress;
    if (progress.verdict() == v1::SITE_CHECK_ERROR) last_error = progress.found();
    shown.set_found(exact(progress.found()));
    view->OnProgress(shown);
    return true;
  });
  view->OnEnd();
  if (status.ok()) return kOk;
  if (!session.json() && status.message() == last_error) return ExitCodeOf(status);  // it has just been shown
  // The site file's problems carry the name that the user knows it by.
  return absl::Status(status.code(), exact(absl::StrReplaceAll(std::string(status.message()), {{"site file:", absl::StrCat(arguments.file, ":")}})));
}

absl::StatusOr<int> DoctorSite(Session& session, const SiteArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  const std::unique_ptr<SiteView> view = session.output().SiteChecks();
  int errors = 0;
  const absl::Status status = gateway.DoctorSite(arguments.name, arguments.without_jobs, [&](const v1::SiteProgress& progress) {
    errors += progress.verdict() == v1::SITE_CHECK_ERROR;
    view->OnProgress(progress);
    return true;
  });
  view->OnEnd();
  if (!status.ok()) return status;
  return errors == 0 ? kOk : kUnsuccessful;
}

absl::StatusOr<int> ShowSite(Session& session, const SiteArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(const v1::Site site, gateway.Site(arguments.name));
  session.output().Site(site);
  return kOk;
}

absl::StatusOr<int> PauseSite(Session& session, const SiteArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(const v1::Site site, gateway.PauseSite(arguments.name, arguments.reason));
  session.output().Sites({site});
  return kOk;
}

absl::StatusOr<int> ResumeSite(Session& session, const SiteArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_ASSIGN_OR_RETURN(const v1::Site site, gateway.ResumeSite(arguments.name));
  session.output().Sites({site});
  return kOk;
}

absl::StatusOr<int> RemoveSite(Session& session, const SiteArguments& arguments) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  ITWIN_RETURN_IF_ERROR(gateway.RemoveSite(arguments.name));
  session.output().SiteRemoved(arguments.name);
  return kOk;
}

}  // namespace itwin::cli
