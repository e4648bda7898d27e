#include <gmock/gmock.h>

#include <map>

#include "common/files.h"
#include "itwin/client.h"
#include "itwin/connect.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::client {
namespace {

using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::HasSubstr;
using ::testing::Not;

class ConfigTest : public ::testing::Test {
 protected:
  Environment environment() {
    return [this](const std::string& name) -> std::optional<std::string> {
      const auto found = variables_.find(name);
      return found == variables_.end() ? std::nullopt : std::optional(found->second);
    };
  }
  absl::StatusOr<ConnectOptions> Resolve(ConnectOptions given = {}) { return ResolveOptions(std::move(given), environment()); }
  void Write(const std::string& name, const std::string& text) {
    ASSERT_OK(MakeDirectories(directory_ / ".config/itwin"));
    ASSERT_OK(WriteFileAtomically(directory_ / name, text));
  }
  // A whole configuration in the home directory.
  void WriteHome() {
    variables_["HOME"] = directory_.path();
    Write(".config/itwin/config.yaml", "endpoint: home:1\nca_file: ca.pem\ntoken_file: ../token\n");
    Write(".config/token", "home-token\n");
  }

  TempDirectory directory_;
  std::map<std::string, std::string> variables_;
};

TEST_F(ConfigTest, ReadsTheFileOfTheHomeDirectory) {
  WriteHome();
  absl::StatusOr<ConnectOptions> options = Resolve();
  ASSERT_OK(options);
  EXPECT_EQ(options->endpoint, "home:1");
  EXPECT_EQ(options->ca_file, directory_ / ".config/itwin/ca.pem");  // relative to the file
  EXPECT_EQ(options->token, "home-token");
}

TEST_F(ConfigTest, OptionsComeBeforeEnvironmentBeforeFile) {
  WriteHome();
  Write("token2", " env-token \n");
  variables_["ITWIN_TOKEN_FILE"] = directory_ / "token2";
  variables_["ITWIN_ENDPOINT"] = "env:2";
  variables_["ITWIN_CA_FILE"] = "/env/ca.pem";
  absl::StatusOr<ConnectOptions> options = Resolve();
  ASSERT_OK(options);
  EXPECT_EQ(options->endpoint, "env:2");
  EXPECT_EQ(options->ca_file, "/env/ca.pem");
  EXPECT_EQ(options->token, "env-token");
  options = Resolve({.endpoint = "https://given:3", .ca_file = "/given/ca.pem", .token = "given-token"});
  ASSERT_OK(options);
  EXPECT_EQ(options->endpoint, "given:3");
  EXPECT_EQ(options->ca_file, "/given/ca.pem");
  EXPECT_EQ(options->token, "given-token");
}

TEST_F(ConfigTest, TakesTheFileThatIsNamed) {
  WriteHome();
  Write("other.yaml", "endpoint: other:9\ntoken_file: token3\nserver_name: gate\n");
  Write("token3", "third");
  variables_["ITWIN_CONFIG"] = directory_ / "other.yaml";
  absl::StatusOr<ConnectOptions> options = Resolve();
  ASSERT_OK(options);
  EXPECT_EQ(options->endpoint, "other:9");
  EXPECT_EQ(options->token, "third");
  EXPECT_EQ(options->ca_file, "");
  EXPECT_EQ(options->server_name, "gate");
}

TEST_F(ConfigTest, DoesNotSendTheTokenOfOneGatewayToAnother) {
  variables_["ITWIN_CONFIG"] = directory_ / "c.yaml";
  Write("c.yaml", "endpoint: mine:9\ntoken_file: t\n");
  Write("t", "secret-token");
  variables_["ITWIN_ENDPOINT"] = "evil:1";
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("belongs to mine:9 and is not sent to evil:1")));
  EXPECT_THAT(std::string(Resolve().status().message()), Not(HasSubstr("secret-token")));
  Write("c.yaml", "endpoint: mine:9\ntoken_file: t\nca_file: ca.pem\n");  // it must prove itself to our CA
  EXPECT_OK(Resolve());
  EXPECT_FALSE(Resolve({.insecure = true}).ok());
}

TEST_F(ConfigTest, SaysWhatIsMissingAndWhatToDo) {
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no gateway is configured; set ITWIN_ENDPOINT")));
  variables_["ITWIN_ENDPOINT"] = "x:1";
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("no token is configured; set ITWIN_TOKEN_FILE")));
  variables_["ITWIN_TOKEN_FILE"] = directory_ / "none";
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none: No such file")));
  Write("empty", "\n");
  variables_["ITWIN_TOKEN_FILE"] = directory_ / "empty";
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kUnauthenticated, HasSubstr("empty: is not a token")));
  variables_["ITWIN_CONFIG"] = directory_ / "none.yaml";
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("unset ITWIN_CONFIG")));
}

TEST_F(ConfigTest, RefusesWrongFiles) {
  variables_["ITWIN_CONFIG"] = directory_ / "c.yaml";
  Write("c.yaml", "endpoint: x:1\nendpiont: y\n");
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("line 2: endpiont: unknown key; did you mean 'endpoint'?")));
  Write("c.yaml", "endpoint: [x]\n");
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("line 1: endpoint: expected text")));
  Write("c.yaml", "endpoint: 'x\n");
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not valid YAML")));
  Write("c.yaml", "just text\n");
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("expected keys")));
  Write("c.yaml", "insecure: perhaps\n");
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'perhaps' is neither true nor false")));
}

TEST_F(ConfigTest, KeepsTheTokenOutOfMessages) {
  variables_["ITWIN_ENDPOINT"] = "x:1";
  variables_["ITWIN_TOKEN"] = "se cret";
  EXPECT_THAT(Resolve(), StatusIs(absl::StatusCode::kUnauthenticated, Not(HasSubstr("cret"))));
}

TEST_F(ConfigTest, PlainTextIsForThisMachineOnly) {
  for (const char* endpoint : {"127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/x"}) {
    EXPECT_OK(MakeConnection({.endpoint = endpoint, .token = "t", .insecure = true})) << endpoint;
  }
  for (const char* endpoint : {"10.0.0.1:1", "example.org:1", "localhost.example.org:1"}) {
    EXPECT_THAT(MakeConnection({.endpoint = endpoint, .token = "t", .insecure = true}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("would show your token"))) << endpoint;
  }
}

TEST_F(ConfigTest, ChecksTheCaFile) {
  EXPECT_THAT(MakeConnection({.endpoint = "x:1", .ca_file = directory_ / "no.pem", .token = "t"}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("set ITWIN_CA_FILE")));
  Write("ca.pem", "no certificate");
  EXPECT_THAT(MakeConnection({.endpoint = "x:1", .ca_file = directory_ / "ca.pem", .token = "t"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("holds no PEM certificate")));
}

}  // namespace
}  // namespace itwin::client
