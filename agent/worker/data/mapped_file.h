// A whole file mapped read-only. Ranks on one node share its pages.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>

namespace itwin::worker {

class MappedFile {
 public:
  // Throws UserError naming the path when it cannot be opened or is no regular file. An empty file
  // has size 0.
  static std::shared_ptr<const MappedFile> Open(const std::filesystem::path& path);

  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}

  const std::byte* const data_;
  const size_t size_;
};

}  // namespace itwin::worker
