// The site files of deploy/sites/: each can be read, and what it makes of a job is written down in tests/data/sites/. After a change
// that is meant: ITWIN_UPDATE_GOLDEN=1 ctest -R server/sites/site_examples
#include <gmock/gmock.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "agent/scheduler/launch.h"
#include "agent/scheduler/slurm/batch_script.h"
#include "common/files.h"
#include "server/dispatch/errands.h"
#include "server/sites/site_file.h"
#include "server/sites/site_link.h"
#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

std::string Source(const std::string& path) {
  const char* source = getenv("ITWIN_SOURCE");
  return absl::StrCat(source != nullptr ? source : ".", "/", path);
}

v1::JobSpec Job(bool gpus) {
  v1::JobSpec spec;
  spec.set_name("wind");
  v1::Resources* resources = spec.mutable_resources();
  resources->set_nodes(2);
  resources->set_ranks_per_node(4);
  resources->set_gpus_per_node(gpus ? 4 : 0);
  spec.mutable_train()->mutable_model()->set_builtin("downscale");
  spec.mutable_train()->mutable_data()->set_netcdf("site:/data/winds.cdf");
  return spec;
}

// The request as the site's agent hands it to SLURM, and the command line of the ranks.
std::string BatchText(const agent::v1::StartAttemptRequest& request) {
  const agent::AttemptDirectory directory("/scratch/itwin", *AttemptKey::Parse(request.attempt()));
  agent::Submission submission{.directory = directory};
  submission.nodes = request.nodes();
  submission.ranks_per_node = request.ranks_per_node();
  submission.cpus_per_rank = request.cpus_per_rank();
  submission.gpus_per_node = request.gpus_per_node();
  submission.memory_mib_per_node = request.memory_mib_per_node();
  submission.time = absl::Seconds(request.time().seconds());
  submission.slurm = request.slurm();
  const auto options = agent::SbatchOptions(submission, "itwin-" + request.attempt());
  EXPECT_OK(options);
  const auto command = agent::LaunchCommand(directory, request, {.worker = "/scratch/itwin/releases/current/itwin-worker"});
  EXPECT_OK(command);
  return absl::StrCat(absl::StrJoin(*options, "\n"), "\n\n", agent::RenderBatchScript(submission, {}), "\n", absl::StrJoin(*command, " "), "\n");
}

std::string Rendered(const SiteFile& site) {
  std::string out = absl::StrCat("# reached by\n", site.address(), "\n");
  if (site.ssh) {
    const auto ssh = SshOptionsOf(site);
    EXPECT_OK(ssh);
    absl::StrAppend(&out, "jump ", ssh->jump.size(), ", keepalive ", absl::FormatDuration(ssh->keepalive_interval), ", certificate ",
                    ssh->certificate_file.empty() ? "no" : "yes", ", fingerprints ", ssh->fingerprints.size(), "\n", ssh->command, "\n");
  }
  for (const bool gpus : {false, true}) {
    absl::StrAppend(&out, "\n# StartAttemptRequest, ", gpus ? "4 GPUs" : "no GPUs", "\n");
    const auto request = StartRequestOf(Job(gpus), *AttemptKey::Parse("7f3c0a1b2c3d4e5f-1"), "", 0, {site.name, &site.settings, nullptr});
    if (!request.ok()) {
      absl::StrAppend(&out, "refused: ", request.status().message(), "\n");
      continue;
    }
    agent::v1::StartAttemptRequest shown = *request;
    shown.clear_spec_json();
    std::string text;
    google::protobuf::TextFormat::PrintToString(shown, &text);
    absl::StrAppend(&out, text, "\n# what the agent makes of it\n", BatchText(*request));
  }
  return out;
}

class SiteExamples : public ::testing::TestWithParam<const char*> {};

TEST_P(SiteExamples, AreWhatTheyShow) {
  setenv("HOME", "/home/itwin", 1);
  const auto site = ReadSiteFile(Source(absl::StrCat("deploy/sites/", GetParam(), ".yaml")));
  ASSERT_OK(site);
  EXPECT_TRUE(site->installs());
  const std::string golden = Source(absl::StrCat("tests/data/sites/", GetParam(), ".txt"));
  const std::string rendered = Rendered(*site);
  if (getenv("ITWIN_UPDATE_GOLDEN") != nullptr) {
    ASSERT_OK(WriteFileAtomically(golden, rendered, 0644));
  }
  const auto expected = ReadFile(golden);
  ASSERT_OK(expected);
  EXPECT_EQ(rendered, *expected);
}

INSTANTIATE_TEST_SUITE_P(All, SiteExamples, ::testing::Values("generic", "juwels-like", "vega-like", "leonardo-like"),
                         [](const auto& example) { return absl::StrReplaceAll(example.param, {{"-", "_"}}); });

}  // namespace
}  // namespace itwin::server
