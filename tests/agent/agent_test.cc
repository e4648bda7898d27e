// The agent as a gateway sees it: a real process, real jobs.
#include "agent/agent.h"

#include <elf.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <filesystem>
#include <fstream>
#include <numeric>

#include "agent/rpc/agent_service.h"
#include "tests/agent/agent_harness.h"

namespace itwin::testing {
namespace {

using namespace agent;  // NOLINT: the wire's names
namespace v1 = agent::v1;  // not itwin::v1, should a header bring it
using ::testing::HasSubstr;

constexpr char kKey[] = "00000000000000aa-1";
constexpr char kOther[] = "00000000000000bb-1";

class AgentTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(harness_.Serve()); }
  AgentHarness harness_;
};

TEST(AgentProgramFile, NeedsNothingOfTheMachine) {
  std::ifstream file(AgentProgram(), std::ios::binary);
  Elf64_Ehdr header;
  ASSERT_TRUE(file.read(reinterpret_cast<char*>(&header), sizeof header));
  for (int i = 0; i < header.e_phnum; ++i) {
    Elf64_Phdr segment;
    file.seekg(static_cast<std::streamoff>(header.e_phoff) + i * header.e_phentsize);
    ASSERT_TRUE(file.read(reinterpret_cast<char*>(&segment), sizeof segment));
    if (getenv("ITWIN_SANITIZED") == nullptr) {
      EXPECT_NE(segment.p_type, static_cast<Elf64_Word>(PT_INTERP)) << "not a static program";
    }
  }
}

TEST_F(AgentTest, SaysHelloAndWhoIsTooOld) {
  v1::HelloRequest request;
  request.set_protocol(kAgentProtocol);
  const auto hello = harness_.Call(request, &v1::Agent::Stub::Hello, v1::HelloResponse());
  ASSERT_OK(hello);
  EXPECT_EQ(hello->scheduler(), "process");
  EXPECT_EQ(hello->slots(), 2);
  EXPECT_EQ(hello->spool(), harness_.root());
  request.set_protocol(kAgentProtocol + 1);
  EXPECT_THAT(harness_.Call(request, &v1::Agent::Stub::Hello, v1::HelloResponse()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("agent at the site is too old")));
  request.set_protocol(kAgentProtocol - 1);
  EXPECT_THAT(harness_.Call(request, &v1::Agent::Stub::Hello, v1::HelloResponse()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("gateway is too old")));
}

TEST_F(AgentTest, RunsAJobWithInputsAndStreamsWhatItWrites) {
  ASSERT_OK(harness_.Put("input text\n"));
  auto request = AgentHarness::Shell(
      kKey, "cat data/in.txt; ./tool; echo '{\"t\":1,\"step\":1,\"metrics\":{\"a\":1}}' >> \"$ITWIN_METRICS\"; "
            "echo '{\"t\":1,\"host\":\"n1\",\"metrics\":{}}' > \"${ITWIN_METRICS%/*}/node-n1.jsonl\"; "
            "printf torn >> \"$ITWIN_METRICS\"; mkdir -p \"$ITWIN_CHECKPOINTS/step-1\"; echo {} > \"$ITWIN_CHECKPOINTS/step-1/manifest.json\"; "
            "echo model > \"$ITWIN_OUTPUTS/model.pt\"");
  auto* input = request.add_inputs();
  input->set_path("data/in.txt");
  input->set_sha256(Sha256Hex("input text\n"));
  const std::string tool = "#!/bin/sh\necho tool ran\n";
  ASSERT_OK(harness_.Put(tool));
  input = request.add_inputs();
  input->set_path("tool");
  input->set_sha256(Sha256Hex(tool));
  input->set_executable(true);
  Follower follower(&harness_);
  follower.Start({kKey});
  ASSERT_TRUE(follower.WaitFor(kKey, [](const auto& f) { return !f.statuses.empty(); }));
  EXPECT_EQ(follower.Get(kKey).statuses[0].phase(), v1::ATTEMPT_PHASE_ABSENT);
  ASSERT_OK(harness_.Start(request));
  const v1::AttemptStatus status = harness_.End(kKey);
  EXPECT_EQ(status.cause(), v1::END_CAUSE_EXITED);
  EXPECT_EQ(status.exit_code(), 0);
  EXPECT_EQ(status.starts(), 1);
  EXPECT_TRUE(status.checkpoint());
  EXPECT_THAT(status.result_json(), HasSubstr("model.pt"));
  EXPECT_EQ(status.sizes().stdout_log(), 20);
  EXPECT_EQ(status.sizes().metrics(), 35) << "up to the last newline";
  ASSERT_TRUE(follower.WaitFor(kKey, [](auto f) {
    return Follower::HasEnded(f) && f.data["stdout"].size() == 20 && f.data["metrics"].size() == 35 &&
           !f.data["node-n1"].empty();
  })) << follower.Get(kKey).data["stdout"];
  EXPECT_EQ(follower.Get(kKey).data["stdout"], "input text\ntool ran\n");
  EXPECT_EQ(follower.errors(), 0);
}

TEST_F(AgentTest, StartedAgainItIsTheSameAttempt) {
  const auto request = AgentHarness::Shell(kKey, "echo ran >> \"$ITWIN_OUTPUTS/runs\"");
  ASSERT_OK(harness_.Start(request));
  ASSERT_OK(harness_.Start(request));
  EXPECT_EQ(harness_.End(kKey).starts(), 1);
  const auto again = harness_.Start(request);
  ASSERT_OK(again);
  EXPECT_EQ(again->phase(), v1::ATTEMPT_PHASE_ENDED);
  EXPECT_EQ(*ReadFile(harness_.DirectoryOf(kKey).outputs_path() + "/runs"), "ran\n");
}

TEST_F(AgentTest, ARefusedStartLeavesNothing) {
  auto too_large = AgentHarness::Shell(kKey, "true");
  too_large.set_ranks_per_node(3);
  EXPECT_THAT(harness_.Start(too_large), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("at most 2")));
  auto no_input = AgentHarness::Shell(kKey, "true");
  no_input.add_inputs()->set_path("x");
  no_input.mutable_inputs(0)->set_sha256(Sha256Hex("never sent"));
  EXPECT_THAT(harness_.Start(no_input), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not complete")));
  auto escape = AgentHarness::Shell(kKey, "true");
  escape.add_inputs()->set_path("../x");
  EXPECT_THAT(harness_.Start(escape), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("..")));
  auto no_checkpoint = AgentHarness::Shell(kKey, "true");
  no_checkpoint.set_resume_attempt("00000000000000aa-7");
  EXPECT_THAT(harness_.Start(no_checkpoint), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no checkpoint")));
  auto no_worker = AgentHarness::Shell(kKey, "true");
  no_worker.set_attempt("not a key");
  EXPECT_THAT(harness_.Start(no_worker), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not a key")));
  EXPECT_EQ(harness_.Status(kKey)->phase(), v1::ATTEMPT_PHASE_ABSENT);
  EXPECT_FALSE(FileExists(harness_.DirectoryOf(kKey).job_path()));
}

TEST_F(AgentTest, CancelledBeforeItCameItNeverStarts) {
  const auto cancelled = harness_.Cancel(kKey);
  ASSERT_OK(cancelled);
  EXPECT_EQ(cancelled->phase(), v1::ATTEMPT_PHASE_ABSENT);
  harness_.Kill();
  ASSERT_TRUE(harness_.Serve());
  const auto status = harness_.Start(AgentHarness::Shell(kKey, "echo ran > \"$ITWIN_OUTPUTS/ran\""));
  ASSERT_OK(status);
  EXPECT_EQ(status->phase(), v1::ATTEMPT_PHASE_ENDED);
  EXPECT_EQ(status->cause(), v1::END_CAUSE_CANCELLED);
  EXPECT_FALSE(FileExists(harness_.DirectoryOf(kKey).request_path()));
}

TEST_F(AgentTest, CancelEndsARunningAndAWaitingOne) {
  auto all_slots = AgentHarness::Shell(kKey, "exec tail -f /dev/null");
  all_slots.set_ranks_per_node(2);
  ASSERT_OK(harness_.Start(all_slots));
  ASSERT_TRUE(harness_.Reaches(kKey, v1::ATTEMPT_PHASE_RUNNING));
  ASSERT_OK(harness_.Start(AgentHarness::Shell(kOther, "true")));
  EXPECT_EQ(harness_.Status(kOther)->phase(), v1::ATTEMPT_PHASE_PENDING);
  EXPECT_THAT(harness_.Status(kOther)->reason(), HasSubstr("waits for 1 of 2 slots"));
  ASSERT_OK(harness_.Cancel(kOther));
  EXPECT_EQ(harness_.End(kOther).cause(), v1::END_CAUSE_CANCELLED);
  ASSERT_OK(harness_.Cancel(kKey));
  const v1::AttemptStatus status = harness_.End(kKey);
  EXPECT_EQ(status.cause(), v1::END_CAUSE_CANCELLED);
  EXPECT_EQ(status.signal(), SIGTERM);
  EXPECT_EQ(harness_.Cancel(kKey)->phase(), v1::ATTEMPT_PHASE_ENDED);
}

TEST_F(AgentTest, AKilledScriptIsALostAttempt) {
  ASSERT_OK(harness_.Start(AgentHarness::Shell(kKey, "exec tail -f /dev/null")));
  ASSERT_TRUE(harness_.Reaches(kKey, v1::ATTEMPT_PHASE_RUNNING));
  kill(ReadLease(harness_.DirectoryOf(kKey))->process.pid, SIGKILL);
  EXPECT_EQ(harness_.End(kKey).cause(), v1::END_CAUSE_LOST);
  EXPECT_TRUE(harness_.Processes().empty());
}

TEST_F(AgentTest, AsksForATraceAndGivesItWhileTheAttemptRuns) {
  const auto trace = [&](const std::string& attempt, int64_t steps, const std::string& name) {
    v1::TraceAttemptRequest request;
    request.set_attempt(attempt);
    request.set_steps(steps);
    request.set_name(name);
    return harness_.Call(request, &v1::Agent::Stub::TraceAttempt, v1::TraceAttemptResponse());
  };
  EXPECT_THAT(trace(kKey, 5, "trace-1.json"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("does not run")));
  // Does what a worker does: takes the request away, writes the trace, gives it its name when it is whole.
  ASSERT_OK(harness_.Start(AgentHarness::Shell(
      kKey, "spool=${ITWIN_OUTPUTS%/outputs}; ln -s /etc/passwd \"$ITWIN_OUTPUTS/link\"; "
            "until read -r steps name < \"$spool/profile\"; do :; done 2>/dev/null; rm \"$spool/profile\"; "
            "echo \"$steps steps\" > \"$ITWIN_OUTPUTS/.part\"; mv \"$ITWIN_OUTPUTS/.part\" \"$ITWIN_OUTPUTS/$name\"; "
            "exec tail -f /dev/null")));
  ASSERT_TRUE(harness_.Reaches(kKey, v1::ATTEMPT_PHASE_RUNNING));
  EXPECT_THAT(trace(kKey, 0, "trace-1.json"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("steps is 0")));
  for (const char* name : {"", ".hidden", "../up", "a/b", "a b"}) {
    EXPECT_THAT(trace(kKey, 5, name), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("name"))) << name;
  }
  v1::FileEntry file;
  ASSERT_TRUE(WaitUntil([&] {
    const auto answer = trace(kKey, 5, "trace-1.json");
    if (answer.ok() && answer->has_file()) file = answer->file();
    return !file.path().empty();
  }));
  EXPECT_EQ(file.sha256(), Sha256Hex("5 steps\n"));
  EXPECT_EQ(file.size_bytes(), 8);
  // Between taking the request away and giving the trace its name a worker may be asked again; afterwards it is not.
  const std::string request_path = harness_.DirectoryOf(kKey).trace_request_path();
  std::filesystem::remove(request_path);
  EXPECT_TRUE(trace(kKey, 5, "trace-1.json")->has_file());
  EXPECT_FALSE(FileExists(request_path));
  EXPECT_FALSE(trace(kKey, 5, "link")->has_file()) << "never out of the spool";
  v1::ReadFileRequest request;
  request.set_attempt(kKey);
  request.set_directory("outputs");
  request.set_path("trace-1.json");
  grpc::ClientContext context;
  AgentHarness::Limit(&context);
  auto reader = harness_.stub().ReadFile(&context, request);
  v1::ReadFileResponse response;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.data(), "5 steps\n");
  EXPECT_FALSE(reader->Read(&response));
  ASSERT_OK(FromGrpc(reader->Finish()));
}

TEST_F(AgentTest, ReadsFilesOfEndedAttemptsOnlyAndNothingElse) {
  const auto directory = harness_.DirectoryOf(kKey);
  ASSERT_OK(harness_.Start(AgentHarness::Shell(
      kKey, "mkdir \"$ITWIN_OUTPUTS/d\"; echo text > \"$ITWIN_OUTPUTS/d/f\"; ln -s /etc/passwd \"$ITWIN_OUTPUTS/link\"; "
            "head -c 3000000 /dev/zero > \"$ITWIN_OUTPUTS/big\"; exec tail -f /dev/null")));
  const auto list = [&](const std::string& where) {
    v1::ListFilesRequest request;
    request.set_attempt(kKey);
    request.set_directory(where);
    return harness_.Call(request, &v1::Agent::Stub::ListFiles, v1::ListFilesResponse());
  };
  ASSERT_TRUE(WaitUntil([&] {
    return ReadFileRange(directory.outputs_path() + "/big", 2'999'999, 1).value_or("").size() == 1;
  }));
  EXPECT_THAT(list("outputs"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("has not ended")));
  EXPECT_THAT(harness_.Remove(kKey), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("has not ended")));
  ASSERT_OK(harness_.Cancel(kKey));
  harness_.End(kKey);
  EXPECT_THAT(list("work"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("use 'outputs'")));
  const auto files = list("outputs");
  ASSERT_OK(files);
  ASSERT_EQ(files->files_size(), 2);
  EXPECT_EQ(files->files(1).path(), "d/f");
  EXPECT_EQ(files->files(1).sha256(), Sha256Hex("text\n"));
  const auto read = [&](const std::string& path, int64_t offset) -> absl::StatusOr<std::string> {
    v1::ReadFileRequest request;
    request.set_attempt(kKey);
    request.set_directory("outputs");
    request.set_path(path);
    request.set_offset(offset);
    grpc::ClientContext context;
    AgentHarness::Limit(&context);
    auto reader = harness_.stub().ReadFile(&context, request);
    std::string out;
    v1::ReadFileResponse response;
    while (reader->Read(&response)) out += response.data();
    const absl::Status status = FromGrpc(reader->Finish());
    if (!status.ok()) return status;
    return out;
  };
  EXPECT_EQ(read("d/f", 2).value_or(""), "xt\n");
  EXPECT_EQ(read("big", 0)->size(), 3'000'000u);
  for (const char* path : {"link", "d", "../request.pb", "d/../../request.pb", "/etc/passwd"}) {
    EXPECT_FALSE(read(path, 0).ok()) << path;
  }
  ASSERT_OK(harness_.Remove(kKey));
  EXPECT_FALSE(FileExists(directory.job_path()));
  EXPECT_EQ(harness_.Status(kKey)->phase(), v1::ATTEMPT_PHASE_ABSENT);
}

TEST_F(AgentTest, ALineReachesTheFollowerInMilliseconds) {
  const auto directory = harness_.DirectoryOf(kKey);
  ASSERT_OK(harness_.Start(AgentHarness::Shell(kKey, "exec tail -f /dev/null")));
  ASSERT_TRUE(harness_.Reaches(kKey, v1::ATTEMPT_PHASE_RUNNING));
  Follower follower(&harness_);
  follower.Start({kKey});
  ASSERT_TRUE(follower.WaitFor(kKey, [](const auto& f) { return !f.statuses.empty(); }));
  std::vector<double> milliseconds;
  size_t size = 0;
  for (int i = 0; i < 50; ++i) {
    const absl::Time before = absl::Now();
    ASSERT_OK(AppendLine(directory.metrics_path(), "{\"step\":1}"));
    size += 11;
    const absl::Time written = absl::Now();
    while (follower.Get(kKey).data["metrics"].size() < size && absl::Now() - before < absl::Seconds(10)) std::this_thread::yield();
    milliseconds.push_back(absl::ToDoubleMilliseconds(absl::Now() - written));
  }
  std::sort(milliseconds.begin(), milliseconds.end());
  std::printf("emit to stream: p50 %.2f ms, p90 %.2f ms, max %.2f ms\n", milliseconds[25], milliseconds[45], milliseconds[49]);
  EXPECT_LT(milliseconds[25], 20);
}

TEST_F(AgentTest, ASlowFollowerDoesNotGrowTheAgent) {
  const auto directory = harness_.DirectoryOf(kKey);
  auto request = AgentHarness::Shell(kKey, "head -c 200000000 /dev/zero");
  request.set_log_limit_bytes(int64_t{1} << 30);
  ASSERT_OK(harness_.Start(request));
  harness_.End(kKey);
  const auto resident = [&] {
    std::ifstream in("/proc/" + std::to_string(harness_.process().pid()) + "/statm");
    int64_t pages = 0, rss = 0;
    in >> pages >> rss;
    return rss * 4096;
  };
  const int64_t before = resident();
  // Streams whose answers nobody reads.
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReaderWriter<v1::FollowRequest, v1::FollowResponse>>> streams;
  for (int i = 0; i < 8; ++i) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    streams.push_back(harness_.stub().Follow(contexts.back().get()));
    v1::FollowRequest follow;
    follow.add_add()->set_attempt(kKey);
    streams.back()->Write(follow);
  }
  v1::FollowResponse response;
  ASSERT_TRUE(streams[0]->Read(&response));  // they are under way
  ASSERT_OK(harness_.Status(kKey));          // and the agent answers others
  Follower quick(&harness_);
  quick.Start({kKey});
  ASSERT_TRUE(quick.WaitFor(kKey, [](auto f) { return f.data["stdout"].size() == 200'000'000; }, absl::Seconds(40)));
  EXPECT_LT(resident() - before, int64_t{64} << 20);
  EXPECT_EQ(quick.errors(), 0);
  for (auto& context : contexts) context->TryCancel();
  for (auto& stream : streams) (void)stream->Finish();
}

TEST_F(AgentTest, StopsOnSigtermWhileJobsAndFollowersGoOn) {
  ASSERT_OK(harness_.Start(AgentHarness::Shell(kKey, "exec tail -f /dev/null")));
  ASSERT_TRUE(harness_.Reaches(kKey, v1::ATTEMPT_PHASE_RUNNING));
  Follower follower(&harness_);
  follower.Start({kKey});
  ASSERT_TRUE(follower.WaitFor(kKey, [](const auto& f) { return !f.statuses.empty(); }));
  const absl::Time before = absl::Now();
  harness_.process().Kill(SIGTERM);
  const auto exit = harness_.process().Wait(absl::Now() + absl::Seconds(15));
  ASSERT_TRUE(exit.has_value());
  EXPECT_EQ(exit->exit_code, 0);
  EXPECT_LT(absl::Now() - before, absl::Seconds(4));
  EXPECT_FALSE(harness_.Processes().empty());
  ASSERT_TRUE(harness_.Serve());
  EXPECT_EQ(harness_.Status(kKey)->phase(), v1::ATTEMPT_PHASE_RUNNING);
  EXPECT_EQ(harness_.Status(kKey)->starts(), 1);
}

TEST(AgentOnAFullDisk, SaysSoAndLeavesNothingHalfDone) {
  // A small file system of its own; without the right to mount there is none, and the test is skipped.
  AgentHarness harness;
  const std::string mount = harness.root();
  if (RunCommand({.argv = {"mount", "-t", "tmpfs", "-o", "size=6m", "none", mount}}, absl::Seconds(10))
          .value_or(CommandOutput{.exit = {1, 0}, .out = "", .err = ""}).exit.exit_code != 0) {
    GTEST_SKIP() << "may not mount";
  }
  ASSERT_TRUE(harness.Serve());
  {
    std::ofstream filler(mount + "/filler", std::ios::binary);
    const std::string block(4096, 'x');
    while (filler.write(block.data(), block.size()).flush()) {
    }
  }
  EXPECT_THAT(harness.Put(std::string(1 << 19, 'x')), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("free")));
  EXPECT_THAT(harness.Start(AgentHarness::Shell(kKey, "true")),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("No space")));
  EXPECT_EQ(harness.Status(kKey)->phase(), v1::ATTEMPT_PHASE_ABSENT);
  EXPECT_FALSE(FileExists(harness.DirectoryOf(kKey).path()));
  std::filesystem::remove(mount + "/filler");
  // A job that fills the disk ends with its record all the same.
  ASSERT_OK(harness.Start(AgentHarness::Shell(kKey, "head -c 20000000 /dev/zero > \"$ITWIN_OUTPUTS/big\"; echo bye; exit 4")));
  const v1::AttemptStatus status = harness.End(kKey);
  EXPECT_EQ(status.cause(), v1::END_CAUSE_EXITED);
  EXPECT_EQ(status.exit_code(), 4);
  harness.Kill();
  (void)RunCommand({.argv = {"umount", "-l", mount}}, absl::Seconds(10));
}

}  // namespace
}  // namespace itwin::testing
