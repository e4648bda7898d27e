// SHA-256 (OpenSSL's), as 64 lower-case hex digits.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

namespace itwin::worker {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  void Update(const void* data, size_t size);
  std::string Hex();  // ends it

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

std::string Sha256Hex(std::string_view bytes);

struct FileDigest {
  int64_t size = 0;
  std::string sha256;
};
// Throws AppError when the file cannot be read.
FileDigest DigestFile(const std::filesystem::path& path);
// SHA-256 of `size` bytes from `offset`. Throws AppError when they cannot be read.
std::string DigestPiece(const std::filesystem::path& path, int64_t offset, int64_t size);

}  // namespace itwin::worker
