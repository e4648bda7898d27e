#include "server/tunnel/login_rotation.h"

#include <algorithm>

namespace itwin::server {

LoginRotation::LoginRotation(size_t hosts, LoginRotationOptions options, uint64_t seed)
    : options_(options), random_(seed), hosts_(hosts) {}

std::vector<size_t> LoginRotation::Choose(absl::Time now) {
  std::vector<size_t> chosen;
  for (size_t i = 0; i < hosts_.size(); ++i) {
    const size_t index = (first_ + i) % hosts_.size();
    Host& host = hosts_[index];
    if (now < host.not_before) continue;
    if (host.wait > absl::ZeroDuration()) host.not_before = now + host.wait;  // half open: one trial
    chosen.push_back(index);
  }
  return chosen;
}

void LoginRotation::Opened(size_t host) {
  hosts_[host].not_before = absl::InfinitePast();
  first_ = host;
}

void LoginRotation::Succeeded(size_t host) { hosts_[host] = Host(); }

void LoginRotation::Failed(size_t index, bool refused, absl::Time now) {
  Host& host = hosts_[index];
  if (refused != host.refused) host.wait = absl::ZeroDuration();
  host.refused = refused;
  ++host.failures;
  if (index == first_) first_ = (first_ + 1) % hosts_.size();
  if (!refused && host.failures <= options_.free_failures) return;
  const absl::Duration first = refused ? options_.first_refused_wait : options_.first_wait;
  const absl::Duration most = refused ? options_.most_refused_wait : options_.most_wait;
  host.wait = host.wait == absl::ZeroDuration() ? first : std::min(host.wait * 2, most);
  host.not_before = now + host.wait * std::uniform_real_distribution<>(0.75, 1.25)(random_);
}

void LoginRotation::CredentialsChanged() {
  for (Host& host : hosts_) {
    if (host.refused) host = Host();
  }
}

}  // namespace itwin::server
