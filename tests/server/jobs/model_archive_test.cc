#include "server/jobs/model_archive.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_directory.h"

namespace itwin::server {
namespace {

using itwin::testing::StatusIs;
using itwin::testing::TempDirectory;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using nlohmann::json;

std::string Archive(const json& metadata) {
  const std::string header = json{{"__metadata__", metadata}}.dump();
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(header.size() >> (8 * i)));
  return bytes + header;
}
json Script(const std::vector<std::string>& operators) {
  return {{"itwin.manifest", json{{"format", 1}, {"operators", operators}}.dump()}};
}

class ModelArchive : public ::testing::Test {
 protected:
  absl::Status Check(const std::string& bytes) {
    v1::JobSpec spec;
    spec.mutable_train()->mutable_model()->set_archive("net.itw");
    v1::InputFile* input = spec.add_inputs();
    input->set_path("net.itw");
    input->set_sha256(*blobs_->PutText(bytes));
    const absl::StatusOr<std::vector<std::string>> operators = OperatorsOfJob(*blobs_, spec);
    return operators.ok() ? CheckOperators(*operators) : operators.status();
  }
  static std::unique_ptr<BlobStore> OpenBlobs(const std::string& directory) {
    BlobStore::Options options;
    options.directory = directory;
    options.min_free_bytes = 0;
    return *BlobStore::Open(options);
  }

  TempDirectory directory_;
  std::unique_ptr<BlobStore> blobs_ = OpenBlobs(directory_.path());
};

TEST_F(ModelArchive, WhatComputesWithTensorsPasses) {
  EXPECT_OK(Check(Archive(Script({"aten::linear", "aten::add.Tensor", "aten::lstm.input", "lab::own_operator"}))));
}

TEST_F(ModelArchive, EachOperatorThatMayNotBeUsedIsNamed) {
  EXPECT_THAT(Check(Archive(Script({"aten::linear", "aten::from_file", "aten::save", "aten::set_.source_Tensor"}))),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("train.model.archive: uses aten::from_file, aten::save, aten::set_.source_Tensor"),
                             Not(HasSubstr("linear")))));
}

TEST_F(ModelArchive, AGraphIsBelievedMoreThanItsManifest) {
  json metadata = Script({"aten::linear"});
  metadata["itwin.graph"] =
      R"({"nodes": [{"op": "size", "args": {}}, {"op": "aten::add", "overload": "Tensor"}, {"op": "aten::from_file"}]})";
  const std::string bytes = Archive(metadata);
  const auto reader = blobs_->OpenReader(*blobs_->PutText(bytes));
  ASSERT_OK(reader);
  EXPECT_THAT(*OperatorsOfArchive(*reader), ElementsAre("aten::add.Tensor", "aten::from_file"));
  EXPECT_THAT(Check(bytes), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("aten::from_file")));
}

TEST_F(ModelArchive, WhatIsNoArchiveIsSaid) {
  std::string cut = Archive(Script({"aten::linear"}));
  cut.resize(cut.size() - 1);
  for (const std::string& bytes :
       {std::string("PK"), std::string(100, '\xff'), cut, Archive(json::object()), Archive({{"itwin.manifest", "{"}})}) {
    EXPECT_THAT(Check(bytes), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is no model archive")));
  }
}

}  // namespace
}  // namespace itwin::server
