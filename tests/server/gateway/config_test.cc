#include "server/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::server {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;

TEST(Config, EverythingCanBeSaid) {
  const auto config = ParseConfig(R"(
listen: "[::1]:7000"
log_level: debug
limits: {live_jobs_per_owner: 10, rpc_threads: 20, log_mirror_mib: 1}
local:
  enabled: false
  slots: 3
  launcher: mpirun -n {ranks}
  max_waiting: 5
  spool_retention: 1h
sites:
  - name: vega
    command: [ssh, -T, login.vega.example, itwin-agent, connect, --root, /scratch/itwin]
    max_waiting: 200
    spool_retention: 0
)",
                                  "gateway.yaml");
  ASSERT_OK(config);
  EXPECT_OK(CheckConfig(*config));
  EXPECT_EQ(config->listen, "[::1]:7000");
  EXPECT_EQ(config->rpc_threads, 20);
  EXPECT_FALSE(config->local.enabled);
  EXPECT_EQ(config->local.launcher, "mpirun -n {ranks}");
  EXPECT_EQ(config->local.spool_retention, absl::Hours(1));
  ASSERT_EQ(config->sites.size(), 1u);
  EXPECT_EQ(config->sites[0].command.size(), 7u);
  EXPECT_EQ(config->sites[0].spool_retention, absl::ZeroDuration());
}

TEST(Config, NothingIsADefault) {
  EXPECT_OK(ParseConfig("", "f"));
  EXPECT_OK(ParseConfig("local:\n", "f"));
  EXPECT_OK(CheckConfig(GatewayConfig{}));
  testing::TempDirectory directory;
  EXPECT_OK(ReadConfig(directory / "none.yaml"));
}

TEST(Config, EveryProblemIsToldWithItsLine) {
  EXPECT_THAT(ParseConfig("listne: x\nlocal:\n  slotz: 3\n  slots: many\nlocal2: 1\n", "gateway.yaml"),
              StatusIs(kInvalid, AllOf(HasSubstr("gateway.yaml:1: listne: unknown key; did you mean 'listen'?"),
                                       HasSubstr("gateway.yaml:3: local.slotz: unknown key; did you mean 'slots'?"),
                                       HasSubstr("gateway.yaml:4: local.slots: must be a whole number"))));
  EXPECT_THAT(ParseConfig("listen: [1, 2]\n", "f"), StatusIs(kInvalid, HasSubstr("f:1: listen: must be text")));
  EXPECT_THAT(ParseConfig("- a\n- b\n", "f"), StatusIs(kInvalid, HasSubstr("mapping")));
  EXPECT_THAT(ParseConfig("a: [1\n", "f"), StatusIs(kInvalid, HasSubstr("f:")));
  EXPECT_THAT(ParseConfig("listen: a:1\nlisten: b:2\n", "f"), StatusIs(kInvalid, HasSubstr("twice")));
  EXPECT_THAT(ParseConfig("sites: {name: a}\n", "f"), StatusIs(kInvalid, HasSubstr("list")));
  EXPECT_THAT(ParseConfig("local: {enabled: perhaps}\n", "f"), StatusIs(kInvalid, HasSubstr("true or false")));
  EXPECT_THAT(ParseConfig("local: {spool_retention: soon}\n", "f"), StatusIs(kInvalid, HasSubstr("duration")));
}

TEST(Config, MeaningIsCheckedToo) {
  GatewayConfig config;
  config.listen = "7443";
  config.log_level = "debgu";
  config.local.slots = -1;
  for (const char* name : {"Vega", "local", "any"}) {
    SiteFile& site = config.sites.emplace_back();
    site.name = name;
    if (site.name != "Vega") site.command = {"x"};
  }
  EXPECT_THAT(CheckConfig(config),
              StatusIs(kInvalid, AllOf(HasSubstr("listen: '7443'"), HasSubstr("did you mean 'debug'?"), HasSubstr("local.slots: -1"),
                                       HasSubstr("sites[0].name: 'Vega'"), HasSubstr("sites[0].command: missing"),
                                       HasSubstr("sites[1].name: 'local' is taken"), HasSubstr("sites[2].name: 'any'"))));
}

TEST(Config, ASiteMayBeAddedLater) {
  GatewayConfig config;
  config.local.enabled = false;
  EXPECT_OK(CheckConfig(config));
}

TEST(Config, ProblemsOfASiteAreToldWithTheirLine) {
  EXPECT_THAT(ParseConfig("sites:\n  - name: vega\n    ssh:\n      hots: [a]\n", "gateway.yaml"),
              StatusIs(kInvalid, HasSubstr("gateway.yaml:4: sites[0].ssh.hots: unknown key; did you mean 'hosts'?")));
}

TEST(Config, FlagsWinOverTheFile) {
  auto config = ParseConfig("listen: 127.0.0.1:1\nlog_level: error\nlocal: {slots: 2}\n", "f");
  ASSERT_OK(config);
  ConfigOverrides overrides;
  overrides.listen = "127.0.0.1:2";
  overrides.slots = 7;
  Apply(overrides, &*config);
  EXPECT_EQ(config->listen, "127.0.0.1:2");
  EXPECT_EQ(config->local.slots, 7);
  EXPECT_EQ(config->log_level, "error");
}

TEST(Config, Addresses) {
  EXPECT_EQ(ParseListen("127.0.0.1:0")->port, 0);
  EXPECT_EQ(ParseListen("[::]:7443")->host, "::");
  for (const char* bad : {"", "7443", ":7443", "host:", "host:x", "host:70000", "::1:7443", "host:-1"}) {
    EXPECT_THAT(ParseListen(bad), StatusIs(kInvalid, HasSubstr("127.0.0.1:7443"))) << bad;
  }
}

}  // namespace
}  // namespace itwin::server
