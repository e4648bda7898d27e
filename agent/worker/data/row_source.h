// Samples that stay in files and are read when they are needed. Free of LibTorch.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agent/worker/data/array.h"
#include "agent/worker/data/cf_time.h"

namespace itwin::worker {

// Rows are samples: the first dimension. Every method may be called by several threads at once.
class RowSource {
 public:
  virtual ~RowSource() = default;
  virtual const std::vector<int64_t>& shape() const = 0;  // [rows, …]
  // Rows that the file stores together: reading one costs as much as reading all of them.
  virtual int64_t rows_per_chunk() const = 0;
  // Rows [first, first + count) as float32. Throws UserError for damage.
  virtual void Read(int64_t first, int64_t count, float* to) const = 0;
  // The coordinate of the first dimension, where that is a CF time axis (its units say "since"); else
  // nothing. Throws UserError for a time axis that cannot be read.
  virtual std::optional<TimeAxis> ReadTimeAxis() const { return std::nullopt; }
};

// All rows at once, float32, where they fit (CheckFitsMemory, with `what`).
Array ReadAllRows(const RowSource& rows, const std::string& what);

// Gives rows in any order, from a bounded memory of what was read last. Rows that follow each other
// are read in one go.
class RowCache {
 public:
  RowCache(std::shared_ptr<const RowSource> source, size_t capacity_bytes);

  const std::vector<int64_t>& shape() const { return source_->shape(); }
  int64_t row_elements() const { return row_elements_; }
  // Any thread.
  void Gather(const std::vector<int64_t>& rows, float* to) const;
  int64_t rows_read() const;  // from the file, so far

 private:
  using Block = std::shared_ptr<const std::vector<float>>;
  struct Entry {
    Block block;
    std::list<int64_t>::iterator used;
  };
  Block Find(int64_t block) const;
  void Insert(int64_t block, Block rows) const;

  const std::shared_ptr<const RowSource> source_;
  int64_t row_elements_ = 1;
  int64_t block_rows_ = 1;
  size_t capacity_blocks_ = 1;

  mutable std::mutex mutex_;  // guards what follows
  mutable std::map<int64_t, Entry> blocks_;
  mutable std::list<int64_t> by_use_;  // newest first
  mutable int64_t rows_read_ = 0;
};

}  // namespace itwin::worker
