#include "agent/worker/checkpoint/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>
#include <set>

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/checkpoint/sha256.h"
#include "agent/worker/checkpoint/state_dict.h"
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
    return LoadNewestCheckpoint({scratch_.path()}, self_,
                                [&](const std::string& w) { warnings_.push_back(w); });
  }
  Scratch scratch_;
  SelfCommunicator self_;
  std::vector<std::string> warnings_;
};

TEST_F(CheckpointFiles, NewestIsReadBackExactly) {
  SaveSteps({2, 9, 10});
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
      LoadNewestCheckpoint({scratch_ / "step-1"}, self_, [](const std::string&) {}).position.step, 1);
}

TEST_F(CheckpointFiles, KeepsTheNewest) {
  SaveSteps({1, 2, 3, 11}, /*keep=*/2);
  EXPECT_FALSE(fs::exists(scratch_ / "step-2"));
  EXPECT_TRUE(fs::exists(scratch_ / "step-3"));
  EXPECT_TRUE(fs::exists(scratch_ / "step-11"));
}

TEST_F(CheckpointFiles, TheOneJustSavedStaysAndNewerOnesThatDidNotVerifyGo) {
  SaveSteps({90, 108});
  fs::resize_file(scratch_ / "step-108" / "weights.safetensors", 10);
  ASSERT_EQ(Load().position.step, 90);
  SaveSteps({91}, /*keep=*/1);
  EXPECT_FALSE(fs::exists(scratch_ / "step-108"));
  EXPECT_EQ(Load().position.step, 91);
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(CheckpointFiles, WhatIsBeyondTheOneGoneOnFromDoesNotCountAsKept) {
  SaveSteps({80, 90});
  CheckpointStore store(scratch_.path(), 2, self_);
  store.GoesOnFrom(80);  // 90 did not verify
  store.Save(Contents(95, 0, 1));
  EXPECT_TRUE(fs::exists(scratch_ / "step-80"));
  EXPECT_FALSE(fs::exists(scratch_ / "step-90"));
  store.Save(Contents(99, 0, 1));
  EXPECT_FALSE(fs::exists(scratch_ / "step-80"));
  EXPECT_TRUE(fs::exists(scratch_ / "step-95"));
}

TEST_F(CheckpointFiles, PartsOfAnInterruptedSaveAreGoneBeforeTheFirstSave) {
  SaveSteps({1});
  fs::create_directories(scratch_ / "step-2.partial");
  WriteFileDurably(scratch_ / "step-2.partial" / "weights.safetensors", "half");
  fs::create_directories(scratch_ / "mine.partial");  // not ours
  const CheckpointStore store(scratch_.path(), 2, self_);
  EXPECT_FALSE(fs::exists(scratch_ / "step-2.partial"));
  EXPECT_TRUE(fs::exists(scratch_ / "mine.partial"));
  EXPECT_TRUE(fs::exists(scratch_ / "step-1"));
}

TEST_F(CheckpointFiles, ASaveThatFailsGivesItsSpaceBack) {
  for (const bool in_background : {false, true}) {
    for (const std::string at : {"weights.safetensors", "manifest", "rename"}) {
      SelfCommunicator background;
      CheckpointStore store(scratch_.path(), 2, self_, in_background ? &background : nullptr);
      store.Save(Contents(1, 0, 1));
      store.Finish();
      store.OnStep([&](const char* what) {
        if (what == at) throw ResourceError("the disk is full");
      });
      EXPECT_THROW(
          {
            store.Save(Contents(2, 0, 1));
            store.Finish();
          },
          WorkerError);
      EXPECT_FALSE(fs::exists(scratch_ / "step-2.partial")) << at;
      EXPECT_EQ(Load().position.step, 1);
    }
  }
}

TEST_F(CheckpointFiles, EachRankGetsItsOwnFileAtTheSameWorldSizeOnly) {
  RunRanksOrThrow(3, [&](Communicator&, Communicator& control) {
    CheckpointStore store(scratch_.path(), 2, control);
    store.Save(Contents(5, control.rank(), 3));
    const CheckpointContents c =
        LoadNewestCheckpoint({scratch_.path()}, control, [](const std::string&) {});
    EXPECT_EQ(c.of_rank[0].second[0].item<float>(), static_cast<float>(control.rank()));
  });
  EXPECT_EQ(Load().world_size, 3);
  EXPECT_TRUE(Load().of_rank.empty());
}

// Tensors whose bytes do not divide evenly, of several types.
NamedTensors Mixed() {
  return {{"a", at::arange(7, at::kFloat).view({7, 1})},
          {"b", at::arange(5, at::kByte)},
          {"c", at::arange(33, at::kDouble).view({3, 11})},
          {"none", at::arange(0, at::kFloat)},
          {"d", at::arange(101, at::kLong)}};
}

CheckpointParts PartsOf(int64_t step, Communicator& ranks) {
  CheckpointParts parts;
  parts.position.step = step;
  parts.world_size = ranks.size();
  parts.weights = EvenParts(Mixed(), ranks.rank(), ranks.size());
  parts.of_rank.emplace_back("r", at::full({3}, ranks.rank()));
  return parts;
}

TEST_F(CheckpointFiles, RanksTogetherWriteTheFileThatOneWouldWrite) {
  WriteSafetensors(scratch_ / "whole", Mixed());
  for (const int ranks : {1, 2, 3, 7}) {
    RunRanksOrThrow(ranks, [&](Communicator&, Communicator& control) {
      CheckpointStore store(scratch_.path(), 1, control);
      store.Save(PartsOf(ranks, control));
    });
    const fs::path step = scratch_ / ("step-" + std::to_string(ranks));
    EXPECT_EQ(ReadWholeFile(step / "weights.safetensors"), ReadWholeFile(scratch_ / "whole"));
    EXPECT_EQ(Load().position.step, ranks);
  }
}

TEST_F(CheckpointFiles, AnyRangesMayBeHeldByAnyRank) {
  RunRanksOrThrow(3, [&](Communicator&, Communicator& control) {
    const int rank = control.rank();
    CheckpointParts parts;
    parts.position.step = 1;
    parts.world_size = 3;
    const at::Tensor whole = at::arange(100, at::kFloat);
    // Strips of ten elements in turn, the later first; "late" is known to rank 2 only.
    for (int64_t strip = 9; strip >= 0; --strip) {
      if (strip % 3 != rank) continue;
      parts.weights.push_back({"w", {10, 10}, strip * 10, whole.narrow(0, strip * 10, 10)});
    }
    if (rank == 2) parts.weights.push_back({"late", {2}, 0, at::full({2}, 5.0)});
    CheckpointStore store(scratch_.path(), 1, control);
    store.Save(parts);
    parts.position.step = 2;
    store.Save(parts);  // with the layout of before
  });
  const CheckpointContents c = Load();
  EXPECT_EQ(c.position.step, 2);
  ASSERT_EQ(c.weights.size(), 2u);
  EXPECT_TRUE(c.weights[0].second.equal(at::arange(100, at::kFloat).view({10, 10})));
  EXPECT_EQ(c.weights[1].first, "late");
}

TEST_F(CheckpointFiles, ElementsOfNobodyOrOfTwoAreRefusedOnEveryRank) {
  for (const auto& [from, to, problem] :
       {std::tuple{0, 4, "element 4 of w is held by no rank"}, {0, 6, "element 5 of w is held twice"},
        {1, 5, "element 0 of w is held by no rank"}}) {
    std::mutex mutex;
    std::multiset<std::string> messages;
    testing::RunRanks(2, [&, first = from, last = to](Communicator&, Communicator& control) {
      CheckpointParts parts;
      const at::Tensor whole = at::arange(10, at::kFloat);
      parts.weights = {control.rank() == 0
                           ? TensorPart{"w", {10}, first, whole.narrow(0, first, last - first)}
                           : TensorPart{"w", {10}, 5, whole.narrow(0, 5, 5)}};
      CheckpointStore store(scratch_.path(), 1, control);
      try {
        store.Save(parts);
      } catch (const WorkerError& e) {
        std::lock_guard lock(mutex);
        messages.insert(e.what());
      }
    });
    EXPECT_EQ(messages.size(), 2u);
    for (const std::string& message : messages) EXPECT_THAT(message, HasSubstr(problem));
  }
}

// A gate that the writing thread waits at.
class Gate {
 public:
  void Open() {
    {
      std::lock_guard lock(mutex_);
      open_ = true;
    }
    changed_.notify_all();
  }
  void Pass() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

TEST_F(CheckpointFiles, TrainingGoesOnWhileTheBytesReachTheDisk) {
  Gate gate;
  SelfCommunicator background;
  CheckpointStore store(scratch_.path(), 2, self_, &background);
  store.OnStep([&](const char*) { gate.Pass(); });
  CheckpointContents contents = Contents(1, 0, 1);
  store.Save(contents);
  EXPECT_FALSE(fs::exists(scratch_ / "step-1"));
  EXPECT_EQ(store.longest_save_seconds(), -1);
  contents.weights[0].second.fill_(-77);  // the next step of the training
  store.Poll();
  gate.Open();
  store.Finish();
  EXPECT_EQ(Load().weights[0].second[3].item<float>(), 1);
  EXPECT_GE(store.longest_save_seconds(), 0);
  // A second save waits for the first.
  store.Save(Contents(2, 0, 1));
  store.Save(Contents(3, 0, 1));
  EXPECT_TRUE(fs::exists(scratch_ / "step-2"));
  store.Finish();
  EXPECT_EQ(Load().position.step, 3);
}

TEST_F(CheckpointFiles, WhatASaveInTheBackgroundMeetsSurfacesOnEveryRank) {
  InProcessGroup behind(2);
  std::vector<std::string> messages(2);
  std::vector<int> about(2, -1);
  RunRanksOrThrow(2, [&](Communicator&, Communicator& control) {
    const int rank = control.rank();
    InProcessCommunicator background(behind, rank);
    CheckpointStore store(rank == 1 ? scratch_ / "no" / "such" : scratch_.path(), 2, control,
                          &background);
    store.Save(PartsOf(1, control));
    try {
      store.Finish();
    } catch (const WorkerError& e) {
      messages[rank] = e.what();
      about[rank] = e.rank.value_or(rank);
    }
  });
  EXPECT_THAT(messages[0], HasSubstr("rank-1.safetensors"));
  EXPECT_EQ(messages[0], messages[1]);
  EXPECT_EQ(about, (std::vector<int>{1, 1}));
  EXPECT_FALSE(fs::exists(scratch_ / "step-1"));
}

// A process that saves step 1, then dies in front of the n-th thing that the save of step 2 does.
// True while there was such a thing.
bool DieAt(const fs::path& directory, int n, bool in_background, bool again) {
  const pid_t child = fork();
  if (child == 0) {
    SelfCommunicator self, background;
    CheckpointStore store(directory, 1, self, in_background ? &background : nullptr);
    store.Save(Contents(1, 0, 1));
    store.Finish();
    if (again) store.Save(Contents(2, 0, 1));  // then step 2 is replaced
    store.Finish();
    int steps = 0;
    store.OnStep([&](const char*) {
      if (++steps == n) _exit(9);
    });
    store.Save(Contents(2, 0, 1));
    store.Finish();
    _exit(0);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << status;
  return WEXITSTATUS(status) == 9;
}

TEST_F(CheckpointFiles, DeathAtAnyStepLeavesOneThatLoads) {
  for (const bool in_background : {false, true}) {
    for (const bool again : {false, true}) {
      int n = 1;
      for (bool died = true; died; ++n) {
        const fs::path directory = scratch_ / "crash";
        died = DieAt(directory, n, in_background, again);
        warnings_.clear();
        const CheckpointContents c = LoadNewestCheckpoint(
            {directory}, self_, [&](const std::string& w) { warnings_.push_back(w); });
        EXPECT_TRUE(warnings_.empty()) << warnings_.front();
        const int64_t step = c.position.step;
        EXPECT_TRUE(step == 1 || step == 2);
        if (!died) {
          EXPECT_EQ(step, 2);
        }
        EXPECT_EQ(c.weights[0].second[3].item<float>(), static_cast<float>(step));
        // The next attempt saves in the same place.
        CheckpointStore store(directory, 1, self_);
        store.Save(Contents(3, 0, 1));
        EXPECT_EQ(std::distance(fs::directory_iterator(directory), fs::directory_iterator()), 1);
        fs::remove_all(directory);
      }
      EXPECT_GT(n, 6) << "too few steps were tried";
    }
  }
}

TEST_F(CheckpointFiles, ACheckpointOfTheFormatBeforeIsRead) {
  SaveSteps({1});
  // As it was: a checksum of each whole file.
  auto manifest = nlohmann::ordered_json::parse(ReadWholeFile(scratch_ / "step-1/manifest.json"));
  manifest.erase("manifest_sha256");
  manifest["format"] = 1;
  for (auto& file : manifest["files"]) {
    file.erase("pieces");
    file["sha256"] = DigestFile(scratch_ / "step-1" / file["path"].get<std::string>()).sha256;
  }
  manifest["manifest_sha256"] = Sha256Hex(manifest.dump());
  WriteFileDurably(scratch_ / "step-1/manifest.json", manifest.dump());
  EXPECT_EQ(Load().weights[0].second[3].item<float>(), 1);
  std::string bytes = ReadWholeFile(scratch_ / "step-1/weights.safetensors");
  bytes.back() ^= 1;
  WriteFileDurably(scratch_ / "step-1/weights.safetensors", bytes);
  EXPECT_THROW(Load(), WorkerError);
}

TEST(StateDict, IsADictionaryOfTensorsForPython) {
  const Scratch scratch;
  const at::Tensor large = at::arange(1000000, at::kFloat);
  WriteStateDict(scratch / "state_dict.pt",
                 {{"layer.weight", large.narrow(0, 10, 6).view({2, 3})},
                  {"layer.count", at::full({}, 7, at::kLong)}});
  EXPECT_LT(fs::file_size(scratch / "state_dict.pt"), 10000u) << "the whole buffer was stored";
  scratch.Python(R"(
import torch
state = torch.load('state_dict.pt', weights_only=True)
assert sorted(state) == ['layer.count', 'layer.weight'], state
assert state['layer.weight'].tolist() == [[10, 11, 12], [13, 14, 15]]
assert state['layer.count'].item() == 7 and state['layer.count'].dtype == torch.int64
model = torch.nn.Module()
model.layer = torch.nn.Module()
model.layer.weight = torch.nn.Parameter(torch.zeros(2, 3))
model.layer.register_buffer('count', torch.tensor(0))
model.load_state_dict(state)
)");
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
