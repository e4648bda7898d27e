// What a rank holds of the tensors of a checkpoint, and where it lies in the file that all ranks
// write together: a safetensors file of full, unpadded tensors, independent of who wrote which part.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "agent/worker/checkpoint/safetensors.h"
#include "agent/worker/dist/communicator.h"

namespace itwin::worker {

// Elements [first, first + values.numel()) of the flattened tensor. A part without elements tells
// of a tensor that other ranks hold.
struct TensorPart {
  std::string name;
  std::vector<int64_t> shape;  // of the whole tensor
  int64_t first = 0;
  at::Tensor values;
};

// This rank's share of tensors that all ranks hold alike: equal numbers of bytes, in their order.
std::vector<TensorPart> EvenParts(const NamedTensors& replicated, int rank, int ranks);
// All of each.
std::vector<TensorPart> WholeParts(const NamedTensors& tensors);

class FileLayout {
 public:
  FileLayout() = default;
  // Every rank calls it with its parts. The file's order is rank 0's, then that of tensors which
  // only later ranks know. Throws AppError, on every rank the same, when an element is nobody's or
  // two ranks', or when ranks disagree about a tensor; `file` is for the sentence.
  FileLayout(const std::vector<TensorPart>& mine, Communicator& communicator,
             const std::string& file);

  const std::string& header() const { return header_; }  // the bytes before the first tensor
  int64_t size() const { return size_; }                 // of the whole file
  int64_t OffsetOf(const TensorPart& part) const;        // in the file

 private:
  struct Place {
    int64_t offset = 0, element_size = 0;
  };
  std::string header_;
  int64_t size_ = 0;
  std::map<std::string, Place> places_;
};

// Equal exactly for parts that lead to the same layout.
std::string DescribeParts(const std::vector<TensorPart>& parts);

}  // namespace itwin::worker
