#include "agent/spool/input_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::agent {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::HasSubstr;

class InputStoreTest : public ::testing::Test {
 protected:
  InputStoreTest() { EXPECT_OK(store_.Create()); }
  void Put(const std::string& content) {
    auto upload = store_.BeginUpload(Sha256Hex(content), static_cast<int64_t>(content.size()), 0);
    ASSERT_OK(upload);
    ASSERT_OK(upload->Write(content));
    ASSERT_OK(upload->Finish());
  }
  itwin::testing::TempDirectory directory_;
  InputStore store_{directory_ / "inputs"};
  const std::string content_ = std::string(100'000, 'x') + "end";
  const std::string name_ = Sha256Hex(content_);
  const int64_t size_ = static_cast<int64_t>(content_.size());
};

TEST_F(InputStoreTest, AnInterruptedUploadGoesOnWhereItStopped) {
  {
    auto upload = store_.BeginUpload(name_, size_, 0);
    ASSERT_OK(upload);
    ASSERT_OK(upload->Write(content_.substr(0, 60'000)));
  }
  auto state = store_.Stat(name_);
  ASSERT_OK(state);
  EXPECT_FALSE(state->complete);
  EXPECT_EQ(state->received_bytes, 60'000);
  EXPECT_THAT(store_.BeginUpload(name_, size_, 60'001).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("has 60000 bytes")));
  auto upload = store_.BeginUpload(name_, size_, 50'000);  // earlier is fine too
  ASSERT_OK(upload);
  EXPECT_THAT(store_.BeginUpload(name_, size_, 0).status(), StatusIs(absl::StatusCode::kAborted, HasSubstr("another")));
  ASSERT_OK(upload->Write(content_.substr(50'000)));
  ASSERT_OK(upload->Finish());
  EXPECT_TRUE(store_.Stat(name_)->complete);
}

TEST_F(InputStoreTest, WrongContentIsThrownAway) {
  auto upload = store_.BeginUpload(name_, 5, 0);
  ASSERT_OK(upload);
  EXPECT_THAT(upload->Write("123456"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("more were sent")));
  ASSERT_OK(upload->Write("123"));
  EXPECT_THAT(upload->Finish(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3 of 5")));
  ASSERT_OK(upload->Write("45"));
  EXPECT_THAT(upload->Finish(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("thrown away")));
  EXPECT_EQ(store_.Stat(name_)->received_bytes, 0);
}

TEST_F(InputStoreTest, WhatDoesNotFitOnTheDiskIsRefusedAtOnce) {
  EXPECT_THAT(store_.BeginUpload(name_, int64_t{1} << 44, 0).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("free")));
}

TEST_F(InputStoreTest, NamesAreSumsOnly) {
  EXPECT_THAT(store_.Stat("../../etc/passwd").status(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("SHA-256")));
}

TEST_F(InputStoreTest, AJobCannotAlterTheStore) {
  Put(content_);
  for (const bool executable : {false, true}) {
    const std::string path = directory_ / "placed";
    ASSERT_OK(store_.Place(name_, path, executable));
    struct stat info;
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, executable ? 0500u : 0400u);
    if (FileDescriptor file(open(path.c_str(), O_WRONLY)); file.valid()) {  // root may, but has a copy
      ASSERT_EQ(write(file.get(), "zzz", 3), 3);
    }
    EXPECT_EQ(*Sha256OfFile(directory_ / "inputs/" + name_), name_);
  }
}

TEST_F(InputStoreTest, AnAlteredEntryIsNoticedAndRemoved) {
  Put(content_);
  const std::string path = directory_ / "inputs/" + name_;
  ASSERT_EQ(chmod(path.c_str(), 0600), 0);
  {
    FileDescriptor file = *OpenFile(path, O_WRONLY);
    ASSERT_OK(WriteAll(file.get(), "zzz", path));
  }
  EXPECT_FALSE(store_.Stat(name_)->complete);
  EXPECT_THAT(store_.Place(name_, directory_ / "placed", false),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not complete")));
}

TEST_F(InputStoreTest, TouchingAnEntryDoesNotLoseIt) {
  Put(content_);
  const std::string path = directory_ / "inputs/" + name_;
  ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), nullptr, 0), 0);
  EXPECT_TRUE(store_.Stat(name_)->complete);
}

TEST_F(InputStoreTest, RemovesOnlyWhatNobodyUses) {
  const std::string linked = "linked elsewhere", half(1000, 'h');
  Put(content_);
  Put(linked);
  const std::string linked_path = directory_ / "inputs/" + Sha256Hex(linked);
  ASSERT_EQ(link(linked_path.c_str(), (directory_ / "of an attempt").c_str()), 0);
  auto upload = store_.BeginUpload(Sha256Hex(half), 1000, 0);
  ASSERT_OK(upload);
  ASSERT_OK(upload->Write(half.substr(0, 500)));
  EXPECT_EQ(store_.RemoveUnused(absl::Now() - absl::Hours(1)), 0);  // all are new
  EXPECT_EQ(store_.RemoveUnused(absl::Now() + absl::Hours(1)), static_cast<int64_t>(content_.size()));
  EXPECT_FALSE(store_.Stat(name_)->complete);
  EXPECT_TRUE(store_.Stat(Sha256Hex(linked))->complete);
  EXPECT_EQ(store_.Stat(Sha256Hex(half))->received_bytes, 500) << "under way";
  { const auto given_up = std::move(upload); }
  EXPECT_EQ(store_.RemoveUnused(absl::Now() + absl::Hours(1)), 500);
}

TEST_F(InputStoreTest, SendingItAgainIsHarmless) {
  Put(content_);
  Put(content_);
  Put("");
  EXPECT_TRUE(store_.Stat(Sha256Hex(""))->complete);
}

}  // namespace
}  // namespace itwin::agent
