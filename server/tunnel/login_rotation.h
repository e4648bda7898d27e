#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "absl/time/time.h"

namespace itwin::server {

struct LoginRotationOptions {
  // So many failures in a row are let pass without a wait: a link that blinks is back at once, and whoever retries has a
  // back-off of its own.
  int free_failures = 3;
  // The wait after the next failure, doubled with each further one. Chosen at random within a quarter of it.
  absl::Duration first_wait = absl::Seconds(1);
  absl::Duration most_wait = absl::Seconds(15);
  // The host was there and said no (credentials, host key): the same, slower and from the first time on, because many
  // sites lock out who is refused too often.
  absl::Duration first_refused_wait = absl::Seconds(10);
  absl::Duration most_refused_wait = absl::Minutes(5);
};

// Which login node to try next: the last one that worked, then the others in a circle, each with a circuit breaker of its
// own. Pure: time is an argument. Not thread-safe.
class LoginRotation {
 public:
  LoginRotation(size_t hosts, LoginRotationOptions options, uint64_t seed);

  // Hosts to try now, best first; empty while all are to be left alone. A host whose wait is over may be tried by one
  // caller: it is left out for the next until Opened or Failed, or another wait.
  std::vector<size_t> Choose(absl::Time now);
  // A connection was made. It counts as a success only once it has lasted: an agent that dies at once is a failure too.
  void Opened(size_t host);
  void Succeeded(size_t host);
  void Failed(size_t host, bool refused, absl::Time now);
  // What was refused may be taken now: all waits of refused hosts are over.
  void CredentialsChanged();
  // When Choose may give this host; InfinitePast: now.
  absl::Time next_try(size_t host) const { return hosts_[host].not_before; }

 private:
  struct Host {
    int failures = 0;
    bool refused = false;
    absl::Duration wait = absl::ZeroDuration();
    absl::Time not_before = absl::InfinitePast();
  };
  const LoginRotationOptions options_;
  std::mt19937_64 random_;
  std::vector<Host> hosts_;
  size_t first_ = 0;  // the last one that opened, or the one after it when that failed
};

}  // namespace itwin::server
