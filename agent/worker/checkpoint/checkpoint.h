// Checkpoints of a run: `step-<n>/` with
//   weights.safetensors     parameters by name, and buffers
//   optimizer.safetensors   its state, per parameter: "<state>/<parameter>"
//   rank-<r>.safetensors    of each rank: its random generator and its own buffers
//   manifest.json           written last: position, world size, size and SHA-256 of every file and
//                           of itself
// A directory is made as `step-<n>.partial` and renamed when it is whole, so a reader sees all of
// it or nothing. Tensors are full and unpadded, in the model's parameter order: independent of
// buckets and world size.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "agent/worker/checkpoint/safetensors.h"
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

struct CheckpointContents {
  Position position;
  int world_size = 1;
  uint64_t seed = 0;
  std::string spec_sha256;     // of what must not change between attempts
  std::string weights_sha256;  // of the parameters, as the end of each epoch compares it
  NamedTensors weights;        // parameters, then buffers (of rank 0)
  NamedTensors optimizer;
  NamedTensors of_rank;  // this rank's own; empty when it was saved with another world size
};

class CheckpointStore {
 public:
  // `directory` is made when first needed. Rank 0 of `communicator` deletes what is beyond the
  // newest `keep`.
  CheckpointStore(std::filesystem::path directory, int keep, Communicator& communicator);

  // Every rank calls it with the same position; rank 0's weights and optimizer are the ones
  // written. Returns the directory. Throws ResourceError when the disk is full; older checkpoints
  // are then untouched.
  std::filesystem::path Save(const CheckpointContents& contents);

 private:
  void DeleteOld();

  const std::filesystem::path directory_;
  const int keep_;
  Communicator& communicator_;
};

// Finds the newest checkpoint under `directory` (or `directory` itself, if it is one) whose files
// all verify, and reads it; every rank calls it and gets the same one. `warn` is told, on rank 0,
// of each newer one that does not verify. Throws AppError when there are some but none is sound,
// and UserError when there are none at all.
CheckpointContents LoadNewestCheckpoint(const std::filesystem::path& directory,
                                        Communicator& communicator,
                                        const std::function<void(const std::string&)>& warn);

}  // namespace itwin::worker
