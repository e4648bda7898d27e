#include "client/src/transfer.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include "common/files.h"
#include "common/sha256.h"
#include "tests/client/fake_gateway.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::client {
namespace {

using ::itwin::testing::FakeGateway;
using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

Pacing NoWaiting() {
  auto now = std::make_shared<absl::Time>(absl::UnixEpoch());
  return {.now = [now] { return *now; },
          .pause = [now](absl::Duration d) { *now += d; return true; },
          .random = [] { return 0.5; }};
}

class TransferTest : public ::testing::Test {
 protected:
  LocalFile File(const std::string& name, const std::string& bytes) {
    EXPECT_OK(WriteFileAtomically(directory_ / name, bytes));
    return {directory_ / name, name, Sha256Hex(bytes), static_cast<int64_t>(bytes.size())};
  }
  absl::Status Download(const std::string& name) {
    return DownloadFile(gateway_, gateway_.outputs["j"][0], directory_ / name, nullptr, NoWaiting());
  }
  bool Exists(const std::string& name) {
    struct stat info;
    return stat((directory_ / name).c_str(), &info) == 0;
  }

  TempDirectory directory_;
  FakeGateway gateway_;
};

TEST_F(TransferTest, UploadsWhatTheGatewayDoesNotHave) {
  const LocalFile a = File("a", "aaa"), b = File("b", "bbb"), empty = File("empty", "");
  gateway_.artifacts[b.sha256] = "bbb";
  std::vector<int64_t> told;
  ASSERT_OK(UploadFiles(gateway_, {a, b, empty}, [&](const TransferProgress& p) { told.push_back(p.done_bytes); }, NoWaiting()));
  EXPECT_EQ(gateway_.artifacts[a.sha256], "aaa");
  EXPECT_EQ(gateway_.artifacts.count(empty.sha256), 1u);
  EXPECT_EQ(gateway_.upload_offsets.size(), 2u);
  EXPECT_THAT(told, ElementsAre(3, 0));
}

TEST_F(TransferTest, ResumesAnUploadWhereItBrokeOff) {
  const std::string bytes(2'000'000, 'x');
  const LocalFile file = File("big", bytes);
  gateway_.cuts = {1, 0};  // after two chunks, then after one
  ASSERT_OK(UploadFiles(gateway_, {file}, nullptr, NoWaiting()));
  EXPECT_EQ(gateway_.artifacts[file.sha256], bytes);
  EXPECT_THAT(gateway_.upload_offsets, ElementsAre(0, 2 << 19, 3 << 19));
}

TEST_F(TransferTest, GoesOnWithAnEarlierUpload) {
  const LocalFile file = File("big", "0123456789");
  gateway_.partial[file.sha256] = "0123";
  ASSERT_OK(UploadFiles(gateway_, {file}, nullptr, NoWaiting()));
  EXPECT_THAT(gateway_.upload_offsets, ElementsAre(4));
  EXPECT_EQ(gateway_.artifacts[file.sha256], "0123456789");
}

TEST_F(TransferTest, GivesUpAnUploadThatMovesNothing) {
  const LocalFile file = File("f", "abc");
  gateway_.faults.assign(1'000, absl::UnavailableError("down"));
  gateway_.faults.insert(gateway_.faults.begin(), absl::OkStatus());  // the first look
  EXPECT_THAT(UploadFiles(gateway_, {file}, nullptr, NoWaiting()), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("upload ")));
}

TEST_F(TransferTest, SaysWhenAFileChangedMeanwhile) {
  LocalFile file = File("f", "abc");
  ASSERT_OK(WriteFileAtomically(file.path, "abd"));
  EXPECT_THAT(UploadFiles(gateway_, {file}, nullptr, NoWaiting()), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("submit again")));
  ASSERT_OK(WriteFileAtomically(file.path, "a"));
  EXPECT_THAT(UploadFiles(gateway_, {file}, nullptr, NoWaiting()), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("became shorter")));
}

TEST_F(TransferTest, DoesNotRepeatIntoAFullDisk) {
  const LocalFile file = File("f", "abc");
  gateway_.faults = {absl::OkStatus(), absl::ResourceExhaustedError("disk full")};
  EXPECT_THAT(UploadFiles(gateway_, {file}, nullptr, NoWaiting()),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("disk full")));
  EXPECT_EQ(gateway_.calls, 2);
}

TEST_F(TransferTest, DownloadsWholeFiles) {
  gateway_.AddOutput("j", "model.pt", "0123456789");
  ASSERT_OK(Download("deep/er/model.pt"));
  EXPECT_EQ(ReadFile(directory_ / "deep/er/model.pt").value(), "0123456789");
  EXPECT_FALSE(Exists("deep/er/model.pt.part"));
  ASSERT_OK(Download("deep/er/model.pt"));  // there already
  EXPECT_EQ(gateway_.download_offsets.size(), 1u);
  gateway_.outputs["e"].clear();
  gateway_.AddOutput("e", "empty", "");
  ASSERT_OK(DownloadFile(gateway_, gateway_.outputs["e"][0], directory_ / "empty", nullptr, NoWaiting()));
  EXPECT_EQ(ReadFile(directory_ / "empty").value(), "");
}

TEST_F(TransferTest, ResumesADownloadWithinACallAndAcrossCalls) {
  gateway_.AddOutput("j", "m", "0123456789abcdef");
  gateway_.cuts = {1, 2};
  ASSERT_OK(Download("m"));
  EXPECT_THAT(gateway_.download_offsets, ElementsAre(0, 4, 12));
  EXPECT_EQ(ReadFile(directory_ / "m").value(), "0123456789abcdef");

  ASSERT_OK(WriteFileAtomically(directory_ / "n.part", "0123456"));  // left by a process that was killed
  gateway_.download_offsets.clear();
  ASSERT_OK(Download("n"));
  EXPECT_THAT(gateway_.download_offsets, ElementsAre(7));
  EXPECT_EQ(ReadFile(directory_ / "n").value(), "0123456789abcdef");
}

TEST_F(TransferTest, KeepsThePartWhenTheGatewayStaysAway) {
  gateway_.AddOutput("j", "m", "0123456789");
  gateway_.cuts = {1};
  gateway_.faults.assign(1'000, absl::UnavailableError("down"));
  gateway_.faults.insert(gateway_.faults.begin(), absl::OkStatus());
  EXPECT_THAT(Download("m"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("download ")));
  EXPECT_EQ(ReadFile(directory_ / "m.part").value(), "0123");
  EXPECT_FALSE(Exists("m"));
}

TEST_F(TransferTest, ReplacesAPartOfAnotherFile) {
  gateway_.AddOutput("j", "m", "0123456789");
  ASSERT_OK(WriteFileAtomically(directory_ / "m.part", "abc"));
  ASSERT_OK(Download("m"));
  EXPECT_THAT(gateway_.download_offsets, ElementsAre(3, 0));
  EXPECT_EQ(ReadFile(directory_ / "m").value(), "0123456789");
  ASSERT_OK(WriteFileAtomically(directory_ / "n.part", std::string(100, 'z')));  // longer than the file
  ASSERT_OK(Download("n"));
  EXPECT_EQ(ReadFile(directory_ / "n").value(), "0123456789");
}

TEST_F(TransferTest, NeverKeepsWrongBytes) {
  gateway_.AddOutput("j", "m", "0123456789");
  ASSERT_OK(WriteFileAtomically(directory_ / "m", "what the user had"));
  gateway_.corrupt_downloads = true;
  EXPECT_THAT(Download("m"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("do not have the checksum")));
  EXPECT_EQ(ReadFile(directory_ / "m").value(), "what the user had");
  EXPECT_FALSE(Exists("m.part"));
  gateway_.corrupt_downloads = false;
  gateway_.artifacts[gateway_.outputs["j"][0].sha256()] = "0123456789 and more";
  EXPECT_THAT(Download("m"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("more than 10 bytes")));
  gateway_.outputs["j"][0].set_sha256("../../x");
  EXPECT_THAT(Download("m"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("no valid checksum")));
}

}  // namespace
}  // namespace itwin::client
