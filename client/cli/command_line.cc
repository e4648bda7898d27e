#include "client/cli/command_line.h"

#include <CLI/CLI.hpp>

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "client/cli/commands/commands.h"
#include "client/cli/completion.h"
#include "client/cli/exit_code.h"
#include "common/spec/nearest_name.h"
#include "common/version.h"

namespace itwin::cli {
namespace {

constexpr char kFooter[] =
    "\nExit codes: 0 fine; 1 the watched job failed or was cancelled; 2 wrong arguments or job document; 3 not found;\n"
    "4 no or bad token, or not allowed; 5 the gateway cannot be reached; 6 any other error; 130 interrupted.\n"
    "A job is named by its id or the first digits of it (at least 4) that are unique.\n"
    "Where the gateway is: options, then ITWIN_ENDPOINT, ITWIN_CA_FILE, ITWIN_TOKEN_FILE (or ITWIN_TOKEN), then the file\n"
    "$ITWIN_CONFIG or ~/.config/itwin/config.yaml with endpoint, ca_file, token_file. See docs/cli.md.";

struct GlobalArguments {
  std::string output = "table";
  std::string timeout = "15s";
  client::ConnectOptions connect;
};

bool IsDuration(const std::string& text) {
  absl::Duration value;
  return absl::ParseDuration(text, &value) && value > absl::ZeroDuration() && value < absl::InfiniteDuration();
}

// The parser with its verbs, each with what it runs.
class CommandLine {
 public:
  using Run = std::function<absl::StatusOr<int>(Session&)>;

  CommandLine() {
    app_.require_subcommand(1);
    app_.fallthrough();  // global options may stand after the verb
    app_.footer(kFooter);
    app_.set_version_flag("--version", std::string("itwin ") + kVersion);
    app_.add_option("--output", global_.output, "How results are printed: table or json")
        ->check(CLI::IsMember({"table", "json"}));
    app_.add_option("--timeout", global_.timeout, "How long to try to reach the gateway, such as 5s (default 15s)")
        ->check([](const std::string& text) {
          return IsDuration(text) ? std::string() : "'" + text + "' is no duration; write 5s or 1m";
        });
    app_.add_option("--endpoint", global_.connect.endpoint, "The gateway, host:port or unix:/path");
    app_.add_option("--ca-file", global_.connect.ca_file, "Certificate (PEM) of the gateway's CA");
    app_.add_option("--token-file", global_.connect.token_file, "File with your token");
    app_.add_option("--server-name", global_.connect.server_name, "Name in the gateway's certificate, behind a port forward");
    app_.add_flag("--insecure", global_.connect.insecure, "Plain text; only to this machine");
    AddSubmit();
    AddValidate();
    AddJobs();
    AddJobVerb("status", "Show one job: state, reason, attempts, result", [this](Session& s) { return Status(s, job_); });
    AddJobVerb("watch", "Watch a job live until it ends; Ctrl-C leaves the job running",
               [this](Session& s) { return Watch(s, job_); });
    AddLogs();
    AddMetrics();
    AddJobVerb("events", "Everything that happened to a job", [this](Session& s) { return Events(s, job_); });
    AddCancel();
    AddRetry();
    AddGet();
    AddTrace();
    AddVerb("sites", "The clusters the gateway can run jobs on; the same as: site list", [](Session& s) { return Sites(s); });
    AddSite();
    AddVerb("version", "Versions of this program and of the gateway", [](Session& s) { return Version(s); });
    AddCompletion();
  }

  CLI::App& app() { return app_; }
  const GlobalArguments& global() const { return global_; }
  const Run& chosen() const { return chosen_; }

  std::vector<VerbWords> Words() const {
    std::vector<VerbWords> out;
    for (const CLI::App* verb : app_.get_subcommands({})) {
      VerbWords words{.name = verb->get_name(), .description = verb->get_description(), .options = {}};
      for (const CLI::App* part : verb->get_subcommands({})) {
        words.parts.push_back(part->get_name());
        for (const CLI::Option* option : part->get_options()) {
          for (const std::string& name : option->get_lnames()) {
            if (std::find(words.options.begin(), words.options.end(), "--" + name) == words.options.end()) words.options.push_back("--" + name);
          }
        }
      }
      for (const CLI::Option* option : verb->get_options()) {
        for (const std::string& name : option->get_lnames()) {
          if (std::find(words.options.begin(), words.options.end(), "--" + name) == words.options.end()) words.options.push_back("--" + name);
        }
        words.takes_job |= option->get_positional() && absl::StartsWith(option->get_name(true), "JOB");
        words.takes_file |= option->get_positional() && option->get_name(true) == "FILE" && verb->get_name() != "get" && verb->get_name() != "trace";
      }
      out.push_back(std::move(words));
    }
    return out;
  }
  std::vector<std::string> GlobalWords() const {
    std::vector<std::string> out;
    for (const CLI::Option* option : app_.get_options()) {
      for (const std::string& name : option->get_lnames()) out.push_back("--" + name);
    }
    return out;
  }
  std::vector<std::string> VerbNames() const {
    std::vector<std::string> out;
    for (const CLI::App* verb : app_.get_subcommands({})) out.push_back(verb->get_name());
    return out;
  }

 private:
  CLI::App* AddVerb(const std::string& name, const std::string& description, Run run) {
    CLI::App* verb = app_.add_subcommand(name, description);
    verb->callback([this, run = std::move(run)] { chosen_ = run; });
    return verb;
  }
  CLI::App* AddJobVerb(const std::string& name, const std::string& description, Run run) {
    CLI::App* verb = AddVerb(name, description, std::move(run));
    verb->add_option("JOB", job_, "Id of the job, or a unique beginning of it")->required();
    return verb;
  }

  void AddSubmit() {
    CLI::App* verb = AddVerb("submit", "Submit a job", [this](Session& s) { return Submit(s, submit_); });
    verb->add_option("FILE", submit_.file, "Job in YAML or JSON; - for standard input")->required();
    verb->add_flag("--watch,-w", submit_.watch, "Watch it until it ends; the exit code tells how it ended");
    AddOverrides(verb, &submit_.overrides);
    verb->add_option("--name", submit_.name, "Name of the job instead of the one in the file");
    verb->add_option("--request-id", submit_.request_id, "Same id and job again: the same job, never two");
    verb->add_option("--id-file", submit_.id_file, "Also write the job's id into this file");
  }
  void AddValidate() {
    CLI::App* verb = AddVerb("validate", "Check a job's file without submitting it",
                             [this](Session& s) { return Validate(s, validate_); });
    verb->add_option("FILE", validate_.file, "Job in YAML or JSON; - for standard input")->required();
    AddOverrides(verb, &validate_.overrides);
    verb->add_flag("--remote", validate_.remote, "Also ask the gateway");
  }
  static void AddOverrides(CLI::App* verb, std::vector<std::string>* overrides) {
    verb->add_option("--set", *overrides, "Change a field, such as train.epochs=5; may be repeated")
        ->type_name("FIELD=VALUE")
        ->expected(1)
        ->take_all();
  }
  void AddJobs() {
    CLI::App* verb = AddVerb("jobs", "List jobs, newest first", [this](Session& s) { return Jobs(s, jobs_); });
    verb->add_option("--state", jobs_.states, "Only jobs in this state, such as RUNNING; may be repeated")->expected(1)->take_all();
    verb->add_option("--site", jobs_.site, "Only jobs of this site");
    verb->add_option("--name", jobs_.name, "Only jobs whose name contains this");
    verb->add_option("--label", jobs_.labels, "Only jobs with this label, key=value; may be repeated")->expected(1)->take_all();
    verb->add_option("--limit", jobs_.limit, "At most this many (default 20)")->check(CLI::Range(1, 1'000'000));
    verb->add_flag("--all", jobs_.all, "All of them");
    verb->add_flag("--live", jobs_.live, "Only jobs that have not ended");
    verb->add_flag("--quiet,-q", jobs_.quiet, "Ids alone, one per line");
  }
  void AddLogs() {
    CLI::App* verb = AddVerb("logs", "What a job's program printed", [this](Session& s) { return Logs(s, logs_); });
    verb->add_option("JOB", logs_.job, "Id of the job, or a unique beginning of it")->required();
    verb->add_flag("--follow,-f", logs_.follow, "Go on until the job ends");
    verb->add_flag("--stderr", logs_.from_stderr, "Standard error instead of standard output");
    verb->add_option("--attempt", logs_.attempt, "Of this attempt (default: the newest)")->check(CLI::Range(1, 999'999));
  }
  void AddMetrics() {
    CLI::App* verb = AddVerb("metrics", "Metrics of a job: an overview, or every point with --csv or --json",
                             [this](Session& s) { return Metrics(s, metrics_); });
    verb->add_option("JOB", metrics_.job, "Id of the job, or a unique beginning of it")->required();
    verb->add_option("--series", metrics_.series, "Only this series; a * at the end matches any ending; may be repeated")
        ->expected(1)
        ->take_all();
    CLI::Option* csv = verb->add_flag("--csv", metrics_.csv, "Every point: series,attempt,step,time_us,value");
    verb->add_flag("--json", metrics_.json, "Every point as a JSON list")->excludes(csv);
  }
  void AddCancel() {
    CLI::App* verb = AddVerb("cancel", "Cancel jobs", [this](Session& s) { return Cancel(s, cancel_); });
    verb->add_option("JOB", cancel_.jobs, "Ids of jobs, or unique beginnings of them")->required();
    verb->add_option("--reason", cancel_.reason, "Why, for the record");
  }
  void AddRetry() {
    CLI::App* verb = AddVerb("retry", "Submit a failed or cancelled job again, from its newest checkpoint",
                             [this](Session& s) { return Retry(s, retry_); });
    verb->add_option("JOB", retry_.job, "Id of the job, or a unique beginning of it")->required();
    verb->add_flag("--fresh", retry_.fresh, "From the start, not from the checkpoint");
    verb->add_flag("--watch,-w", retry_.watch, "Watch it until it ends");
  }
  void AddGet() {
    CLI::App* verb = AddVerb("get", "Fetch the outputs of a job, checked and resumable", [this](Session& s) { return Get(s, get_); });
    verb->add_option("JOB", get_.job, "Id of the job, or a unique beginning of it")->required();
    verb->add_option("DIR", get_.directory, "Where to put them (default: a directory named by the job's id)");
    verb->add_option("FILE", get_.files, "Only these outputs (default: all)");
  }
  void AddTrace() {
    CLI::App* verb = AddVerb("trace", "Trace the next training steps of a running job, for ui.perfetto.dev",
                             [this](Session& s) { return Trace(s, trace_); });
    verb->add_option("JOB", trace_.job, "Id of the job, or a unique beginning of it")->required();
    verb->add_option("FILE", trace_.file, "Where to put it (default: <job>-trace-<n>.json)");
    verb->add_option("--steps", trace_.steps, "How many steps (default 20)")->check(CLI::Range(1, 10'000));
  }
  void AddSite() {
    CLI::App* site = app_.add_subcommand("site", "Add, examine, pause and remove clusters (administrators)");
    site->require_subcommand(1);
    using Verb = absl::StatusOr<int> (*)(Session&, const SiteArguments&);
    const auto part = [&](const std::string& name, const std::string& description, Verb run) {
      CLI::App* verb = site->add_subcommand(name, description);
      verb->callback([this, run] { chosen_ = [this, run](Session& s) { return run(s, site_); }; });
      return verb;
    };
    const auto named = [&](CLI::App* verb) {
      verb->add_option("NAME", site_.name, "Name of the site")->required();
      return verb;
    };
    CLI::App* add = part("add", "Reach a new site, install what it lacks, examine it, and keep it", &cli::AddSite);
    add->add_option("FILE", site_.file, "Site file (docs/sites.md); - for standard input")->required();
    add->add_option("--accept-host-key", site_.fingerprint, "SHA256:... of a host key that you have compared; several with commas");
    add->add_flag("--replace", site_.replace, "Change a site that is there");
    add->add_flag("--without-jobs", site_.without_jobs, "Without the check that runs on compute nodes");
    CLI::App* doctor = named(part("doctor", "Examine a site: login, agent, scheduler, MPI, worker, scratch; exit code 1 if a check fails", &cli::DoctorSite));
    doctor->add_flag("--without-jobs", site_.without_jobs, "Without the check that runs on compute nodes");
    CLI::App* list = site->add_subcommand("list", "The clusters the gateway can run jobs on");
    list->callback([this] { chosen_ = [](Session& s) { return Sites(s); }; });
    named(part("show", "One site, with its file", &cli::ShowSite));
    CLI::App* pause = named(part("pause", "Place no new jobs there; what runs goes on. Kept over restarts", &cli::PauseSite));
    pause->add_option("--reason", site_.reason, "Why, for everybody who looks");
    named(part("resume", "Place jobs there again", &cli::ResumeSite));
    named(part("remove", "Forget a site without jobs; what is installed there stays", &cli::RemoveSite));
  }
  void AddCompletion() {
    CLI::App* verb = AddVerb("completion", "Print a completion script", [this](Session& s) -> absl::StatusOr<int> {
      absl::StatusOr<std::string> script = CompletionScript(shell_, Words(), GlobalWords());
      if (!script.ok()) return script.status();
      *s.terminal().out << *script << std::flush;
      return kOk;
    });
    verb->add_option("SHELL", shell_, "bash, zsh or fish")->required();
  }

  CLI::App app_{"Train on a supercomputer from here: submit jobs, watch them, get the models back.", "itwin"};
  GlobalArguments global_;
  Run chosen_;
  std::string job_;
  SiteArguments site_;
  std::string shell_;
  SubmitArguments submit_;
  ValidateArguments validate_;
  JobsArguments jobs_;
  LogsArguments logs_;
  MetricsArguments metrics_;
  CancelArguments cancel_;
  RetryArguments retry_;
  GetArguments get_;
  TraceArguments trace_;
};

// CLI11's words, with the verb that was probably meant.
std::string UsageProblem(const CommandLine& line, const CLI::ParseError& error, const std::vector<std::string>& arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& word = arguments[i];
    if (absl::StartsWith(word, "-")) {
      if (!absl::StrContains(word, "=")) ++i;  // its value, most likely
      continue;
    }
    const std::vector<std::string> verbs = line.VerbNames();
    if (std::find(verbs.begin(), verbs.end(), word) == verbs.end()) {
      return absl::StrCat("'", word, "' is no command; ", UnknownNameHint(word, verbs));
    }
    return absl::StrCat(error.what(), "; see itwin ", word, " --help");
  }
  return absl::StrCat(error.what(), "; see itwin --help");
}

}  // namespace

int RunCommandLine(const std::vector<std::string>& arguments, const Terminal& terminal, const Session::Connect& connect) {
  CommandLine line;
  // CLI11 reports by exceptions; this is their door.
  try {
    line.app().parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
  } catch (const CLI::CallForHelp&) {
    const CLI::App* deepest = &line.app();
    std::string before;
    while (!deepest->get_subcommands().empty()) {
      absl::StrAppend(&before, before.empty() ? "" : " ", deepest->get_name());
      deepest = deepest->get_subcommands().back();
    }
    *terminal.out << (before.empty() ? line.app().help() : deepest->help(before)) << std::flush;
    return kOk;
  } catch (const CLI::CallForVersion& version) {
    *terminal.out << version.what() << std::endl;
    return kOk;
  } catch (const CLI::ParseError& error) {
    MakeTableOutput(terminal)->Error(absl::InvalidArgumentError(UsageProblem(line, error, arguments)));
    return kUsage;
  }
  const GlobalArguments& global = line.global();
  client::ConnectOptions options = global.connect;
  absl::ParseDuration(global.timeout, &options.retry_for);
  options.call_deadline = std::max(options.retry_for, absl::Seconds(1));
  const bool json = global.output == "json";
  Session session(terminal, options, connect, json ? MakeJsonOutput(terminal) : MakeTableOutput(terminal), json);
  absl::StatusOr<int> code = line.chosen()(session);
  if (!code.ok()) {
    session.output().Error(code.status());
    return ExitCodeOf(code.status());
  }
  if (!terminal.out->flush()) {
    *terminal.err << "itwin: standard output cannot be written to\n";
    return kOther;
  }
  return *code;
}

}  // namespace itwin::cli
