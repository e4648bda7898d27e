// What users feel of a real gateway with its embedded site, over TLS and with tokens, as they run it.
//   gateway_benchmark [NAME...]   all, or: submit latency ingest emit queue start
// ITWIN_BIN names the folder of the programs. Each figure is a line of JSON (figures.h).
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "common/check.h"
#include "common/files.h"
#include "common/ids.h"
#include "common/subprocess.h"
#include "itwin/v1/jobs.grpc.pb.h"
#include "itwin/v1/sites.grpc.pb.h"
#include "server/sites/site_file.h"
#include "server/store/sqlite_job_store.h"
#include "tests/benchmark/figures.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

namespace itwin::benchmark {
namespace {

constexpr int kRuns = 5;
constexpr absl::Duration kRunTime = absl::Seconds(1);

std::string Program(const std::string& name) {
  const char* bin = getenv("ITWIN_BIN");
  return absl::StrCat(bin ? bin : "build-bench/bin", "/", name);
}

template <typename T>
T ValueOrDie(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::cerr << value.status() << "\n";
    std::exit(1);
  }
  return std::move(value).value();
}

void OkOrDie(const grpc::Status& status) {
  if (!status.ok()) {
    std::cerr << "code " << status.error_code() << ": " << status.error_message() << "\n";
    std::exit(1);
  }
}

// A gateway on a fresh directory; ends with the object.
class RunningGateway {
 public:
  explicit RunningGateway(int slots = 2) : slots_(slots) {
    SubprocessOptions init;
    init.argv = {Program("itwin-gateway"), "init", "--data", data()};
    ITWIN_CHECK(ValueOrDie(RunCommand(init, absl::Seconds(60))).exit.exit_code == 0);
  }
  ~RunningGateway() {
    Stop();
    SubprocessOptions stop;
    stop.argv = {Program("itwin-agent"), "stop", "--root", data() + "/sites/local", "--kill-jobs"};
    RunCommand(stop, absl::Seconds(30)).status().IgnoreError();
  }

  // Time from the start of the process to the first answered call.
  absl::Duration Start() {
    unlink(EndpointFile().c_str());
    FileDescriptor log = ValueOrDie(OpenFile(directory_ / "log", O_WRONLY | O_CREAT | O_APPEND));
    SubprocessOptions serve;
    serve.argv = {Program("itwin-gateway"), "serve", "--data", data(), "--listen", "127.0.0.1:0",
                  "--slots", absl::StrCat(slots_)};
    serve.stdout_fd = serve.stderr_fd = log.get();
    const absl::Time start = absl::Now();
    process_ = ValueOrDie(Subprocess::Start(serve));
    ITWIN_CHECK(testing::WaitUntil([&] { return access(EndpointFile().c_str(), R_OK) == 0; }, absl::Minutes(2)));
    channel_ = MakeChannel();
    v1::Sites::Stub sites(channel_);
    ITWIN_CHECK(testing::WaitUntil(
        [&] {
          grpc::ClientContext context;
          context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(5)));
          v1::GetVersionResponse response;
          return sites.GetVersion(&context, {}, &response).ok();
        },
        absl::Minutes(2)));
    return absl::Now() - start;
  }

  void Stop() {
    if (!process_) return;
    process_->Kill(SIGTERM);
    if (!process_->Wait(absl::Now() + absl::Seconds(20))) process_->Kill(SIGKILL);
    process_.reset();
  }

  // A connection of its own: gRPC shares them between channels unless told otherwise.
  std::shared_ptr<grpc::Channel> MakeChannel(int number = 0) {
    const std::string client = data() + "/client/";
    std::map<std::string, std::string> config;
    const std::string text = ValueOrDie(ReadFile(client + "config.yaml"));
    for (absl::string_view line : absl::StrSplit(text, '\n')) {
      std::pair<std::string, std::string> entry = absl::StrSplit(line, absl::MaxSplits(':', 1));
      config[entry.first] = std::string(absl::StripAsciiWhitespace(absl::StripAsciiWhitespace(entry.second)));
    }
    const std::string token = ValueOrDie(ReadFile(client + config["token_file"]));
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = ValueOrDie(ReadFile(client + config["ca_file"]));
    grpc::ChannelArguments arguments;
    arguments.SetInt("itwin.benchmark.channel", number);
    arguments.SetMaxReceiveMessageSize(64 << 20);
    return grpc::CreateCustomChannel(
        std::string(absl::StripAsciiWhitespace(ValueOrDie(ReadFile(EndpointFile())))),
        grpc::CompositeChannelCredentials(
            grpc::SslCredentials(ssl),
            grpc::AccessTokenCredentials(std::string(absl::StripAsciiWhitespace(token)))),
        arguments);
  }
  std::shared_ptr<grpc::Channel> channel() { return channel_; }
  std::string data() const { return directory_ / "data"; }
  int64_t resident_bytes() const {
    std::ifstream in(absl::StrCat("/proc/", process_->pid(), "/statm"));
    int64_t total = 0, resident = 0;
    in >> total >> resident;
    return resident * 4096;
  }

  // Of all its threads, in user and kernel, so far.
  double cpu_seconds() const {
    const std::vector<std::string> fields =
        absl::StrSplit(ValueOrDie(ReadFile(absl::StrCat("/proc/", process_->pid(), "/stat"))), ' ');
    int64_t user = 0, system = 0;
    ITWIN_CHECK(absl::SimpleAtoi(fields.at(13), &user) && absl::SimpleAtoi(fields.at(14), &system));
    return static_cast<double>(user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
  }

  v1::Job Submit(v1::Jobs::Stub& jobs, const v1::JobSpec& spec) {
    grpc::ClientContext context;
    v1::SubmitJobRequest request;
    request.set_request_id(RandomHex(16));
    *request.mutable_spec() = spec;
    v1::SubmitJobResponse response;
    OkOrDie(jobs.SubmitJob(&context, request, &response));
    return response.job();
  }
  v1::Job Get(v1::Jobs::Stub& jobs, const std::string& id) {
    grpc::ClientContext context;
    v1::GetJobRequest request;
    request.set_job(id);
    v1::Job job;
    OkOrDie(jobs.GetJob(&context, request, &job));
    return job;
  }

 private:
  std::string EndpointFile() const { return data() + "/run/endpoint"; }

  const int slots_;
  testing::TempDirectory directory_;
  std::optional<Subprocess> process_;
  std::shared_ptr<grpc::Channel> channel_;
};

v1::JobSpec Command(std::vector<std::string> argv) {
  v1::JobSpec spec;
  spec.set_name("benchmark");
  for (std::string& word : argv) spec.mutable_command()->add_argv(std::move(word));
  return spec;
}

struct Load {
  double calls_per_second = 0;
  double gateway_cpu_us = 0;  // per call; also tells on a machine that does other things
};

// `call` with `callers` threads over four connections.
Load CallsPerSecond(RunningGateway& gateway, int callers,
                      const std::function<void(std::shared_ptr<grpc::Channel>)>& call) {
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (int i = 0; i < 4; ++i) channels.push_back(gateway.MakeChannel(i));
  std::atomic<bool> stop{false};
  std::atomic<int64_t> calls{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i) {
    threads.emplace_back([&, i] {
      while (!stop) {
        call(channels[i % channels.size()]);
        ++calls;
      }
    });
  }
  const absl::Time start = absl::Now();
  const int64_t before = calls;
  const double cpu = gateway.cpu_seconds();
  absl::SleepFor(kRunTime);
  const int64_t made = calls - before;
  Load load;
  load.calls_per_second = static_cast<double>(made) / absl::ToDoubleSeconds(absl::Now() - start);
  load.gateway_cpu_us = (gateway.cpu_seconds() - cpu) / static_cast<double>(made) * 1e6;
  stop = true;
  for (std::thread& thread : threads) thread.join();
  return load;
}

void Echo(const std::shared_ptr<grpc::Channel>& channel) {
  v1::Sites::Stub stub(channel);
  grpc::ClientContext context;
  v1::GetVersionResponse response;
  OkOrDie(stub.GetVersion(&context, {}, &response));
}

// A job that waits for all slots, so that the queue stays where it is.
v1::Job Block(RunningGateway& gateway, v1::Jobs::Stub& jobs, int slots) {
  v1::JobSpec spec = Command({"/bin/sh", "-c", "exec tail -f /dev/null"});
  spec.mutable_resources()->set_ranks_per_node(slots);
  const v1::Job job = gateway.Submit(jobs, spec);
  ITWIN_CHECK(testing::WaitUntil(
      [&] { return gateway.Get(jobs, job.id()).state() == v1::JOB_STATE_RUNNING; }, absl::Minutes(1)));
  return job;
}

// As many jobs as the site takes ahead of its slots, and until they are with its scheduler: what is submitted after that only waits.
void FillSite(RunningGateway& gateway, v1::Jobs::Stub& jobs) {
  std::vector<std::string> ahead;
  for (int i = 0; i < server::SiteFile().max_waiting; ++i) ahead.push_back(gateway.Submit(jobs, Command({"true"})).id());
  ahead.pop_back();  // the blocking job may have counted as waiting
  for (const std::string& id : ahead) {
    ITWIN_CHECK(testing::WaitUntil([&] { return gateway.Get(jobs, id).state() == v1::JOB_STATE_PENDING; }, absl::Minutes(1)));
  }
}

void SubmitThroughput() {
  const v1::JobSpec spec = Command({"true"});
  std::vector<double> submits, echoes, ratios, submit_cpu, echo_cpu;
  for (int run = 0; run < kRuns; ++run) {
    RunningGateway gateway;  // a new one each time: an owner may have 20,000 unfinished jobs
    gateway.Start();
    v1::Jobs::Stub jobs(gateway.channel());
    Block(gateway, jobs, 2);
    FillSite(gateway, jobs);
    const Load echo = CallsPerSecond(gateway, 64, Echo);
    const Load submit = CallsPerSecond(gateway, 64, [&](std::shared_ptr<grpc::Channel> channel) {
      v1::Jobs::Stub stub(channel);
      gateway.Submit(stub, spec);
    });
    echoes.push_back(echo.calls_per_second);
    submits.push_back(submit.calls_per_second);
    ratios.push_back(submit.calls_per_second / echo.calls_per_second);
    echo_cpu.push_back(echo.gateway_cpu_us);
    submit_cpu.push_back(submit.gateway_cpu_us);
  }
  PrintFigure("submit_per_second_64_callers", Median(submits), "1/s", Median(echoes), kRuns, Median(ratios));
  PrintFigure("submit_gateway_cpu_per_call", Median(submit_cpu), "us", Median(echo_cpu), kRuns);
}

void SubmitLatency() {
  RunningGateway gateway;
  gateway.Start();
  v1::Jobs::Stub jobs(gateway.channel());
  Block(gateway, jobs, 2);
  const v1::JobSpec spec = Command({"true"});
  std::vector<double> submit, echo;
  for (int i = 0; i < 1000; ++i) {
    absl::Time start = absl::Now();
    Echo(gateway.channel());
    echo.push_back(absl::ToDoubleMilliseconds(absl::Now() - start));
    start = absl::Now();
    gateway.Submit(jobs, spec);
    submit.push_back(absl::ToDoubleMilliseconds(absl::Now() - start));
  }
  std::sort(submit.begin(), submit.end());
  std::sort(echo.begin(), echo.end());
  PrintFigure("submit_latency_p50", submit[500], "ms", echo[500], 1000);
  PrintFigure("submit_latency_p99", submit[990], "ms", echo[990], 1000);
}

// From lines in a spool to committed rows, the whole way: agent, tunnel, parser, database.
void Ingest() {
  constexpr int kPoints = 1'000'000;
  std::vector<double> rates;
  for (int run = 0; run < 3; ++run) {
    RunningGateway gateway;
    gateway.Start();
    v1::Jobs::Stub jobs(gateway.channel());
    // Two values a line, as training loops write them; the file appears at once, and says when.
    const std::string started = gateway.data() + "/ingest_started";
    const v1::Job job = gateway.Submit(
        jobs, Command({"/bin/sh", "-c",
                       absl::StrCat("seq ", kPoints / 2,
                                    " | awk '{printf \"{\\\"t\\\":1732370000.%06d,\\\"step\\\":%d,\\\"metrics\\\":"
                                    "{\\\"train/loss\\\":0.%05d,\\\"lr\\\":0.001}}\\n\", $1, $1, $1 % 100000}' > m; "
                                    "date +%s%N > ",
                                    started, "; cat m >> $ITWIN_METRICS; exec tail -f /dev/null")}));
    int64_t seen = 0, cursor = 0;
    const absl::Time deadline = absl::Now() + absl::Minutes(3);
    while (seen < kPoints && absl::Now() < deadline) {
      grpc::ClientContext context;
      v1::ListPointsRequest request;
      request.set_job(job.id());
      request.set_cursor(cursor);
      request.set_limit(100'000);
      v1::ListPointsResponse response;
      OkOrDie(jobs.ListPoints(&context, request, &response));
      for (const v1::PointBlock& block : response.blocks()) seen += block.steps_size();
      cursor = response.next_cursor();
      if (response.end()) absl::SleepFor(absl::Milliseconds(2));
    }
    ITWIN_CHECK(seen == kPoints);
    int64_t nanoseconds = 0;
    ITWIN_CHECK(absl::SimpleAtoi(absl::StripAsciiWhitespace(ValueOrDie(ReadFile(started))), &nanoseconds));
    rates.push_back(kPoints / absl::ToDoubleSeconds(absl::Now() - absl::FromUnixNanos(nanoseconds)));
  }
  PrintFigure("points_per_second_spool_to_database", Median(rates), "1/s", 200'000, 3);
}

// Runs as the job: once the file `go` is there, `rate` points a second for `seconds`, dated when they are written.
int EmitProgram(int rate, int seconds, const std::string& go) {
  const char* path = getenv("ITWIN_METRICS");
  if (path == nullptr) return 2;
  FileDescriptor out = ValueOrDie(OpenFile(path, O_WRONLY | O_APPEND | O_CREAT));
  ITWIN_CHECK(testing::WaitUntil([&] { return access(go.c_str(), R_OK) == 0; }, absl::Minutes(2)));
  const absl::Time start = absl::Now();
  for (int i = 0; i < rate * seconds; ++i) {
    absl::SleepFor(start + absl::Seconds(static_cast<double>(i) / rate) - absl::Now());
    char line[128];
    const int size = std::snprintf(line, sizeof line, "{\"t\":%.6f,\"step\":%d,\"metrics\":{\"x\":1}}\n",
                                   absl::ToUnixMicros(absl::Now()) / 1e6, i);
    if (write(out.get(), line, static_cast<size_t>(size)) != size) return 4;
  }
  return 0;
}

// Latencies in logarithmic buckets of 2 %; and how many updates they came in.
class Histogram {
 public:
  void Add(double ms) {
    const int bucket = ms <= 0.01 ? 0 : static_cast<int>(std::log(ms / 0.01) / std::log(1.02));
    ++counts_[static_cast<size_t>(std::min(bucket, kBuckets - 1))];
  }
  double Quantile(double q) const {
    int64_t total = 0;
    for (const auto& count : counts_) total += count;
    int64_t left = static_cast<int64_t>(q * static_cast<double>(total));
    for (int i = 0; i < kBuckets; ++i) {
      left -= counts_[static_cast<size_t>(i)];
      if (left < 0) return 0.01 * std::pow(1.02, i + 1);
    }
    return 0;
  }
  std::atomic<int64_t> updates{0};
  int64_t count() const {
    int64_t total = 0;
    for (const auto& count : counts_) total += count;
    return total;
  }

 private:
  static constexpr int kBuckets = 1000;
  std::vector<std::atomic<int64_t>> counts_ = std::vector<std::atomic<int64_t>>(kBuckets);
};

class Watcher : public grpc::ClientReadReactor<v1::JobUpdate> {
 public:
  Watcher(v1::Jobs::Stub& jobs, const std::string& job, Histogram& histogram, std::atomic<int>& connected,
          std::atomic<int>& running)
      : histogram_(histogram), connected_(connected), running_(running) {
    v1::WatchJobRequest& request = request_;
    request.set_job(job);
    request.set_points(true);
    ++running_;
    jobs.async()->WatchJob(&context_, &request_, this);
    StartRead(&update_);
    StartCall();
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;
    const int64_t now = absl::ToUnixMicros(absl::Now());
    ++histogram_.updates;
    if (!told_) ++connected_;
    told_ = true;
    for (const v1::PointBlock& block : update_.blocks()) {
      for (int i = 0; i < block.times_us_size(); ++i) {
        ITWIN_CHECK(block.steps(i) == next_step_++);  // nothing lost, nothing twice
        histogram_.Add(static_cast<double>(now - block.times_us(i)) / 1e3);
      }
    }
    StartRead(&update_);
  }
  void OnDone(const grpc::Status&) override { --running_; }
  void Cancel() { context_.TryCancel(); }

 private:
  grpc::ClientContext context_;
  v1::WatchJobRequest request_;
  v1::JobUpdate update_;
  int64_t next_step_ = 0;
  bool told_ = false;  // it has had an update
  Histogram& histogram_;
  std::atomic<int>& connected_;
  std::atomic<int>& running_;
};

void EmitLatency(const std::string& self, int watchers) {
  constexpr int kRate = 1000, kSeconds = 10;
  RunningGateway gateway;
  gateway.Start();
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  std::vector<std::unique_ptr<v1::Jobs::Stub>> stubs;
  for (int i = 0; i < std::max(1, watchers / 50); ++i) {
    channels.push_back(gateway.MakeChannel(i));
    stubs.push_back(v1::Jobs::NewStub(channels.back()));
  }
  const v1::Job job = gateway.Submit(
      *stubs[0], Command({self, "--emit", absl::StrCat(kRate), absl::StrCat(kSeconds), gateway.data() + "/go"}));
  Histogram histogram;
  std::atomic<int> connected{0}, running{0};
  std::vector<std::unique_ptr<Watcher>> all;
  for (int i = 0; i < watchers; ++i) {
    all.push_back(std::make_unique<Watcher>(*stubs[static_cast<size_t>(i) % stubs.size()], job.id(), histogram, connected, running));
  }
  // Connecting is no part of it.
  ITWIN_CHECK(testing::WaitUntil(
      [&] { return connected == watchers && gateway.Get(*stubs[0], job.id()).started_us() > 0; }, absl::Minutes(1)));
  const int64_t memory_before = gateway.resident_bytes();
  int64_t memory_most = memory_before;
  const double cpu = gateway.cpu_seconds();
  histogram.updates = 0;
  ITWIN_CHECK(WriteFileAtomically(gateway.data() + "/go", "").ok());
  ITWIN_CHECK(testing::WaitUntil(
      [&] {
        memory_most = std::max(memory_most, gateway.resident_bytes());
        return running == 0;
      },
      absl::Minutes(3)));
  ITWIN_CHECK(histogram.count() == static_cast<int64_t>(watchers) * kRate * kSeconds);
  const std::string name = absl::StrCat("emit_to_client_", watchers, "_watchers_");
  PrintFigure(name + "p50", histogram.Quantile(0.5), "ms", 0, 1);
  PrintFigure(name + "p99", histogram.Quantile(0.99), "ms", 100, 1);
  // All that the gateway does in that time, shared among the updates: it tells more than times do on a busy machine.
  PrintFigure(name + "gateway_cpu_per_update", (gateway.cpu_seconds() - cpu) / static_cast<double>(histogram.updates) * 1e6,
              "us", 0, 1);
  PrintFigure(name + "memory_growth", static_cast<double>(memory_most - memory_before) / 1048576.0, "MiB", 0, 1);
}

double CallMilliseconds(const std::function<void()>& call) {
  std::vector<double> times;
  for (int i = 0; i < 101; ++i) {
    const absl::Time start = absl::Now();
    call();
    times.push_back(absl::ToDoubleMilliseconds(absl::Now() - start));
  }
  return Median(times);
}

void LongQueue() {
  RunningGateway gateway;
  gateway.Start();
  v1::Jobs::Stub jobs(gateway.channel());
  const v1::Job blocker = Block(gateway, jobs, 2);
  const v1::JobSpec spec = Command({"true"});
  const auto list = [&] {
    grpc::ClientContext context;
    v1::ListJobsRequest request;
    request.set_live_only(true);
    v1::ListJobsResponse response;
    OkOrDie(jobs.ListJobs(&context, request, &response));
  };
  const auto status = [&] { gateway.Get(jobs, blocker.id()); };
  for (int i = 0; i < 50; ++i) gateway.Submit(jobs, spec);
  const double list_few = CallMilliseconds(list), status_few = CallMilliseconds(status);
  std::vector<std::thread> threads;
  for (int t = 0; t < 32; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 10'000 / 32; ++i) gateway.Submit(jobs, spec);
    });
  }
  for (std::thread& thread : threads) thread.join();
  PrintFigure("list_page_with_10000_queued", CallMilliseconds(list), "ms", list_few, 101);
  PrintFigure("status_with_10000_queued", CallMilliseconds(status), "ms", status_few, 101);
}

// 100,000 jobs that have ended, by the store itself: through the front door it would take the same commits.
void FillStore(const std::string& data) {
  server::SqliteJobStore::Options options;
  options.path = data + "/gateway.db";
  options.max_live_jobs_per_owner = 1'000'000;
  auto store = ValueOrDie(server::SqliteJobStore::Open(options));
  std::vector<std::thread> threads;
  for (int t = 0; t < 64; ++t) {
    threads.emplace_back([&, t] {
      for (int i = t; i < 100'000; i += 64) {
        server::NewJob job;
        job.owner = "benchmark";
        job.request_id = absl::StrCat("r", i);
        job.spec = Command({"true"});
        job.message = "submitted";
        const server::Submitted submitted = ValueOrDie(store->Submit(job));
        JobEvent end;
        end.kind = EventKind::kFailed;
        end.failure = FailureClass::kUser;
        end.message = "made for a benchmark";
        end.actor = "gateway";
        ValueOrDie(store->AppendEvent(submitted.job.id, end));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void StartTime() {
  RunningGateway gateway;
  std::vector<double> empty;
  for (int i = 0; i < kRuns; ++i) {
    empty.push_back(absl::ToDoubleMilliseconds(gateway.Start()));
    gateway.Stop();
  }
  FillStore(gateway.data());
  std::vector<double> full;
  for (int i = 0; i < kRuns; ++i) {
    full.push_back(absl::ToDoubleMilliseconds(gateway.Start()));
    gateway.Stop();
  }
  PrintFigure("gateway_start_with_100000_finished_jobs", Median(full), "ms", Median(empty), kRuns);
}

}  // namespace
}  // namespace itwin::benchmark

int main(int argc, char** argv) {
  using namespace itwin::benchmark;
  if (argc == 5 && std::string(argv[1]) == "--emit") return EmitProgram(std::atoi(argv[2]), std::atoi(argv[3]), argv[4]);
  const std::string self = std::filesystem::canonical("/proc/self/exe").string();
  const std::set<std::string> wanted(argv + 1, argv + argc);
  const std::vector<std::pair<std::string, std::function<void()>>> all = {
      {"submit", SubmitThroughput}, {"latency", SubmitLatency},
      {"ingest", Ingest},           {"emit", [&] { for (int n : {1, 100, 1000}) EmitLatency(self, n); }},
      {"queue", LongQueue},         {"start", StartTime}};
  for (const auto& [name, run] : all) {
    if (wanted.empty() || wanted.count(name) > 0) run();
  }
  return 0;
}
