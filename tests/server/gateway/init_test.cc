#include "server/init.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <map>

#include "absl/strings/ascii.h"
#include "absl/time/clock.h"
#include "common/files.h"
#include "common/sha256.h"
#include "server/certificates.h"
#include "server/store/sqlite_job_store.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::server {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

class InitTest : public ::testing::Test {
 protected:
  absl::StatusOr<InitReport> Run(std::vector<std::string> hosts = {}) {
    return Init({.data = data_.root, .hosts = std::move(hosts), .user = "alice"});
  }
  std::unique_ptr<SqliteJobStore> OpenStore() {
    auto store = SqliteJobStore::Open({.path = data_.database(), .readers = 1, .exclusive = false});
    EXPECT_OK(store);
    return *std::move(store);
  }
  std::map<std::string, std::string> Files() const {
    std::map<std::string, std::string> out;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(data_.root)) {
      const std::string name = entry.path().filename();
      if (entry.is_regular_file() && name.find("gateway.db") != 0) out[entry.path()] = *ReadFile(entry.path());
    }
    return out;
  }

  testing::TempDirectory directory_;
  const DataDirectory data_{directory_ / "data"};
};

TEST_F(InitTest, MakesWhatAGatewayAndItsFirstUserNeed) {
  const auto report = Run({"gateway.example"});
  ASSERT_OK(report);
  EXPECT_EQ(report->client_config, data_.client("config.yaml"));
  EXPECT_THAT(*ReadFile(data_.client("config.yaml")), HasSubstr("endpoint: 127.0.0.1:7443\nca_file: ca.pem\ntoken_file: token\n"));
  const auto facts = ReadCertificate(*ReadFile(data_.tls("server.pem")));
  ASSERT_OK(facts);
  for (const char* host : {"localhost", "127.0.0.1", "::1", "gateway.example"}) EXPECT_THAT(facts->hosts, Contains(host));
  EXPECT_GT(facts->expires, absl::Now() + absl::Hours(24 * 365));
  EXPECT_EQ(*ReadFile(data_.client("ca.pem")), *ReadFile(data_.tls("ca.pem")));

  const std::string token(absl::StripAsciiWhitespace(*ReadFile(data_.client("token"))));
  const auto known = OpenStore()->FindToken(Sha256Hex(token));
  ASSERT_OK(known);
  ASSERT_TRUE(known->has_value());
  EXPECT_EQ((*known)->name, "alice");
  EXPECT_EQ((*known)->role, TokenRole::kAdmin);
}

TEST_F(InitTest, NobodyElseMayReadIt) {
  ASSERT_OK(Run());
  for (const auto& entry : std::filesystem::recursive_directory_iterator(data_.root)) {
    struct stat st;
    ASSERT_EQ(stat(entry.path().c_str(), &st), 0);
    EXPECT_EQ(st.st_mode & 077, 0u) << entry.path();
  }
}

TEST_F(InitTest, TheSecondTimeChangesNothing) {
  ASSERT_OK(Run());
  const auto before = Files();
  const auto again = Run();
  ASSERT_OK(again);
  EXPECT_THAT(again->done, IsEmpty());
  EXPECT_EQ(Files(), before);
}

TEST_F(InitTest, AnotherHostMeansAnotherCertificateOfTheSameAuthority) {
  ASSERT_OK(Run({"one.example"}));
  const std::string authority = *ReadFile(data_.tls("ca.pem")), token = *ReadFile(data_.client("token"));
  ASSERT_OK(Run({"two.example"}));
  EXPECT_EQ(*ReadFile(data_.tls("ca.pem")), authority);
  EXPECT_EQ(*ReadFile(data_.client("token")), token);
  const auto facts = ReadCertificate(*ReadFile(data_.tls("server.pem")));
  EXPECT_THAT(facts->hosts, Contains("one.example"));
  EXPECT_THAT(facts->hosts, Contains("two.example"));
}

TEST_F(InitTest, ALostTokenFileIsReplacedAndAnOldDatabaseLearnsTheToken) {
  ASSERT_OK(Run());
  std::filesystem::remove(data_.client("token"));
  ASSERT_OK(Run());
  const std::string token(absl::StripAsciiWhitespace(*ReadFile(data_.client("token"))));
  EXPECT_TRUE(OpenStore()->FindToken(Sha256Hex(token))->has_value());

  std::filesystem::remove(data_.database());
  std::filesystem::remove(data_.database() + "-wal");
  std::filesystem::remove(data_.database() + "-shm");
  ASSERT_OK(Run());
  EXPECT_EQ(*ReadFile(data_.client("token")), token + "\n");
  EXPECT_TRUE(OpenStore()->FindToken(Sha256Hex(token))->has_value());
}

TEST_F(InitTest, WrongHostsAreRefused) {
  EXPECT_THAT(Run({"bad host"}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bad host")));
  EXPECT_THAT(Run({"x,DNS:evil"}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("evil")));
}

TEST_F(InitTest, TokensAreShownOnceAndNeverStored) {
  ASSERT_OK(Run());
  const auto store = OpenStore();
  const auto token = AddToken(store.get(), "bob", TokenRole::kUser);
  ASSERT_OK(token);
  EXPECT_GE(token->size(), 64u);
  EXPECT_THAT(AddToken(store.get(), "bob", TokenRole::kUser), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("bob")));
  for (const auto& [path, text] : Files()) EXPECT_EQ(text.find(*token), std::string::npos) << path;
}

TEST_F(InitTest, EndpointsForClients) {
  EXPECT_EQ(ClientEndpoint("0.0.0.0", 1), "127.0.0.1:1");
  EXPECT_EQ(ClientEndpoint("::", 1), "[::1]:1");
  EXPECT_EQ(ClientEndpoint("gateway.example", 7443), "gateway.example:7443");
  ASSERT_OK(Run());
  ASSERT_OK(UpdateClientEndpoint(data_, "127.0.0.1:9"));
  EXPECT_THAT(*ReadFile(data_.client("config.yaml")), HasSubstr("endpoint: 127.0.0.1:9\n"));
}

}  // namespace
}  // namespace itwin::server
