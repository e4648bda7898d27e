#include "common/grpc_status.h"

#include <gmock/gmock.h>

namespace itwin {
namespace {

TEST(GrpcStatus, KeepsCodeAndMessageBothWays) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "because");
    EXPECT_EQ(static_cast<int>(ToGrpc(status).error_code()), code);
    EXPECT_EQ(FromGrpc(ToGrpc(status)), status);
  }
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpc(grpc::Status::OK).ok());
}

TEST(GrpcStatus, CutsLongMessages) {
  const std::string message = ToGrpc(absl::InternalError(std::string(100'000, 'x'))).error_message();
  EXPECT_LE(message.size(), 4200u);
  EXPECT_GT(message.size(), 1000u);
}

}  // namespace
}  // namespace itwin
