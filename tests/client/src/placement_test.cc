#include "client/src/placement.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include "common/files.h"
#include "common/sha256.h"
#include "common/spec/spec_document.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::client {
namespace {

using ::itwin::testing::StatusIs;
using ::itwin::testing::TempDirectory;
using ::testing::HasSubstr;

class PlacementTest : public ::testing::Test {
 protected:
  void Write(const std::string& name, const std::string& text) {
    ASSERT_OK(MakeDirectories(directory_ / "job/data"));
    ASSERT_OK(WriteFileAtomically(directory_ / name, text));
  }
  absl::StatusOr<std::vector<LocalFile>> Place(const std::string& document) {
    spec_ = ParseSpecDocument(document, {}).value();
    return PlaceLocalFiles(&spec_, directory_ / "job", nullptr);
  }
  TempDirectory directory_;
  v1::JobSpec spec_;
};

TEST_F(PlacementTest, PutsFilesWhereTheyAreBelowTheBaseDirectoryElseByName) {
  Write("job/m.pt", "model");
  Write("job/data/x.npz", "data");
  Write("outside.npz", "other");
  absl::StatusOr<std::vector<LocalFile>> files = Place("train: {model: {torchscript: ./m.pt}, data: {npz: data/x.npz}}");
  ASSERT_OK(files);
  ASSERT_EQ(files->size(), 2u);
  EXPECT_EQ(spec_.train().model().torchscript(), "m.pt");
  EXPECT_EQ(spec_.train().data().npz(), "data/x.npz");
  EXPECT_EQ(spec_.inputs(1).path(), "data/x.npz");
  EXPECT_EQ(spec_.inputs(1).sha256(), Sha256Hex("data"));
  EXPECT_EQ((*files)[1].size_bytes, 4);
  ASSERT_OK(Place("train: {data: {npz: ../outside.npz}}"));
  EXPECT_EQ(spec_.train().data().npz(), "outside.npz");
  ASSERT_OK(Place("train: {data: {npz: '" + directory_ / "outside.npz" + "'}}"));
  EXPECT_EQ(spec_.train().data().npz(), "outside.npz");
}

TEST_F(PlacementTest, PutsFilesOfACommandUnderTheirBaseNameWithTheirMode) {
  Write("job/data/run.sh", "#!/bin/sh");
  chmod((directory_ / "job/data/run.sh").c_str(), 0755);
  ASSERT_OK(Place("command: {argv: [./run.sh], files: [data/run.sh]}"));
  EXPECT_EQ(spec_.command().files(0), "run.sh");
  EXPECT_EQ(spec_.inputs(0).path(), "run.sh");
  EXPECT_TRUE(spec_.inputs(0).executable());
}

TEST_F(PlacementTest, SendsOneContentOnce) {
  Write("job/a.npy", "same");
  Write("job/b.npy", "same");
  absl::StatusOr<std::vector<LocalFile>> files = Place("train: {data: {npy: {input: a.npy, target: b.npy}}}");
  ASSERT_OK(files);
  EXPECT_EQ(files->size(), 1u);
  EXPECT_EQ(spec_.inputs_size(), 2);
}

TEST_F(PlacementTest, RefusesTwoFilesInOnePlace) {
  Write("job/x.npy", "one");
  Write("x.npy", "two");
  EXPECT_THAT(Place("train: {data: {npy: {input: x.npy, target: ../x.npy}}}"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       ::testing::AllOf(HasSubstr("train.data.npy.target: "), HasSubstr("another file of train.data.npy.input"))));
  Write("x.npy", "one");  // the same bytes may
  EXPECT_OK(Place("train: {data: {npy: {input: x.npy, target: ../x.npy}}}"));
}

TEST_F(PlacementTest, NamesTheFieldOfAFileThatIsNotThere) {
  Write("job/x", "");
  EXPECT_THAT(Place("train: {data: {npz: none.npz}}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("train.data.npz: ")));
  EXPECT_THAT(Place("train: {data: {npz: none.npz}}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("none.npz: No such file or directory; paths are relative")));
  EXPECT_THAT(Place("train: {data: {npz: data}}"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("data is not a file")));
}

TEST_F(PlacementTest, LeavesReferencesToOtherPlacesAlone) {
  Write("job/x", "");
  absl::StatusOr<std::vector<LocalFile>> files =
      Place("train: {model: {torchscript: 'sha256:" + std::string(64, 'a') + "'}, data: {npz: 'site:/d.npz'}}");
  ASSERT_OK(files);
  EXPECT_TRUE(files->empty());
  EXPECT_EQ(spec_.inputs_size(), 0);
}

}  // namespace
}  // namespace itwin::client
