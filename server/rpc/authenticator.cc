#include "server/rpc/authenticator.h"

#include <openssl/crypto.h>

#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/sha256.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

constexpr size_t kMaxRemembered = 4096;
constexpr size_t kMaxTokenBytes = 1024;
constexpr char kScheme[] = "Bearer ";
constexpr char kHint[] =
    "every call needs the metadata 'authorization: Bearer <token>'; clients read the token from their configuration, and "
    "an admin of the gateway makes new ones";

}  // namespace

absl::StatusOr<Caller> TokenAuthenticator::Authenticate(const grpc::ServerContextBase& context) {
  const auto& metadata = context.client_metadata();
  const auto it = metadata.find("authorization");
  if (it == metadata.end()) return absl::UnauthenticatedError(absl::StrCat("no token was sent: ", kHint));
  absl::string_view header(it->second.data(), it->second.size());
  if (metadata.count("authorization") != 1 || !absl::StartsWithIgnoreCase(header, kScheme) ||
      header.size() > kMaxTokenBytes) {
    return absl::UnauthenticatedError(absl::StrCat("the authorization metadata is not a token: ", kHint));
  }
  header.remove_prefix(sizeof(kScheme) - 1);
  const std::string sha256 = Sha256Hex(absl::StripAsciiWhitespace(header));
  const absl::Time now = absl::Now();
  {
    absl::MutexLock lock(&mu_);
    const auto known = known_.find(sha256);
    if (known != known_.end() && known->second.until > now) return known->second.caller;
  }
  ITWIN_ASSIGN_OR_RETURN(const std::optional<TokenRow> row, tokens_.FindToken(sha256));
  if (!row || row->sha256.size() != sha256.size() ||
      CRYPTO_memcmp(row->sha256.data(), sha256.data(), sha256.size()) != 0) {
    return absl::UnauthenticatedError(absl::StrCat("the token is not known to this gateway: ", kHint));
  }
  if (row->revoked <= now) {
    return absl::UnauthenticatedError(
        absl::StrCat("the token '", row->name, "' was revoked; ask an admin of the gateway for a new one"));
  }
  Caller caller{row->name, row->role == TokenRole::kAdmin};
  absl::MutexLock lock(&mu_);
  if (known_.size() >= kMaxRemembered) known_.clear();
  known_[sha256] = {caller, now + remember_for_};
  return caller;
}

}  // namespace itwin::server
