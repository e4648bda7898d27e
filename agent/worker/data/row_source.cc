#include "agent/worker/data/row_source.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace itwin::worker {
namespace {

constexpr size_t kMaxReadBytes = 64 << 20;  // in one go

}  // namespace

Array ReadAllRows(const RowSource& rows, const std::string& what) {
  const size_t bytes = CheckedBytes(rows.shape(), ElementType::kFloat32, what);
  CheckFitsMemory(what, bytes);
  std::vector<std::byte> all(bytes);
  rows.Read(0, rows.shape()[0], reinterpret_cast<float*>(all.data()));
  return OwnedArray(ElementType::kFloat32, rows.shape(), std::move(all));
}

RowCache::RowCache(std::shared_ptr<const RowSource> source, size_t capacity_bytes)
    : source_(std::move(source)) {
  for (size_t d = 1; d < source_->shape().size(); ++d) row_elements_ *= source_->shape()[d];
  block_rows_ = std::max<int64_t>(1, source_->rows_per_chunk());
  const size_t block_bytes =
      static_cast<size_t>(block_rows_ * std::max<int64_t>(row_elements_, 1)) * sizeof(float);
  capacity_blocks_ = std::max<size_t>(1, capacity_bytes / block_bytes);
}

RowCache::Block RowCache::Find(int64_t block) const {
  std::lock_guard lock(mutex_);
  const auto found = blocks_.find(block);
  if (found == blocks_.end()) return nullptr;
  by_use_.splice(by_use_.begin(), by_use_, found->second.used);
  return found->second.block;
}

void RowCache::Insert(int64_t block, Block rows) const {
  std::lock_guard lock(mutex_);
  if (blocks_.contains(block)) return;  // another thread was faster
  by_use_.push_front(block);
  blocks_[block] = {std::move(rows), by_use_.begin()};
  while (blocks_.size() > capacity_blocks_) {
    blocks_.erase(by_use_.back());
    by_use_.pop_back();
  }
}

void RowCache::Gather(const std::vector<int64_t>& rows, float* to) const {
  const auto elements = static_cast<size_t>(row_elements_);
  // In the order of the file, so that neighbours are read together.
  std::map<int64_t, std::vector<size_t>> wanted;  // block -> where its rows go
  for (size_t i = 0; i < rows.size(); ++i) wanted[rows[i] / block_rows_].push_back(i);
  const auto copy = [&](int64_t block, const std::vector<float>& data) {
    for (const size_t i : wanted[block]) {
      std::memcpy(to + i * elements,
                  data.data() + static_cast<size_t>(rows[i] - block * block_rows_) * elements,
                  elements * sizeof(float));
    }
  };
  const auto max_blocks = std::max<int64_t>(
      1, static_cast<int64_t>(kMaxReadBytes / sizeof(float) / std::max<size_t>(elements, 1)) /
             block_rows_);
  for (auto it = wanted.begin(); it != wanted.end();) {
    const int64_t first = it->first;
    if (const Block block = Find(first)) {
      copy(first, *block);
      ++it;
      continue;
    }
    int64_t last = first;  // of a run of blocks that are missing
    for (++it; it != wanted.end() && it->first == last + 1 && last - first + 1 < max_blocks &&
               Find(it->first) == nullptr;
         ++it) {
      ++last;
    }
    const int64_t first_row = first * block_rows_;
    const int64_t end_row = std::min((last + 1) * block_rows_, shape()[0]);
    std::vector<float> read(static_cast<size_t>(end_row - first_row) * elements);
    source_->Read(first_row, end_row - first_row, read.data());
    {
      std::lock_guard lock(mutex_);
      rows_read_ += end_row - first_row;
    }
    for (int64_t block = first; block <= last; ++block) {
      const auto begin = static_cast<std::ptrdiff_t>((block - first) * block_rows_ *
                                                     static_cast<int64_t>(elements));
      const int64_t count = std::min(block_rows_, end_row - block * block_rows_);
      auto data = std::make_shared<const std::vector<float>>(
          read.begin() + begin,
          read.begin() + begin + static_cast<std::ptrdiff_t>(count * static_cast<int64_t>(elements)));
      copy(block, *data);
      Insert(block, std::move(data));
    }
  }
}

int64_t RowCache::rows_read() const {
  std::lock_guard lock(mutex_);
  return rows_read_;
}

}  // namespace itwin::worker
