#pragma once

#include <string>

#include <grpcpp/server_context.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/jobs/caller.h"
#include "server/store/token_store.h"

namespace itwin::server {

// Who calls. Thread-safe.
class Authenticator {
 public:
  virtual ~Authenticator() = default;
  // kUnauthenticated, saying what to do, without a valid token.
  virtual absl::StatusOr<Caller> Authenticate(const grpc::ServerContextBase& context) = 0;
};

// Tokens of the database, from `authorization: Bearer <token>`. Only hashes are looked up, compared and remembered.
class TokenAuthenticator : public Authenticator {
 public:
  // `tokens` must outlive the authenticator. A revoked token is refused within `remember_for`.
  explicit TokenAuthenticator(TokenStore* tokens, absl::Duration remember_for = absl::Seconds(2))
      : tokens_(*tokens), remember_for_(remember_for) {}
  absl::StatusOr<Caller> Authenticate(const grpc::ServerContextBase& context) override ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Known {
    Caller caller;
    absl::Time until;
  };
  TokenStore& tokens_;
  const absl::Duration remember_for_;
  absl::Mutex mu_;
  absl::flat_hash_map<std::string, Known> known_ ABSL_GUARDED_BY(mu_);  // by SHA-256
};

}  // namespace itwin::server
