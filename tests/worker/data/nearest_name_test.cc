#include "agent/worker/data/nearest_name.h"

#include <gtest/gtest.h>

namespace itwin::worker {
namespace {

TEST(NearestName, FindsTheOneThatWasMeant) {
  const std::vector<std::string> known = {"mse",           "l1",         "huber",
                                          "cross_entropy", "bce_logits", "nll"};
  EXPECT_EQ(NearestName("crossentropy", known), "cross_entropy");
  EXPECT_EQ(NearestName("MSE", known), "mse");
  EXPECT_EQ(NearestName("hubber", known), "huber");
  EXPECT_EQ(NearestName("something else entirely", known), "");
  EXPECT_EQ(NearestName(std::string(1 << 20, 'x'), known), "");
  EXPECT_EQ(NearestName("a", {}), "");
  EXPECT_EQ(NearestHint("l2", known), "; did you mean \"l1\"?");
  EXPECT_EQ(NearestHint("zzzzzz", known), "");
  EXPECT_EQ(JoinNames({"a", "b"}), "a, b");
}

}  // namespace
}  // namespace itwin::worker
