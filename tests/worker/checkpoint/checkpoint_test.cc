#include "agent/worker/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ATen/ops/full.h>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/dist/self_communicator.h"
#include "agent/worker/error.h"
#include "tests/worker/data/scratch.h"
#include "tests/worker/training/ranks.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::RunRanksOrThrow;
using testing::Scratch;
namespace fs = std::filesystem;

CheckpointContents Contents(int64_t step, int rank, int world_size) {
  CheckpointContents c;
  c.position = {
      .step = step, .epoch = 3, .next_batch = 4, .epoch_loss_sum = 0.1 + 0.2, .epoch_samples = 99};
  c.world_size = world_size;
  c.seed = 18446744073709551615ull;
  c.spec_sha256 = "spec";
  c.weights_sha256 = "weights";
  c.weights.emplace_back("w", at::full({100}, static_cast<float>(step)));
  c.optimizer.emplace_back("m/w", at::full({100}, -static_cast<float>(step)));
  c.of_rank.emplace_back("r", at::full({7}, static_cast<float>(rank)));
  return c;
}

class CheckpointFiles : public ::testing::Test {
 protected:
  void SaveSteps(std::vector<int64_t> steps, int keep = 10) {
    CheckpointStore store(scratch_.path(), keep, self_);
    for (int64_t step : steps) store.Save(Contents(step, 0, 1));
  }
  CheckpointContents Load() {
    warnings_.clear();
    return LoadNewestCheckpoint(scratch_.path(), self_,
                                [&](const std::string& w) { warnings_.push_back(w); });
  }
  Scratch scratch_;
  SelfCommunicator self_;
  std::vector<std::string> warnings_;
};

TEST_F(CheckpointFiles, NewestIsReadBackExactly) {
  SaveSteps({9, 10, 2});
  const CheckpointContents c = Load();
  EXPECT_EQ(c.position.step, 10);
  EXPECT_EQ(c.position.epoch, 3);
  EXPECT_EQ(c.position.next_batch, 4);
  EXPECT_EQ(c.position.epoch_loss_sum, 0.1 + 0.2);
  EXPECT_EQ(c.position.epoch_samples, 99);
  EXPECT_EQ(c.seed, 18446744073709551615ull);
  EXPECT_EQ(c.weights[0].second[3].item<float>(), 10);
  EXPECT_EQ(c.optimizer[0].first, "m/w");
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(CheckpointFiles, AnyDamagedFileFallsBackToTheOneBefore) {
  for (const char* name :
       {"weights.safetensors", "optimizer.safetensors", "rank-0.safetensors", "manifest.json"}) {
    for (int damage = 0; damage < 4; ++damage) {
      SaveSteps({1, 2});
      const fs::path file = scratch_ / "step-2" / name;
      std::string bytes = ReadWholeFile(file);
      if (damage == 0) bytes[bytes.size() / 2] ^= 4;
      if (damage == 1) bytes.resize(bytes.size() - 3);
      if (damage == 2) bytes.clear();
      if (damage == 3) fs::remove(file);
      if (damage != 3) WriteFileDurably(file, bytes);
      EXPECT_EQ(Load().position.step, 1) << name << " " << damage;
      ASSERT_EQ(warnings_.size(), 1u);
      EXPECT_THAT(warnings_[0], HasSubstr("step-2"));
    }
  }
}

TEST_F(CheckpointFiles, HalfWrittenOnesAreNotSeen) {
  SaveSteps({1});
  fs::create_directories(scratch_ / "step-2.partial");
  WriteFileDurably(scratch_ / "step-2.partial" / "manifest.json",
                   ReadWholeFile(scratch_ / "step-1" / "manifest.json"));
  EXPECT_EQ(Load().position.step, 1);
  SaveSteps({2});  // and they are no obstacle
  EXPECT_EQ(Load().position.step, 2);
}

TEST_F(CheckpointFiles, NoneAndNoneSoundAreDifferentErrors) {
  try {
    Load();
    FAIL();
  } catch (const WorkerError& e) {
    EXPECT_EQ(e.failure, FailureClass::kUser);
  }
  SaveSteps({1});
  fs::resize_file(scratch_ / "step-1" / "weights.safetensors", 10);
  try {
    Load();
    FAIL();
  } catch (const WorkerError& e) {
    EXPECT_EQ(e.failure, FailureClass::kApp);
    EXPECT_THAT(e.what(), HasSubstr("has 10 bytes instead of"));
  }
}

TEST_F(CheckpointFiles, OneStepDirectoryMayBeNamedItself) {
  SaveSteps({1, 2});
  EXPECT_EQ(
      LoadNewestCheckpoint(scratch_ / "step-1", self_, [](const std::string&) {}).position.step, 1);
}

TEST_F(CheckpointFiles, KeepsTheNewest) {
  SaveSteps({1, 2, 3, 11}, /*keep=*/2);
  EXPECT_FALSE(fs::exists(scratch_ / "step-2"));
  EXPECT_TRUE(fs::exists(scratch_ / "step-3"));
  EXPECT_TRUE(fs::exists(scratch_ / "step-11"));
}

TEST_F(CheckpointFiles, EachRankGetsItsOwnFileAtTheSameWorldSizeOnly) {
  RunRanksOrThrow(3, [&](Communicator&, Communicator& control) {
    CheckpointStore store(scratch_.path(), 2, control);
    store.Save(Contents(5, control.rank(), 3));
    const CheckpointContents c =
        LoadNewestCheckpoint(scratch_.path(), control, [](const std::string&) {});
    EXPECT_EQ(c.of_rank[0].second[0].item<float>(), static_cast<float>(control.rank()));
  });
  EXPECT_EQ(Load().world_size, 3);
  EXPECT_TRUE(Load().of_rank.empty());
}

TEST(Sha256, KnownDigests) {
  EXPECT_EQ(Sha256Hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const Scratch scratch;
  const FileDigest digest = DigestFile(scratch.Write("a", std::string(3 << 20, 'x')));
  EXPECT_EQ(digest.size, 3 << 20);
  EXPECT_EQ(digest.sha256, Sha256Hex(std::string(3 << 20, 'x')));
}

TEST(DurableFile, OnlyOneCreatorWins) {
  const Scratch scratch;
  EXPECT_TRUE(CreateFileDurably(scratch / "r", "first"));
  EXPECT_FALSE(CreateFileDurably(scratch / "r", "second"));
  EXPECT_EQ(ReadWholeFile(scratch / "r"), "first");
  WriteFileDurably(scratch / "r", "third");
  EXPECT_EQ(ReadWholeFile(scratch / "r"), "third");
  int files = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(scratch.path())) ++files;
  EXPECT_EQ(files, 1) << "a temporary file was left";
}

}  // namespace
}  // namespace itwin::worker
