#include "agent/worker/device/device.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>

#include <ATen/Context.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/version.h>

#include "agent/worker/device/gpu.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// Whose gradients stay where they are and are exchanged after backward: what a recorded step can be part of.
const std::set<std::string> kRecordable = {"single", "ddp", "local_sgd", "zero1"};

std::string Count(int n, const std::string& what) {
  return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
}

}  // namespace

GpuSituation FindGpus(int local_rank, const std::string& host) {
  return {.built = gpu::Built(),
          .visible = gpu::Built() ? gpu::Count() : 0,
          .local_rank = local_rank,
          .host = host,
          .libtorch = TORCH_VERSION};
}

at::Device ChooseDevice(const Resources& resources, const GpuSituation& found) {
  if (resources.gpus_per_node == 0) return at::kCPU;
  if (!found.built) {
    throw UserError("resources.gpus_per_node is " + std::to_string(resources.gpus_per_node) +
                    ", but this worker is built on LibTorch " + found.libtorch +
                    " without CUDA; have the site install one that is built with CUDA, or leave "
                    "gpus_per_node out");
  }
  if (resources.ranks_per_node > resources.gpus_per_node) {
    throw UserError("resources.ranks_per_node is " + std::to_string(resources.ranks_per_node) +
                    ", but gpus_per_node is " + std::to_string(resources.gpus_per_node) +
                    "; each rank needs a GPU of its own");
  }
  // One GPU alone may be what the scheduler has bound this rank to; else ranks take them in turn.
  const int index = found.visible == 1 ? 0 : found.local_rank;
  if (index >= found.visible) {
    WorkerError error(FailureClass::kInfra,
                      "rank " + std::to_string(found.local_rank) + " of node " + found.host + " sees " +
                          Count(found.visible, "GPU") + ", but the job was promised " +
                          std::to_string(resources.gpus_per_node) +
                          " per node; the driver, the scheduler's binding or the GPU is at fault "
                          "(nvidia-smi on the node tells)");
    error.host = found.host;
    throw error;
  }
  return at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index));
}

void CheckGpuSettings(const TrainSpec& spec, const std::string& strategy) {
  if (spec.resources.gpus_per_node == 0) {
    if (spec.gpu.given) {
      throw UserError("train.gpu is for jobs with GPUs; set resources.gpus_per_node, or remove it");
    }
    return;
  }
  if (std::holds_alternative<Lbfgs>(spec.optimizer)) {
    throw UserError("train.optimizer is lbfgs, which runs on processors only; use adam, or leave resources.gpus_per_node out");
  }
  const bool measured = std::holds_alternative<Lamb>(spec.optimizer) ||
                        std::holds_alternative<Lars>(spec.optimizer);
  if (measured && strategy.starts_with("zero")) {
    throw UserError("train.optimizer: lamb and lars do not go with strategy " + strategy +
                    " on GPUs; use ddp");
  }
  if (!spec.gpu.graphs) return;
  if (!spec.phases.empty()) {
    throw UserError("train.gpu.graphs does not go with phases, each of which is another step");
  }
  if (!kRecordable.contains(strategy)) {
    throw UserError("train.gpu.graphs does not go with strategy " + strategy + "; use ddp or zero1");
  }
}

void RequireOwnGpus(const std::vector<std::string>& uuids) {
  std::map<std::string, size_t> owner;
  for (size_t rank = 0; rank < uuids.size(); ++rank) {
    const auto [found, is_new] = owner.emplace(uuids[rank], rank);
    if (is_new) continue;
    WorkerError error(FailureClass::kInfra, "ranks " + std::to_string(found->second) + " and " +
                                                std::to_string(rank) +
                                                " were given the same GPU; the scheduler's binding is at "
                                                "fault (give each rank one, or all of a node's to all)");
    error.rank = static_cast<int>(rank);
    throw error;
  }
}

void SetUpDevice(at::Device device, const TrainSpec& spec) {
  if (device.is_cpu()) return;
  c10::impl::VirtualGuardImpl(device.type()).setDevice(device);
  at::globalContext().setAllowTF32CuBLAS(spec.gpu.tf32);
  at::globalContext().setAllowTF32CuDNN(spec.gpu.tf32);
  // Shapes are the same in every step but an epoch's last, so trying convolutions out pays.
  at::globalContext().setBenchmarkCuDNN(!spec.deterministic);
  at::globalContext().setDeterministicCuDNN(spec.deterministic);
}

std::string DescribeDevice(at::Device device) {
  if (device.is_cpu()) return "cpu";
  return device.str() + ", " + gpu::Describe(device.index()).name;
}

}  // namespace itwin::worker
