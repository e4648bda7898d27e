#include "server/tunnel/known_hosts.h"

#include <random>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "tests/testing/sshd.h"
#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using ::itwin::testing::FingerprintOfFile;
using ::itwin::testing::MakeSshKey;
using ::itwin::testing::MustRun;
using ::itwin::testing::ReadText;
using ::itwin::testing::TempDirectory;
using ::itwin::testing::WriteText;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

// Keys made once by ssh-keygen, as everything here is held against OpenSSH's own tools.
struct Keys {
  Keys() {
    for (const char* name : {"a", "b"}) MakeSshKey(directory / name);
    MakeSshKey(directory / "r", "rsa");
  }
  HostKey Get(const std::string& name, const std::string& host) const {
    const std::vector<std::string> words = absl::StrSplit(ReadText(directory / (name + ".pub")), ' ');
    HostKey key;
    key.host = host;
    key.type = words[0];
    EXPECT_TRUE(absl::Base64Unescape(words[1], &key.blob));
    key.fingerprint = FingerprintOf(key.blob);
    return key;
  }
  // "ssh-ed25519 AAAA..."
  std::string Line(const std::string& name) const {
    const std::vector<std::string> words = absl::StrSplit(ReadText(directory / (name + ".pub")), ' ');
    return absl::StrCat(words[0], " ", words[1]);
  }
  TempDirectory directory;
};
const Keys& TheKeys() {
  static const Keys* keys = new Keys();
  return *keys;
}

HostKeyVerdict Verdict(const std::string& text, const std::string& key, const std::string& host) {
  return CheckHostKey(text, TheKeys().Get(key, host)).verdict;
}

TEST(KnownHosts, FingerprintIsThatOfSshKeygen) {
  for (const char* name : {"a", "r"}) {
    const std::string fingerprint = TheKeys().Get(name, "h").fingerprint;
    EXPECT_EQ(fingerprint, FingerprintOfFile(TheKeys().directory / (std::string(name) + ".pub")));
    EXPECT_TRUE(IsFingerprint(fingerprint));
  }
  for (const char* wrong : {"", "SHA256:", "SHA256:abc", "MD5:00:11", "sha256:0000000000000000000000000000000000000000000"}) {
    EXPECT_FALSE(IsFingerprint(wrong)) << wrong;
  }
}

TEST(KnownHosts, NamesPortsPatternsAndNegation) {
  const std::string key = TheKeys().Line("a");
  EXPECT_EQ(KnownHostsName("Login.Example", 22), "login.example");
  EXPECT_EQ(KnownHostsName("::1", 2222), "[::1]:2222");
  EXPECT_EQ(Verdict("login.example " + key, "a", "login.example"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict("LOGIN.example\t" + key + "\t comment here\r", "a", "login.example"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict("login.example " + key, "a", "[login.example]:2222"), HostKeyVerdict::kUnknown);
  EXPECT_EQ(Verdict("[login.example]:2222 " + key, "a", "[login.example]:2222"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict("[login.example]:2222 " + key, "a", "login.example"), HostKeyVerdict::kUnknown);
  EXPECT_EQ(Verdict("other,login?.example " + key, "a", "login2.example"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict("*.example,!evil.example " + key, "a", "login.example"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict("*.example,!evil.example " + key, "a", "evil.example"), HostKeyVerdict::kUnknown);
  EXPECT_EQ(Verdict("!evil.example,*.example " + key, "a", "evil.example"), HostKeyVerdict::kUnknown);
  EXPECT_EQ(Verdict("# login.example " + key, "a", "login.example"), HostKeyVerdict::kUnknown);
  EXPECT_EQ(Verdict("login.example.org " + key, "a", "login.example"), HostKeyVerdict::kUnknown);
}

TEST(KnownHosts, HashedByOpenSsh) {
  const TempDirectory directory;
  const std::string path = directory / "known";
  WriteText(path, absl::StrCat("login.example ", TheKeys().Line("a"), "\n[other.example]:2222 ", TheKeys().Line("b"), "\n"));
  MustRun({"ssh-keygen", "-q", "-H", "-f", path});
  const std::string text = ReadText(path);
  ASSERT_THAT(text, Not(HasSubstr("login.example")));
  EXPECT_EQ(Verdict(text, "a", "login.example"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict(text, "b", "[other.example]:2222"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict(text, "b", "login.example"), HostKeyVerdict::kChanged);
  EXPECT_EQ(Verdict(text, "a", "third.example"), HostKeyVerdict::kUnknown);
}

TEST(KnownHosts, ChangedRevokedAndAuthorities) {
  const std::string a = TheKeys().Line("a"), b = TheKeys().Line("b");
  const HostKeyCheck changed = CheckHostKey("h " + b, TheKeys().Get("a", "h"));
  EXPECT_EQ(changed.verdict, HostKeyVerdict::kChanged);
  EXPECT_THAT(changed.expected, ElementsAre(absl::StrCat("ssh-ed25519 ", TheKeys().Get("b", "h").fingerprint)));
  // Several keys of one host: any of them will do.
  EXPECT_EQ(Verdict("h " + b + "\nh " + a, "a", "h"), HostKeyVerdict::kKnown);
  // Revoked wins, wherever it stands.
  EXPECT_EQ(Verdict("@revoked * " + a + "\nh " + a, "a", "h"), HostKeyVerdict::kRevoked);
  EXPECT_EQ(Verdict("h " + a + "\n@revoked h " + a, "a", "h"), HostKeyVerdict::kRevoked);
  EXPECT_EQ(Verdict("h " + a + "\n@revoked h " + b, "a", "h"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict("h " + a + "\n@revoked other " + a, "a", "h"), HostKeyVerdict::kKnown);
  // An authority's key is not a host's.
  const HostKeyCheck authority = CheckHostKey("@cert-authority * " + a, TheKeys().Get("a", "h"));
  EXPECT_EQ(authority.verdict, HostKeyVerdict::kUnknown);
  EXPECT_TRUE(authority.authority);
}

TEST(KnownHosts, BadLinesAreCountedAndHideNothing) {
  const std::string good = "h " + TheKeys().Line("a");
  const std::string text = absl::StrCat("h ssh-ed25519\nh ssh-ed25519 !!!\n@unknown h ", TheKeys().Line("a"), "\nh ssh-rsa ",
                                        std::string(absl::StrSplit(TheKeys().Line("a"), ' ').begin()->size(), 'A'), "\n",
                                        std::string(100'000, 'x'), "\n\n#\n", good, "\n");
  const HostKeyCheck check = CheckHostKey(text, TheKeys().Get("a", "h"));
  EXPECT_EQ(check.verdict, HostKeyVerdict::kKnown);
  EXPECT_EQ(check.bad_lines, 5);
}

TEST(KnownHosts, TypesThatAreKnown) {
  const std::string text = absl::StrCat("h ", TheKeys().Line("r"), "\n@revoked h ", TheKeys().Line("b"), "\nother ", TheKeys().Line("a"), "\n");
  EXPECT_THAT(KnownKeyTypes(text, "h"), ElementsAre("ssh-rsa"));
}

TEST(KnownHosts, AcceptingReplacesTheKeyOfThatHostAndTypeOnly) {
  const TempDirectory directory;
  const std::string path = directory / "deep/known";
  ASSERT_OK(AcceptHostKey(path, TheKeys().Get("a", "h")));
  EXPECT_EQ(ReadText(path), absl::StrCat("h ", TheKeys().Line("a"), "\n"));
  ASSERT_OK(AcceptHostKey(path, TheKeys().Get("r", "h")));
  EXPECT_EQ(Verdict(ReadText(path), "a", "h"), HostKeyVerdict::kKnown);
  WriteText(path, absl::StrCat(ReadText(path), "# a comment\nother,h,third ", TheKeys().Line("a"), "\n@revoked x ", TheKeys().Line("a")));
  ASSERT_OK(AcceptHostKey(path, TheKeys().Get("b", "h")));
  const std::string text = ReadText(path);
  EXPECT_EQ(Verdict(text, "a", "h"), HostKeyVerdict::kChanged);
  EXPECT_EQ(Verdict(text, "b", "h"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict(text, "r", "h"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict(text, "a", "third"), HostKeyVerdict::kKnown);
  EXPECT_EQ(Verdict(text, "a", "x"), HostKeyVerdict::kRevoked);
  EXPECT_THAT(text, HasSubstr("# a comment\n"));
  // OpenSSH reads what we wrote.
  EXPECT_THAT(MustRun({"ssh-keygen", "-F", "h", "-f", path}), HasSubstr(TheKeys().Line("b")));
  // A hashed line of the host is replaced as well.
  MustRun({"ssh-keygen", "-q", "-H", "-f", path});
  ASSERT_OK(AcceptHostKey(path, TheKeys().Get("a", "h")));
  EXPECT_EQ(Verdict(ReadText(path), "b", "h"), HostKeyVerdict::kChanged);
}

// Whatever the file holds: no crash, no endless loop, and never a key taken as known that is not in there.
TEST(KnownHosts, RandomTextIsHarmless) {
  std::mt19937 random(424242);
  const std::vector<std::string> pieces = {"h", ",", "!", "*", "?", "|1|", "|", " ", "\t", "\n", "@revoked ", "@cert-authority ", "#", "[h]:22",
                                           "ssh-ed25519 ", "ssh-rsa ", "AAAA", "====", std::string("\0", 1), "\xff", TheKeys().Line("b"), "h " + TheKeys().Line("b")};
  const HostKey key = TheKeys().Get("a", "h");
  for (int i = 0; i < 20'000; ++i) {
    std::string text;
    for (int n = static_cast<int>(random() % 24); n > 0; --n) text += pieces[random() % pieces.size()];
    const HostKeyCheck check = CheckHostKey(text, key);
    ASSERT_NE(check.verdict, HostKeyVerdict::kKnown) << absl::CHexEscape(text);
    ASSERT_NE(check.verdict, HostKeyVerdict::kRevoked) << absl::CHexEscape(text);
    const std::string with = WithHostKey(text, key);
    const HostKeyVerdict after = CheckHostKey(with, key).verdict;
    ASSERT_EQ(after, HostKeyVerdict::kKnown) << absl::CHexEscape(text);
  }
  // Stars do not make it slow.
  const std::string stars = std::string(30'000, '*') + "x " + TheKeys().Line("a");
  EXPECT_EQ(CheckHostKey(stars, TheKeys().Get("a", std::string(2000, 'h'))).verdict, HostKeyVerdict::kUnknown);
}

}  // namespace
}  // namespace itwin::server
