#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <thread>
#include <vector>

#include "common/files.h"

namespace itwin::agent {

// Accepts connections on the agent's socket, turns away other users' processes, and hands the rest to the gRPC
// server. A thread of its own that sleeps between connections.
class Acceptor {
 public:
  Acceptor(FileDescriptor listener, grpc::Server* server);
  ~Acceptor();  // Stop()
  void Start();
  void Stop();  // idempotent; open connections are the server's to end
  // Open now. Thread-safe.
  int connections() const { return connections_; }

 private:
  void Run();
  void Accept();

  FileDescriptor listener_;
  grpc::Server* const server_;
  FileDescriptor stop_;
  std::thread thread_;
  std::vector<FileDescriptor> open_;  // duplicates, only to see the other side hang up; the thread's own
  std::atomic<int> connections_{0};
};

}  // namespace itwin::agent
