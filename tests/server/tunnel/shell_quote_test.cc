#include "server/tunnel/shell_quote.h"

#include <random>

#include "common/subprocess.h"
#include "tests/testing/status_matchers.h"

namespace itwin::server {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::HasSubstr;

// What a real sh makes of the words: printed one after the other, each ended by a NUL.
std::string ThroughShell(const std::vector<std::string>& words) {
  std::vector<std::string> argv = {"printf", "%s\\0"};
  argv.insert(argv.end(), words.begin(), words.end());
  const auto line = CommandLine(argv);
  EXPECT_OK(line);
  SubprocessOptions options;
  options.argv = {"sh", "-c", *line};
  const auto output = RunCommand(options, absl::Seconds(20));
  EXPECT_OK(output);
  EXPECT_EQ(output->err, "");
  return output->out;
}

std::string Joined(const std::vector<std::string>& words) {
  std::string all;
  for (const std::string& word : words) (all += word).push_back('\0');
  return all;
}

TEST(ShellQuote, WordsComeBackFromARealShell) {
  const std::vector<std::string> words = {"plain",   "two words",  "it's",      "\"quoted\"",   "a\nb\n",      "$HOME",     "`id`",
                                          "$(id)",   "a;b",        "a&&b|c>d<e", "*",           "?[a]",        "~root",     "#x",
                                          "\\",      "\\n",        "!!",        "-n",           "",            "'",         "''",
                                          "\t",      "A=b",        "ü€",        "{a,b}",        "\x7f\x01",    "a'b\"c$d`e\\f\ng"};
  EXPECT_EQ(ThroughShell(words), Joined(words));
}

TEST(ShellQuote, RandomBytesComeBackFromARealShell) {
  std::mt19937 random(20240607);
  std::vector<std::string> words;
  for (int i = 0; i < 300; ++i) {
    std::string word;
    for (int length = static_cast<int>(random() % 40); length > 0; --length) word.push_back(static_cast<char>(1 + random() % 255));
    words.push_back(word);
  }
  EXPECT_EQ(ThroughShell(words), Joined(words));
}

TEST(ShellQuote, NulIsRefusedRatherThanCutOff) {
  EXPECT_THAT(QuoteForShell(absl::string_view("a\0b", 3)), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("NUL")));
  EXPECT_THAT(CommandLine({"cat", std::string("\0", 1)}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("NUL")));
}

TEST(ShellQuote, PlainWordsStayReadable) { EXPECT_EQ(*CommandLine({"itwin-agent", "connect", "--root", "/a/b c"}), "itwin-agent connect --root '/a/b c'"); }

}  // namespace
}  // namespace itwin::server
