#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace itwin {

// Incremental SHA-256 (OpenSSL). Not thread-safe.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(Sha256&&) noexcept;
  Sha256& operator=(Sha256&&) noexcept;
  void Update(absl::string_view bytes);
  // 64 lower-case hex digits; the object is reset and can be used again.
  std::string FinishHex();

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

std::string Sha256Hex(absl::string_view bytes);
// Reads the file; kNotFound, kPermissionDenied or kUnavailable (I/O error) naming the path.
absl::StatusOr<std::string> Sha256OfFile(const std::string& path);
// 64 lower-case hex digits.
bool IsSha256Hex(absl::string_view text);

}  // namespace itwin
