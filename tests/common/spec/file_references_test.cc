#include "common/spec/file_references.h"

#include <gmock/gmock.h>

#include "common/spec/spec_document.h"
#include "tests/testing/status_matchers.h"

namespace itwin {
namespace {

using ::itwin::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

const std::string kHash(64, 'a');

v1::JobSpec Parse(const std::string& text) {
  absl::StatusOr<v1::JobSpec> spec = ParseSpecDocument(text, {});
  EXPECT_OK(spec);
  return *spec;
}

std::vector<std::pair<std::string, std::string>> Pairs(const v1::JobSpec& spec) {
  std::vector<std::pair<std::string, std::string>> out;
  for (const v1::FileReference& reference : FileReferences(spec)) out.emplace_back(reference.field(), reference.value());
  return out;
}

TEST(FileReferences, FindsEveryFileThereIs) {
  EXPECT_THAT(Pairs(Parse("train: {model: {torchscript: m.pt}, data: {netcdf: d/x.nc, variables: [A]}}")),
              ElementsAre(Pair("train.model.torchscript", "m.pt"), Pair("train.data.netcdf", "d/x.nc")));
  EXPECT_THAT(Pairs(Parse("train: {data: {idx: {train_images: a, train_labels: b, test_images: c, test_labels: d}}}")),
              ElementsAre(Pair("train.data.idx.train_images", "a"), Pair("train.data.idx.train_labels", "b"),
                          Pair("train.data.idx.test_images", "c"), Pair("train.data.idx.test_labels", "d")));
  EXPECT_THAT(Pairs(Parse("train: {data: {npy: {input: i.npy, target: t.npy}}}")),
              ElementsAre(Pair("train.data.npy.input", "i.npy"), Pair("train.data.npy.target", "t.npy")));
  EXPECT_THAT(Pairs(Parse("train: {data: {npz: z.npz}}")), ElementsAre(Pair("train.data.npz", "z.npz")));
  EXPECT_THAT(Pairs(Parse("train: {data: {csv: {path: c.csv}}}")), ElementsAre(Pair("train.data.csv.path", "c.csv")));
  EXPECT_THAT(Pairs(Parse("command: {argv: [./run], files: [run, more/data]}")),
              ElementsAre(Pair("command.files[0]", "run"), Pair("command.files[1]", "more/data")));
  EXPECT_THAT(Pairs(Parse("train: {model: {builtin: mlp}, data: {synthetic: {samples: 1}}}")), ElementsAre());
}

TEST(FileReferences, CanBeReplacedOneByOne) {
  v1::JobSpec spec = Parse("command: {argv: [a], files: [x, y]}");
  ASSERT_OK(SetFileReference(&spec, "command.files[1]", "z"));
  EXPECT_THAT(spec.command().files(), ElementsAre("x", "z"));
  EXPECT_THAT(SetFileReference(&spec, "command.files[2]", "z"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("command.files[2]")));
  EXPECT_THAT(SetFileReference(&spec, "command.argv[0]", "z"), StatusIs(absl::StatusCode::kNotFound, ::testing::_));
}

TEST(FileReferences, KnowWhereAFileIs) {
  EXPECT_EQ(PlaceOf("a.pt"), FilePlace::kLocal);
  EXPECT_EQ(PlaceOf("sha256:" + kHash), FilePlace::kArtifact);
  EXPECT_EQ(PlaceOf("site:/data/x.nc"), FilePlace::kSite);
}

TEST(PlaceArtifacts, MakesInputsOfHashes) {
  v1::JobSpec spec = Parse("train: {data: {npy: {input: 'sha256:" + kHash + "', target: 'site:/t.npy'}}}");
  ASSERT_OK(PlaceArtifacts(&spec));
  ASSERT_OK(PlaceArtifacts(&spec));  // idempotent
  EXPECT_EQ(spec.train().data().npy().input(), std::string(16, 'a'));
  ASSERT_EQ(spec.inputs_size(), 1);
  EXPECT_EQ(spec.inputs(0).sha256(), kHash);
  EXPECT_EQ(spec.inputs(0).path(), std::string(16, 'a'));
  EXPECT_OK(CheckFilesArePlaced(spec));
}

TEST(PlaceArtifacts, SharesOneInputForOneHash) {
  v1::JobSpec spec = Parse("command: {argv: [a], files: ['sha256:" + kHash + "', 'sha256:" + kHash + "']}");
  ASSERT_OK(PlaceArtifacts(&spec));
  EXPECT_EQ(spec.inputs_size(), 1);
}

TEST(PlaceArtifacts, RefusesBadHashesAndTakenNames) {
  v1::JobSpec spec = Parse("train: {data: {npz: 'sha256:12'}}");
  EXPECT_THAT(PlaceArtifacts(&spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("train.data.npz")));
  spec = Parse("inputs: [{path: aaaaaaaaaaaaaaaa, sha256: " + std::string(64, 'b') + "}]\n"
               "train: {data: {npz: 'sha256:" + kHash + "'}}");
  EXPECT_THAT(PlaceArtifacts(&spec), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("another input")));
}

TEST(CheckFilesArePlaced, NamesTheFieldAndWhatToDo) {
  v1::JobSpec spec = Parse("train: {data: {npz: z.npz}}");
  EXPECT_THAT(CheckFilesArePlaced(spec), StatusIs(absl::StatusCode::kInvalidArgument,
                                                  HasSubstr("train.data.npz: 'z.npz' is not among `inputs`; upload")));
  spec.add_inputs()->set_path("z.npz");
  EXPECT_OK(CheckFilesArePlaced(spec));
}

}  // namespace
}  // namespace itwin
