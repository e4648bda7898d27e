#include "server/tunnel/ssh_certificate.h"

#include <random>

#include "absl/strings/escaping.h"
#include "absl/strings/str_split.h"
#include "tests/testing/sshd.h"
#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using ::itwin::testing::FingerprintOfFile;
using ::itwin::testing::MakeSshKey;
using ::itwin::testing::MustRun;
using ::itwin::testing::ReadText;
using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const absl::Time kFrom = absl::FromUnixSeconds(1'700'000'000);
const absl::Time kTo = absl::FromUnixSeconds(1'700'036'000);

class SshCertificateTest : public ::testing::Test {
 protected:
  SshCertificateTest() { MakeSshKey(directory_ / "ca"); }
  std::string Make(const std::string& type, std::vector<std::string> options) {
    const std::string key = directory_ / ("key" + std::to_string(made_++));
    MakeSshKey(key, type);
    std::vector<std::string> argv = {"ssh-keygen", "-q", "-s", directory_ / "ca", "-I", "an id"};
    argv.insert(argv.end(), options.begin(), options.end());
    argv.push_back(key + ".pub");
    MustRun(argv);
    return ReadText(key + "-cert.pub");
  }
  TempDirectory directory_;
  int made_ = 0;
};

TEST_F(SshCertificateTest, EveryTypeOfKey) {
  for (const char* type : {"ed25519", "ecdsa", "rsa"}) {
    const auto certificate = ParseSshCertificate(Make(type, {"-n", "ada,bob", "-V", "0x6553f100:0x65547da0"}));
    ASSERT_OK(certificate) << type;
    EXPECT_TRUE(certificate->for_users);
    EXPECT_EQ(certificate->key_id, "an id");
    EXPECT_THAT(certificate->principals, ElementsAre("ada", "bob"));
    EXPECT_EQ(certificate->valid_after, kFrom);
    EXPECT_EQ(certificate->valid_before, kTo);
    EXPECT_EQ(certificate->authority, FingerprintOfFile(directory_ / "ca.pub"));
  }
}

TEST_F(SshCertificateTest, NoEndAndHosts) {
  const auto forever = ParseSshCertificate(Make("ed25519", {}));
  ASSERT_OK(forever);
  EXPECT_EQ(forever->valid_before, absl::InfiniteFuture());
  EXPECT_THAT(forever->principals, IsEmpty());
  EXPECT_EQ(WhyUnusable(*forever, absl::Now()), "");
  const auto host = ParseSshCertificate(Make("ed25519", {"-h", "-n", "login.example"}));
  ASSERT_OK(host);
  EXPECT_THAT(WhyUnusable(*host, absl::Now()), HasSubstr("of a host"));
}

TEST(SshCertificate, ReasonsSayWhen) {
  SshCertificate certificate;
  certificate.for_users = true;
  certificate.valid_after = kFrom;
  certificate.valid_before = kTo;
  EXPECT_EQ(WhyUnusable(certificate, kFrom), "");
  EXPECT_THAT(WhyUnusable(certificate, kTo), HasSubstr("expired 0 seconds ago, at 2023-11-15 08:13:20 UTC"));
  EXPECT_THAT(WhyUnusable(certificate, kTo + absl::Hours(3)), HasSubstr("expired 3 hours ago"));
  EXPECT_THAT(WhyUnusable(certificate, kFrom - absl::Minutes(5)), HasSubstr("not valid before 2023-11-14 22:13:20 UTC, in 5 minutes"));
  EXPECT_EQ(WarnBefore(certificate), absl::Hours(1));
  certificate.valid_before = kFrom + absl::Hours(24 * 365);
  EXPECT_EQ(WarnBefore(certificate), absl::Hours(24));
}

TEST_F(SshCertificateTest, DamagedTextIsAnErrorAndNothingElse) {
  EXPECT_THAT(ParseSshCertificate(""), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no OpenSSH certificate")));
  EXPECT_THAT(ParseSshCertificate(ReadText(directory_ / "ca.pub")), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no OpenSSH certificate")));
  const std::string text = Make("ed25519", {"-n", "ada"});
  const std::vector<std::string> words = absl::StrSplit(text, ' ');
  std::string blob;
  ASSERT_TRUE(absl::Base64Unescape(words[1], &blob));
  // Cut anywhere before the signature.
  for (size_t size = 0; size + 100 < blob.size(); ++size) {
    const auto cut = ParseSshCertificate(words[0] + " " + absl::Base64Escape(blob.substr(0, size)));
    ASSERT_FALSE(cut.ok() && size < blob.size() - 150) << size;
  }
  std::mt19937 random(99);
  for (int i = 0; i < 20'000; ++i) {
    std::string harmed = blob;
    for (int n = 1 + static_cast<int>(random() % 4); n > 0; --n) harmed[random() % harmed.size()] = static_cast<char>(random());
    ParseSshCertificate(words[0] + " " + absl::Base64Escape(harmed)).status().IgnoreError();  // must only return
  }
}

}  // namespace
}  // namespace itwin::server
