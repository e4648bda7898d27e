// Checkpoints of a run: `step-<n>/` with
//   weights.safetensors     parameters by name, and buffers
//   optimizer.safetensors   its state, per parameter: "<state>/<parameter>"
//   rank-<r>.safetensors    of each rank: its random generator and its own buffers
//   manifest.json           written last: position, world size, size and checksums of every file and
//                           of itself
// A directory is made as `step-<n>.partial` and renamed when it is whole, so a reader sees all of
// it or nothing. Tensors are full and unpadded, in the model's parameter order: independent of
// buckets, strategy and world size. Each rank writes the parts that it holds, and the manifest has a
// checksum of each piece that was written in one go.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/checkpoint/tensor_parts.h"
#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// Where a run stands between two steps.
struct Position {
  int64_t step = 0;        // optimiser steps done
  int64_t epoch = 0;       // epochs done
  int64_t next_batch = 0;  // of the epoch under way: global batches done
  // Sums over the epoch under way, for its means.
  double epoch_loss_sum = 0;
  int64_t epoch_samples = 0;
};

// What a checkpoint says of the run it was taken from.
struct CheckpointHead {
  Position position;
  int world_size = 1;
  uint64_t seed = 0;
  std::string spec_sha256;     // of what must not change between attempts
  std::string weights_sha256;  // of the parameters, as the end of each epoch compares it
  // JSON objects, see run_identity.h; empty in checkpoints of workers that did not have them yet.
  std::string spec_document{}, data_document{};
};

// As it is read back: whole tensors.
struct CheckpointContents : CheckpointHead {
  std::filesystem::path directory;  // that it was read from
  NamedTensors weights;  // parameters, then buffers (of rank 0)
  NamedTensors optimizer;
  NamedTensors of_rank;  // this rank's own; empty when it was saved with another world size
};

// As a rank gives it: the ranks' parts together are the whole, each element once.
struct CheckpointParts : CheckpointHead {
  std::vector<TensorPart> weights;
  std::vector<TensorPart> optimizer;
  NamedTensors of_rank;
};

class CheckpointStore {
 public:
  // `directory` is made when first needed, and nobody else writes to it meanwhile: rank 0 of
  // `communicator` removes at once what interrupted saves have left there, and after each save what
  // is beyond the newest `keep` and what is newer than the one just saved. With `background`, a
  // communicator that nobody else uses, Save() returns once the state is copied, and a thread
  // writes; without, when it is on the disk.
  CheckpointStore(std::filesystem::path directory, int keep, Communicator& communicator,
                  Communicator* background = nullptr);
  ~CheckpointStore();  // waits for the save in flight

  // Every rank calls it with the same head. Waits for the save before it, if that is in flight, and
  // throws what that one met. Throws ResourceError when the disk is full, here or in the next call;
  // older checkpoints are then untouched, and nothing stays of this one.
  void Save(const CheckpointParts& parts);
  // The same for a state that all ranks hold alike: rank 0's is written.
  void Save(const CheckpointContents& contents);

  // Returns when the save in flight is on the disk; throws what it met. Every rank calls it.
  void Finish();
  // Throws what the last save met, once that has ended. Costs nothing.
  void Poll();

  // The run goes on from this step: what `directory` has beyond it is not sound, or given up, and the
  // first save deletes it. Before that save, on every rank.
  void GoesOnFrom(int64_t step) { went_on_from_ = step; }

  // For how long the callers of Save() and Finish() have waited, in all and the last time.
  double stall_seconds() const { return stall_seconds_; }
  double last_stall_seconds() const { return last_stall_seconds_; }
  // From the call of Save() to the renamed directory: the longest so far; -1 before the first.
  double longest_save_seconds() const { return longest_save_seconds_; }
  int64_t bytes_written() const { return bytes_written_; }  // by this rank

  // For tests: called before each thing that a save does to the disk, in the thread that does it.
  void OnStep(std::function<void(const char*)> hook) { hook_ = std::move(hook); }

 private:
  struct File;
  struct Writing;

  void Write(const Writing& writing, Communicator& communicator);
  void WriteManifest(const Writing& writing, const std::vector<std::string>& written);
  void WriteAll(const Writing& writing, Communicator& communicator);
  void RemovePartial();
  void DeleteOld(int64_t saved);
  void Wait();
  void Step(const char* what) const {
    if (hook_) hook_(what);
  }

  const std::filesystem::path directory_;
  const int keep_;
  Communicator& communicator_;
  Communicator* const background_;
  std::function<void(const char*)> hook_;

  // The caller's.
  struct Layout {
    std::string parts;  // DescribeParts of what it was made from
    FileLayout file{};
  };
  Layout weights_layout_, optimizer_layout_;
  std::unique_ptr<Writing> writing_;  // kept: its memory serves the next save
  double stall_seconds_ = 0, last_stall_seconds_ = 0, longest_save_seconds_ = -1;
  int64_t bytes_written_ = 0;
  std::optional<int64_t> went_on_from_;  // until the first save; then the thread's that saves

  // The thread's until `done_`.
  std::thread thread_;
  std::exception_ptr error_;
  double save_seconds_ = 0;
  std::atomic<bool> done_ = false;
};

// Finds the newest checkpoint whose files all verify under the first of `directories` (each may be
// a checkpoint itself) that has one, and reads it; every rank calls it and gets the same one, and
// verifies a part. `warn` is told, on rank 0, of each one before it that does not verify, and of
// directories without any. Throws AppError when there are some but none is sound, and UserError when
// there are none at all.
CheckpointContents LoadNewestCheckpoint(const std::vector<std::filesystem::path>& directories,
                                        Communicator& communicator,
                                        const std::function<void(const std::string&)>& warn);

// Puts the optimiser's state of the checkpoint of `step`, in the first of `directories` that has
// it, at `to`, in place of what may be there: a second name of the same bytes where the file system
// has that, else a copy. For one rank. Throws AppError when there is none, else as OutputFile.
void ExportOptimizer(const std::vector<std::filesystem::path>& directories, int64_t step,
                     const std::filesystem::path& to);

}  // namespace itwin::worker
