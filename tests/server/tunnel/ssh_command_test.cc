#include "server/tunnel/ssh_command.h"

#include <sys/stat.h>

#include <filesystem>

#include "common/sha256.h"
#include "server/tunnel/shell_quote.h"
#include "tests/testing/sshd.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tcp_proxy.h"

namespace itwin::server {
namespace {

using ::itwin::testing::ReadText;
using ::itwin::testing::Soon;
using ::itwin::testing::Sshd;
using ::itwin::testing::StatusIs;
using ::itwin::testing::TcpProxy;
using ::itwin::testing::TempDirectory;
using ::itwin::testing::WriteText;
using ::testing::HasSubstr;

class SshCommandTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { sshd_ = new Sshd; }
  static void TearDownTestSuite() {
    delete sshd_;
    sshd_ = nullptr;
  }
  static absl::StatusOr<SshCommandResult> Run(const std::string& command, const SshInput& input = nullptr) {
    return RunSshCommand(sshd_->Options(), command, input, Soon());
  }
  static Sshd* sshd_;
};
Sshd* SshCommandTest::sshd_ = nullptr;

TEST_F(SshCommandTest, OutputErrorsAndHowItEnded) {
  const auto result = Run("echo out; echo err >&2; exit 3");
  ASSERT_OK(result);
  EXPECT_EQ(result->out, "out\n");
  EXPECT_EQ(result->err, "err");
  EXPECT_EQ(result->exit_code, 3);
  EXPECT_FALSE(result->truncated);
  const auto killed = Run("kill -KILL $$");
  ASSERT_OK(killed);
  EXPECT_EQ(killed->signal, "KILL");
  const auto silent = Run("true");
  ASSERT_OK(silent);
  EXPECT_EQ(silent->out + silent->err, "");
}

TEST_F(SshCommandTest, OutputIsBounded) {
  const auto result = Run("head -c 5000000 /dev/zero; head -c 100000 /dev/zero | tr '\\0' e >&2; echo >&2; echo last >&2");
  ASSERT_OK(result);
  EXPECT_EQ(result->out.size(), kMaxSshCommandOutput);
  EXPECT_TRUE(result->truncated);
  EXPECT_LE(result->err.size(), 4096u);
  EXPECT_THAT(result->err, HasSubstr("last"));
}

TEST_F(SshCommandTest, InputIsSentToItsEndOrUntilItFails) {
  int left = 40;
  const auto result = Run("wc -c", [&]() -> absl::StatusOr<std::string> { return left-- > 0 ? std::string(100'000, 'x') : ""; });
  ASSERT_OK(result);
  EXPECT_EQ(result->out, "4000000\n");
  EXPECT_THAT(Run("cat", []() -> absl::StatusOr<std::string> { return absl::DataLossError("the disk is broken"); }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("the disk is broken")));
  // A command that does not want all of it is no failure.
  const auto early = Run("head -c 3", []() -> absl::StatusOr<std::string> { return std::string(100'000, 'y'); });
  ASSERT_OK(early);
  EXPECT_EQ(early->out, "yyy");
}

TEST_F(SshCommandTest, DeadlineEndsIt) {
  const absl::Time start = absl::Now();
  EXPECT_THAT(RunSshCommand(sshd_->Options(), "tail -f /dev/null", nullptr, start + absl::Seconds(2)),
              StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("in time")));
  EXPECT_LT(absl::Now() - start, absl::Seconds(8));
}

TEST_F(SshCommandTest, QuotedWordsArriveThroughTheAccountsShell) {
  const std::vector<std::string> argv = {"printf", "%s|", "a b", "it's", "$HOME `id` $(id)", "x\ny", "\"", "", "*"};
  const auto result = Run(*CommandLine(argv));
  ASSERT_OK(result);
  EXPECT_EQ(result->out, "a b|it's|$HOME `id` $(id)|x\ny|\"||*|");
}

std::string Bytes(size_t size, uint32_t x) {
  std::string bytes(size, '\0');
  for (char& c : bytes) c = static_cast<char>((x = x * 1664525u + 1013904223u) >> 24);
  return bytes;
}
unsigned ModeOf(const std::string& path) {
  struct stat info = {};
  stat(path.c_str(), &info);
  return info.st_mode & 07777;
}
size_t FilesIn(const std::string& directory) {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) count += entry.exists() ? 1 : 0;
  return count;
}

TEST_F(SshCommandTest, UploadArrivesWholeWithItsModeAndIsNotSentTwice) {
  const TempDirectory local, remote;
  const std::string bytes = Bytes(5'000'001, 1);
  WriteText(local / "file", bytes);
  const std::string target = remote / "it's $HOME/a new\nfolder/agent";
  std::vector<int64_t> seen;
  const auto progress = [&](int64_t sent, int64_t total) {
    EXPECT_EQ(total, static_cast<int64_t>(bytes.size()));
    seen.push_back(sent);
  };
  ASSERT_OK(UploadFile(sshd_->Options(), local / "file", target, 0755, Soon(), progress));
  EXPECT_TRUE(ReadText(target) == bytes);
  EXPECT_EQ(ModeOf(target), 0755u);
  EXPECT_EQ(FilesIn(remote / "it's $HOME/a new\nfolder"), 1u) << "something of the sending was left";
  EXPECT_GE(seen.size(), 5u);
  EXPECT_EQ(seen.back(), static_cast<int64_t>(bytes.size()));
  seen.clear();
  ASSERT_OK(UploadFile(sshd_->Options(), local / "file", target, 0700, Soon(), progress));
  EXPECT_EQ(seen.size(), 1u) << "it was there already";
  EXPECT_EQ(ModeOf(target), 0700u);
  // A newer version replaces the old one; an empty file is one too.
  WriteText(local / "file", "");
  ASSERT_OK(UploadFile(sshd_->Options(), local / "file", target, 0600, Soon()));
  EXPECT_EQ(ReadText(target), "");
}

TEST_F(SshCommandTest, UploadGoesOnWhereItWasCut) {
  const TempDirectory local, remote;
  const std::string bytes = Bytes(24 << 20, 2);
  WriteText(local / "file", bytes);
  TcpProxy proxy(sshd_->port());
  SshTunnelOptions options = sshd_->Options();
  options.hosts = {{.host = "127.0.0.1", .port = proxy.port()}};
  options.fingerprints = {testing::FingerprintOfFile(sshd_->host_key() + ".pub")};
  bool cut = false;
  const absl::Status status = UploadFile(options, local / "file", remote / "file", 0644, Soon(), [&](int64_t sent, int64_t) {
    if (sent >= (16 << 20) && !cut) {
      cut = true;
      proxy.Cut();
    }
  });
  ASSERT_TRUE(cut);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_FALSE(std::filesystem::exists(remote / "file"));
  proxy.Pass();
  int64_t first = -1;
  ASSERT_OK(UploadFile(options, local / "file", remote / "file", 0644, Soon(), [&](int64_t sent, int64_t) { first = first < 0 ? sent : first; }));
  EXPECT_GT(first, 1 << 20) << "it began anew";
  EXPECT_EQ(*Sha256OfFile(remote / "file"), Sha256Hex(bytes));
}

TEST_F(SshCommandTest, PartThatDoesNotFitIsThrownAway) {
  const TempDirectory local, remote;
  const std::string bytes = Bytes(3 << 20, 3);
  WriteText(local / "file", bytes);
  WriteText(remote / ("file.part-" + Sha256Hex(bytes).substr(0, 16)), Bytes(1 << 20, 4));
  ASSERT_OK(UploadFile(sshd_->Options(), local / "file", remote / "file", 0644, Soon()));
  EXPECT_EQ(*Sha256OfFile(remote / "file"), Sha256Hex(bytes));
  EXPECT_EQ(FilesIn(remote.path()), 1u);
}

TEST_F(SshCommandTest, UploadThatCannotBeSaysWhy) {
  const TempDirectory local;
  WriteText(local / "file", Bytes(1 << 20, 5));
  EXPECT_THAT(UploadFile(sshd_->Options(), local / "file", "/dev/full/x", 0644, Soon()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("/dev/full")));
  EXPECT_THAT(UploadFile(sshd_->Options(), local / "none", "x", 0644, Soon()), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  EXPECT_THAT(UploadFile(sshd_->Options(), local / "file", "folder/", 0644, Soon()), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("folder/")));
}

}  // namespace
}  // namespace itwin::server
