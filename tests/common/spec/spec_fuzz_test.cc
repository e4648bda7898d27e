// Random changes to good documents: the reader answers each with a spec or an error that names a place, and what it
// accepts survives the checks and a round trip. Seeds are fixed and printed.
#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>

#include <random>

#include "absl/time/clock.h"
#include "common/files.h"
#include "common/spec/file_references.h"
#include "common/spec/spec_document.h"
#include "common/spec/validate.h"
#include "tests/testing/status_matchers.h"

namespace itwin {
namespace {

const char* const kDocuments[] = {
    "name: w\nsite: any\nresources: {nodes: 2, ranks_per_node: 4, time: 30m}\ntrain:\n  model: {torchscript: d.pt}\n"
    "  data: {netcdf: m.cdf, variables: [U, V], split: {train: 0..108, test: 108..132}}\n"
    "  optimizer: {adam: {lr: 2e-3}}\n  batch: 12\n  epochs: 40\n  strategy: ddp\n",
    "{\"name\": \"x\", \"command\": {\"argv\": [\"a\", \"b\"], \"mpi\": true}, \"env\": {\"A\": \"1\"}}",
    "train:\n  model:\n    builtin: mlp\n    options: &o {hidden: [1, 2, {x: 'y'}], z: null}\n  data:\n"
    "    synthetic: {samples: 5, input_shape: [3], target_shape: [1]}\n    transforms:\n      - standardize\n"
    "      - scale: {multiply: 2.5}\nlabels: {a: &t b, c: *t}\nretry: {infra: 1}\n",
};
const char* const kPieces[] = {"{",  "}",    "[",   "]",    ":",  ": ", "- ",   "\n",   "  ",    ",",   "'",  "\"",
                               "&a", "*a",   "*o",  "!!str", "|", ">",  "# ",   "? ",   "<<: ",  "~",   "\t", "\\u",
                               "---\n", "...", "%TAG", "\xc3\xa9", "\xff", "0",  "-1", "1e999", "nan", "true", "train", "adam"};

TEST(SpecFuzz, AnyTextIsAnsweredWithoutACrash) {
  const absl::Time end = absl::Now() + absl::Seconds(4);
  int accepted = 0;
  unsigned seed = 0;
  for (; seed < 20'000 && (seed < 2'000 || absl::Now() < end); ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
    std::string text = kDocuments[below(std::size(kDocuments))];
    for (size_t changes = 1 + below(6); changes > 0; --changes) {
      const size_t at = below(text.size() + 1);
      switch (below(4)) {
        case 0: text.insert(at, kPieces[below(std::size(kPieces))]); break;
        case 1: text.erase(at, 1 + below(8)); break;
        case 2: text.insert(at, text.substr(below(text.size() + 1), below(40) + 1)); break;
        default:
          if (at < text.size()) text[at] = static_cast<char>(below(256));
      }
    }
    absl::StatusOr<v1::JobSpec> spec = ParseSpecDocument(text, {});
    if (!spec.ok()) {
      ASSERT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument);
      ASSERT_FALSE(spec.status().message().empty());
      ASSERT_TRUE(IsValidUtf8(spec.status().message())) << spec.status();
      continue;
    }
    ++accepted;
    ValidateSpec(*spec).IgnoreError();
    FileReferences(*spec);
    v1::JobSpec placed = *spec;
    PlaceArtifacts(&placed).IgnoreError();
    if (ValidateSpec(*spec).ok()) SpecToJson(*spec);
    absl::StatusOr<v1::JobSpec> back = ParseSpecDocument(SpecToYaml(*spec), {});
    ASSERT_OK(back) << text << "\n" << SpecToYaml(*spec);
    google::protobuf::util::MessageDifferencer differencer;
    differencer.set_float_comparison(google::protobuf::util::MessageDifferencer::EXACT);
    // NaN is not equal to itself; the bytes are.
    ASSERT_TRUE(differencer.Compare(*spec, *back) || SpecToYaml(*spec) == SpecToYaml(*back)) << text;
  }
  // One in a hundred at least, else the changes are too wild to test anything but the parser.
  EXPECT_GT(accepted * 100, static_cast<int>(seed));
  EXPECT_GT(seed, 1'999u);
}

}  // namespace
}  // namespace itwin
