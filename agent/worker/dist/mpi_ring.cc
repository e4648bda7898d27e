#include "agent/worker/dist/mpi_ring.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

constexpr int kTag = 1;  // messages between ranks have 0

void WaitAll(std::vector<MPI_Request>& requests) {
  CheckMpi(MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE),
           "MPI_Waitall");
  requests.clear();
}

int64_t BytesOf(MPI_Datatype type) {
  int bytes = 1;
  CheckMpi(MPI_Type_size(type, &bytes), "MPI_Type_size");
  return bytes;
}

}  // namespace

void CheckMpi(int code, const char* call) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw AppError(std::string(call) + ": " + std::string(text, static_cast<size_t>(length)));
}

MpiRing::MpiRing(MPI_Comm comm) : comm_(comm) {
  MPI_Comm_rank(comm_, &rank_);
  MPI_Comm_size(comm_, &size_);
  const char* variable = std::getenv("ITWIN_COLLECTIVES");
  const std::string wanted = variable == nullptr || *variable == 0 ? "auto" : variable;
  if (wanted != "auto" && wanted != "mpi" && wanted != "ring")
    throw UserError("ITWIN_COLLECTIVES is \"" + wanted + "\"; known: auto, mpi, ring");

  // Each rank's node, by the lowest rank there.
  MPI_Comm node = MPI_COMM_NULL;
  CheckMpi(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node),
           "MPI_Comm_split_type");
  int lowest = rank_;
  CheckMpi(MPI_Bcast(&lowest, 1, MPI_INT, 0, node), "MPI_Bcast");
  MPI_Comm_free(&node);
  std::vector<int> node_of(static_cast<size_t>(size_));
  CheckMpi(MPI_Allgather(&lowest, 1, MPI_INT, node_of.data(), 1, MPI_INT, comm_), "MPI_Allgather");
  order_.resize(static_cast<size_t>(size_));
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int a, int b) { return node_of[a] < node_of[b]; });
  position_ = static_cast<int>(std::find(order_.begin(), order_.end(), rank_) - order_.begin());
  next_ = RankAt(position_ + 1);
  before_ = RankAt(position_ - 1);
  const bool several_nodes = node_of[order_.front()] != node_of[order_.back()];
  serves_ = size_ > 1 && (wanted == "ring" || (wanted == "auto" && several_nodes));
}

MpiRing::Parts MpiRing::Split(int64_t count) const {
  Parts parts(static_cast<size_t>(size_) + 1);
  for (int rank = 0; rank <= size_; ++rank) parts[rank] = count * rank / size_;
  return parts;
}

std::vector<MpiRing::Step> MpiRing::ReduceSteps(const char* all, const Parts& parts, char* mine,
                                                const Elements& elements) {
  int64_t longest = 0;
  for (int rank = 0; rank < size_; ++rank)
    longest = std::max(longest, parts[rank + 1] - parts[rank]);
  for (auto& work : work_)
    work.resize(std::max(work.size(), static_cast<size_t>(longest * elements.bytes)));
  std::vector<Step> steps;
  for (int s = 1; s < size_; ++s) {
    const int of = RankAt(position_ - s - 1);
    steps.push_back({.into = work_[s % 3].data(),
                     .count = parts[of + 1] - parts[of],
                     .add = all + parts[of] * elements.bytes,
                     .keep = s + 1 == size_ ? mine : nullptr,
                     .after = s - 2});  // which left from the same memory
  }
  return steps;
}

std::vector<MpiRing::Step> MpiRing::GatherSteps(char* all, const Parts& parts,
                                                const Elements& elements) const {
  std::vector<Step> steps;
  for (int s = 1; s < size_; ++s) {
    const int of = RankAt(position_ - s);
    steps.push_back({.into = all + parts[of] * elements.bytes, .count = parts[of + 1] - parts[of]});
  }
  return steps;
}

void MpiRing::Run(const char* first, int64_t count, const std::vector<Step>& steps,
                  const Elements& elements) {
  // By step, from 1.
  const size_t last = steps.size();
  std::vector<std::vector<MPI_Request>> sends(last + 1), receives(last + 1);
  const auto in_segments = [&](int64_t n, auto f) {
    const int64_t segment = std::max<int64_t>(1, kSegment / elements.bytes);
    for (int64_t at = 0; at < n; at += segment)
      f(at * elements.bytes, static_cast<int>(std::min(segment, n - at)));
  };
  const auto send = [&](size_t step, const char* data, int n) {
    CheckMpi(MPI_Isend(data, n, elements.type, next_, kTag, comm_,
                       &sends[step].emplace_back(MPI_REQUEST_NULL)),
             "MPI_Isend");
  };
  size_t posted = 0;
  int left = 0;  // messages up to this step's have
  const auto post = [&](size_t step) {
    const Step& to = steps[step - 1];
    while (left < to.after) WaitAll(sends[++left]);
    in_segments(to.count, [&](int64_t at, int n) {
      CheckMpi(MPI_Irecv(to.into + at, n, elements.type, before_, kTag, comm_,
                         &receives[step].emplace_back(MPI_REQUEST_NULL)),
               "MPI_Irecv");
    });
    posted = step;
  };

  post(1);
  in_segments(count, [&](int64_t at, int n) { send(1, first + at, n); });
  for (size_t step = 1; step <= last; ++step) {
    if (posted < step) post(step);
    // One step ahead, so that nothing that comes has to wait; unless that would wait for messages
    // that are leaving now.
    if (step < last && steps[step].after < static_cast<int>(step)) post(step + 1);
    const Step& now = steps[step - 1];
    size_t segment = 0;
    in_segments(now.count, [&](int64_t at, int n) {
      CheckMpi(MPI_Wait(&receives[step][segment++], MPI_STATUS_IGNORE), "MPI_Wait");
      char* sum = now.into + at;
      if (now.add != nullptr)
        CheckMpi(MPI_Reduce_local(now.add + at, sum, n, elements.type, elements.op),
                 "MPI_Reduce_local");
      if (now.keep != nullptr) {
        std::memcpy(now.keep + at, sum, static_cast<size_t>(n * elements.bytes));
        sum = now.keep + at;
      }
      if (step < last) send(step + 1, sum, n);
    });
  }
  for (auto& requests : sends) WaitAll(requests);
}

void MpiRing::AllReduce(void* data, int64_t count, MPI_Datatype type, MPI_Op op) {
  const Elements elements{type, op, BytesOf(type)};
  auto* all = static_cast<char*>(data);
  const Parts parts = Split(count);
  std::vector<Step> steps = ReduceSteps(all, parts, all + parts[rank_] * elements.bytes, elements);
  std::vector<Step> gather = GatherSteps(all, parts, elements);
  gather.front().after = 1;  // it comes to where the first message left from
  steps.insert(steps.end(), gather.begin(), gather.end());
  Run(all + parts[before_] * elements.bytes, parts[before_ + 1] - parts[before_], steps, elements);
}

void MpiRing::ReduceScatter(const void* all, void* mine, int64_t count, MPI_Datatype type,
                            MPI_Op op) {
  const Elements elements{type, op, BytesOf(type)};
  const auto* from = static_cast<const char*>(all);
  Run(from + before_ * count * elements.bytes, count,
      ReduceSteps(from, Split(count * size_), static_cast<char*>(mine), elements), elements);
}

void MpiRing::AllGather(const void* mine, void* all, int64_t bytes) {
  const Elements elements{MPI_BYTE, MPI_OP_NULL, 1};
  auto* to = static_cast<char*>(all);
  char* own = to + rank_ * bytes;
  if (mine != own) std::memcpy(own, mine, static_cast<size_t>(bytes));
  Run(own, bytes, GatherSteps(to, Split(bytes * size_), elements), elements);
}

}  // namespace itwin::worker
