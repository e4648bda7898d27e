#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace itwin::server {

// What an OpenSSH certificate ("key-cert.pub") says. Nothing is verified here: that is the server's to do.
struct SshCertificate {
  std::string key_type;  // "ssh-ed25519-cert-v01@openssh.com"
  bool for_users = false;
  std::string key_id;
  std::vector<std::string> principals;  // none: any
  absl::Time valid_after = absl::InfinitePast();
  absl::Time valid_before = absl::InfiniteFuture();
  std::string authority;  // fingerprint of the key that signed it
};

// From the text of the file. kInvalidArgument: not a certificate.
absl::StatusOr<SshCertificate> ParseSshCertificate(absl::string_view text);

// Why the certificate cannot be used now, for people: "... expired 3 hours ago (at ...)"; "" when it can.
std::string WhyUnusable(const SshCertificate& certificate, absl::Time now);

// How long before its end people are told: the last tenth of its life, at most a day.
absl::Duration WarnBefore(const SshCertificate& certificate);

}  // namespace itwin::server
