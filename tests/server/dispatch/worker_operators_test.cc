#include "server/dispatch/worker_operators.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using itwin::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kList[] = R"({"libtorch": "1.13.0", "allow_list": 1, "libraries": [],
                            "operators": ["aten::add.Tensor", "aten::linear", "aten::sum", "aten::sum.dim_IntList"]})";

TEST(WorkerOperators, NamesWhatIsMissingAndAsksOnce) {
  int asked = 0;
  WorkerOperators operators("worker", [&]() -> absl::StatusOr<std::string> { return ++asked, kList; });
  EXPECT_EQ(asked, 0);  // not before a model needs it
  const auto missing = operators.WhatLacks({"aten::linear", "aten::rms_norm", "aten::add.Tensor", "aten::add.Scalar"});
  EXPECT_EQ(missing.libtorch, "1.13.0");
  EXPECT_THAT(missing.names, ElementsAre("aten::rms_norm", "aten::add.Scalar"));
  operators.WhatLacks({"aten::linear"});
  EXPECT_EQ(asked, 1);
}

TEST(WorkerOperators, WithoutAnOverloadAnyWillDo) {
  WorkerOperators operators("worker", [] { return kList; });
  EXPECT_THAT(operators.WhatLacks({"aten::add", "aten::sum", "aten::lin", "aten::su"}).names, ElementsAre("aten::lin", "aten::su"));
}

TEST(WorkerOperators, WhatIsNotLibTorchsIsNotItsToKnow) {
  WorkerOperators operators("worker", [] { return kList; });
  EXPECT_THAT(operators.WhatLacks({"prim::ListConstruct", "lab::own_operator"}).names, IsEmpty());
}

TEST(WorkerOperators, NothingIsHeldAgainstAModelWhenTheWorkerCannotBeAsked) {
  WorkerOperators broken("worker", [] { return absl::UnavailableError("no libtorch.so"); });
  EXPECT_THAT(broken.WhatLacks({"aten::rms_norm"}).names, IsEmpty());
  for (const char* text : {"", "[]", "{}", R"({"libtorch": "2.6.0", "operators": []})", R"({"operators": ["aten::add"]})"}) {
    WorkerOperators other("/etc/list.json", [text] { return text; });
    EXPECT_THAT(other.Load(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("/etc/list.json: is not what")));
    EXPECT_THAT(other.WhatLacks({"aten::rms_norm"}).names, IsEmpty());
  }
}

}  // namespace
}  // namespace itwin::server
