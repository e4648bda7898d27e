#include "client/cli/watch_job.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "client/cli/exit_code.h"
#include "common/status_macros.h"

namespace itwin::cli {
namespace {

// Written by the handler, which may neither allocate nor lock; set before the handler is.
char farewell[256];
size_t farewell_size = 0;

void OnInterrupt(int) {
  const ssize_t ignored = write(STDERR_FILENO, farewell, farewell_size);
  (void)ignored;
  _exit(kInterrupted);
}

// Ctrl-C leaves the job alone: says so for as long as this object lives.
class InterruptNotice {
 public:
  explicit InterruptNotice(const std::string& job) {
    const std::string text =
        absl::StrCat("\nThe job goes on without this watch. To look again: itwin watch ", job, "\nTo end it: itwin cancel ", job, "\n");
    farewell_size = std::min(text.size(), sizeof farewell);
    std::memcpy(farewell, text.data(), farewell_size);
    struct sigaction action {};
    action.sa_handler = OnInterrupt;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, &before_);
  }
  ~InterruptNotice() { sigaction(SIGINT, &before_, nullptr); }
  InterruptNotice(const InterruptNotice&) = delete;
  InterruptNotice& operator=(const InterruptNotice&) = delete;

 private:
  struct sigaction before_ {};
};

}  // namespace

absl::StatusOr<int> WatchJob(Session& session, const std::string& job) {
  ITWIN_ASSIGN_OR_RETURN(client::Client gateway, session.Gateway());
  // The watch itself waits for a gateway for ever; one that was never there is an error after --timeout.
  ITWIN_ASSIGN_OR_RETURN(const v1::Job known, gateway.Get(job));
  InterruptNotice notice(known.id());
  std::unique_ptr<WatchView> view = session.output().Watch();
  client::WatchOptions options;
  options.on_reconnect = [&](const absl::Status& why, absl::Duration delay) { view->OnReconnect(why, delay); };
  ITWIN_ASSIGN_OR_RETURN(v1::Job last, gateway.Watch(known.id(), options, [&](const v1::JobUpdate& update) {
    view->OnUpdate(update);
    return true;
  }));
  view->OnEnd(last);
  return ExitCodeOf(last.state());
}

}  // namespace itwin::cli
