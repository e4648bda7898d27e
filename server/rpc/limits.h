#pragma once

namespace itwin::server {

// What gateway.cc gives to grpc::ServerBuilder::SetMaxReceiveMessageSize: a spec or a chunk of 1 MiB and some slack.
// A larger message is refused by gRPC with RESOURCE_EXHAUSTED before it is read.
inline constexpr int kMaxReceiveMessageBytes = 2 << 20;
inline constexpr int kMaxWatchers = 10'000;
inline constexpr int kMaxTransfers = 256;             // uploads and downloads at once; beyond it RESOURCE_EXHAUSTED
inline constexpr int kTransferChunkBytes = 1 << 20;   // of one message

}  // namespace itwin::server
