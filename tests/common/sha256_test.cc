#include "common/sha256.h"

#include <gmock/gmock.h>

#include "common/files.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin {
namespace {

constexpr char kEmpty[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
constexpr char kAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

TEST(Sha256, AgreesWithTheStandard) {
  EXPECT_EQ(Sha256Hex(""), kEmpty);
  EXPECT_EQ(Sha256Hex("abc"), kAbc);
}

TEST(Sha256, IsIncrementalAndReusable) {
  Sha256 hash;
  hash.Update("a");
  hash.Update("");
  hash.Update("bc");
  EXPECT_EQ(hash.FinishHex(), kAbc);
  EXPECT_EQ(hash.FinishHex(), kEmpty);
}

TEST(Sha256, ReadsFiles) {
  testing::TempDirectory directory;
  ASSERT_OK(WriteFileAtomically(directory / "f", std::string(3'000'000, 'x')));
  EXPECT_EQ(Sha256OfFile(directory / "f").value(), Sha256Hex(std::string(3'000'000, 'x')));
  EXPECT_EQ(Sha256OfFile(directory / "g").status().code(), absl::StatusCode::kNotFound);
}

TEST(IsSha256Hex, HasOneSpelling) {
  EXPECT_TRUE(IsSha256Hex(kAbc));
  EXPECT_FALSE(IsSha256Hex(""));
  EXPECT_FALSE(IsSha256Hex(std::string(63, 'a')));
  EXPECT_FALSE(IsSha256Hex(std::string(65, 'a')));
  EXPECT_FALSE(IsSha256Hex(std::string(64, 'A')));
  EXPECT_FALSE(IsSha256Hex(std::string(63, 'a') + "g"));
}

}  // namespace
}  // namespace itwin
