#include "server/dispatch/plan_placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using ::itwin::testing::StatusIs;

using ::testing::AllOf;
using ::testing::HasSubstr;

SiteOffer Site(const char* name, int slots, int free_slots, bool ready = true) {
  return {.name = name, .ready = ready, .known = true, .slots = slots, .free_slots = free_slots, .trains = true};
}

TEST(PlanPlacement, TakesTheSiteThatIsNamed) {
  const std::vector<SiteOffer> offers = {Site("big", 64, 64), Site("local", 4, 0)};
  EXPECT_EQ(ChooseSite({.site = "local", .bound_site = "", .ranks = 4}, offers), 1u);
  EXPECT_EQ(ChooseSite({.site = "nowhere", .bound_site = ""}, offers), std::nullopt);
}

TEST(PlanPlacement, TakesTheReadySiteWithMostRoomThatFits) {
  EXPECT_EQ(ChooseSite({.site = "any", .bound_site = "", .ranks = 2}, {Site("a", 4, 1), Site("b", 8, 3), Site("c", 99, 50, false)}), 1u);
  EXPECT_EQ(ChooseSite({.site = "", .bound_site = "", .ranks = 16}, {Site("a", 4, 4), Site("cluster", 0, 0)}), 1u);
  EXPECT_EQ(ChooseSite({.site = "any", .bound_site = "", .ranks = 16}, {Site("a", 4, 4)}), std::nullopt);
}

TEST(PlanPlacement, GoesBackToItsCheckpoint) {
  EXPECT_EQ(ChooseSite({.site = "any", .bound_site = "a", .ranks = 1}, {Site("a", 4, -10), Site("b", 8, 8)}), 0u);
}

TEST(PlanPlacement, SaysWhatCanNeverRun) {
  const std::vector<SiteOffer> offers = {Site("local", 4, 4)};
  EXPECT_EQ(WhyImpossible({.site = "any", .bound_site = "", .ranks = 4}, offers), "");
  EXPECT_THAT(WhyImpossible({.site = "any", .bound_site = "", .ranks = 5}, offers), AllOf(HasSubstr("5 ranks"), HasSubstr("4 slots")));
  EXPECT_THAT(WhyImpossible({.site = "gone", .bound_site = ""}, offers), HasSubstr("'gone' is not configured"));
  SiteOffer bare = Site("bare", 4, 4);
  bare.trains = false;
  EXPECT_THAT(WhyImpossible({.site = "bare", .bound_site = "", .ranks = 1, .train = true}, {bare}), HasSubstr("itwin-worker"));
  EXPECT_EQ(ChooseSite({.site = "any", .bound_site = "", .ranks = 1, .train = true}, {bare}), std::nullopt);
}

TEST(PlanPlacement, AModelGoesWhereItsOperatorsAre) {
  SiteOffer old = Site("old", 8, 8), fresh = Site("fresh", 4, 0), own = Site("own", 4, 4);
  old.settings.worker_operators = std::make_shared<WorkerOperators>(
      "old", [] { return R"({"libtorch": "1.13.0", "operators": ["aten::linear"]})"; });
  fresh.settings.worker_operators = std::make_shared<WorkerOperators>(
      "fresh", [] { return R"({"libtorch": "2.6.0", "operators": ["aten::linear", "aten::rms_norm"]})"; });
  PlacementRequest request{.site = "any", .bound_site = "", .ranks = 1, .train = true};
  request.operators = {"aten::linear", "aten::rms_norm"};
  EXPECT_EQ(ChooseSite(request, {old, fresh}), 1u);
  EXPECT_THAT(WhyImpossible(request, {old}),
              AllOf(HasSubstr("LibTorch of site old (1.13.0) does not have aten::rms_norm;"), HasSubstr("name another site")));
  EXPECT_EQ(WhyImpossible(request, {own}), "");  // only its worker knows
  old.known = false;
  EXPECT_THAT(WhyImpossible(request, {old}), HasSubstr("does not have aten::rms_norm"));
  request.operators = {"aten::linear"};
  EXPECT_EQ(ChooseSite(request, {old, fresh}), 0u);
}

TEST(PlanPlacement, SiteThatHasNotAnsweredYetMayFit) {
  SiteOffer silent = Site("silent", 0, 0, false);
  silent.known = false;
  EXPECT_EQ(WhyImpossible({.site = "any", .bound_site = "", .ranks = 5}, {Site("local", 4, 4), silent}), "");
}

// ---- sites with SLURM ----

SiteOffer Cluster(const char* name, int waiting = 0) {
  SiteOffer out = Site(name, 0, 0);
  out.waiting = waiting;
  out.settings.scheduler = "slurm";
  agent::v1::SlurmFacts facts;
  const auto partition = [&](const char* called, bool is_default, int hours, int nodes, int cpus, int gpus) {
    agent::v1::Partition* one = facts.add_partitions();
    one->set_name(called);
    one->set_is_default(is_default);
    one->set_up(true);
    if (hours > 0) one->mutable_max_time()->set_seconds(hours * 3600);
    one->set_nodes(nodes);
    one->set_cpus_per_node(cpus);
    one->set_memory_mib_per_node(64'000);
    one->set_gpus_per_node(gpus);
  };
  partition("main", true, 24, 10, 16, 0);
  partition("gpu", false, 6, 4, 32, 4);
  out.slurm = facts;
  return out;
}
v1::Resources Asks(int nodes, int ranks_per_node, int gpus = 0, int hours = 0) {
  v1::Resources out;
  out.set_nodes(nodes);
  out.set_ranks_per_node(ranks_per_node);
  out.set_gpus_per_node(gpus);
  if (hours > 0) out.mutable_time()->set_seconds(hours * 3600);
  return out;
}
PlacementRequest Any(const v1::Resources& resources) {
  return {.site = "any", .bound_site = "", .ranks = std::max(1, resources.nodes()) * std::max(1, resources.ranks_per_node()), .resources = resources};
}

TEST(PlanPlacement, EveryLimitIsNamedWithTheNextStep) {
  const std::vector<SiteOffer> offers = {Cluster("vega")};
  EXPECT_EQ(WhyImpossible(Any(Asks(10, 16)), offers), "");
  EXPECT_THAT(WhyImpossible(Any(Asks(11, 1)), offers), AllOf(HasSubstr("partition main of site vega"), HasSubstr("at most 10 nodes"), HasSubstr("resources.nodes is 11")));
  EXPECT_THAT(WhyImpossible(Any(Asks(1, 64)), offers), AllOf(HasSubstr("16 CPUs"), HasSubstr("is 64")));
  EXPECT_THAT(WhyImpossible(Any(Asks(1, 1, 8)), offers), AllOf(HasSubstr("no GPUs"), HasSubstr("resources.gpus_per_node is 8")));
  EXPECT_THAT(WhyImpossible(Any(Asks(1, 1, 0, 48)), offers), AllOf(HasSubstr("its limit is 24h"), HasSubstr("resources.time is 48h"), HasSubstr("continued")));
  v1::Resources memory = Asks(1, 1);
  memory.set_memory_mib_per_node(100'000);
  EXPECT_THAT(WhyImpossible(Any(memory), offers), AllOf(HasSubstr("64000 MiB"), HasSubstr("100000 MiB")));
  v1::Resources named = Asks(1, 1);
  named.set_partition("gpus");
  EXPECT_THAT(WhyImpossible(Any(named), offers), HasSubstr("site vega has no partition 'gpus'; did you mean 'gpu'?"));
  // What only SLURM understands is not dropped in silence elsewhere.
  named.set_partition("gpu");
  EXPECT_THAT(WhyImpossible(Any(named), {Site("local", 4, 4)}), HasSubstr("site local has no SLURM, so resources.partition means nothing there"));
  EXPECT_EQ(WhyImpossible(Any(named), {Site("local", 4, 4), Cluster("vega")}), "");
}

TEST(PlanPlacement, ThePartitionThatFitsIsTaken) {
  const SiteOffer offer = Cluster("vega");
  const auto partition = [&](const v1::Resources& resources) { return PlanForSlurm("vega", offer.settings, &*offer.slurm, resources)->slurm.partition(); };
  EXPECT_EQ(partition(Asks(1, 1)), "main");
  EXPECT_EQ(partition(Asks(1, 1, 2)), "gpu");
  EXPECT_EQ(partition(Asks(1, 20)), "gpu");
  SiteSettings settings = offer.settings;
  settings.partitions = {{.name = "gpu"}, {.name = "main", .max_time = absl::Minutes(30)}};
  EXPECT_EQ(PlanForSlurm("vega", settings, &*offer.slurm, Asks(1, 1))->slurm.partition(), "gpu");  // the file's order
  // Without a time of its own a job gets what the partition gives at most.
  settings.slurm.set_partition("main");
  EXPECT_EQ(PlanForSlurm("vega", settings, &*offer.slurm, Asks(1, 1))->time, absl::Minutes(30));
  EXPECT_FALSE(PlanForSlurm("vega", settings, &*offer.slurm, Asks(1, 1, 0, 1)).ok());
  // Several named: SLURM takes the one that starts first, if one of them can.
  v1::Resources several = Asks(1, 20);
  several.set_partition("main,gpu");
  EXPECT_EQ(PlanForSlurm("vega", settings, &*offer.slurm, several)->slurm.partition(), "main,gpu");
}

TEST(PlanPlacement, ASiteAllowsWhatItsFileSays) {
  SiteOffer offer = Cluster("vega");
  offer.settings.allowed_accounts = {{"hpc1"}};
  offer.settings.allowed_qos.emplace();
  offer.settings.allowed_options = {"--licenses"};
  offer.settings.slurm.set_account("hpc1");
  v1::Resources resources = Asks(1, 1);
  resources.add_scheduler_options("--licenses=matlab:1");
  const auto plan = PlanForSlurm("vega", offer.settings, &*offer.slurm, resources);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->slurm.account(), "hpc1");
  EXPECT_EQ(plan->slurm.options(0), "--licenses=matlab:1");
  resources.set_account("hpc2");
  EXPECT_THAT(WhyImpossible(Any(resources), {offer}), AllOf(HasSubstr("does not allow account 'hpc2' (resources.account)"), HasSubstr("hpc1")));
  resources.set_account("hpc1");
  resources.set_qos("high");
  EXPECT_THAT(WhyImpossible(Any(resources), {offer}), HasSubstr("lets no job choose its QOS; leave resources.qos out"));
  resources.clear_qos();
  resources.set_scheduler_options(0, "--nice=0");
  EXPECT_THAT(WhyImpossible(Any(resources), {offer}), AllOf(HasSubstr("--nice"), HasSubstr("it allows --licenses")));
  // Also before the site has answered.
  offer.known = offer.ready = false;
  offer.slurm.reset();
  EXPECT_THAT(WhyImpossible(Any(resources), {offer}), HasSubstr("--nice"));
}

// ---- containers ----

SiteSettings Runtime(const char* line, const char* image = "") {
  SiteSettings out;
  out.launch.set_container(line);
  out.image = image;
  return out;
}

TEST(ContainerLine, TheJobsImageOrElseTheSitesTakesItsPlace) {
  const SiteSettings settings = Runtime("apptainer exec --nv '{image}' env IMAGE={image}", "/images/site.sif");
  EXPECT_EQ(*ContainerLine("vega", settings, "docker://a/b:1"), "apptainer exec --nv 'docker://a/b:1' env IMAGE=docker://a/b:1");
  EXPECT_EQ(*ContainerLine("vega", settings, ""), "apptainer exec --nv '/images/site.sif' env IMAGE=/images/site.sif");
  EXPECT_EQ(*ContainerLine("vega", Runtime("apptainer exec /images/site.sif"), ""), "apptainer exec /images/site.sif");
  EXPECT_EQ(*ContainerLine("vega", {}, ""), "");
}

TEST(ContainerLine, SaysWhatIsMissing) {
  constexpr absl::StatusCode kRefused = absl::StatusCode::kFailedPrecondition;
  EXPECT_THAT(ContainerLine("local", {}, "a.sif"), StatusIs(kRefused, AllOf(HasSubstr("site local runs jobs in no container"), HasSubstr("image 'a.sif'"))));
  EXPECT_THAT(ContainerLine("vega", Runtime("apptainer exec /images/site.sif"), "a.sif"),
              StatusIs(kRefused, AllOf(HasSubstr("of its own site file, not in 'a.sif'"), HasSubstr("write {image} into the `container` line"))));
  EXPECT_THAT(ContainerLine("vega", Runtime("apptainer exec {image}"), ""), StatusIs(kRefused, AllOf(HasSubstr("no default image"), HasSubstr("name one"))));
}

TEST(PlanPlacement, AJobWithAnImageGoesWhereItHasAPlace) {
  SiteOffer bare = Site("bare", 8, 8), fixed = Site("fixed", 8, 7), free = Site("free", 8, 1);
  fixed.settings = Runtime("apptainer exec /images/site.sif");
  free.settings = Runtime("apptainer exec {image}");
  const PlacementRequest with{.site = "any", .bound_site = "", .image = "a.sif"}, without{.site = "any", .bound_site = ""};
  EXPECT_EQ(ChooseSite(with, {bare, fixed, free}), 2u);
  EXPECT_EQ(ChooseSite(without, {free, fixed}), 1u);
  EXPECT_EQ(WhyImpossible(with, {bare, free}), "");
  EXPECT_THAT(WhyImpossible(with, {bare}), HasSubstr("site bare runs jobs in no container"));
  // A site's file says so also before the site has answered.
  free.known = fixed.known = free.ready = fixed.ready = false;
  EXPECT_THAT(WhyImpossible(with, {fixed}), HasSubstr("not in 'a.sif'"));
  EXPECT_THAT(WhyImpossible(without, {free}), HasSubstr("no default image"));
}

TEST(PlanPlacement, TheShorterQueueIsTaken) {
  EXPECT_EQ(ChooseSite(Any(Asks(1, 1)), {Cluster("busy", 9), Cluster("calm", 2)}), 1u);
  EXPECT_EQ(ChooseSite(Any(Asks(1, 2)), {Cluster("busy", 1), Site("local", 4, 3)}), 1u);  // at once
  EXPECT_EQ(ChooseSite(Any(Asks(1, 2)), {Cluster("idle", 0), Site("local", 4, 1)}), 0u);
  EXPECT_EQ(ChooseSite(Any(Asks(1, 1, 4)), {Site("local", 4, 4), Cluster("vega", 3)}), 1u) << "only it has GPUs";
}

}  // namespace
}  // namespace itwin::server
