#include "agent/spool/release.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

using ::itwin::testing::StatusIs;
namespace fs = std::filesystem;

class ReleaseTest : public ::testing::Test {
 protected:
  ReleaseTest() { EXPECT_OK(inputs_.Create()); }
  v1::InstallReleaseRequest Request(const std::string& name, const std::string& program) {
    auto upload = inputs_.BeginUpload(Sha256Hex(program), static_cast<int64_t>(program.size()), 0);
    EXPECT_OK(upload);
    EXPECT_OK(upload->Write(program));
    EXPECT_OK(upload->Finish());
    v1::InstallReleaseRequest request;
    request.set_name(name);
    v1::StagedInput* file = request.add_files();
    file->set_path("itwin-agent");
    file->set_sha256(Sha256Hex(program));
    file->set_executable(true);
    request.add_carry("itwin-worker");
    return request;
  }
  std::string Current(const std::string& file) {
    return ReadFile(directory_ / ("releases/current/" + file)).value_or("(none)");
  }
  std::vector<std::string> Entries() {
    std::vector<std::string> out;
    for (const auto& entry : fs::directory_iterator(directory_ / "releases")) out.push_back(entry.path().filename());
    std::sort(out.begin(), out.end());
    return out;
  }
  itwin::testing::TempDirectory directory_;
  InputStore inputs_{directory_ / "inputs"};
};

TEST_F(ReleaseTest, TheNewOneIsCurrentAndTheOldOneStays) {
  const auto one = InstallRelease(directory_.path(), Request("1.0-aaaa", "first"), &inputs_);
  ASSERT_OK(one);
  EXPECT_EQ(*one, directory_ / "releases/1.0-aaaa");
  EXPECT_EQ(Current("itwin-agent"), "first");
  EXPECT_EQ(access((*one + "/itwin-agent").c_str(), X_OK), 0);
  ASSERT_OK(WriteFileAtomically(*one + "/itwin-worker", "worker"));

  ASSERT_OK(InstallRelease(directory_.path(), Request("1.1-bbbb", "second"), &inputs_));
  EXPECT_EQ(Current("itwin-agent"), "second");
  EXPECT_EQ(Current("itwin-worker"), "worker");  // carried over
  EXPECT_EQ(*ReadFile(*one + "/itwin-agent"), "first");
  // Back again: what is there is only switched to.
  ASSERT_OK(InstallRelease(directory_.path(), Request("1.0-aaaa", "first"), &inputs_));
  EXPECT_EQ(Current("itwin-agent"), "first");
  EXPECT_THAT(Entries(), ::testing::ElementsAre("1.0-aaaa", "1.1-bbbb", "current"));
}

TEST_F(ReleaseTest, NothingHalfDoneStays) {
  ASSERT_OK(InstallRelease(directory_.path(), Request("1.0-aaaa", "first"), &inputs_));
  v1::InstallReleaseRequest request = Request("1.1-bbbb", "second");
  v1::StagedInput* missing = request.add_files();
  missing->set_path("other");
  missing->set_sha256(std::string(64, 'a'));
  EXPECT_FALSE(InstallRelease(directory_.path(), request, &inputs_).ok());
  EXPECT_EQ(Current("itwin-agent"), "first");
  EXPECT_THAT(Entries(), ::testing::ElementsAre("1.0-aaaa", "current"));
}

TEST_F(ReleaseTest, NamesStayBelowTheDirectory) {
  for (const char* name : {"", "..", "a/b", "current", ".hidden", "a b"}) {
    v1::InstallReleaseRequest request = Request("x", "p");
    request.set_name(name);
    EXPECT_THAT(InstallRelease(directory_.path(), request, &inputs_), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_)) << name;
  }
  v1::InstallReleaseRequest request = Request("x", "p");
  request.add_carry("../../etc/passwd");
  EXPECT_THAT(InstallRelease(directory_.path(), request, &inputs_), StatusIs(absl::StatusCode::kInvalidArgument, ::testing::_));
}

}  // namespace
}  // namespace itwin::agent
