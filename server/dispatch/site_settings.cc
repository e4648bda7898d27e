#include "server/dispatch/site_settings.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "common/spec/nearest_name.h"
#include "common/status_macros.h"

namespace itwin::server {
namespace {

constexpr absl::Duration kDefaultTime = absl::Hours(1);
constexpr char kImagePlace[] = "{image}";  // in a site file's `container`

absl::Duration ToDuration(const google::protobuf::Duration& time) {
  return absl::Seconds(time.seconds()) + absl::Nanoseconds(time.nanos());
}

// One partition as far as it is known: the site file's limits over SLURM's.
PartitionLimits Merged(const PartitionLimits& own, const agent::v1::Partition* fact) {
  PartitionLimits out = own;
  if (fact == nullptr) return out;
  const auto lower = [](auto mine, auto theirs) { return mine == 0 ? theirs : theirs == 0 ? mine : std::min(mine, theirs); };
  if (fact->has_max_time()) out.max_time = std::min(out.max_time, ToDuration(fact->max_time()));
  const int nodes = fact->max_nodes_per_job() > 0 ? std::min(fact->max_nodes_per_job(), fact->nodes()) : fact->nodes();
  out.max_nodes = lower(out.max_nodes, nodes);
  out.cpus_per_node = lower(out.cpus_per_node, fact->cpus_per_node());
  out.memory_mib_per_node = lower(out.memory_mib_per_node, fact->memory_mib_per_node());
  // A site file may know GPUs that SLURM does not count.
  out.gpus_per_node = out.gpus_per_node > 0 ? out.gpus_per_node : fact->gpus_per_node();
  return out;
}

absl::Status Allowed(const std::string& site, const std::optional<std::vector<std::string>>& allowed, const char* what,
                     const std::string& field, const std::string& value) {
  if (value.empty() || !allowed) return absl::OkStatus();
  for (const auto part : absl::StrSplit(value, ',')) {
    if (std::find(allowed->begin(), allowed->end(), part) != allowed->end()) continue;
    if (allowed->empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat("site ", site, " lets no job choose its ", what, "; leave resources.", field, " out"));
    }
    return absl::FailedPreconditionError(absl::StrCat("site ", site, " does not allow ", what, " '", part, "' (resources.", field,
                                                      "); ", UnknownNameHint(part, *allowed)));
  }
  return absl::OkStatus();
}

std::string TimeText(absl::Duration time) {
  std::string text = absl::FormatDuration(time);
  // "24h0m0s" reads as 24h.
  for (const char* zero : {"0s", "0m"}) {
    const std::string tail(zero);
    if (text.size() > tail.size() + 1 && text.compare(text.size() - 2, 2, tail) == 0 && !isdigit(static_cast<unsigned char>(text[text.size() - 3]))) {
      text.resize(text.size() - 2);
    }
  }
  return text;
}

// Why this partition cannot take the job; "" when it can.
std::string TooMuch(const PartitionLimits& limits, const v1::Resources& resources, int64_t memory, absl::Duration time, bool time_said) {
  const int nodes = std::max(1, resources.nodes());
  const int cpus = std::max(1, resources.ranks_per_node()) * std::max(1, resources.cpus_per_rank());
  if (limits.max_nodes > 0 && nodes > limits.max_nodes) {
    return absl::StrCat("it gives a job at most ", limits.max_nodes, limits.max_nodes == 1 ? " node" : " nodes", ", and resources.nodes is ", nodes);
  }
  if (limits.cpus_per_node > 0 && cpus > limits.cpus_per_node) {
    return absl::StrCat("its nodes have ", limits.cpus_per_node, " CPUs, and ranks_per_node × cpus_per_rank is ", cpus);
  }
  if (resources.gpus_per_node() > limits.gpus_per_node) {
    return absl::StrCat("its nodes have ", limits.gpus_per_node == 0 ? "no" : absl::StrCat(limits.gpus_per_node), " GPUs, and resources.gpus_per_node is ",
                        resources.gpus_per_node());
  }
  if (limits.memory_mib_per_node > 0 && memory > limits.memory_mib_per_node) {
    return absl::StrCat("its nodes have ", limits.memory_mib_per_node, " MiB, and the job asks for ", memory, " MiB (resources.memory_mib_per_node)");
  }
  if (time_said && time > limits.max_time) {
    return absl::StrCat("its limit is ", TimeText(limits.max_time), ", and resources.time is ", TimeText(time),
                        "; ask for less, and save checkpoints: the job is continued where it was saved");
  }
  return "";
}

}  // namespace

absl::StatusOr<std::string> ContainerLine(const std::string& site, const SiteSettings& settings, const std::string& image) {
  const std::string& line = settings.launch.container();
  if (!absl::StrContains(line, kImagePlace)) {
    if (image.empty()) return line;
    return absl::FailedPreconditionError(
        line.empty() ? absl::StrCat("site ", site, " runs jobs in no container, so image '", image,
                                    "' means nothing there; leave image out, or name a site with a container runtime")
                     : absl::StrCat("site ", site, " runs every job in the container of its own site file, not in '", image,
                                    "'; leave image out, or have its administrator write {image} into the `container` line"));
  }
  const std::string& chosen = image.empty() ? settings.image : image;
  if (chosen.empty()) {
    return absl::FailedPreconditionError(absl::StrCat("site ", site, " runs jobs in a container, and its site file has no default image; "
                                                      "name one, such as image: docker://debian:12"));
  }
  return absl::StrReplaceAll(line, {{kImagePlace, chosen}});
}

std::optional<std::string> SlurmOnlyField(const v1::Resources& resources) {
  if (!resources.partition().empty()) return "partition";
  if (!resources.account().empty()) return "account";
  if (!resources.qos().empty()) return "qos";
  if (!resources.reservation().empty()) return "reservation";
  if (!resources.constraint().empty()) return "constraint";
  if (resources.exclude_nodes_size() > 0) return "exclude_nodes";
  if (resources.scheduler_options_size() > 0) return "scheduler_options";
  return std::nullopt;
}

absl::StatusOr<SlurmPlan> PlanForSlurm(const std::string& site, const SiteSettings& settings,
                                       const agent::v1::SlurmFacts* facts, const v1::Resources& resources) {
  ITWIN_RETURN_IF_ERROR(Allowed(site, settings.allowed_partitions, "partition", "partition", resources.partition()));
  ITWIN_RETURN_IF_ERROR(Allowed(site, settings.allowed_accounts, "account", "account", resources.account()));
  ITWIN_RETURN_IF_ERROR(Allowed(site, settings.allowed_qos, "QOS", "qos", resources.qos()));
  ITWIN_RETURN_IF_ERROR(Allowed(site, settings.allowed_reservations, "reservation", "reservation", resources.reservation()));
  // A constraint is an expression: as a whole it is allowed or not.
  if (settings.allowed_constraints && !resources.constraint().empty() &&
      std::find(settings.allowed_constraints->begin(), settings.allowed_constraints->end(), resources.constraint()) ==
          settings.allowed_constraints->end()) {
    return absl::FailedPreconditionError(
        absl::StrCat("site ", site, " does not allow constraint '", resources.constraint(), "' (resources.constraint); ",
                     settings.allowed_constraints->empty() ? "leave it out" : UnknownNameHint(resources.constraint(), *settings.allowed_constraints)));
  }
  for (const std::string& option : resources.scheduler_options()) {
    const std::string name = option.substr(0, option.find('='));
    if (std::find(settings.allowed_options.begin(), settings.allowed_options.end(), name) != settings.allowed_options.end()) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("site ", site, " does not allow ", name, " (resources.scheduler_options); ",
                     settings.allowed_options.empty() ? "its administrator can list it under allow.options in the site file"
                                                      : absl::StrCat("it allows ", absl::StrJoin(settings.allowed_options, ", "))));
  }

  SlurmPlan plan;
  agent::v1::SlurmSettings& slurm = plan.slurm;
  slurm = settings.slurm;
  if (!resources.account().empty()) slurm.set_account(resources.account());
  if (!resources.qos().empty()) slurm.set_qos(resources.qos());
  if (!resources.reservation().empty()) slurm.set_reservation(resources.reservation());
  if (!resources.constraint().empty()) slurm.set_constraint(resources.constraint());
  if (resources.exclusive()) slurm.set_exclusive(true);
  if (!resources.gpu_type().empty()) slurm.set_gpu_type(resources.gpu_type());
  slurm.mutable_exclude_nodes()->MergeFrom(resources.exclude_nodes());
  slurm.mutable_options()->MergeFrom(resources.scheduler_options());

  plan.memory_mib_per_node = resources.memory_mib_per_node() > 0 ? resources.memory_mib_per_node() : settings.default_memory_mib;
  const bool time_said = resources.has_time() && ToDuration(resources.time()) > absl::ZeroDuration();
  plan.time = time_said                                            ? ToDuration(resources.time())
              : settings.default_time > absl::ZeroDuration() ? settings.default_time
                                                             : kDefaultTime;

  // The partition: the job's, else the site's default, else the first that fits.
  const auto fact_of = [&](absl::string_view name) -> const agent::v1::Partition* {
    if (facts == nullptr) return nullptr;
    for (const agent::v1::Partition& one : facts->partitions()) {
      if (one.name() == name) return &one;
    }
    return nullptr;
  };
  const auto limits_of = [&](absl::string_view name) {
    PartitionLimits own{.name = std::string(name)};
    for (const PartitionLimits& one : settings.partitions) {
      if (one.name == name) own = one;
    }
    return Merged(own, fact_of(name));
  };
  std::vector<std::string> candidates;
  const std::string& named = !resources.partition().empty() ? resources.partition() : settings.slurm.partition();
  const bool chosen = !named.empty();
  if (chosen) {
    for (const auto part : absl::StrSplit(named, ',')) candidates.emplace_back(part);
  } else if (!settings.partitions.empty()) {
    for (const PartitionLimits& one : settings.partitions) candidates.push_back(one.name);
  } else if (facts != nullptr) {
    for (const bool is_default : {true, false}) {
      for (const agent::v1::Partition& one : facts->partitions()) {
        if (one.is_default() != is_default) continue;
        if (settings.allowed_partitions && std::find(settings.allowed_partitions->begin(), settings.allowed_partitions->end(),
                                                     one.name()) == settings.allowed_partitions->end()) {
          continue;
        }
        candidates.push_back(one.name());
      }
    }
  }
  if (candidates.empty()) return plan;  // nothing is known: SLURM decides

  std::string why;
  std::vector<std::string> known;
  if (facts != nullptr) {
    for (const agent::v1::Partition& one : facts->partitions()) known.push_back(one.name());
  }
  const PartitionLimits* fits = nullptr;
  PartitionLimits found;
  bool found_up = false;
  for (const std::string& name : candidates) {
    const agent::v1::Partition* fact = fact_of(name);
    std::string reason;
    if (facts != nullptr && !known.empty() && fact == nullptr) {
      reason = absl::StrCat("site ", site, " has no partition '", name, "'; ", UnknownNameHint(name, known));
    } else if (facts != nullptr || std::any_of(settings.partitions.begin(), settings.partitions.end(),
                                               [&](const PartitionLimits& one) { return one.name == name; })) {
      const PartitionLimits limits = limits_of(name);
      // Without facts nothing is said about GPUs, unless the file does.
      v1::Resources asked = resources;
      if (facts == nullptr && limits.gpus_per_node == 0) asked.set_gpus_per_node(0);
      const std::string much = TooMuch(limits, asked, plan.memory_mib_per_node, plan.time, time_said);
      if (!much.empty()) reason = absl::StrCat("partition ", name, " of site ", site, " cannot run it: ", much);
      // Down is no verdict: it comes back; but one that is up is preferred.
      const bool up = fact == nullptr || fact->up();
      if (much.empty() && (fits == nullptr || (up && !found_up))) {
        found = limits;
        found_up = up;
        fits = &found;
      }
    } else {
      if (fits == nullptr) found = PartitionLimits{.name = name};
      fits = &found;
    }
    if (why.empty()) why = reason;
  }
  if (fits == nullptr) {
    if (candidates.size() > 1) absl::StrAppend(&why, " (and none of its other partitions can)");
    return absl::FailedPreconditionError(why);
  }
  // A list of partitions goes to SLURM as it is: it takes the one that starts first.
  slurm.set_partition(chosen ? named : fits->name);
  if (!time_said) plan.time = std::min(plan.time, fits->max_time);
  return plan;
}

}  // namespace itwin::server
