#pragma once

#include <grpcpp/grpcpp.h>

#include "agent/follow_loop.h"
#include "itwin/agent/v1/agent.pb.h"

namespace itwin::agent {

// One Follow stream. gRPC's callbacks only post; every decision is made in the follow loop's thread, so there is no
// lock. One read and one write are under way at most. Deletes itself, in the loop's thread, after OnDone.
class FollowReactor final : public grpc::ServerBidiReactor<v1::FollowRequest, v1::FollowResponse>, public FollowSink {
 public:
  explicit FollowReactor(FollowLoop* loop);

  void Send(v1::FollowResponse response) override;  // the loop's thread

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  void TakeRequest(const v1::FollowRequest& request);
  void End(grpc::Status status);

  FollowLoop* const loop_;
  v1::FollowRequest request_;   // gRPC's while a read is under way, else the loop's
  v1::FollowResponse response_;  // gRPC's while a write is under way, else the loop's
  // The loop's thread only.
  int64_t session_ = 0;
  bool writing_ = false;
  bool ending_ = false;
  bool finished_ = false;
  grpc::Status end_status_;
};

}  // namespace itwin::agent
