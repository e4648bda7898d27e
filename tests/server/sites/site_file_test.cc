#include "server/sites/site_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "absl/strings/str_cat.h"
#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::server {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr absl::StatusCode kInvalid = absl::StatusCode::kInvalidArgument;
constexpr char kFingerprint[] = "SHA256:abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ";

constexpr char kSmall[] = R"(name: vega
ssh:
  hosts: [login1.example, login2.example]
  user: ada
  key: /keys/id_ed25519
root: /scratch/$USER/itwin
scheduler: slurm
)";

TEST(SiteFile, EverythingCanBeSaid) {
  const auto site = ParseSiteFile(absl::StrCat(R"(
name: vega
ssh: {hosts: [login1.example, "2001:db8::7"], user: ada, port: 2222, key: /k, certificate: /k-cert.pub, passphrase_file: /p, agent: true,
      known_hosts: /known, fingerprint: )", kFingerprint, R"(, jump: "ada@jump.example:22", one_time_code_program: /bin/code, keepalive: 7s}
root: ~/itwin
scheduler: slurm
agent: /opt/itwin/itwin-agent
worker: {path: /opt/itwin/itwin-worker, operators: /etc/operators.json}
launcher: srun --mpi=pmix -n {ranks}
prologue: [source /etc/profile.d/modules.sh]
modules: [OpenMPI/4.1.4]
container: apptainer exec --nv {image}
image: /images/itwin.sif
env: {OMP_NUM_THREADS: 4, NCCL_DEBUG: WARN}
gpu_request: --gres=gpu:{type}:{gpus}
signal_before: 2m
partitions:
  gpu: {max_time: 24h, max_nodes: 8, cpus_per_node: 64, memory_per_node: 256G, gpus_per_node: 4}
  cpu:
defaults: {partition: gpu, account: hpc1, qos: normal, reservation: res, constraint: "a&b", gpu_type: a100, exclusive: true,
           exclude_nodes: [n7], options: ["--licenses=x:1"], time: 2h, memory: 64G}
allow: {partitions: [gpu, cpu], accounts: [hpc1], qos: [normal], reservations: [], constraints: [a], options: [--licenses]}
query_interval: 5s
max_waiting: 7
spool_retention: 24h
)"), "f");
  ASSERT_OK(site);
  EXPECT_EQ(site->ssh->hosts[1], "2001:db8::7");
  EXPECT_EQ(site->ssh->port, 2222);
  EXPECT_EQ(site->ssh->keepalive, absl::Seconds(7));
  EXPECT_THAT(site->ssh->fingerprints, ElementsAre(kFingerprint));
  EXPECT_EQ(site->address(), "ssh ada@login1.example, 2001:db8::7 port 2222 by ada@jump.example:22");
  EXPECT_EQ(site->settings.launch.launcher(), "srun --mpi=pmix -n {ranks}");
  EXPECT_THAT(site->settings.launch.prologue(), ElementsAre("source /etc/profile.d/modules.sh", "module load OpenMPI/4.1.4"));
  EXPECT_EQ(site->settings.launch.worker(), "/opt/itwin/itwin-worker");
  EXPECT_EQ(site->worker_operators, "/etc/operators.json");
  EXPECT_EQ(site->settings.launch.container(), "apptainer exec --nv {image}");
  EXPECT_EQ(site->settings.image, "/images/itwin.sif");
  EXPECT_EQ(site->settings.launch.env().at("OMP_NUM_THREADS"), "4");
  EXPECT_EQ(site->settings.slurm.gpu_request(), "--gres=gpu:{type}:{gpus}");
  EXPECT_EQ(site->settings.slurm.signal_before().seconds(), 120);
  EXPECT_TRUE(site->settings.slurm.exclusive());
  EXPECT_THAT(site->settings.slurm.options(), ElementsAre("--licenses=x:1"));
  ASSERT_EQ(site->settings.partitions.size(), 2u);
  EXPECT_EQ(site->settings.partitions[0].memory_mib_per_node, 256 * 1024);
  EXPECT_EQ(site->settings.default_memory_mib, 64 * 1024);
  EXPECT_EQ(site->settings.default_time, absl::Hours(2));
  EXPECT_THAT(*site->settings.allowed_reservations, ElementsAre());
  EXPECT_EQ(site->query_interval, absl::Seconds(5));
  EXPECT_FALSE(site->installs());
  EXPECT_EQ(ConnectCommand(*site),
            "exec \"/opt/itwin/itwin-agent\" connect --root \"$HOME/itwin\" --scheduler slurm --worker \"/opt/itwin/itwin-worker\"");
}

TEST(SiteFile, LittleIsEnough) {
  const auto site = ParseSiteFile(kSmall, "f");
  ASSERT_OK(site);
  EXPECT_TRUE(site->installs());
  EXPECT_EQ(ConnectCommand(*site),
            "exec \"/scratch/$USER/itwin/releases/current/itwin-agent\" connect --root \"/scratch/$USER/itwin\" --scheduler slurm");
  EXPECT_OK(ParseSiteFile("name: lab\ncommand: [ssh, -T, lab, itwin-agent, connect, --root, /scratch/itwin]\n", "f"));
}

TEST(SiteFile, ProblemsSayWhereWhatAndWhatWouldBeRight) {
  const auto with = [](absl::string_view more) { return ParseSiteFile(absl::StrCat(kSmall, more), "vega.yaml"); };
  EXPECT_THAT(ParseSiteFile("name: vega\nshh: {hosts: [a]}\n", "vega.yaml"),
              StatusIs(kInvalid, HasSubstr("vega.yaml:2: shh: unknown key; did you mean 'ssh'?")));
  EXPECT_THAT(with("partitions: {gpu: {max_tme: 1h}}\n"),
              StatusIs(kInvalid, HasSubstr("vega.yaml:8: partitions.gpu.max_tme: unknown key; did you mean 'max_time'?")));
  EXPECT_THAT(with("max_waiting: many\n"), StatusIs(kInvalid, HasSubstr("vega.yaml:8: max_waiting: must be a whole number")));
  EXPECT_THAT(ParseSiteFile("name: Vega\n", "f"), StatusIs(kInvalid, AllOf(HasSubstr("name: 'Vega' must be"), HasSubstr("command: missing; give `ssh`"))));
  EXPECT_THAT(ParseSiteFile("name: v\nssh: {hosts: [a]}\nroot: /r\n", "f"), StatusIs(kInvalid, HasSubstr("ssh.key: missing")));
  EXPECT_THAT(ParseSiteFile("name: v\nssh: {hosts: [a], key: id}\n", "f"),
              StatusIs(kInvalid, AllOf(HasSubstr("ssh.key: 'id' must be an absolute path"), HasSubstr("root: missing; give a directory"))));
  EXPECT_THAT(with("command: [x]\n"), StatusIs(kInvalid, HasSubstr("command: stands beside `ssh`")));
  EXPECT_THAT(with("worker: {path: bin/w}\n"), StatusIs(kInvalid, HasSubstr("worker.path")));
  EXPECT_THAT(with("gpu_request: --gres=gpu\n"), StatusIs(kInvalid, HasSubstr("with {gpus} in it")));
  EXPECT_THAT(with("allow: {options: [\"--licenses=3\"]}\n"), StatusIs(kInvalid, HasSubstr("without a value")));
  EXPECT_THAT(with("worker: {operators: here.json}\n"), StatusIs(kInvalid, HasSubstr("worker.operators: must be an absolute path")));
  EXPECT_THAT(with("image: a.sif\n"), StatusIs(kInvalid, HasSubstr("image: has no place: `container` must say where it goes")));
  EXPECT_THAT(with("container: apptainer exec {image}\nimage: \"a b\"\n"), StatusIs(kInvalid, HasSubstr("image: 'a b' is no name of a container image")));
  EXPECT_THAT(with("name: twice\n"), StatusIs(kInvalid, HasSubstr("is there twice")));
  EXPECT_THAT(ParseSiteFile("[1", "f"), StatusIs(kInvalid, HasSubstr("f:1")));
}

TEST(SiteFile, NothingInItBecomesAnotherCommand) {
  for (const char* root : {"/scratch/a;b", "/a b", "/a`id`", "/a$(id)", "/a\"b", "a/b", "/", "/a'b", "/a${x}", "/a$"}) {
    EXPECT_THAT(ParseSiteFile(absl::StrCat("name: v\nssh: {hosts: [a], key: /k}\nroot: '", root, "'\n"), "f"), StatusIs(kInvalid, ::testing::_)) << root;
  }
  for (const char* more : {"modules: [\"a; rm -rf x\"]\n", "prologue: [\"a\\nb\"]\n", "launcher: \"a\\nb\"\n", "env: {\"A B\": 1}\n"}) {
    EXPECT_THAT(ParseSiteFile(absl::StrCat(kSmall, more), "f"), StatusIs(kInvalid, ::testing::_)) << more;
  }
  EXPECT_THAT(ParseSiteFile("name: v\nssh: {hosts: [\"-oProxyCommand=x\"], key: /k}\nroot: /r\n", "f"), StatusIs(kInvalid, HasSubstr("no host name")));
  EXPECT_THAT(ParseSiteFile("name: v\nssh: {hosts: [a], user: \"-l x\", key: /k}\nroot: /r\n", "f"), StatusIs(kInvalid, HasSubstr("no account name")));
}

TEST(SiteFile, AnAcceptedHostKeyIsWrittenIntoIt) {
  const auto block = WithFingerprints(kSmall, {kFingerprint});
  ASSERT_OK(block);
  EXPECT_THAT(*block, HasSubstr(absl::StrCat("ssh:\n  fingerprint: [\"", kFingerprint, "\"]\n  hosts:")));
  EXPECT_THAT(ParseSiteFile(*block, "f")->ssh->fingerprints, ElementsAre(kFingerprint));
  // The rest stays as the administrator wrote it.
  const auto flow = WithFingerprints("# ours\nname: v\nssh: {hosts: [a], key: /k}  # by hand\nroot: /r\n", {kFingerprint, kFingerprint});
  ASSERT_OK(flow);
  EXPECT_THAT(*flow, AllOf(HasSubstr("# ours"), HasSubstr("# by hand")));
  EXPECT_EQ(ParseSiteFile(*flow, "f")->ssh->fingerprints.size(), 2u);
  EXPECT_THAT(WithFingerprints(*block, {kFingerprint}), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("names other host keys")));
}

TEST(SiteFile, SecretsAreFilesThatOnlyTheirOwnerReads) {
  testing::TempDirectory directory;
  const std::string key = directory / "id";
  SiteFile site;
  site.ssh.emplace().key = key;
  EXPECT_THAT(CheckSecretFiles(site), StatusIs(absl::StatusCode::kNotFound, HasSubstr("ssh.key, a file of the gateway's machine")));
  ASSERT_OK(WriteFileAtomically(key, "secret", 0640));
  ASSERT_EQ(chmod(key.c_str(), 0640), 0);
  EXPECT_THAT(CheckSecretFiles(site), StatusIs(absl::StatusCode::kPermissionDenied, AllOf(HasSubstr("mode 0640"), HasSubstr("chmod 600 " + key))));
  ASSERT_EQ(chmod(key.c_str(), 0600), 0);
  EXPECT_OK(CheckSecretFiles(site));
  site.ssh->passphrase_file = directory / "none";
  EXPECT_THAT(CheckSecretFiles(site), StatusIs(absl::StatusCode::kNotFound, HasSubstr("passphrase_file")));
}

}  // namespace
}  // namespace itwin::server
