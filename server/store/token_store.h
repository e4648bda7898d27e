#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace itwin::server {

enum class TokenRole {  // stored; never renumbered
  kUser = 1,   // acts on its own jobs
  kAdmin = 2,  // acts on everybody's
};

// A token as the database knows it: its hash, never itself.
struct TokenRow {
  std::string name;    // owner of the jobs submitted with it; unique
  std::string sha256;  // 64 hex digits, of the token's text
  TokenRole role = TokenRole::kUser;
  absl::Time created;
  absl::Time revoked = absl::InfiniteFuture();  // InfiniteFuture: valid
};

// Who may call. Thread-safe; errors as in JobStore.
class TokenStore {
 public:
  virtual ~TokenStore() = default;
  // kAlreadyExists when the name or the hash is taken; kInvalidArgument for a name that is not 1..63 of [A-Za-z0-9._@-].
  virtual absl::Status AddToken(const TokenRow& token) = 0;
  // Also finds revoked ones.
  virtual absl::StatusOr<std::optional<TokenRow>> FindToken(absl::string_view sha256) = 0;
  // kNotFound. Revoking twice is fine; the first time stays.
  virtual absl::Status RevokeToken(absl::string_view name) = 0;
  virtual absl::StatusOr<std::vector<TokenRow>> ListTokens() = 0;
};

}  // namespace itwin::server
