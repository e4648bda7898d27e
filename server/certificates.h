#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

// Keys and certificates of a gateway's own small authority (ECDSA P-256). The only user of OpenSSL's X.509 calls.
namespace itwin::server {

struct KeyAndCertificate {
  std::string key_pem;
  std::string certificate_pem;
};

// An authority that signs nothing but what IssueServerCertificate makes.
absl::StatusOr<KeyAndCertificate> MakeAuthority(const std::string& name, absl::Time now);

// A server certificate for these DNS names and addresses, signed by the authority. kInvalidArgument: no host, or one
// that is neither a name nor an address.
absl::StatusOr<KeyAndCertificate> IssueServerCertificate(const KeyAndCertificate& authority,
                                                         const std::vector<std::string>& hosts, absl::Time now);

struct CertificateFacts {
  std::vector<std::string> hosts;  // names and addresses, as text
  absl::Time expires;
};
// kDataLoss when it is none.
absl::StatusOr<CertificateFacts> ReadCertificate(const std::string& pem);

}  // namespace itwin::server
