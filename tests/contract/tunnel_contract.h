#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/tunnel/tunnel.h"
#include "tests/testing/socket_io.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"
#include "tests/testing/wait.h"

// What every Tunnel must do. An implementation's test instantiates the suite with a harness that makes a
// tunnel whose far side is a shell command:
//   INSTANTIATE_TEST_SUITE_P(Process, TunnelContract, ::testing::Values(TunnelHarness{"process", MakeIt}));
namespace itwin::server {

using ::itwin::testing::Receive;
using ::itwin::testing::Send;
using ::itwin::testing::Soon;

inline size_t CountEntries(const char* directory) {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) count += entry.exists() ? 1 : 0;
  return count;
}

struct TunnelHarness {
  const char* name;
  std::function<std::unique_ptr<Tunnel>(const std::string& shell_command)> make;
};

inline std::ostream& operator<<(std::ostream& out, const TunnelHarness& harness) { return out << harness.name; }

class TunnelContract : public ::testing::TestWithParam<TunnelHarness> {
 protected:
  std::unique_ptr<TunnelStream> Open(const std::string& command) {
    tunnel_ = GetParam().make(command);
    auto stream = tunnel_->Open(Soon());
    EXPECT_OK(stream);
    return stream.ok() ? std::move(*stream) : nullptr;
  }
  std::unique_ptr<Tunnel> tunnel_;
};

TEST_P(TunnelContract, CarriesEveryByteValueBothWays) {
  auto stream = Open("exec cat");
  ASSERT_NE(stream, nullptr);
  const FileDescriptor socket = stream->TakeSocket();
  std::string all;
  for (int i = 0; i < 256 * 16; ++i) all.push_back(static_cast<char>(i % 256));
  ASSERT_TRUE(Send(socket.get(), all));
  EXPECT_EQ(Receive(socket.get(), all.size()), all);
  EXPECT_TRUE(stream->alive());
}

TEST_P(TunnelContract, LargeTransfersMeetBackPressureNotLoss) {
  auto stream = Open("exec cat");
  ASSERT_NE(stream, nullptr);
  const FileDescriptor socket = stream->TakeSocket();
  constexpr size_t kBytes = 32 << 20;
  std::string sent(kBytes, '\0');
  uint32_t x = 12345;
  for (char& c : sent) c = static_cast<char>((x = x * 1664525u + 1013904223u) >> 24);
  // First only write: the stream must fill up and say so, rather than take it all into memory.
  size_t taken = 0;
  while (taken < kBytes) {
    const ssize_t got = send(socket.get(), sent.data() + taken, kBytes - taken, MSG_NOSIGNAL);
    if (got > 0) taken += static_cast<size_t>(got);
    pollfd entry{socket.get(), POLLOUT, 0};
    if (got < 0 && poll(&entry, 1, 300) == 0) break;
  }
  EXPECT_LT(taken, kBytes) << "32 MiB went into a stream nobody reads";
  std::thread writer([&] { EXPECT_TRUE(Send(socket.get(), absl::string_view(sent).substr(taken))); });
  const std::string received = Receive(socket.get(), kBytes);
  writer.join();
  EXPECT_TRUE(received == sent);
}

TEST_P(TunnelContract, FarEndThatDiesEndsTheStreamAndLeavesItsLastWords) {
  auto stream = Open("echo 'agent: no such file system' >&2; exit 3");
  ASSERT_NE(stream, nullptr);
  const FileDescriptor socket = stream->TakeSocket();
  EXPECT_EQ(Receive(socket.get(), 1), "");
  EXPECT_TRUE(testing::WaitUntil([&] { return !stream->alive(); }));
  EXPECT_THAT(stream->Diagnostics(), ::testing::HasSubstr("agent: no such file system"));
  EXPECT_THAT(stream->Diagnostics(), ::testing::HasSubstr("exit code 3"));
}

TEST_P(TunnelContract, FarEndKilledEndsTheStream) {
  auto stream = Open("kill -9 $$");
  ASSERT_NE(stream, nullptr);
  const FileDescriptor socket = stream->TakeSocket();
  EXPECT_EQ(Receive(socket.get(), 1), "");
  EXPECT_TRUE(testing::WaitUntil([&] { return !stream->alive(); }));
}

TEST_P(TunnelContract, DiagnosticsStayBounded) {
  auto stream = Open("yes 'a long complaint' | head -c 3000000 >&2; echo 'the last line' >&2");
  ASSERT_NE(stream, nullptr);
  ASSERT_TRUE(testing::WaitUntil([&] { return !stream->alive(); }));
  EXPECT_LE(stream->Diagnostics().size(), kMaxDiagnosticsBytes);
  EXPECT_THAT(stream->Diagnostics(), ::testing::HasSubstr("the last line"));
}

TEST_P(TunnelContract, CloseEndsTheFarSideEvenWhileTheSocketIsHeld) {
  testing::TempDirectory directory;
  // The far side notes its end of input, as `itwin-agent connect` ends on it.
  auto stream = Open(absl::StrCat("cat >/dev/null; touch '", directory / "ended", "'"));
  ASSERT_NE(stream, nullptr);
  const FileDescriptor socket = stream->TakeSocket();
  stream->Close();
  stream->Close();
  EXPECT_FALSE(stream->alive());
  EXPECT_TRUE(testing::WaitUntil([&] { return std::filesystem::exists(directory / "ended"); }));
  EXPECT_EQ(Receive(socket.get(), 1), "");
}

TEST_P(TunnelContract, CloseDoesNotWaitForAFarSideThatIgnoresIt) {
  auto stream = Open("trap '' TERM HUP; while :; do read -r line </dev/tty || tail -f /dev/null; done");
  ASSERT_NE(stream, nullptr);
  const absl::Time start = absl::Now();
  stream->Close();
  EXPECT_LT(absl::Now() - start, absl::Seconds(8));
  EXPECT_FALSE(stream->alive());
}

TEST_P(TunnelContract, StreamsAreIndependent) {
  tunnel_ = GetParam().make("exec cat");
  auto first = tunnel_->Open(Soon());
  auto second = tunnel_->Open(Soon());
  ASSERT_OK(first);
  ASSERT_OK(second);
  const FileDescriptor a = (*first)->TakeSocket();
  const FileDescriptor b = (*second)->TakeSocket();
  (*first)->Close();
  ASSERT_TRUE(Send(b.get(), "still here"));
  EXPECT_EQ(Receive(b.get(), 10), "still here");
}

TEST_P(TunnelContract, ManyReopensLeakNothing) {
  tunnel_ = GetParam().make("exec cat");
  const auto once = [&] {
    auto stream = tunnel_->Open(Soon());
    ASSERT_OK(stream);
    const FileDescriptor socket = (*stream)->TakeSocket();
    ASSERT_TRUE(Send(socket.get(), "x"));
    ASSERT_EQ(Receive(socket.get(), 1), "x");
  };
  once();  // whatever is made once is made now
  const size_t descriptors = CountEntries("/proc/self/fd");
  const size_t threads = CountEntries("/proc/self/task");
  for (int i = 0; i < 50; ++i) once();
  EXPECT_EQ(CountEntries("/proc/self/fd"), descriptors);
  EXPECT_LE(CountEntries("/proc/self/task"), threads);
}

}  // namespace itwin::server
