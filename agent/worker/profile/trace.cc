#include "agent/worker/profile/trace.h"

#include <array>
#include <cstdio>
#include <limits>

#include "agent/worker/dist/gather_texts.h"
#include "agent/worker/report/metric_sink.h"

namespace itwin::worker {
namespace {

constexpr int kPings = 20;

void AppendEvent(std::string& text, const CollectiveLog::Event& event, int rank, size_t lane,
                 double offset) {
  char line[300];
  std::snprintf(line, sizeof(line),
                ",\n{\"name\":\"%s\",\"ph\":\"X\",\"pid\":%d,\"tid\":%zu,\"ts\":%.3f,\"dur\":%.3f",
                event.operation, rank, lane, (event.start + offset) * 1e6,
                (event.end - event.start) * 1e6);
  text += line;
  if (event.bytes > 0) text += ",\"args\":{\"bytes\":" + std::to_string(event.bytes) + "}";
  text += "}";
}

void AppendName(std::string& text, const char* what, int rank, size_t lane, const std::string& name) {
  text += ",\n{\"name\":\"" + std::string(what) + "\",\"ph\":\"M\",\"pid\":" + std::to_string(rank) +
          ",\"tid\":" + std::to_string(lane) + ",\"args\":{\"name\":";
  AppendJsonString(text, name);
  text += "}}";
}

}  // namespace

double ClockOffset(Communicator& communicator) {
  double offset = 0;
  for (int other = 1; other < communicator.size(); ++other) {
    if (communicator.rank() != 0 && communicator.rank() != other) continue;
    double best = std::numeric_limits<double>::infinity(), found = 0;
    for (int ping = 0; ping < kPings; ++ping) {
      std::array<double, 1> time{};
      if (communicator.rank() == 0) {
        communicator.Recv(BufferOf(std::span(time)), other)->Wait();  // "ready", and its clock
        time[0] = SteadySeconds();
        communicator.Send(BufferOf(std::span(time)), other)->Wait();
      } else {
        const double sent = time[0] = SteadySeconds();
        communicator.Send(BufferOf(std::span(time)), 0)->Wait();
        communicator.Recv(BufferOf(std::span(time)), 0)->Wait();
        const double received = SteadySeconds();
        if (received - sent < best) {
          best = received - sent;
          found = time[0] - (sent + received) / 2;
        }
      }
    }
    if (communicator.rank() == other) offset = found;
  }
  return offset;
}

std::string GatherTrace(const std::vector<TraceLane>& lanes, const std::string& host, double offset,
                        Communicator& communicator) {
  const int rank = communicator.rank();
  std::string mine;
  AppendName(mine, "process_name", rank, 0, "rank " + std::to_string(rank) + " (" + host + ")");
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    AppendName(mine, "thread_name", rank, lane, lanes[lane].name);
    for (const CollectiveLog::Event& event : lanes[lane].events) {
      AppendEvent(mine, event, rank, lane, offset);
    }
  }
  // Rank by rank: all at once would need the longest one's memory for each.
  std::string whole = "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";
  for (int root = 0; root < communicator.size(); ++root) {
    const std::string of_rank = BroadcastText(communicator, root == rank ? mine : "", root);
    if (rank == 0) whole += root == 0 ? of_rank.substr(1) : of_rank;
  }
  return rank == 0 ? whole + "\n]}\n" : "";
}

}  // namespace itwin::worker
