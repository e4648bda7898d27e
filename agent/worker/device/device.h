// Which device a rank computes on, and what of a job works there.
#pragma once

#include <string>
#include <vector>

#include <c10/core/Device.h>

#include "agent/worker/dist/communicator.h"
#include "agent/worker/spec/train_spec.h"

namespace itwin::worker {

// What a rank finds where it was started.
struct GpuSituation {
  bool built = false;  // the worker, with CUDA
  int visible = 0;     // GPUs that this process may use
  int local_rank = 0;  // among the ranks of this node
  std::string host;
  std::string libtorch;  // version
};
GpuSituation FindGpus(int local_rank, const std::string& host);

// The processor, unless the job asks for GPUs. Pure. Throws UserError where this worker can never do
// what is asked, and an error of the node's (kInfra) where GPUs were promised that are not there.
at::Device ChooseDevice(const Resources& resources, const GpuSituation& found);

// Throws UserError for what a job with GPUs asks for and does not work on them, and for settings of
// GPUs in a job without. Pure.
void CheckGpuSettings(const TrainSpec& spec, const std::string& strategy);

// Whether no two ranks of a node have the same GPU (several GPUs under the same number, where the
// scheduler binds each rank to one, are fine). Every rank calls it; throws on all of them.
void RequireOwnGpus(const std::vector<std::string>& uuids);

// Once, before tensors are made on it: TF32, the choice of algorithms.
void SetUpDevice(at::Device device, const TrainSpec& spec);

// "cuda:1, NVIDIA A100-SXM4-40GB"
std::string DescribeDevice(at::Device device);

}  // namespace itwin::worker
