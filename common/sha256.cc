#include "common/sha256.h"

#include <openssl/evp.h>

#include <vector>

#include "absl/strings/escaping.h"
#include "common/check.h"
#include "common/files.h"

namespace itwin {

struct Sha256::Context {
  EVP_MD_CTX* md = EVP_MD_CTX_new();
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() { EVP_MD_CTX_free(md); }
  void Init() { ITWIN_CHECK(EVP_DigestInit_ex(md, EVP_sha256(), nullptr) == 1); }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) { context_->Init(); }
Sha256::~Sha256() = default;
Sha256::Sha256(Sha256&&) noexcept = default;
Sha256& Sha256::operator=(Sha256&&) noexcept = default;

void Sha256::Update(absl::string_view bytes) {
  ITWIN_CHECK(EVP_DigestUpdate(context_->md, bytes.data(), bytes.size()) == 1);
}

std::string Sha256::FinishHex() {
  std::string digest(32, '\0');
  unsigned length = 0;
  ITWIN_CHECK(EVP_DigestFinal_ex(context_->md, reinterpret_cast<unsigned char*>(digest.data()),
                                 &length) == 1 &&
              length == digest.size());
  context_->Init();
  return absl::BytesToHexString(digest);
}

std::string Sha256Hex(absl::string_view bytes) {
  Sha256 hash;
  hash.Update(bytes);
  return hash.FinishHex();
}

absl::StatusOr<std::string> Sha256OfFile(const std::string& path) {
  Sha256 hash;
  absl::Status status =
      ReadFileChunks(path, 1 << 20, [&](absl::string_view chunk) { hash.Update(chunk); return absl::OkStatus(); });
  if (!status.ok()) return status;
  return hash.FinishHex();
}

bool IsSha256Hex(absl::string_view text) {
  if (text.size() != 64) return false;
  for (char c : text) {
    if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) return false;
  }
  return true;
}

}  // namespace itwin
