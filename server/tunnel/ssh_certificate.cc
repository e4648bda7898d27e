#include "server/tunnel/ssh_certificate.h"

#include <algorithm>
#include <limits>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/tunnel/known_hosts.h"

namespace itwin::server {
namespace {

constexpr size_t kMaxPrincipals = 256;  // as OpenSSH

// Reads SSH's wire format (RFC 4251, section 5). After the first field that is not there, all is empty and `ok` false.
class Reader {
 public:
  explicit Reader(absl::string_view bytes) : rest_(bytes) {}
  uint64_t Number(size_t bytes) {
    if (rest_.size() < bytes) {
      ok_ = false;
      rest_ = {};
      return 0;
    }
    uint64_t value = 0;
    for (size_t i = 0; i < bytes; ++i) value = value << 8 | static_cast<unsigned char>(rest_[i]);
    rest_.remove_prefix(bytes);
    return value;
  }
  absl::string_view String() {
    const uint64_t size = Number(4);
    if (size > rest_.size()) {
      ok_ = false;
      rest_ = {};
      return {};
    }
    const absl::string_view value = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return value;
  }
  bool ok() const { return ok_; }
  bool at_end() const { return rest_.empty(); }

 private:
  absl::string_view rest_;
  bool ok_ = true;
};

// Strings and numbers of the public key itself, between nonce and serial number; -1: not a type that we know.
int KeyFields(absl::string_view type) {
  if (absl::StartsWith(type, "ssh-ed25519-cert")) return 1;
  if (absl::StartsWith(type, "ssh-rsa-cert") || absl::StartsWith(type, "rsa-sha2-")) return 2;
  if (absl::StartsWith(type, "ecdsa-sha2-")) return 2;
  if (absl::StartsWith(type, "sk-ssh-ed25519-cert")) return 2;
  if (absl::StartsWith(type, "sk-ecdsa-sha2-")) return 3;
  if (absl::StartsWith(type, "ssh-dss-cert")) return 4;
  return -1;
}

// Zero and all ones are "always", as in OpenSSH.
absl::Time TimeOf(uint64_t seconds, absl::Time always) {
  if (seconds == 0 || seconds > static_cast<uint64_t>(std::numeric_limits<int64_t>::max() / 2)) return always;
  return absl::FromUnixSeconds(static_cast<int64_t>(seconds));
}

// "3 hours", "12 minutes": one unit is enough.
std::string Roughly(absl::Duration time) {
  const auto count = [](int64_t n, absl::string_view unit) { return absl::StrCat(n, " ", unit, n == 1 ? "" : "s"); };
  if (time >= absl::Hours(48)) return count(time / absl::Hours(24), "day");
  if (time >= absl::Hours(2)) return count(time / absl::Hours(1), "hour");
  if (time >= absl::Minutes(2)) return count(time / absl::Minutes(1), "minute");
  return count(time / absl::Seconds(1), "second");
}

std::string At(absl::Time time) { return absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", time, absl::UTCTimeZone()); }

}  // namespace

absl::StatusOr<SshCertificate> ParseSshCertificate(absl::string_view text) {
  const std::vector<absl::string_view> words =
      absl::StrSplit(absl::StripAsciiWhitespace(text), absl::ByAnyChar(" \t\r\n"), absl::SkipEmpty());
  std::string blob;
  if (words.size() < 2 || !absl::StrContains(words[0], "-cert-v01@") || !absl::Base64Unescape(words[1], &blob)) {
    return absl::InvalidArgumentError("this is no OpenSSH certificate (a line that begins with '…-cert-v01@openssh.com')");
  }
  SshCertificate certificate;
  Reader reader(blob);
  certificate.key_type = std::string(reader.String());
  const int fields = KeyFields(certificate.key_type);
  if (fields < 0 || certificate.key_type != words[0]) {
    return absl::InvalidArgumentError(absl::StrCat("a certificate of type '", absl::CHexEscape(words[0].substr(0, 64)), "' is not known"));
  }
  reader.String();  // nonce
  for (int i = 0; i < fields; ++i) reader.String();
  reader.Number(8);  // serial number
  certificate.for_users = reader.Number(4) == 1;
  certificate.key_id = std::string(reader.String());
  Reader principals(reader.String());
  while (!principals.at_end() && certificate.principals.size() < kMaxPrincipals) {
    certificate.principals.emplace_back(principals.String());
  }
  certificate.valid_after = TimeOf(reader.Number(8), absl::InfinitePast());
  certificate.valid_before = TimeOf(reader.Number(8), absl::InfiniteFuture());
  reader.String();  // critical options
  reader.String();  // extensions
  reader.String();  // reserved
  const absl::string_view authority = reader.String();
  if (!reader.ok() || !principals.ok() || authority.empty()) return absl::InvalidArgumentError("the certificate is cut short");
  certificate.authority = FingerprintOf(authority);
  return certificate;
}

std::string WhyUnusable(const SshCertificate& certificate, absl::Time now) {
  if (!certificate.for_users) return "is one of a host, not of a user";
  if (now < certificate.valid_after) {
    return absl::StrCat("is not valid before ", At(certificate.valid_after), ", in ", Roughly(certificate.valid_after - now),
                        " (is this machine's clock right?)");
  }
  if (now >= certificate.valid_before) {
    return absl::StrCat("expired ", Roughly(now - certificate.valid_before), " ago, at ", At(certificate.valid_before));
  }
  return "";
}

absl::Duration WarnBefore(const SshCertificate& certificate) {
  if (certificate.valid_after == absl::InfinitePast() || certificate.valid_before == absl::InfiniteFuture()) {
    return absl::Hours(24);
  }
  return std::min(absl::Hours(24), (certificate.valid_before - certificate.valid_after) / 10);
}

}  // namespace itwin::server
