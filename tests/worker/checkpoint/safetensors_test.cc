#include "agent/worker/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>

#include "agent/worker/error.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::HasSubstr;
using testing::Scratch;

at::Tensor Counting(std::vector<int64_t> shape, at::ScalarType type) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return at::arange(count, at::TensorOptions().dtype(at::kLong)).to(type).view(shape);
}

std::string ErrorOf(const std::filesystem::path& path) {
  try {
    ReadSafetensors(path);
  } catch (const WorkerError& e) {
    return e.what();
  }
  return "";
}

TEST(Safetensors, RoundTripKeepsEverything) {
  const Scratch scratch;
  NamedTensors written;
  for (at::ScalarType type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kLong,
                              at::kInt, at::kShort, at::kChar, at::kByte, at::kBool}) {
    written.emplace_back(std::string("t \"") + c10::toString(type), Counting({2, 3}, type));
  }
  written.emplace_back("scalar", Counting({}, at::kFloat));
  written.emplace_back("empty", Counting({0, 4}, at::kFloat));
  written.emplace_back("transposed", Counting({3, 5}, at::kFloat).t());
  WriteSafetensors(scratch / "a", written, {{"format", "pt"}});
  const NamedTensors read = ReadSafetensors(scratch / "a");
  ASSERT_EQ(read.size(), written.size());
  for (size_t i = 0; i < read.size(); ++i) {
    EXPECT_EQ(read[i].first, written[i].first);
    EXPECT_EQ(read[i].second.scalar_type(), written[i].second.scalar_type());
    EXPECT_TRUE(read[i].second.equal(written[i].second)) << read[i].first;
  }
}

TEST(Safetensors, OtherReadersUnderstandIt) {
  const Scratch scratch;
  WriteSafetensors(scratch / "a",
                   {{"x", Counting({2, 3}, at::kFloat)}, {"y", Counting({4}, at::kLong)}});
  scratch.Python(R"(
import json, struct, numpy
data = open("a", "rb").read()
n, = struct.unpack("<Q", data[:8])
header = json.loads(data[8:8 + n])
x, y = header["x"], header["y"]
assert x["dtype"] == "F32" and x["shape"] == [2, 3] and (8 + n) % 8 == 0
array = numpy.frombuffer(data[8 + n:][x["data_offsets"][0]:x["data_offsets"][1]], "<f4").reshape(2, 3)
assert (array == numpy.arange(6).reshape(2, 3)).all()
assert y["data_offsets"][1] == len(data) - 8 - n
)");
}

TEST(Safetensors, EveryTruncationAndEveryDamageIsFoundOrHarmless) {
  const Scratch scratch;
  WriteSafetensors(scratch / "a",
                   {{"x", Counting({2, 3}, at::kFloat)}, {"y", Counting({4}, at::kLong)}});
  const std::string whole = scratch.Read("a");
  for (size_t size = 0; size < whole.size(); ++size) {
    scratch.Write("b", whole.substr(0, size));
    EXPECT_THAT(ErrorOf(scratch / "b"), HasSubstr("safetensors")) << size;
  }
  for (size_t at = 0; at < whole.size(); ++at) {
    for (char bit : {1, 64}) {
      std::string damaged = whole;
      damaged[at] = static_cast<char>(damaged[at] ^ bit);
      scratch.Write("b", damaged);
      ErrorOf(scratch / "b");  // must neither crash nor read outside the file
    }
  }
}

TEST(Safetensors, FullDiskIsAResourceError) {
  try {
    WriteSafetensors("/dev/full", {{"x", at::full({100000}, 1.0f)}});
    FAIL();
  } catch (const WorkerError& e) {
    EXPECT_EQ(e.failure, FailureClass::kResource);
    EXPECT_THAT(e.what(), HasSubstr("No space left on device; free space"));
  }
}

}  // namespace
}  // namespace itwin::worker
