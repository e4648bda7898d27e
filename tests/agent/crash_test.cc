// kill -9 of the agent, and of the script, on every line where something has been recorded or is about to be.
#include <filesystem>
#include <random>

#include "tests/agent/agent_harness.h"

namespace itwin::testing {
namespace {

using namespace agent;  // NOLINT: the wire's names
namespace v1 = agent::v1;  // not itwin::v1, should a header bring it

constexpr char kKey[] = "00000000000000aa-1";

class AgentCrash : public ::testing::TestWithParam<const char*> {};
std::string NameOf(const ::testing::TestParamInfo<const char*>& info) {
  std::string out;
  for (const char c : std::string(info.param)) out += isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return out;
}

class StartCrash : public AgentCrash {};
INSTANTIATE_TEST_SUITE_P(Every, StartCrash,
                         ::testing::Values("start.begin", "start.directory", "start.request", "start.directories",
                                           "start.input", "start.spec", "start.prepared", "scheduler.queued",
                                           "start.submitted", "scheduler.before_start", "scheduler.after_start",
                                           "scheduler.before_forget", "scheduler.after_forget", "loop.before_ended",
                                           "loop.after_ended"),
                         NameOf);

TEST_P(StartCrash, TheAttemptRunsExactlyOnce) {
  AgentHarness harness;
  ASSERT_TRUE(harness.Serve());
  ASSERT_OK(harness.Put("x\n"));
  harness.Kill();
  auto request = AgentHarness::Shell(kKey, "echo ran >> \"$ITWIN_OUTPUTS/runs\"; cat in");
  request.add_inputs()->set_path("in");
  request.mutable_inputs(0)->set_sha256(Sha256Hex("x\n"));
  ASSERT_TRUE(harness.Serve(GetParam()));
  (void)harness.Start(request);  // the answer may be lost with the agent
  ASSERT_TRUE(WaitUntil([&] { return !harness.alive(); })) << "the agent never came to " << GetParam();
  ASSERT_TRUE(harness.Serve());
  // The gateway does not know what became of it, and asks again.
  ASSERT_OK(harness.Start(request));
  const v1::AttemptStatus status = harness.End(kKey);
  EXPECT_EQ(status.cause(), v1::END_CAUSE_EXITED) << status.ShortDebugString();
  EXPECT_EQ(status.exit_code(), 0);
  EXPECT_EQ(status.starts(), 1);
  EXPECT_EQ(*ReadFile(harness.DirectoryOf(kKey).outputs_path() + "/runs"), "ran\n");
  EXPECT_EQ(*ReadFile(harness.DirectoryOf(kKey).stdout_path()), "x\n");
  EXPECT_TRUE(WaitUntil([&] { return std::filesystem::is_empty(harness.root() + "/queue"); }));
}

TEST_P(StartCrash, WithoutBeingAskedAgainItIsRunOnceOrUnknown) {
  AgentHarness harness;
  ASSERT_TRUE(harness.Serve());
  ASSERT_OK(harness.Put("x\n"));
  harness.Kill();
  auto request = AgentHarness::Shell(kKey, "echo ran >> \"$ITWIN_OUTPUTS/runs\"");
  request.add_inputs()->set_path("in");
  request.mutable_inputs(0)->set_sha256(Sha256Hex("x\n"));
  ASSERT_TRUE(harness.Serve(GetParam()));
  (void)harness.Start(request);
  ASSERT_TRUE(WaitUntil([&] { return !harness.alive(); }));
  ASSERT_TRUE(harness.Serve());
  if (harness.Status(kKey)->phase() == v1::ATTEMPT_PHASE_ABSENT) {
    EXPECT_FALSE(FileExists(harness.DirectoryOf(kKey).path()));
  } else {
    EXPECT_EQ(harness.End(kKey).starts(), 1);
    EXPECT_EQ(*ReadFile(harness.DirectoryOf(kKey).outputs_path() + "/runs"), "ran\n");
  }
}

class ScriptCrash : public AgentCrash {};
INSTANTIATE_TEST_SUITE_P(Every, ScriptCrash,
                         ::testing::Values("script.before_lease", "script.after_lease", "script.started",
                                           "script.launched", "script.before_exited", "script.after_exited"),
                         NameOf);

TEST_P(ScriptCrash, TheAttemptEndsAndRunsAtMostOnce) {
  AgentHarness harness;
  ASSERT_TRUE(harness.Serve(GetParam()));  // the script inherits it
  ASSERT_OK(harness.Start(AgentHarness::Shell(kKey, "echo ran >> \"$ITWIN_OUTPUTS/runs\"; exit 5")));
  const v1::AttemptStatus status = harness.End(kKey);
  const std::string point = GetParam();
  if (point == "script.after_exited") {
    EXPECT_EQ(status.cause(), v1::END_CAUSE_EXITED);
    EXPECT_EQ(status.exit_code(), 5);
  } else if (point == "script.before_lease") {
    EXPECT_EQ(status.cause(), v1::END_CAUSE_LAUNCH_FAILED);
    EXPECT_NE(status.reason().find("signal 9"), std::string::npos) << status.reason();
  } else {
    EXPECT_EQ(status.cause(), v1::END_CAUSE_LOST);
  }
  const std::string runs = ReadFile(harness.DirectoryOf(kKey).outputs_path() + "/runs").value_or("");
  EXPECT_TRUE(runs.empty() || runs == "ran\n");
  harness.Kill();
  ASSERT_TRUE(harness.Serve());
  const auto again = harness.Status(kKey);
  ASSERT_OK(again);
  EXPECT_EQ(again->cause(), status.cause()) << "a verdict stays";
  EXPECT_EQ(again->ended_us(), status.ended_us());
  EXPECT_TRUE(harness.Processes().empty());
}

class CancelCrash : public AgentCrash {};
INSTANTIATE_TEST_SUITE_P(Every, CancelCrash,
                         ::testing::Values("cancel.begin", "cancel.marked", "scheduler.dequeued", "cancel.asked"), NameOf);

TEST_P(CancelCrash, TheCancelIsDoneInTheEnd) {
  for (const bool running : {true, false}) {
    if (running && std::string(GetParam()) == "scheduler.dequeued") continue;
    AgentHarness harness(1);
    ASSERT_TRUE(harness.Serve(GetParam()));
    const std::string blocker = "00000000000000bb-1";
    if (!running) {
      ASSERT_OK(harness.Start(AgentHarness::Shell(blocker, "exec tail -f /dev/null")));
      ASSERT_TRUE(harness.Reaches(blocker, v1::ATTEMPT_PHASE_RUNNING));
    }
    ASSERT_OK(harness.Start(AgentHarness::Shell(kKey, "echo ran >> \"$ITWIN_OUTPUTS/runs\"; exec tail -f /dev/null")));
    if (running) {
      ASSERT_TRUE(harness.Reaches(kKey, v1::ATTEMPT_PHASE_RUNNING));
    }
    (void)harness.Cancel(kKey);
    ASSERT_TRUE(WaitUntil([&] { return !harness.alive(); }));
    ASSERT_TRUE(harness.Serve());
    if (std::string(GetParam()) == "cancel.begin") {
      ASSERT_OK(harness.Cancel(kKey));
    }
    const v1::AttemptStatus status = harness.End(kKey);
    EXPECT_EQ(status.cause(), v1::END_CAUSE_CANCELLED) << status.ShortDebugString();
    EXPECT_EQ(status.starts(), running ? 1 : 0);
  }
}

TEST(UploadCrash, IsResumedOrComplete) {
  const std::string content(3 << 20, 'u');
  for (const char* point : {"input.written", "2:input.written", "input.verified"}) {
    AgentHarness harness;
    ASSERT_TRUE(harness.Serve(point));
    {
      grpc::ClientContext context;
      v1::PutInputResponse response;
      auto writer = harness.stub().PutInput(&context, &response);
      for (int64_t at = 0; at < static_cast<int64_t>(content.size()); at += 1 << 20) {
        v1::PutInputRequest chunk;
        if (at == 0) {
          chunk.set_sha256(Sha256Hex(content));
          chunk.set_size_bytes(static_cast<int64_t>(content.size()));
        }
        chunk.set_data(content.substr(static_cast<size_t>(at), 1 << 20));
        writer->Write(chunk);
      }
      writer->WritesDone();
      EXPECT_FALSE(writer->Finish().ok());
    }
    ASSERT_TRUE(WaitUntil([&] { return !harness.alive(); }));
    ASSERT_TRUE(harness.Serve());
    v1::StatInputsRequest stat;
    stat.add_sha256(Sha256Hex(content));
    auto state = harness.Call(stat, &v1::Agent::Stub::StatInputs, v1::StatInputsResponse());
    ASSERT_OK(state);
    EXPECT_FALSE(state->inputs(0).complete());
    const int64_t have = state->inputs(0).received_bytes();
    EXPECT_GT(have, 0);
    grpc::ClientContext context;
    v1::PutInputResponse response;
    auto writer = harness.stub().PutInput(&context, &response);
    v1::PutInputRequest rest;
    rest.set_sha256(Sha256Hex(content));
    rest.set_size_bytes(static_cast<int64_t>(content.size()));
    rest.set_offset(have);
    writer->Write(rest);
    for (int64_t at = have; at < static_cast<int64_t>(content.size()); at += 1 << 20) {
      v1::PutInputRequest chunk;
      chunk.set_data(content.substr(static_cast<size_t>(at), 1 << 20));
      writer->Write(chunk);
    }
    writer->WritesDone();
    ASSERT_OK(FromGrpc(writer->Finish()));
    EXPECT_TRUE(harness.Call(stat, &v1::Agent::Stub::StatInputs, v1::StatInputsResponse())->inputs(0).complete());
  }
}

TEST(AgentKilledAtRandom, ARunningAttemptGoesOnAndEveryRecordIsDeliveredOnce) {
  AgentHarness harness;
  ASSERT_TRUE(harness.Serve());
  ASSERT_OK(harness.Start(AgentHarness::Shell(
      kKey, "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo \"{\\\"step\\\":$i}\" >> \"$ITWIN_METRICS\"; "
            "[ $((i % 10)) = 0 ] && echo line $i; done; exit 0")));
  std::mt19937 random(7);
  Follower follower(&harness);
  size_t seen = 0;
  int kills = 0;
  while (!Follower::HasEnded(follower.Get(kKey)) && kills < 12) {
    follower.Start({kKey});
    const size_t goal = seen + random() % 200'000;
    follower.WaitFor(kKey, [&](auto f) { return f.data["metrics"].size() >= goal || Follower::HasEnded(f); });
    harness.Kill();
    follower.Stop();
    seen = follower.Get(kKey).data["metrics"].size();
    ++kills;
    ASSERT_TRUE(harness.Serve());
  }
  EXPECT_GT(kills, 3);
  follower.Start({kKey});
  const v1::AttemptStatus status = harness.End(kKey, absl::Seconds(40));
  EXPECT_EQ(status.starts(), 1);
  EXPECT_EQ(status.exit_code(), 0);
  ASSERT_TRUE(follower.WaitFor(kKey, [&](auto f) {
    return static_cast<int64_t>(f.data["metrics"].size()) >= status.sizes().metrics() &&
           static_cast<int64_t>(f.data["stdout"].size()) >= status.sizes().stdout_log();
  }));
  EXPECT_EQ(follower.errors(), 0);
  EXPECT_EQ(follower.Get(kKey).data["metrics"], *ReadFile(harness.DirectoryOf(kKey).metrics_path()));
  EXPECT_EQ(follower.Get(kKey).data["stdout"], *ReadFile(harness.DirectoryOf(kKey).stdout_path()));
}

}  // namespace
}  // namespace itwin::testing
