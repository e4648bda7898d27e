#include "agent/rpc/follow_reactor.h"

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "common/grpc_status.h"

namespace itwin::agent {

FollowReactor::FollowReactor(FollowLoop* loop) : loop_(loop) {
  // The loop outlives the server, so posting cannot fail while there are reactors.
  ITWIN_CHECK(loop_->Post([this] {
    session_ = loop_->OpenSession(this);
    StartRead(&request_);
  }));
}

void FollowReactor::OnReadDone(bool ok) {
  loop_->Post([this, ok] {
    if (ok) {
      TakeRequest(request_);
    } else {
      End(grpc::Status::OK);  // the gateway has no more to say: it leaves
    }
  });
}

void FollowReactor::TakeRequest(const v1::FollowRequest& request) {
  if (ending_) return;
  for (const std::string& text : request.drop()) {
    if (const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(text); key.ok()) loop_->Unfollow(session_, *key);
  }
  for (const v1::FollowRequest::Add& add : request.add()) {
    const absl::StatusOr<AttemptKey> key = AttemptKey::Parse(add.attempt());
    if (!key.ok()) {
      End(ToGrpc(key.status()));
      return;
    }
    loop_->Follow(session_, *key, add.cursor());
  }
  StartRead(&request_);
}

void FollowReactor::Send(v1::FollowResponse response) {
  if (ending_) return;
  ITWIN_CHECK(!writing_);
  writing_ = true;
  response_ = std::move(response);
  StartWrite(&response_);
}

void FollowReactor::OnWriteDone(bool ok) {
  loop_->Post([this, ok] {
    writing_ = false;
    response_.Clear();
    if (!ok) {
      End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the connection is gone"));
    } else if (ending_) {
      End(end_status_);
    } else {
      loop_->Writable(session_);
    }
  });
}

void FollowReactor::OnCancel() {
  loop_->Post([this] { End(grpc::Status::CANCELLED); });
}

void FollowReactor::End(grpc::Status status) {
  if (!ending_) {
    ending_ = true;
    end_status_ = std::move(status);
    loop_->CloseSession(session_);
  }
  if (writing_ || finished_) return;
  finished_ = true;
  Finish(end_status_);
}

void FollowReactor::OnDone() {
  // Behind everything that was posted before, so nothing of ours is left in the mailbox.
  loop_->Post([this] {
    loop_->CloseSession(session_);
    delete this;
  });
}

}  // namespace itwin::agent
