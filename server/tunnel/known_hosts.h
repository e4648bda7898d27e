#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

// OpenSSH's known_hosts format (sshd(8)), read and written here: libssh's reader gives up at a bad line, does not honour
// negated patterns over a list and leaves out revoked keys. All but the last function is pure.
namespace itwin::server {

// A key that a host has shown.
struct HostKey {
  std::string host;         // as known_hosts names it: "login.example", or "[login.example]:2222"
  std::string type;         // "ssh-ed25519"
  std::string blob;         // the key in SSH's wire format
  std::string fingerprint;  // "SHA256:..." as ssh-keygen shows it
};

// "host" for port 22, else "[host]:port"; lower case.
std::string KnownHostsName(absl::string_view host, int port);
// "SHA256:" and base64 without padding.
std::string FingerprintOf(absl::string_view blob);
// Whether the text looks like one.
bool IsFingerprint(absl::string_view text);

enum class HostKeyVerdict { kKnown, kUnknown, kChanged, kRevoked };

struct HostKeyCheck {
  HostKeyVerdict verdict = HostKeyVerdict::kUnknown;
  std::vector<std::string> expected = {};  // kChanged: "ssh-ed25519 SHA256:..." of each key that the file has for it
  bool authority = false;                  // a @cert-authority line names the host; such lines are not used
  int bad_lines = 0;
};
HostKeyCheck CheckHostKey(absl::string_view known_hosts, const HostKey& key);

// Key types that the file has for the host, so that the server is asked for one of them.
std::vector<std::string> KnownKeyTypes(absl::string_view known_hosts, absl::string_view known_hosts_name);

// The file's text with this key as the only one of its type for the host. Lines of other hosts stay as they are.
std::string WithHostKey(absl::string_view known_hosts, const HostKey& key);

// The same in a file, which is made if need be and replaced as a whole.
absl::Status AcceptHostKey(const std::string& known_hosts_file, const HostKey& key);

}  // namespace itwin::server
