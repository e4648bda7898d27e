// Whole command lines against a gateway in memory: what is printed, where, and the exit code.
#include "client/cli/command_line.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "client/cli/exit_code.h"
#include "common/files.h"
#include "common/subprocess.h"
#include "tests/client/fake_gateway.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::cli {
namespace {

using ::itwin::testing::FakeGateway;
using ::itwin::testing::TempDirectory;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::StartsWith;

constexpr char kJob[] = "0123456789abcdef";

class CommandLineTest : public ::testing::Test {
 protected:
  CommandLineTest() {
    terminal_.out = &out_;
    terminal_.err = &err_;
  }
  int Run(std::vector<std::string> arguments) {
    out_.str("");
    err_.str("");
    return RunCommandLine(arguments, terminal_, [this](const client::ConnectOptions& options) -> absl::StatusOr<client::Client> {
      ++connects_;
      options_ = options;
      if (!connect_error_.ok()) return connect_error_;
      return client::Client(gateway_);
    });
  }
  nlohmann::json Json() { return nlohmann::json::parse(out_.str(), nullptr, false); }
  std::string WriteJob(const std::string& text) {
    EXPECT_OK(WriteFileAtomically(directory_ / "job.yaml", text));
    return directory_ / "job.yaml";
  }
  void ScriptEnd(const std::string& id, v1::JobState state) {
    v1::JobUpdate& first = gateway_->AddUpdate(id);
    *first.mutable_job() = gateway_->jobs[id];
    v1::JobEvent* event = first.add_events();
    event->set_state(v1::JOB_STATE_QUEUED);
    event->set_kind("submitted");
    event->set_message("submitted by alice");
    v1::JobUpdate& running = gateway_->AddUpdate(id);
    *running.mutable_job() = gateway_->jobs[id];
    running.mutable_job()->set_state(v1::JOB_STATE_RUNNING);
    running.mutable_job()->mutable_progress()->set_epoch(1);
    running.mutable_job()->mutable_progress()->set_epochs(4);
    v1::PointBlock* block = running.add_blocks();
    block->set_series("train/loss");
    block->add_steps(1);
    block->add_times_us(1);
    block->add_values(0.5);
    v1::JobUpdate& last = gateway_->AddUpdate(id);
    v1::Job* job = last.mutable_job();
    *job = gateway_->jobs[id];
    job->set_state(state);
    job->set_reason(state == v1::JOB_STATE_FAILED ? "rank 1 ran out of memory; ask for more" : "");
    job->set_started_us(1'700'000'000'000'000);
    job->set_finished_us(1'700'000'092'000'000);
    (*job->mutable_summary())["test/rmse"] = 0.25;
  }

  TempDirectory directory_;
  std::ostringstream out_, err_;
  Terminal terminal_;
  std::shared_ptr<FakeGateway> gateway_ = std::make_shared<FakeGateway>();
  absl::Status connect_error_;
  client::ConnectOptions options_;
  int connects_ = 0;
};

TEST_F(CommandLineTest, WrongUsageIsExitTwoWithAHint) {
  const std::pair<std::vector<std::string>, const char*> kTable[] = {
      {{}, "see itwin --help"},
      {{"sbmit", "x"}, "'sbmit' is no command; did you mean 'submit'?"},
      {{"--output", "json", "stat"}, "'stat' is no command; did you mean 'status'?"},
      {{"frobnicate"}, "use one of submit, validate"},
      {{"submit"}, "see itwin submit --help"},
      {{"jobs", "--nope"}, "see itwin jobs --help"},
      {{"jobs", "--output", "xml"}, "xml not in {table,json}"},
      {{"jobs", "--timeout", "soon"}, "'soon' is no duration"},
      {{"jobs", "--limit", "0"}, "--limit"},
      {{"jobs", "--state", "runing"}, "--state: 'runing' is unknown; did you mean 'RUNNING'?"},
      {{"jobs", "--label", "novalue"}, "--label: 'novalue' is not key=value"},
      {{"metrics", "0123", "--csv", "--json"}, "excludes"},
      {{"logs", "0123", "-f", "--attempt", "2"}, "--follow shows the newest attempt"},
      {{"completion", "tcsh"}, "shell 'tcsh' is unknown"},
      {{"submit", "/no/such/file.yaml"}, "/no/such/file.yaml: No such file"},
  };
  for (const auto& [arguments, problem] : kTable) {
    EXPECT_EQ(Run(arguments), kUsage) << problem;
    EXPECT_THAT(err_.str(), AllOf(StartsWith("itwin: "), HasSubstr(problem)));
    EXPECT_THAT(out_.str(), IsEmpty());
  }
  EXPECT_EQ(connects_, 0);
}

TEST_F(CommandLineTest, HelpAndVersionNeedNoGateway) {
  EXPECT_EQ(Run({"--help"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("Exit codes:"), HasSubstr("submit"), HasSubstr("ITWIN_ENDPOINT")));
  EXPECT_EQ(Run({"submit", "--help"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("--watch"), HasSubstr("itwin submit")));
  EXPECT_EQ(Run({"--version"}), kOk);
  EXPECT_THAT(out_.str(), StartsWith("itwin 0"));
  EXPECT_EQ(connects_, 0);
}

TEST_F(CommandLineTest, ExitCodesFollowTheError) {
  const std::pair<absl::Status, int> kTable[] = {
      {absl::InvalidArgumentError("x"), 2}, {absl::NotFoundError("x"), 3},      {absl::UnauthenticatedError("x"), 4},
      {absl::PermissionDeniedError("x"), 4}, {absl::UnavailableError("x"), 5},  {absl::DeadlineExceededError("x"), 5},
      {absl::FailedPreconditionError("x"), 6}, {absl::ResourceExhaustedError("x"), 6}, {absl::DataLossError("x"), 6},
      {absl::InternalError("x"), 6},        {absl::UnimplementedError("x"), 6},
  };
  for (const auto& [status, code] : kTable) {
    gateway_->faults = {status};
    EXPECT_EQ(Run({"sites"}), code) << status;
    EXPECT_EQ(err_.str(), "itwin: x\n");
    gateway_->faults = {status};
    EXPECT_EQ(Run({"sites", "--output", "json"}), code);
    EXPECT_EQ(nlohmann::json::parse(err_.str())["error"]["message"], "x");
    EXPECT_EQ(nlohmann::json::parse(err_.str())["error"]["code"], absl::StatusCodeToString(status.code()));
  }
  connect_error_ = absl::InvalidArgumentError("no gateway is configured");
  EXPECT_EQ(Run({"sites"}), kUsage);
}

TEST_F(CommandLineTest, GlobalOptionsMayStandAnywhere) {
  EXPECT_EQ(Run({"--timeout", "3s", "version", "--endpoint", "a:1", "--ca-file", "c", "--token-file", "t"}), kOk);
  EXPECT_EQ(options_.retry_for, absl::Seconds(3));
  EXPECT_EQ(options_.endpoint, "a:1");
  EXPECT_EQ(options_.ca_file, "c");
  EXPECT_EQ(options_.token_file, "t");
  EXPECT_THAT(out_.str(), HasSubstr("gateway 0.1.0, API 1"));
  EXPECT_EQ(Run({"version", "--output", "json"}), kOk);
  EXPECT_EQ(Json()["gateway"], "0.1.0");
}

TEST_F(CommandLineTest, SubmitPrintsTheIdAndSendsWhatWasAsked) {
  const std::string file = WriteJob("name: a\ncommand: {argv: [./run.sh], files: [run.sh]}\n");
  ASSERT_OK(WriteFileAtomically(directory_ / "run.sh", "#!/bin/sh\n"));
  EXPECT_EQ(Run({"submit", file, "--set", "resources.nodes=3", "--set", "env.A=b", "--name", "other", "--request-id", "r1",
                 "--id-file", directory_ / "id"}), kOk) << err_.str();
  const v1::JobSpec& spec = gateway_->last_submit.spec();
  EXPECT_EQ(spec.name(), "other");
  EXPECT_EQ(spec.resources().nodes(), 3);
  EXPECT_EQ(spec.env().at("A"), "b");
  EXPECT_EQ(spec.inputs(0).path(), "run.sh");
  EXPECT_EQ(gateway_->last_submit.request_id(), "r1");
  const std::string id = ReadFile(directory_ / "id").value();
  EXPECT_EQ(out_.str(), "job " + id.substr(0, 16) + " submitted\n");
  EXPECT_EQ(Run({"submit", file, "--request-id", "r1"}), kOk);
  EXPECT_THAT(out_.str(), HasSubstr("existed already"));
  EXPECT_EQ(Run({"submit", file, "--output", "json"}), kOk);
  EXPECT_EQ(Json()["state"], "QUEUED");
  EXPECT_EQ(Json()["existed"], false);
}

TEST_F(CommandLineTest, SubmitShowsEveryProblemOfTheFile) {
  const std::string file = WriteJob("name: a\ntrain:\n  optimzer: adam\n  epochs: five\n");
  EXPECT_EQ(Run({"submit", file}), kUsage);
  EXPECT_THAT(err_.str(), AllOf(HasSubstr("job.yaml is not a valid job"),
                                HasSubstr("itwin: line 3: train.optimzer: unknown key; did you mean 'optimizer'?\n"),
                                HasSubstr("itwin: line 4: train.epochs: found 'five'")));
  EXPECT_EQ(Run({"submit", WriteJob("command: {argv: [a], files: [none]}")}), kUsage);
  EXPECT_THAT(err_.str(), HasSubstr("command.files[0]: "));
  EXPECT_EQ(connects_, 1);  // only the last got that far
  EXPECT_EQ(Run({"submit", WriteJob(std::string(2 << 20, 'x'))}), kUsage);
  EXPECT_THAT(err_.str(), HasSubstr("larger than 1048576 bytes"));
}

TEST_F(CommandLineTest, SubmitWatchEndsWithTheJobsOwnCode) {
  const std::string file = WriteJob("command: {argv: [a]}");
  for (const auto& [state, code] : {std::pair(v1::JOB_STATE_SUCCEEDED, kOk), std::pair(v1::JOB_STATE_FAILED, kUnsuccessful),
                                    std::pair(v1::JOB_STATE_CANCELLED, kUnsuccessful)}) {
    gateway_ = std::make_shared<FakeGateway>();
    const std::string id = "5ab3177ed0000100";
    gateway_->AddJob(id, v1::JOB_STATE_QUEUED);
    ScriptEnd(id, state);
    EXPECT_EQ(Run({"submit", file, "--watch"}), code) << err_.str();
    EXPECT_THAT(out_.str(), HasSubstr("job " + id + " submitted\n"));
  }
}

TEST_F(CommandLineTest, WatchPrintsPlainLinesWithoutATerminal) {
  gateway_->AddJob(kJob, v1::JOB_STATE_QUEUED);
  ScriptEnd(kJob, v1::JOB_STATE_FAILED);
  gateway_->cuts = {1};
  EXPECT_EQ(Run({"watch", "0123"}), kUnsuccessful);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("QUEUED: submitted by alice\n"), HasSubstr("RUNNING\n"),
                                HasSubstr("epoch 1/4  train/loss 0.5\n"), HasSubstr("FAILED after 1m32s\n"),
                                HasSubstr("rank 1 ran out of memory; ask for more"), HasSubstr("test/rmse 0.25"),
                                HasSubstr("itwin logs 0123456789abcdef --stderr")));
  EXPECT_THAT(out_.str(), Not(HasSubstr("\x1b")));
  EXPECT_THAT(err_.str(), AllOf(HasSubstr("connection lost"), HasSubstr("connected again")));
}

TEST_F(CommandLineTest, WatchInJsonIsOneLinePerUpdate) {
  gateway_->AddJob(kJob, v1::JOB_STATE_QUEUED);
  ScriptEnd(kJob, v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(Run({"watch", kJob, "--output", "json"}), kOk);
  std::vector<nlohmann::json> lines;
  std::istringstream in(out_.str());
  for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0]["events"][0]["message"], "submitted by alice");
  EXPECT_EQ(lines[1]["points"][0]["value"], 0.5);
  EXPECT_EQ(lines[2]["job"]["state"], "SUCCEEDED");
}

TEST_F(CommandLineTest, ValidateWorksOfflineAndAsksTheGatewayOnRequest) {
  const std::string file = WriteJob("name: a\ncommand: {argv: [a]}\nresources: {time: 30m}");
  EXPECT_EQ(Run({"validate", file, "--set", "resources.nodes=2"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("nodes: 2"), HasSubstr("time: 30m"), HasSubstr("# valid\n")));
  EXPECT_EQ(connects_, 0);
  EXPECT_EQ(Run({"validate", file, "--output", "json"}), kOk);
  EXPECT_EQ(Json()["valid"], true);
  EXPECT_EQ(Json()["spec"]["resources"]["time"], "1800s");
  EXPECT_EQ(Run({"validate", file, "--remote"}), kOk);
  EXPECT_EQ(connects_, 1);
  gateway_->faults = {absl::InvalidArgumentError("site: 'x' is unknown")};
  EXPECT_EQ(Run({"validate", file, "--remote"}), kUsage);
  EXPECT_EQ(Run({"validate", WriteJob("command: {argv: [a], files: [gone]}")}), kUsage);
  EXPECT_THAT(err_.str(), AllOf(HasSubstr("command.files[0]: "), HasSubstr("gone: No such file")));
  EXPECT_EQ(Run({"validate", WriteJob("command: {argv: []}")}), kUsage);
  EXPECT_THAT(err_.str(), HasSubstr("command.argv: is empty"));
}

TEST_F(CommandLineTest, JobsAreListedFilteredAndPaged) {
  EXPECT_EQ(Run({"jobs"}), kOk);
  EXPECT_EQ(out_.str(), "no jobs\n");
  for (int i = 0; i < 45; ++i) gateway_->AddJob(absl::StrCat("00000000000000", 10 + i));
  EXPECT_EQ(Run({"jobs", "--state", "running", "--state", "PENDING", "--site", "vega", "--name", "win", "--label", "a=b=c", "--live"}), kOk);
  EXPECT_THAT(gateway_->last_list.states(), ElementsAre(v1::JOB_STATE_RUNNING, v1::JOB_STATE_PENDING));
  EXPECT_EQ(gateway_->last_list.site(), "vega");
  EXPECT_EQ(gateway_->last_list.name_contains(), "win");
  EXPECT_EQ(gateway_->last_list.labels().at("a"), "b=c");
  EXPECT_TRUE(gateway_->last_list.live_only());
  const std::string table = out_.str();
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 21);
  EXPECT_THAT(err_.str(), HasSubstr("there are more"));
  EXPECT_THAT(out_.str(), HasSubstr("0000000000000054  job-0000  RUNNING"));  // whole ids for scripts
  EXPECT_EQ(Run({"jobs", "--all", "--output", "json"}), kOk);
  EXPECT_EQ(Json()["jobs"].size(), 45u);
  EXPECT_EQ(Json()["more"], false);
  EXPECT_EQ(Run({"jobs", "--limit", "3", "-q"}), kOk);
  EXPECT_EQ(out_.str(), "0000000000000054\n0000000000000053\n0000000000000052\n");
}

TEST_F(CommandLineTest, TablesOnATerminalFitAndShortenIds) {
  terminal_.out_is_terminal = true;
  terminal_.unicode = true;
  terminal_.width = [] { return 60; };
  gateway_->AddJob(kJob).set_name("a very long name, longer than any column should ever be, really");
  EXPECT_EQ(Run({"jobs"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("01234567  "), HasSubstr("…"), Not(HasSubstr(kJob))));
}

TEST_F(CommandLineTest, StatusShowsAllThereIs) {
  v1::Job& job = gateway_->AddJob(kJob, v1::JOB_STATE_FAILED);
  job.set_reason("rank 0: bad\x1b[31m thing");
  job.set_failure(v1::FAILURE_CLASS_APP);
  (*job.mutable_summary())["test/rmse"] = 0.5;
  v1::Attempt* attempt = job.add_attempts();
  attempt->set_number(1);
  attempt->set_exit_code(3);
  attempt->set_reason("exit 3");
  EXPECT_EQ(Run({"status", "0123"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("state      FAILED"), HasSubstr("rank 0: bad?[31m thing"), HasSubstr("failure    app"),
                                HasSubstr("test/rmse = 0.5"), HasSubstr("exit 3")));
  EXPECT_EQ(Run({"--output", "json", "status", "0123"}), kOk);
  EXPECT_EQ(Json()["id"], kJob);
  EXPECT_EQ(Json()["state"], "FAILED");
  EXPECT_EQ(Json()["summary"]["test/rmse"], 0.5);
  EXPECT_EQ(Json()["created_us"], 1'700'000'000'000'000);
  EXPECT_EQ(Json()["attempts"][0]["exit_code"], 3);
  EXPECT_EQ(Run({"status", "beef"}), kNotFound);
  EXPECT_EQ(err_.str(), "itwin: no job 'beef'\n");
}

TEST_F(CommandLineTest, NoColorWithoutATerminalOrWhenUnwanted) {
  gateway_->AddJob(kJob);
  terminal_.out_is_terminal = true;
  EXPECT_EQ(Run({"status", kJob}), kOk);
  EXPECT_THAT(out_.str(), Not(HasSubstr("\x1b[")));
  terminal_.color = true;
  EXPECT_EQ(Run({"status", kJob}), kOk);
  EXPECT_THAT(out_.str(), HasSubstr("\x1b[36mRUNNING\x1b[0m"));
}

TEST_F(CommandLineTest, LogsAreWrittenAsTheyAre) {
  gateway_->AddJob(kJob);
  gateway_->logs[kJob] = {std::string("line one\nbytes \x00\xff\n", 18), "oops\n"};
  EXPECT_EQ(Run({"logs", kJob}), kOk);
  EXPECT_EQ(out_.str(), gateway_->logs[kJob].first);
  EXPECT_EQ(Run({"logs", kJob, "--stderr"}), kOk);
  EXPECT_EQ(out_.str(), "oops\n");
  gateway_->dropped_log_bytes = 77;
  EXPECT_EQ(Run({"logs", kJob}), kOk);
  EXPECT_THAT(err_.str(), HasSubstr("77 more bytes than the limit"));
}

TEST_F(CommandLineTest, LogsCanBeFollowedAcrossABrokenConnection) {
  gateway_->AddJob(kJob);
  for (const char* text : {"a\n", "b\n", "c\n"}) {
    v1::JobUpdate& update = gateway_->AddUpdate(kJob);
    update.set_stdout_data(text);
    update.set_stderr_data("e");
    update.mutable_cursor()->set_log_attempt(text[0] == 'c' ? 2 : 1);
  }
  *gateway_->updates[kJob].back().mutable_job() = gateway_->AddJob(kJob, v1::JOB_STATE_SUCCEEDED);
  gateway_->cuts = {2};
  EXPECT_EQ(Run({"logs", kJob, "-f"}), kOk);
  EXPECT_EQ(out_.str(), "a\nb\nc\n");
  EXPECT_THAT(err_.str(), HasSubstr("attempt 2 begins"));
  EXPECT_TRUE(gateway_->watches[0].logs());
  EXPECT_FALSE(gateway_->watches[0].points());
}

TEST_F(CommandLineTest, MetricsAsTableCsvAndJson) {
  gateway_->AddJob(kJob);
  for (const char* series : {"train/loss", "odd,\"name\""}) {
    v1::PointBlock& block = gateway_->points[kJob].emplace_back();
    block.set_series(series);
    block.set_attempt(1);
    for (double value : {0.1, std::nan("")}) {
      block.add_steps(7);
      block.add_times_us(1'700'000'000'000'001);
      block.add_values(value);
    }
  }
  EXPECT_EQ(Run({"metrics", kJob, "--csv"}), kOk);
  EXPECT_THAT(out_.str(), StartsWith("series,attempt,step,time_us,value\ntrain/loss,1,7,1700000000000001,0.10000000000000001\n"));
  EXPECT_THAT(out_.str(), HasSubstr("\n\"odd,\"\"name\"\"\",1,7,"));
  EXPECT_EQ(Run({"metrics", kJob, "--json"}), kOk);
  EXPECT_EQ(Json().size(), 4u);
  EXPECT_EQ(Json()[0]["value"], 0.1);
  EXPECT_EQ(Json()[0]["time_us"], 1'700'000'000'000'001);
  EXPECT_TRUE(Json()[1]["value"].is_null());
  EXPECT_EQ(Run({"metrics", kJob, "--output", "json"}), kOk);
  EXPECT_EQ(Json().size(), 4u);
  EXPECT_EQ(Run({"metrics", kJob}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("SERIES"), HasSubstr("train/loss")));
  gateway_->points.clear();
  EXPECT_EQ(Run({"metrics", kJob}), kOk);
  EXPECT_EQ(out_.str(), "no metrics yet\n");
  EXPECT_EQ(Run({"metrics", "beef", "--json"}), kNotFound);
  EXPECT_THAT(out_.str(), IsEmpty());
}

TEST_F(CommandLineTest, EventsAreTheAuditTrail) {
  gateway_->AddJob(kJob);
  for (int i = 1; i <= 3; ++i) {
    v1::JobEvent& event = gateway_->events[kJob].emplace_back();
    event.set_sequence(i);
    event.set_kind("placed");
    event.set_state(v1::JOB_STATE_STAGING);
    event.set_actor("gateway");
    event.set_message("on site local");
  }
  EXPECT_EQ(Run({"events", kJob}), kOk);
  EXPECT_THAT(out_.str(), HasSubstr("placed  STAGING  -        gateway  on site local"));
  EXPECT_EQ(Run({"events", kJob, "--output", "json"}), kOk);
  EXPECT_EQ(Json().size(), 3u);
}

TEST_F(CommandLineTest, CancelTriesAllAndReportsTheFirstError) {
  gateway_->AddJob(kJob);
  gateway_->AddJob("fedcba9876543210", v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(Run({"cancel", kJob, "--reason", "enough"}), kOk);
  EXPECT_THAT(out_.str(), HasSubstr("will be cancelled; it is RUNNING now"));
  EXPECT_EQ(Run({"cancel", "beef", "fedc", kJob}), kNotFound);
  EXPECT_THAT(out_.str(), HasSubstr(kJob));
  EXPECT_THAT(err_.str(), AllOf(HasSubstr("cancel beef: no job"), HasSubstr("cancel fedc: the job has ended")));
  EXPECT_EQ(Run({"cancel", "beef", kJob, "--output", "json"}), kNotFound);
  EXPECT_EQ(Json()[0]["error"]["code"], "NOT_FOUND");
  EXPECT_TRUE(Json()[1]["error"].is_null());
}

TEST_F(CommandLineTest, TraceWaitsForTheTraceAndFetchesIt) {
  gateway_->AddJob(kJob).set_version(1);
  gateway_->AddUpdate(kJob).add_events()->set_kind("traced");  // of one before: not waited for
  gateway_->AddUpdate(kJob).add_events()->set_kind("note");
  v1::JobEvent* traced = gateway_->AddUpdate(kJob).add_events();
  traced->set_kind("traced");
  traced->set_message("the agent takes no traces");
  gateway_->AddOutput(kJob, "trace-1.json", "{}");
  const std::string file = directory_ / "here.json";
  EXPECT_EQ(Run({"trace", "0123", file, "--steps", "7"}), kOk);
  EXPECT_EQ(gateway_->last_trace.steps(), 7);
  EXPECT_EQ(gateway_->watches.back().cursor().event_sequence(), 1);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr(file), HasSubstr("ui.perfetto.dev")));
  EXPECT_EQ(*ReadFile(file, 100), "{}");
  EXPECT_EQ(Run({"trace", "0123", file, "--output", "json"}), kOk);
  EXPECT_EQ(gateway_->last_trace.steps(), 20);
  EXPECT_EQ(Json()["output"], "trace-1.json");
  // The event says why there is none.
  gateway_->outputs.clear();
  EXPECT_EQ(Run({"trace", "0123", file}), kOther);
  EXPECT_THAT(err_.str(), HasSubstr("there is no trace-1.json of job 0123456789abcdef: the agent takes no traces"));
  traced->set_kind("requeued");
  traced->set_message("a node failed");
  EXPECT_EQ(Run({"trace", "0123", file}), kOther);
  EXPECT_THAT(err_.str(), HasSubstr("a node failed"));
  EXPECT_EQ(Run({"trace", "0123", "--steps", "0"}), kUsage);
  gateway_->AddJob(kJob, v1::JOB_STATE_SUCCEEDED);
  EXPECT_EQ(Run({"trace", "0123"}), kOther);
  EXPECT_THAT(err_.str(), HasSubstr("only a RUNNING job"));
}

TEST_F(CommandLineTest, RetryMakesANewJob) {
  gateway_->AddJob(kJob, v1::JOB_STATE_FAILED);
  EXPECT_EQ(Run({"retry", "0123", "--fresh"}), kOk);
  EXPECT_EQ(out_.str(), "job eeeeeeeeeeeeeeee submitted (repeats 0123456789abcdef)\n");
}

TEST_F(CommandLineTest, GetFetchesOutputs) {
  gateway_->AddJob(kJob, v1::JOB_STATE_SUCCEEDED);
  gateway_->AddOutput(kJob, "model.pt", "weights");
  gateway_->AddOutput(kJob, "plots/loss.txt", "loss");
  EXPECT_EQ(Run({"get", "0123", directory_ / "r"}), kOk) << err_.str();
  EXPECT_EQ(ReadFile(directory_ / "r/model.pt").value(), "weights");
  EXPECT_EQ(ReadFile(directory_ / "r/plots/loss.txt").value(), "loss");
  EXPECT_THAT(out_.str(), HasSubstr("r/model.pt  7 B  checksum right"));
  EXPECT_EQ(Run({"get", "0123", directory_ / "s", "plots/loss.txt", "--output", "json"}), kOk);
  EXPECT_EQ(Json()["files"].size(), 1u);
  EXPECT_EQ(Json()["files"][0]["path"], directory_ / "s/plots/loss.txt");
  EXPECT_EQ(Run({"get", "0123", directory_ / "s", "modl.pt"}), kNotFound);
  EXPECT_THAT(err_.str(), HasSubstr("no output 'modl.pt'; did you mean 'model.pt'?"));
  gateway_->corrupt_downloads = true;
  EXPECT_EQ(Run({"get", "0123", directory_ / "t"}), kOther);
  gateway_->AddJob("fedcba9876543210");
  EXPECT_EQ(Run({"get", "fedc", directory_ / "t"}), kOther);
  EXPECT_THAT(err_.str(), HasSubstr("is RUNNING; outputs come when it has ended"));
}

TEST_F(CommandLineTest, ASurveyShowsEachVerdictWithWhatToDo) {
  const auto tell = [&](const char* step, v1::SiteCheck verdict, const char* found, const char* advice = "") {
    v1::SiteProgress& progress = gateway_->survey.emplace_back();
    progress.set_step(step);
    progress.set_verdict(verdict);
    progress.set_found(found);
    progress.set_advice(advice);
  };
  tell("install", v1::SITE_CHECK_UNSPECIFIED, "sending 18 MB");
  gateway_->survey.back().set_fraction(0.5);
  tell("install", v1::SITE_CHECK_OK, "0.1.0-1a2b3c4d");
  tell("quota", v1::SITE_CHECK_WARNING, "91 % of the home is used", "remove old spools");
  gateway_->sites.emplace_back().set_name("vega");
  // Plain lines: nothing that is drawn over.
  EXPECT_EQ(Run({"site", "doctor", "vega"}), kOk) << err_.str();
  EXPECT_EQ(out_.str(), "ok       install      0.1.0-1a2b3c4d\nwarning  quota        91 % of the home is used\n"
                        "                      -> remove old spools\n");
  // A terminal also sees what is under way, in colours.
  terminal_.out_is_terminal = terminal_.color = true;
  EXPECT_EQ(Run({"site", "doctor", "vega"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("sending 18 MB"), HasSubstr("50 %"), HasSubstr("\x1b[33mwarning"), HasSubstr("\x1b[32mok")));
  terminal_.out_is_terminal = terminal_.color = false;

  tell("scheduler", v1::SITE_CHECK_ERROR, "sbatch is not in PATH");
  EXPECT_EQ(Run({"site", "doctor", "vega"}), kUnsuccessful);
  EXPECT_THAT(out_.str(), HasSubstr("ERROR    scheduler    sbatch is not in PATH"));
  EXPECT_EQ(Run({"site", "doctor", "vega", "--output", "json"}), kUnsuccessful);
  EXPECT_THAT(out_.str(), HasSubstr(R"({"step":"scheduler","verdict":"ERROR","found":"sbatch is not in PATH")"));
  EXPECT_EQ(Run({"site", "doctor", "vegas"}), kNotFound);
}

TEST_F(CommandLineTest, AddingASiteSendsItsFileAndGivesTheExactCommandToAcceptAKey) {
  ASSERT_OK(WriteFileAtomically(directory_ / "my site.yaml", "name: vega\n"));
  const std::string file = directory_ / "my site.yaml";
  EXPECT_EQ(Run({"site", "add", file, "--without-jobs", "--accept-host-key", "SHA256:x"}), kOk) << err_.str();
  ASSERT_EQ(gateway_->added.size(), 1u);
  EXPECT_EQ(gateway_->added[0].document(), "name: vega\n");
  EXPECT_EQ(gateway_->added[0].accept_fingerprint(), "SHA256:x");
  EXPECT_TRUE(gateway_->added[0].without_jobs());
  EXPECT_FALSE(gateway_->added[0].replace());

  gateway_->survey_result = absl::FailedPreconditionError("unknown key. If it is the same: itwin site add FILE --accept-host-key SHA256:abc");
  EXPECT_EQ(Run({"site", "add", file, "--replace"}), kOther);
  EXPECT_THAT(err_.str(), HasSubstr(absl::StrCat("itwin site add '", file, "' --replace --accept-host-key SHA256:abc")));
  gateway_->survey_result = absl::InvalidArgumentError("site file:3: shh: unknown key; did you mean 'ssh'?");
  EXPECT_EQ(Run({"site", "add", file}), kUsage);
  EXPECT_THAT(err_.str(), HasSubstr(absl::StrCat(file, ":3: shh: unknown key")));
  gateway_->survey_result = absl::PermissionDeniedError("an administrator's token");
  EXPECT_EQ(Run({"site", "add", file}), kNotAllowed);
  EXPECT_EQ(Run({"site", "add", directory_ / "none.yaml"}), kNotFound);
}

TEST_F(CommandLineTest, ASiteIsShownPausedResumedAndRemoved) {
  v1::Site& site = gateway_->sites.emplace_back();
  site.set_name("vega");
  site.set_state(v1::SITE_STATE_READY);
  site.set_address("ssh ada@login.vega.example");
  site.add_partitions("gpu");
  site.set_calls_per_minute(2.25);
  site.set_document("name: vega\nssh: {hosts: [login.vega.example]}\n");
  EXPECT_EQ(Run({"site", "list"}), kOk);
  EXPECT_THAT(out_.str(), HasSubstr("vega"));
  EXPECT_EQ(Run({"site", "show", "vega"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("address      ssh ada@login.vega.example"), HasSubstr("partitions   gpu"),
                                HasSubstr("calls        2.2 to the scheduler per minute"),
                                HasSubstr("ssh: {hosts: [login.vega.example]}")));
  EXPECT_EQ(Run({"site", "show", "vega", "--output", "json"}), kOk);
  EXPECT_EQ(Json()["partitions"][0], "gpu");
  EXPECT_EQ(Json()["calls_per_minute"], 2.25);
  EXPECT_EQ(Run({"site", "pause", "vega", "--reason", "maintenance"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("PAUSED"), HasSubstr("maintenance")));
  EXPECT_EQ(Run({"site", "resume", "vega"}), kOk);
  EXPECT_THAT(out_.str(), HasSubstr("READY"));
  EXPECT_EQ(Run({"site", "remove", "vega"}), kOk);
  EXPECT_EQ(Run({"site", "remove", "vega"}), kNotFound);
  EXPECT_EQ(Run({"site", "remvoe", "vega"}), kUsage);
  EXPECT_EQ(Run({"site", "add", "--help"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("itwin site add"), HasSubstr("--accept-host-key")));
  EXPECT_EQ(Run({"completion", "bash"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("--accept-host-key"), HasSubstr("add doctor list show pause resume remove")));
}

TEST_F(CommandLineTest, SitesShowWhyOneIsAway) {
  v1::Site& site = gateway_->sites.emplace_back();
  site.set_name("vega");
  site.set_state(v1::SITE_STATE_PAUSED_AUTH);
  site.set_scheduler("slurm");
  site.set_reason("renew your key");
  EXPECT_EQ(Run({"sites"}), kOk);
  EXPECT_THAT(out_.str(), AllOf(HasSubstr("vega"), HasSubstr("PAUSED_AUTH"), HasSubstr("renew your key")));
  EXPECT_EQ(Run({"sites", "--output", "json"}), kOk);
  EXPECT_EQ(Json()[0]["state"], "PAUSED_AUTH");
}

TEST_F(CommandLineTest, CompletionScriptsAreGoodScripts) {
  for (const char* shell : {"bash", "zsh", "fish"}) {
    EXPECT_EQ(Run({"completion", shell}), kOk);
    for (const char* word : {"submit", "watch", "request-id", "token-file"}) EXPECT_THAT(out_.str(), HasSubstr(word)) << shell;
  }
  EXPECT_EQ(Run({"completion", "bash"}), kOk);
  ASSERT_OK(WriteFileAtomically(directory_ / "c.bash", out_.str()));
  const auto complete = [&](const std::string& words, const std::string& index) {
    SubprocessOptions options{.argv = {"bash", "-c", "source " + directory_ / "c.bash" + "; COMP_WORDS=(" + words +
                                       "); COMP_CWORD=" + index + "; _itwin; printf '%s\\n' \"${COMPREPLY[@]}\""},
                              .directory = directory_.path(), .env = {}};
    absl::StatusOr<CommandOutput> output = RunCommand(options, absl::Seconds(20));
    EXPECT_OK(output);
    EXPECT_EQ(output->err, "");
    return output->out;
  };
  EXPECT_EQ(complete("itwin sub", "1"), "submit\n");
  EXPECT_EQ(complete("itwin submit --wa", "2"), "--watch\n");
  EXPECT_EQ(complete("itwin jobs --output ''", "3"), "table\njson\n");
  EXPECT_EQ(complete("itwin completion z", "2"), "zsh\n");
  EXPECT_EQ(complete("itwin validate c.b", "2"), "c.bash\n");
}

}  // namespace
}  // namespace itwin::cli
