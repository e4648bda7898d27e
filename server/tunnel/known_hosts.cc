#include "server/tunnel/known_hosts.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/sha.h>

#include <algorithm>
#include <optional>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "common/files.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

constexpr int64_t kMaxKnownHostsBytes = 16 << 20;
constexpr size_t kMaxLineBytes = 64 << 10;
constexpr absl::string_view kAuthority = "@cert-authority";
constexpr absl::string_view kRevoked = "@revoked";

struct Line {
  absl::string_view marker;  // "" or one of the two
  absl::string_view hosts;   // a list of patterns, or one hashed name
  absl::string_view type;
  absl::string_view base64;
  std::string blob;
};

// Nothing for blank lines and comments; `bad` is set for what is neither those nor a line that can be used.
std::optional<Line> ParseLine(absl::string_view text, bool* bad) {
  *bad = false;
  text = absl::StripAsciiWhitespace(text);
  if (text.empty() || text[0] == '#') return std::nullopt;
  *bad = true;
  if (text.size() > kMaxLineBytes) return std::nullopt;
  std::vector<absl::string_view> words = absl::StrSplit(text, absl::ByAnyChar(" \t"), absl::SkipEmpty());
  Line line;
  if (words[0][0] == '@') {
    line.marker = words[0];
    if (line.marker != kAuthority && line.marker != kRevoked) return std::nullopt;
    words.erase(words.begin());
  }
  if (words.size() < 3) return std::nullopt;
  line.hosts = words[0];
  line.type = words[1];
  line.base64 = words[2];
  if (!absl::Base64Unescape(line.base64, &line.blob)) return std::nullopt;
  // The blob begins with its type, as a string with a length of four bytes.
  const std::string head = absl::StrCat(std::string(3, '\0'), std::string(1, static_cast<char>(line.type.size())), line.type);
  if (line.type.size() > 127 || !absl::StartsWith(line.blob, head)) return std::nullopt;
  *bad = false;
  return line;
}

// `*` is any text, `?` any character. Linear in both: only the last star is ever gone back to.
bool MatchesPattern(absl::string_view name, absl::string_view pattern) {
  size_t n = 0, p = 0;
  size_t star = absl::string_view::npos, star_n = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      star_n = n;
    } else if (p < pattern.size() && (pattern[p] == '?' || absl::ascii_tolower(static_cast<unsigned char>(pattern[p])) == name[n])) {
      ++p;
      ++n;
    } else if (star != absl::string_view::npos) {
      p = star + 1;
      n = ++star_n;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

// "|1|salt|hash", both in base64: HMAC-SHA1 of the name.
bool MatchesHash(absl::string_view name, absl::string_view hashed) {
  const std::vector<absl::string_view> parts = absl::StrSplit(hashed, '|');
  std::string salt, hash;
  if (parts.size() != 4 || parts[1] != "1" || !absl::Base64Unescape(parts[2], &salt) ||
      !absl::Base64Unescape(parts[3], &hash)) {
    return false;
  }
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  if (HMAC(EVP_sha1(), salt.data(), static_cast<int>(salt.size()), reinterpret_cast<const unsigned char*>(name.data()),
           name.size(), digest, &size) == nullptr) {
    return false;
  }
  return hash == absl::string_view(reinterpret_cast<const char*>(digest), size);
}

bool Names(const Line& line, absl::string_view name) {
  if (absl::StartsWith(line.hosts, "|")) return MatchesHash(name, line.hosts);
  bool match = false;
  for (absl::string_view pattern : absl::StrSplit(line.hosts, ',', absl::SkipEmpty())) {
    const bool negated = absl::ConsumePrefix(&pattern, "!");
    if (!MatchesPattern(name, pattern)) continue;
    if (negated) return false;  // whatever else the list says
    match = true;
  }
  return match;
}

template <typename Visit>
void ForEachLine(absl::string_view text, const Visit& visit) {
  for (const absl::string_view raw : absl::StrSplit(text, '\n')) {
    bool bad;
    const std::optional<Line> line = ParseLine(raw, &bad);
    visit(raw, line, bad);
  }
}

}  // namespace

std::string KnownHostsName(absl::string_view host, int port) {
  const std::string lower = absl::AsciiStrToLower(host);
  return port == 22 ? lower : absl::StrCat("[", lower, "]:", port);
}

std::string FingerprintOf(absl::string_view blob) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(blob.data()), blob.size(), digest);
  std::string text = absl::Base64Escape(absl::string_view(reinterpret_cast<const char*>(digest), sizeof digest));
  while (absl::EndsWith(text, "=")) text.pop_back();
  return absl::StrCat("SHA256:", text);
}

bool IsFingerprint(absl::string_view text) {
  std::string digest;
  return absl::ConsumePrefix(&text, "SHA256:") && text.size() == 43 && absl::Base64Unescape(text, &digest) &&
         digest.size() == SHA256_DIGEST_LENGTH;
}

HostKeyCheck CheckHostKey(absl::string_view known_hosts, const HostKey& key) {
  HostKeyCheck check;
  bool known = false, revoked = false;
  ForEachLine(known_hosts, [&](absl::string_view, const std::optional<Line>& line, bool bad) {
    if (bad) ++check.bad_lines;
    if (!line || !Names(*line, key.host)) return;
    const bool same = line->blob == key.blob;
    if (line->marker == kRevoked) {
      revoked = revoked || same;
    } else if (line->marker == kAuthority) {
      check.authority = true;
    } else if (same) {
      known = true;
    } else {
      check.expected.push_back(absl::StrCat(line->type, " ", FingerprintOf(line->blob)));
    }
  });
  check.verdict = revoked                  ? HostKeyVerdict::kRevoked
                  : known                  ? HostKeyVerdict::kKnown
                  : check.expected.empty() ? HostKeyVerdict::kUnknown
                                           : HostKeyVerdict::kChanged;
  if (check.verdict != HostKeyVerdict::kChanged) check.expected.clear();
  return check;
}

std::vector<std::string> KnownKeyTypes(absl::string_view known_hosts, absl::string_view known_hosts_name) {
  std::vector<std::string> types;
  ForEachLine(known_hosts, [&](absl::string_view, const std::optional<Line>& line, bool) {
    if (!line || !line->marker.empty() || !Names(*line, known_hosts_name)) return;
    if (!absl::c_linear_search(types, line->type)) types.emplace_back(line->type);
  });
  return types;
}

std::string WithHostKey(absl::string_view known_hosts, const HostKey& key) {
  std::string out;
  const absl::string_view all = absl::StripSuffix(known_hosts, "\n");
  if (!all.empty()) {
    ForEachLine(all, [&](absl::string_view raw, const std::optional<Line>& line, bool) {
      if (line && line->marker.empty() && line->type == key.type) {
        if (absl::StartsWith(line->hosts, "|")) {
          if (MatchesHash(key.host, line->hosts)) return;
        } else {
          std::vector<absl::string_view> names = absl::StrSplit(line->hosts, ',', absl::SkipEmpty());
          const size_t before = names.size();
          names.erase(std::remove_if(names.begin(), names.end(),
                                     [&](absl::string_view name) { return absl::EqualsIgnoreCase(name, key.host); }),
                      names.end());
          if (names.empty()) return;
          if (names.size() != before) {
            absl::StrAppend(&out, absl::StrJoin(names, ","), " ", line->type, " ", line->base64, "\n");
            return;
          }
        }
      }
      absl::StrAppend(&out, raw, "\n");
    });
  }
  absl::StrAppend(&out, key.host, " ", key.type, " ", absl::Base64Escape(key.blob), "\n");
  return out;
}

absl::Status AcceptHostKey(const std::string& known_hosts_file, const HostKey& key) {
  static absl::Mutex mu(absl::kConstInit);  // two sites may share a file
  absl::MutexLock lock(&mu);
  absl::StatusOr<std::string> text = ReadFile(known_hosts_file, kMaxKnownHostsBytes);
  if (!text.ok() && text.status().code() != absl::StatusCode::kNotFound) return text.status();
  const size_t slash = known_hosts_file.rfind('/');
  if (slash != std::string::npos && slash > 0) {
    ITWIN_RETURN_IF_ERROR(MakeDirectories(known_hosts_file.substr(0, slash)));
  }
  return WriteFileAtomically(known_hosts_file, WithHostKey(text.ok() ? *text : "", key), 0600);
}

}  // namespace itwin::server
