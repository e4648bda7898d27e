#include "agent/worker/checkpoint/sha256.h"

#include <openssl/evp.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <vector>

#include "agent/worker/checkpoint/durable_file.h"
#include "agent/worker/error.h"

namespace itwin::worker {

struct Sha256::Context {
  EVP_MD_CTX* md = EVP_MD_CTX_new();
  ~Context() { EVP_MD_CTX_free(md); }
};

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  if (EVP_DigestInit_ex(context_->md, EVP_sha256(), nullptr) != 1) {
    throw AppError("OpenSSL offers no SHA-256 here");
  }
}
Sha256::~Sha256() = default;

void Sha256::Update(const void* data, size_t size) { EVP_DigestUpdate(context_->md, data, size); }

std::string Sha256::Hex() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  EVP_DigestFinal_ex(context_->md, digest, &size);
  std::string hex;
  for (unsigned int i = 0; i < size; ++i) {
    hex += "0123456789abcdef"[digest[i] >> 4];
    hex += "0123456789abcdef"[digest[i] & 15];
  }
  return hex;
}

std::string Sha256Hex(std::string_view bytes) {
  Sha256 hash;
  hash.Update(bytes.data(), bytes.size());
  return hash.Hex();
}

FileDigest DigestFile(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) ThrowIoError("cannot read", path, errno);
  FileDigest digest;
  Sha256 hash;
  std::vector<char> block(1 << 20);
  while (in) {
    in.read(block.data(), static_cast<std::streamsize>(block.size()));
    hash.Update(block.data(), static_cast<size_t>(in.gcount()));
    digest.size += in.gcount();
  }
  if (in.bad()) ThrowIoError("cannot read", path, EIO);
  digest.sha256 = hash.Hex();
  return digest;
}

std::string DigestPiece(const std::filesystem::path& path, int64_t offset, int64_t size) {
  std::ifstream in(path, std::ios::binary);
  if (!in || !in.seekg(offset)) ThrowIoError("cannot read", path, errno);
  Sha256 hash;
  std::vector<char> block(1 << 20);
  while (size > 0) {
    in.read(block.data(), std::min<int64_t>(size, static_cast<int64_t>(block.size())));
    if (in.gcount() == 0) ThrowIoError("cannot read", path, EIO);
    hash.Update(block.data(), static_cast<size_t>(in.gcount()));
    size -= in.gcount();
  }
  return hash.Hex();
}

}  // namespace itwin::worker
