// What can be tested without a GPU: what is said when the libraries are not there, or are not what
// they should be.
#include "agent/worker/dist/nccl_communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string LoadError(const NcclLibraries::Names& names) {
  try {
    NcclLibraries::Load(names);
  } catch (const WorkerError& error) {
    EXPECT_EQ(error.failure, FailureClass::kUser);
    return error.what();
  }
  return "";
}

TEST(Nccl, SaysWhichLibraryIsMissing) {
  EXPECT_THAT(LoadError({.cuda = {"libno-such-cuda.so"}, .nccl = {"libm.so.6"}}),
              AllOf(HasSubstr("the CUDA runtime (libcudart) is not there"),
                    HasSubstr("libno-such-cuda.so"), HasSubstr("LD_LIBRARY_PATH")));
  EXPECT_THAT(LoadError({.cuda = {"libno-such-cuda.so", "libm.so.6"}, .nccl = {"libno-nccl.so"}}),
              HasSubstr("NCCL (libnccl) is not there"));
}

TEST(Nccl, SaysWhichFunctionALibraryLacks) {
  EXPECT_THAT(LoadError({.cuda = {"libm.so.6"}, .nccl = {"libm.so.6"}}),
              HasSubstr("has no function cudaGetDeviceCount"));
}

TEST(Nccl, AvailabilityIsASentence) {
  std::string why_not;
  if (NcclAvailable(&why_not)) {
    EXPECT_GT(NcclLibraries::Get().CountDevices(), 0);
  } else {
    EXPECT_THAT(why_not, HasSubstr("GPUs cannot be used: "));
  }
}

}  // namespace
}  // namespace itwin::worker
