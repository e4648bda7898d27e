#include "server/artifacts/blob_store.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::server {
namespace {

using itwin::testing::StatusIs;
using itwin::testing::TempDirectory;
using ::testing::_;
using ::testing::HasSubstr;

class BlobStoreTest : public ::testing::Test {
 protected:
  std::unique_ptr<BlobStore> Open(int64_t min_free = 0) {
    BlobStore::Options options;
    options.directory = directory_.path();
    options.min_free_bytes = min_free;
    options.max_blob_bytes = 100 << 20;
    auto store = BlobStore::Open(options);
    ITWIN_CHECK(store.ok());
    return *std::move(store);
  }
  int FilesBelow(const std::string& folder) {
    int count = 0;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(directory_ / folder)) {
      count += entry.is_regular_file();
    }
    return count;
  }

  TempDirectory directory_;
  std::unique_ptr<BlobStore> store_ = Open();
};

std::string Noise(size_t bytes) {
  std::string out(bytes, '\0');
  uint32_t state = 1;
  for (char& c : out) c = static_cast<char>((state = state * 1664525 + 1013904223) >> 24);
  return out;
}

TEST_F(BlobStoreTest, WritesReadsAndKnowsAgain) {
  const std::string bytes = Noise(3'000'000);
  const std::string hash = Sha256Hex(bytes);
  EXPECT_FALSE(store_->StatBlob(hash)->complete);
  EXPECT_THAT(store_->OpenReader(hash).status(), StatusIs(absl::StatusCode::kNotFound, _));
  {
    auto writer = store_->OpenWriter(hash, static_cast<int64_t>(bytes.size()), 0);
    ASSERT_OK(writer);
    for (size_t i = 0; i < bytes.size(); i += 700'000) ASSERT_OK((*writer)->Append(bytes.substr(i, 700'000)));
    ASSERT_OK((*writer)->Commit());
  }
  store_ = Open();
  EXPECT_TRUE(store_->StatBlob(hash)->complete);
  const auto reader = store_->OpenReader(hash);
  ASSERT_OK(reader);
  EXPECT_EQ(*reader->Read(0, 10'000'000), bytes);
  EXPECT_EQ(*reader->Read(2'999'990, 100), bytes.substr(2'999'990));
  EXPECT_EQ(*reader->Read(3'000'000, 100), "");
  EXPECT_EQ(FilesBelow("partial"), 0);
  struct stat info;
  ASSERT_EQ(stat(store_->PathOf(hash)->c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0400u);
  // Again: nothing to do.
  auto again = store_->OpenWriter(hash, static_cast<int64_t>(bytes.size()), 0);
  ASSERT_OK(again);
  EXPECT_TRUE((*again)->complete());
  EXPECT_OK((*again)->Append("whatever"));
  EXPECT_OK((*again)->Commit());
  EXPECT_EQ(*store_->OpenReader(hash)->Read(0, 10'000'000), bytes);
}

TEST_F(BlobStoreTest, BrokenOffUploadsGoOnAlsoAfterARestart) {
  const std::string bytes = Noise(1'000'000);
  const std::string hash = Sha256Hex(bytes);
  for (size_t sent = 0; sent < bytes.size();) {
    store_ = Open();
    EXPECT_EQ(store_->StatBlob(hash)->received_bytes, static_cast<int64_t>(sent));
    auto writer = store_->ResumeWriter(hash, static_cast<int64_t>(bytes.size()));
    ASSERT_OK(writer);
    EXPECT_EQ((*writer)->offset(), static_cast<int64_t>(sent));
    ASSERT_OK((*writer)->Append(bytes.substr(sent, 300'000)));
    sent = std::min(bytes.size(), sent + 300'000);
    if (sent == bytes.size()) {
      ASSERT_OK((*writer)->Commit());
    } else {
      EXPECT_THAT((*writer)->Commit(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("send the rest")));
    }
  }
  EXPECT_EQ(*store_->OpenReader(hash)->Read(0, 10'000'000), bytes);
  // From the middle of what is there: the rest is dropped.
  const std::string other = Noise(1000) + "x";
  {
    auto writer = store_->OpenWriter(Sha256Hex(other), 1001, 0);
    ASSERT_OK((*writer)->Append(std::string(800, 'w')));  // wrong ones
  }
  EXPECT_THAT(store_->OpenWriter(Sha256Hex(other), 1001, 801).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("800 bytes have arrived")));
  auto writer = store_->OpenWriter(Sha256Hex(other), 1001, 0);
  ASSERT_OK((*writer)->Append(other));
  EXPECT_OK((*writer)->Commit());
}

TEST_F(BlobStoreTest, WrongBytesLeaveNothing) {
  const std::string hash = Sha256Hex("right");
  {
    auto writer = store_->OpenWriter(hash, 5, 0);
    ASSERT_OK((*writer)->Append("wrong"));
    EXPECT_THAT((*writer)->Append("x"), StatusIs(absl::StatusCode::kInvalidArgument, _));
    EXPECT_THAT((*writer)->Commit(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(hash)));
  }
  EXPECT_EQ(FilesBelow(""), 0);
  for (const std::string& name : {std::string("../../etc/passwd"), std::string(64, 'A'), std::string(63, 'a'), std::string()}) {
    EXPECT_THAT(store_->OpenWriter(name, 5, 0).status(), StatusIs(absl::StatusCode::kInvalidArgument, _));
    EXPECT_THAT(store_->StatBlob(name).status(), StatusIs(absl::StatusCode::kInvalidArgument, _));
    EXPECT_THAT(store_->OpenReader(name).status(), StatusIs(absl::StatusCode::kInvalidArgument, _));
  }
  EXPECT_THAT(store_->OpenWriter(hash, -1, 0).status(), StatusIs(absl::StatusCode::kInvalidArgument, _));
  EXPECT_THAT(store_->OpenWriter(hash, int64_t{1} << 40, 0).status(), StatusIs(absl::StatusCode::kInvalidArgument, _));
  EXPECT_THAT(store_->OpenWriter(hash, 5, 6).status(), StatusIs(absl::StatusCode::kInvalidArgument, _));
}

TEST_F(BlobStoreTest, EmptyBlobsAndTextsWork) {
  const auto empty = store_->PutText("");
  ASSERT_OK(empty);
  EXPECT_TRUE(store_->StatBlob(*empty)->complete);
  EXPECT_EQ(*store_->PutText("abc"), Sha256Hex("abc"));
  EXPECT_EQ(*store_->PutText("abc"), Sha256Hex("abc"));
}

TEST_F(BlobStoreTest, OneWriterPerHashAndAllEndUpComplete) {
  const std::string bytes = Noise(2'000'000);
  const std::string hash = Sha256Hex(bytes);
  auto first = store_->OpenWriter(hash, 2'000'000, 0);
  ASSERT_OK(first);
  EXPECT_THAT(store_->OpenWriter(hash, 2'000'000, 0).status(), StatusIs(absl::StatusCode::kAborted, _));
  first->reset();
  std::atomic<int> complete = 0, aborted = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      auto writer = store_->OpenWriter(hash, 2'000'000, 0);
      if (!writer.ok()) {
        aborted += absl::IsAborted(writer.status());
        return;
      }
      complete += (*writer)->Append(bytes).ok() && (*writer)->Commit().ok();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(complete + aborted, 8);
  EXPECT_GE(complete, 1);
  EXPECT_EQ(*store_->OpenReader(hash)->Read(0, 10'000'000), bytes);
}

TEST_F(BlobStoreTest, AFullDiskKeepsWhatArrivedForLater) {
  const std::string bytes = Noise(1'000'000);
  const std::string hash = Sha256Hex(bytes);
  signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 450'000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  absl::Status refused;
  {
    auto writer = store_->OpenWriter(hash, 1'000'000, 0);
    ASSERT_OK(writer);
    for (size_t i = 0; refused.ok() && i < bytes.size(); i += 100'000) refused = (*writer)->Append(bytes.substr(i, 100'000));
  }
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, _));
  EXPECT_EQ(store_->StatBlob(hash)->received_bytes, 400'000);
  auto writer = store_->ResumeWriter(hash, 1'000'000);
  ASSERT_OK(writer);
  ASSERT_OK((*writer)->Append(bytes.substr(400'000)));
  ASSERT_OK((*writer)->Commit());
}

TEST_F(BlobStoreTest, KeepsSomeOfTheDiskFree) {
  store_ = Open(/*min_free=*/int64_t{1} << 60);
  EXPECT_THAT(store_->OpenWriter(Sha256Hex("x"), 1, 0).status(),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("MiB left")));
}

TEST_F(BlobStoreTest, ForgottenPartsCanBeRemoved) {
  {
    auto writer = store_->OpenWriter(Sha256Hex("abc"), 3, 0);
    ASSERT_OK((*writer)->Append("a"));
    EXPECT_EQ(store_->RemoveStalePartials(absl::Now() + absl::Hours(1)), 0);  // in use
  }
  EXPECT_EQ(store_->RemoveStalePartials(absl::Now() - absl::Hours(1)), 0);
  EXPECT_EQ(store_->RemoveStalePartials(absl::Now() + absl::Hours(1)), 1);
  EXPECT_EQ(FilesBelow("partial"), 0);
}

}  // namespace
}  // namespace itwin::server
