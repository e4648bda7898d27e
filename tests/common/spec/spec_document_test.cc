#include "common/spec/spec_document.h"

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/duration.pb.h>
#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/message_differencer.h>

#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "tests/testing/status_matchers.h"

namespace itwin {
namespace {

using ::google::protobuf::FieldDescriptor;
using ::google::protobuf::Message;
using ::google::protobuf::Reflection;
using ::google::protobuf::util::MessageDifferencer;
using ::itwin::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

v1::JobSpec Parse(const std::string& text, const std::vector<std::string>& overrides = {}) {
  absl::StatusOr<v1::JobSpec> spec = ParseSpecDocument(text, overrides);
  EXPECT_OK(spec) << text;
  return spec.ok() ? *spec : v1::JobSpec();
}

std::string Problem(const std::string& text, const std::vector<std::string>& overrides = {}) {
  absl::StatusOr<v1::JobSpec> spec = ParseSpecDocument(text, overrides);
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument) << text;
  return std::string(spec.status().message());
}

constexpr char kDesignExample[] = R"(
name: wind-downscaling
site: any
resources: {nodes: 2, ranks_per_node: 4, time: 30m}
train:
  model: {torchscript: downscale.pt}                   # or {builtin: resnet18}
  data: {netcdf: monthly_navy_winds.cdf, variables: [UWND, VWND], split: {train: 0..108, test: 108..132}}
  optimizer: {adam: {lr: 2e-3}}
  batch: 12
  epochs: 40
  strategy: ddp
)";

TEST(SpecDocument, ReadsTheExampleOfTheDesign) {
  const v1::JobSpec spec = Parse(kDesignExample);
  EXPECT_EQ(spec.name(), "wind-downscaling");
  EXPECT_EQ(spec.site(), "any");
  EXPECT_EQ(spec.resources().nodes(), 2);
  EXPECT_EQ(spec.resources().ranks_per_node(), 4);
  EXPECT_EQ(spec.resources().time().seconds(), 1800);
  EXPECT_EQ(spec.train().model().torchscript(), "downscale.pt");
  EXPECT_EQ(spec.train().data().netcdf(), "monthly_navy_winds.cdf");
  EXPECT_THAT(spec.train().data().variables(), ElementsAre("UWND", "VWND"));
  EXPECT_EQ(spec.train().data().split().train(), "0..108");
  EXPECT_EQ(spec.train().data().split().test(), "108..132");
  EXPECT_EQ(spec.train().optimizer().adam().lr(), 2e-3);
  EXPECT_EQ(spec.train().batch(), 12);
  EXPECT_EQ(spec.train().epochs(), 40);
  EXPECT_EQ(spec.train().strategy(), "ddp");
}

TEST(SpecDocument, ReadsShorthands) {
  EXPECT_TRUE(Parse("train: {optimizer: adam}").train().optimizer().has_adam());
  EXPECT_TRUE(Parse("train: {optimizer: {sgd: }}").train().optimizer().has_sgd());
  EXPECT_TRUE(Parse("train: {optimizer: {adamw: {}}}").train().optimizer().has_adamw());
  const v1::JobSpec spec = Parse(R"(
train:
  data:
    csv: {path: x.csv, inputs: [a, b], targets: [y], target_is_class: true}
    transforms:
      - standardize
      - coarsen: {factor: 4, baselines: [bilinear, bicubic]}
      - fill_missing:
      - crop: {sizes: [72, 144]}
)");
  const auto& transforms = spec.train().data().transforms();
  ASSERT_EQ(transforms.size(), 4);
  EXPECT_TRUE(transforms[0].has_standardize());
  EXPECT_EQ(transforms[1].coarsen().factor(), 4);
  EXPECT_TRUE(transforms[2].has_fill_missing());
  EXPECT_THAT(transforms[3].crop().sizes(), ElementsAre(72, 144));
  EXPECT_TRUE(spec.train().data().csv().target_is_class());
}

TEST(SpecDocument, ReadsDurations) {
  const auto seconds = [](const std::string& text) {
    return Parse("resources: {time: " + text + "}").resources().time().seconds();
  };
  EXPECT_EQ(seconds("30m"), 1800);
  EXPECT_EQ(seconds("1h30m"), 5400);
  EXPECT_EQ(seconds("90s"), 90);
  EXPECT_EQ(seconds("90"), 90);
  EXPECT_EQ(seconds("1.5h"), 5400);
  EXPECT_EQ(seconds("2d"), 172800);
  EXPECT_EQ(seconds("1d12h"), 129600);
  EXPECT_EQ(seconds("\"1800s\""), 1800);
  EXPECT_EQ(Parse("resources: {time: 1.5}").resources().time().nanos(), 500'000'000);
}

TEST(SpecDocument, LetsTheFieldDecideWhatAScalarMeans) {
  const v1::JobSpec spec = Parse("name: 2024\nsite: no\nenv: {OMP_NUM_THREADS: 4, DEBUG: true, EMPTY: ''}\n"
                                 "labels: {version: 1.10, a.b: 'x'}");
  EXPECT_EQ(spec.name(), "2024");
  EXPECT_EQ(spec.site(), "no");
  EXPECT_EQ(spec.env().at("OMP_NUM_THREADS"), "4");
  EXPECT_EQ(spec.env().at("DEBUG"), "true");
  EXPECT_EQ(spec.env().at("EMPTY"), "");
  EXPECT_EQ(spec.labels().at("version"), "1.10");
  EXPECT_EQ(spec.labels().at("a.b"), "x");
}

TEST(SpecDocument, KeepsUnsetApartFromZero) {
  EXPECT_FALSE(Parse("retry: {}").retry().has_infra());
  EXPECT_TRUE(Parse("retry: {infra: 0}").retry().has_infra());
  EXPECT_TRUE(Parse("train: {stop_on_nan: false}").train().has_stop_on_nan());
  EXPECT_FALSE(Parse("train: {}").train().has_stop_on_nan());
  EXPECT_FALSE(Parse("train: {optimizer: {adam: {}}}").train().optimizer().adam().has_lr());
}

TEST(SpecDocument, ReadsFreeFormOptions) {
  const v1::JobSpec spec = Parse(
      "train: {model: {builtin: mlp, options: {hidden: [128, 128], act: relu, deep: {p: 0.5, q: true, r: null, s: '5'}}}}");
  const auto& options = spec.train().model().options().fields();
  EXPECT_EQ(options.at("hidden").list_value().values(1).number_value(), 128);
  EXPECT_EQ(options.at("act").string_value(), "relu");
  const auto& deep = options.at("deep").struct_value().fields();
  EXPECT_EQ(deep.at("p").number_value(), 0.5);
  EXPECT_TRUE(deep.at("q").bool_value());
  EXPECT_TRUE(deep.at("r").has_null_value());
  EXPECT_EQ(deep.at("s").string_value(), "5");
}

TEST(SpecDocument, ReadsJson) {
  const v1::JobSpec spec = Parse(
      "{\"name\": \"smile \\ud83d\\ude00 \\\\ud83d \\/\",\n\t\"train\": {\"steps\": \"100\", \"seed\": 18446744073709551615,"
      "\"stop_on_nan\": true, \"model\": {\"builtin\": \"mlp\"}}}\n");
  EXPECT_EQ(spec.name(), "smile \xF0\x9F\x98\x80 \\ud83d /");
  EXPECT_EQ(spec.train().steps(), 100);
  EXPECT_EQ(spec.train().seed(), 18446744073709551615u);
}

TEST(SpecDocument, ReadsBlocksAndEndMarkers) {
  EXPECT_EQ(Parse("command:\n  argv:\n    - |\n      one\n      two\n").command().argv(0), "one\ntwo\n");
  EXPECT_EQ(Parse("name: >-\n  folded\n  text\n").name(), "folded text");
  EXPECT_EQ(Parse("---\nname: a\n...\n").name(), "a");
  EXPECT_EQ(Parse("\xef\xbb\xbfname: a").name(), "a");  // a byte order mark
  EXPECT_EQ(Parse("name: a\r\nsite: b\r\n").site(), "b");
  EXPECT_EQ(Parse("name: a  # not in it\n# nor this").name(), "a");
}

TEST(SpecDocument, ReadsAnchorsAndAliases) {
  const v1::JobSpec spec = Parse("train: {optimizer: {adam: &a {lr: 0.5}}}\nlabels: {x: &v deep, y: *v}");
  EXPECT_EQ(spec.labels().at("y"), "deep");
}

struct Bad {
  const char* text;
  const char* problem;  // part of the message
};

TEST(SpecDocument, NamesThePlaceTheMistakeAndTheRemedy) {
  const Bad kTable[] = {
      // the text itself
      {"", "the document is empty"},
      {"# only a comment\n", "the document is empty"},
      {"just words", "line 1: found 'just words'; a job is a map of fields"},
      {"- a\n- b", "line 1: found a list; a job is a map"},
      {"name: [a", "line "},
      {"name: 'a", "the text ends inside quotes that are never closed"},
      {"name: 'a\ntrain: {}\n", "the text ends inside quotes that are never closed"},
      {"name: \"a\n", "the text ends inside quotes that are never closed"},
      {"~", "the document is empty"},
      {"...", "the document is empty"},
      {"\tname: a", "line 1: not valid YAML"},
      {"name: a\n---\nname: b", "there is a second document"},
      {"name: a\x01z", "line 1: a control character (code 1)"},
      {"name: \xff\xfe", "the document is not valid UTF-8"},
      {"name: *nowhere", "not valid YAML"},
      {"? [a, b]\n: c", "line 1: a key must be a name, not a list or a map"},
      {"? {a: b}\n: c", "line 1: a key must be a name, not a list or a map"},
      {"~: c", "line 1: a key must be a name, not empty"},
      {"name: a\nname: b", "line 2: name: is given twice; keep one"},
      {"a: &x {b: *x}", "line 1: an alias of what it stands in, so the document would have no end"},
      // unknown keys
      {"nmae: x", "line 1: nmae: unknown key; did you mean 'name'?"},
      {"name: x\n\ntrain:\n  optimzer: adam", "line 4: train.optimzer: unknown key; did you mean 'optimizer'?"},
      {"train: {optimizer: {adma: {lr: 1}}}", "line 1: train.optimizer.adma: unknown key; did you mean 'adam'?"},
      {"train: {optimizer: {adam: {learning_rate: 1}}}", "train.optimizer.adam.learning_rate: unknown key; use one of lr, beta1"},
      {"epochs: 5", "line 1: epochs: unknown key; did you mean 'train.epochs'?"},
      {"epoch: 5", "line 1: epoch: unknown key; did you mean 'train.epochs'?"},
      {"nodes: 2", "nodes: unknown key; did you mean 'resources.nodes'?"},
      {"time: 30m", "time: unknown key; did you mean 'resources.time'?"},
      {"argv: [ls]", "argv: unknown key; did you mean 'command.argv'?"},
      {"train: {lr: 1}", "train.lr: unknown key; did you mean 'train.optimizer.sgd.lr' or 'train.optimizer.adam.lr'"},
      {"train: {variables: [A]}", "train.variables: unknown key; did you mean 'train.data.variables'?"},
      {"train: {data: {transforms: [{standardise: {}}]}}",
       "train.data.transforms[0].standardise: unknown key; did you mean 'standardize'?"},
      {"train: {data: {split: {trian: 0..3}}}", "train.data.split.trian: unknown key; did you mean 'train'?"},
      {"resources: {ranksPerNode: 2}", "resources.ranksPerNode: unknown key; did you mean 'ranks_per_node'?"},
      {"resources: {ranks-per-node: 2}", "resources.ranks-per-node: unknown key; did you mean 'ranks_per_node'?"},
      {"frobnicate: 1", "frobnicate: unknown key; use one of name, site, resources, train"},
      {"resources:\n  <<: {nodes: 1}", "resources.<<: unknown key; merge keys are not supported"},
      {"inputs: [{pth: x}]", "inputs[0].pth: unknown key; did you mean 'path'?"},
      {"\"a\\u0007b\": 1", "a\\007b: unknown key"},
      // wrong types
      {"resources: {nodes: two}", "line 1: resources.nodes: found 'two', expected a whole number"},
      {"resources: {nodes: 1.5}", "resources.nodes: found '1.5', expected a whole number"},
      {"resources: {nodes: \"2\"}", "resources.nodes: found the text '2', expected a whole number"},
      {"resources: {nodes: [2]}", "resources.nodes: found a list, expected a whole number"},
      {"resources: {nodes: {a: 2}}", "resources.nodes: found a map, expected a whole number"},
      {"resources: {nodes: }", "resources.nodes: has no value; give a whole number or leave the key out"},
      {"resources: {nodes: 3000000000}", "resources.nodes: '3000000000' is out of range"},
      {"resources: {memory_mib_per_node: 99999999999999999999}", "resources.memory_mib_per_node: '99999999999999999999' is out"},
      {"resources: {nodes: 0x10}", "found '0x10', expected a whole number"},
      {"resources: 2", "line 1: resources: found '2', expected a map with fields such as nodes"},
      {"resources: [nodes]", "resources: found a list, expected a map"},
      {"resources: {time: soon}", "resources.time: found 'soon', expected a duration such as 30m"},
      {"resources: {time: 30 minutes}", "resources.time: found '30 minutes', expected a duration"},
      {"resources: {time: inf}", "resources.time: found 'inf', expected a duration"},
      {"resources: {time: nan}", "resources.time: found 'nan', expected a duration"},
      {"resources: {time: {hours: 1}}", "resources.time: found a map, expected a duration"},
      {"resources: {time: }", "resources.time: has no value; give a duration"},
      {"name: {a: b}", "name: found a map, expected text"},
      {"name: [a]", "name: found a list, expected text"},
      {"name: null", "name: has no value; give text or leave the key out"},
      {"train: {seed: -1}", "train.seed: '-1' is out of range; use a whole number from 0"},
      {"train: {clip_norm: big}", "train.clip_norm: found 'big', expected a number"},
      {"train: {clip_norm: \"1\"}", "train.clip_norm: found the text '1', expected a number"},
      {"train: {optimizer: {adam: {lr: 1e}}}", "train.optimizer.adam.lr: found '1e', expected a number"},
      {"train: {optimizer: {adam: 2e-3}}", "train.optimizer.adam: found '2e-3', expected a map with fields such as lr"},
      {"train: {optimizer: [adam]}", "train.optimizer: found a list, expected a map with one of sgd, adam, adamw, rmsprop, adagrad, lamb, lars, lbfgs"},
      {"train: {stop_on_nan: yes}", "train.stop_on_nan: found 'yes', expected true or false"},
      {"train: {stop_on_nan: \"true\"}", "train.stop_on_nan: found the text 'true', expected true or false"},
      {"command: {mpi: 1}", "command.mpi: found '1', expected true or false"},
      {"command: {argv: ls -l}", "command.argv: found 'ls -l', expected a list such as [ls -l]"},
      {"command: {argv: {a: b}}", "command.argv: found a map, expected a list"},
      {"command: {argv: [a, [b]]}", "command.argv[1]: found a list, expected text"},
      {"command: {argv: [a, ]}\nx: ", "x: unknown key"},
      {"train: {data: {variables: UWND}}", "train.data.variables: found 'UWND', expected a list such as [UWND]"},
      {"train: {data: {netcdf: {path: x}}}", "train.data.netcdf: found a map, expected text"},
      {"train: {data: {csv: x.csv}}", "train.data.csv: found 'x.csv', expected a map with fields such as path, inputs"},
      {"train: {data: x.csv}", "train.data: found 'x.csv', expected a map with one of netcdf, idx, npz, npy, csv, synthetic"},
      {"train: {data: {transforms: standardize}}", "train.data.transforms: found 'standardize', expected a list"},
      {"train: {data: {transforms: [{crop: [1, 2]}]}}", "train.data.transforms[0].crop: found a list, expected a map"},
      {"train: {data: {synthetic: {input_shape: [1, x]}}}", "train.data.synthetic.input_shape[1]: found 'x', expected a whole"},
      {"train: {model: resnet18}", "train.model: found 'resnet18', expected a map with one of torchscript, builtin, archive"},
      {"train: {model: {options: [1]}}", "train.model.options: found a list, expected a map of options"},
      {"train: {model: {options: {a: .nan}}}", "train.model.options.a: '.nan' is not a finite number"},
      {"train: {model: {options: {a: 1, a: 2}}}", "train.model.options.a: is given twice"},
      {"env: [A=1]", "env: found a list, expected a map of names to texts"},
      {"env: {A: [1]}", "env.A: found a list, expected text"},
      {"env: {A: }", "env.A: has no value; give text (\"\" for empty)"},
      {"env: {A: 1, A: 2}", "env.A: is given twice"},
      {"inputs: {a: b}", "inputs: found a map, expected a list"},
      // alternatives
      {"train: {optimizer: adm}", "train.optimizer: 'adm' is unknown; did you mean 'adam'?"},
      {"train: {optimizer: lion}", "train.optimizer: 'lion' is unknown; use one of sgd, adam, adamw, rmsprop, adagrad, lamb, lars, lbfgs"},
      {"train: {data: {transforms: [normalise]}}", "train.data.transforms[0]: 'normalise' is unknown; use one of standardize"},
      {"train: {optimizer: {adam: {}, sgd: {}}}", "train.optimizer: 'adam' and 'sgd' are both given; keep one"},
      {"train: {model: {builtin: mlp, torchscript: x.pt}}", "train.model: 'builtin' and 'torchscript' are both given"},
      {"train: {}\ncommand: {argv: [a]}", "line 2: command: 'train' and 'command' are both given; keep one"},
      {"train: {data: {netcdf: a, npz: b}}", "train.data: 'netcdf' and 'npz' are both given"},
      {"train: {data: {transforms: [{crop: {}, scale: {}}]}}", "train.data.transforms[0]: 'crop' and 'scale' are both given"},
  };
  EXPECT_GE(std::size(kTable), 60u);
  for (const Bad& bad : kTable) EXPECT_THAT(Problem(bad.text), HasSubstr(bad.problem)) << bad.text;
}

TEST(SpecDocument, ReportsSeveralProblemsAtOnceButNotAll) {
  const std::string problems = Problem("nmae: x\nresources: {nodes: a, time: b}\ntrain: {epochs: c}");
  EXPECT_THAT(std::vector<std::string>(absl::StrSplit(problems, '\n')),
              ElementsAre(HasSubstr("line 1: nmae"), HasSubstr("line 2: resources.nodes"),
                          HasSubstr("line 2: resources.time"), HasSubstr("line 3: train.epochs")));
  std::string many;
  for (int i = 0; i < 50; ++i) absl::StrAppend(&many, "wrong_key_", i, ": 1\n");
  EXPECT_THAT(Problem(many), HasSubstr("\n... and 40 more"));
}

TEST(SpecDocument, IsBounded) {
  EXPECT_THAT(Problem("name: " + std::string(kMaxDocumentBytes, 'x')), HasSubstr("the limit is 1048576"));
  EXPECT_OK(ParseSpecDocument("name: " + std::string(kMaxDocumentBytes - 6, 'x'), {}));
  EXPECT_THAT(Problem("train: {model: {options: {a: " + std::string(100, '[') + std::string(100, ']') + "}}}"),
              HasSubstr("nested deeper than 64 levels"));
  EXPECT_THAT(Problem(std::string(100'000, '[')), HasSubstr("line 1"));
  EXPECT_THAT(Problem(std::string(100'000, '{')), HasSubstr("line 1"));
  std::string list = "command: {argv: [";
  for (int i = 0; i < kMaxDocumentNodes; ++i) list += "a,";
  EXPECT_THAT(Problem(list + "]}"), HasSubstr("more than 100000 values"));
}

TEST(SpecDocument, SurvivesAliasBombs) {
  std::string bomb = "train:\n  model:\n    options:\n      a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 20; ++i) {
    const std::string alias = absl::StrCat("*a", i - 1);
    absl::StrAppend(&bomb, "      a", i, ": &a", i, " [",
                    absl::StrJoin(std::vector<std::string>(10, alias), ", "), "]\n");
  }
  EXPECT_THAT(Problem(bomb), HasSubstr("more than 100000 values"));
  EXPECT_THAT(Problem("train: {model: {options: &o {a: [{b: *o}]}}}"), HasSubstr("line 1: an alias of what it stands in"));
}

TEST(Overrides, AreReadLikeTheDocument) {
  const v1::JobSpec spec = Parse(kDesignExample, {"train.epochs=5", "resources.time=10m", " name = new name ",
                                                  "train.data.variables=[A]", "env.OMP_NUM_THREADS=2",
                                                  "labels.a.b=c", "train.optimizer.adam.beta1=0.8", "site="});
  EXPECT_EQ(spec.train().epochs(), 5);
  EXPECT_EQ(spec.resources().time().seconds(), 600);
  EXPECT_EQ(spec.resources().nodes(), 2);
  EXPECT_EQ(spec.name(), "new name");
  EXPECT_THAT(spec.train().data().variables(), ElementsAre("A"));
  EXPECT_EQ(spec.env().at("OMP_NUM_THREADS"), "2");
  EXPECT_EQ(spec.labels().at("a.b"), "c");
  EXPECT_EQ(spec.train().optimizer().adam().lr(), 2e-3);
  EXPECT_EQ(spec.train().optimizer().adam().beta1(), 0.8);
  EXPECT_EQ(spec.site(), "");
}

TEST(Overrides, TakeThePlaceOfAnotherAlternative) {
  v1::JobSpec spec = Parse(kDesignExample, {"train.model.builtin=downscale", "train.optimizer.sgd.lr=0.1"});
  EXPECT_EQ(spec.train().model().builtin(), "downscale");
  EXPECT_EQ(spec.train().optimizer().sgd().lr(), 0.1);
  spec = Parse(kDesignExample, {"train.optimizer=rmsprop"});
  EXPECT_TRUE(spec.train().optimizer().has_rmsprop());
  spec = Parse("train: {optimizer: adam}", {"train.optimizer.adam.lr=1"});
  EXPECT_EQ(spec.train().optimizer().adam().lr(), 1);
  spec = Parse("train: {optimizer: adam}", {"train.optimizer.sgd.lr=1"});
  EXPECT_EQ(spec.train().optimizer().sgd().lr(), 1);
  spec = Parse("train: {epochs: 3}", {"command.argv=[ls]"});
  EXPECT_TRUE(spec.has_command());
}

TEST(Overrides, ReachElementsOfLists) {
  const v1::JobSpec spec =
      Parse("train: {data: {transforms: [standardize, {crop: {sizes: [4, 5]}}]}}",
            {"train.data.transforms[1].crop.sizes=[8, 8]", "train.data.transforms[0]=fill_missing"});
  EXPECT_TRUE(spec.train().data().transforms(0).has_fill_missing());
  EXPECT_THAT(spec.train().data().transforms(1).crop().sizes(), ElementsAre(8, 8));
}

TEST(Overrides, DoNotChangeWhatAnAliasShares) {
  const v1::JobSpec spec = Parse("train: {model: {builtin: mlp, options: {a: &x {k: 1}, b: *x}}}",
                                 {"train.model.options.a.k=2"});
  EXPECT_EQ(spec.train().model().options().fields().at("b").struct_value().fields().at("k").number_value(), 1);
  EXPECT_EQ(spec.train().model().options().fields().at("a").struct_value().fields().at("k").number_value(), 2);
}

TEST(Overrides, AreNamedWhenTheyAreWrong) {
  const std::pair<const char*, const char*> kTable[] = {
      {"train.epochs", "override 'train.epochs': write it as field=value"},
      {"=5", "override '=5': write it as field=value"},
      {"train..epochs=5", "write it as field=value"},
      {"train.epochs=x", "override 'train.epochs=x': train.epochs: found 'x', expected a whole number"},
      {"train.epoch=5", "override 'train.epoch=5': train.epoch: unknown key; did you mean 'epochs'?"},
      {"epochs=5", "override 'epochs=5': epochs: unknown key; did you mean 'train.epochs'?"},
      {"foo.bar.baz=5", "override 'foo.bar.baz=5': foo: unknown key"},
      {"train.epochs.x=5", "train.epochs: is one value and has no fields"},
      {"resources.time.seconds=5", "resources.time: is one value and has no fields"},
      {"train.data.transforms.crop=5", "train.data.transforms: is a list; name the element, as in train.data.transforms[0]"},
      {"train.data.variables[7]=A", "train.data.variables: there is no element 7; the list has 2"},
      {"train.data.transforms[0]=crop", "train.data.transforms: is not a list in the document"},
      {"train.data.variables[x]=A", "write it as field=value"},
      {"name=[a", "override 'name=[a': not valid YAML"},
      {"train.optimizer={adam: {}, sgd: {}}", "override 'train.optimizer={adam: {}, sgd: {}}': train.optimizer: 'adam' and 'sgd'"},
  };
  for (const auto& [text, problem] : kTable) EXPECT_THAT(Problem(kDesignExample, {text}), HasSubstr(problem)) << text;
}

// ---- every field there is, written and read back ---------------------------------------------------------------

class RandomSpec {
 public:
  explicit RandomSpec(unsigned seed) : random_(seed) {}
  std::set<std::string>* visited = nullptr;

  void Fill(Message* message, int depth = 0) {
    if (auto* duration = dynamic_cast<google::protobuf::Duration*>(message)) {
      duration->set_seconds(Number(0, 100'000));
      if (Number(0, 1)) duration->set_nanos(static_cast<int>(Number(0, 999)) * 1'000'000);
      return;
    }
    if (auto* options = dynamic_cast<google::protobuf::Struct*>(message)) {
      for (int i = 0; i < 3; ++i) FillValue(&(*options->mutable_fields())[Text()], depth);
      return;
    }
    const Reflection* reflection = message->GetReflection();
    for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
      const FieldDescriptor* field = message->GetDescriptor()->field(i);
      if (field->real_containing_oneof() != nullptr) continue;
      if (Number(0, 3) == 0) continue;
      FillField(message, reflection, field, depth);
    }
    for (int i = 0; i < message->GetDescriptor()->real_oneof_decl_count(); ++i) {
      const auto* oneof = message->GetDescriptor()->oneof_decl(i);
      FillField(message, reflection, oneof->field(static_cast<int>(Number(0, oneof->field_count() - 1))), depth);
    }
  }

 private:
  int64_t Number(int64_t min, int64_t max) { return std::uniform_int_distribution<int64_t>(min, max)(random_); }
  std::string Text() {
    static const char* const kTexts[] = {"plain", "",     "true", "null", "~",      "5",     "a: b", "- x", "#no",
                                         "0..108", "no", "\"q\"", "it's", "a\nb\tc", "\\d", " pad ", "é😀", "[x]",
                                         "*a",    "&b",   "!c",   "%d",   "@e",     "`f",  "=",    "<<",  ".nan"};
    return kTexts[Number(0, std::size(kTexts) - 1)];
  }
  double Real() {
    static const double kReals[] = {0.1, 1e-300, 2e-3, 1.0, -5, 1e22, 123456789.123, 1.0 / 3};
    return kReals[Number(0, std::size(kReals) - 1)];
  }
  void FillValue(google::protobuf::Value* value, int depth) {
    switch (Number(0, depth > 4 ? 3 : 5)) {
      case 0: value->set_null_value(google::protobuf::NULL_VALUE); break;
      case 1: value->set_bool_value(Number(0, 1) == 1); break;
      case 2: value->set_number_value(Real()); break;
      case 3: value->set_string_value(Text()); break;
      case 4:
        value->mutable_list_value();
        for (int64_t i = Number(0, 3); i > 0; --i) FillValue(value->mutable_list_value()->add_values(), depth + 1);
        break;
      default:
        value->mutable_struct_value();
        for (int64_t i = Number(0, 3); i > 0; --i) {
          FillValue(&(*value->mutable_struct_value()->mutable_fields())[Text()], depth + 1);
        }
    }
  }
  void FillField(Message* message, const Reflection* reflection, const FieldDescriptor* field, int depth) {
    if (visited != nullptr) visited->insert(field->full_name());
    if (field->is_map()) {
      for (int64_t i = Number(0, 3); i > 0; --i) {
        auto* map = field->name() == "env" ? static_cast<v1::JobSpec*>(message)->mutable_env()
                                           : static_cast<v1::JobSpec*>(message)->mutable_labels();
        (*map)[Text()] = Text();
      }
      return;
    }
    const bool repeated = field->is_repeated();
    for (int64_t i = repeated ? Number(0, 3) : 1; i > 0; --i) {
      switch (field->cpp_type()) {
        case FieldDescriptor::CPPTYPE_MESSAGE:
          Fill(repeated ? reflection->AddMessage(message, field) : reflection->MutableMessage(message, field), depth + 1);
          break;
        case FieldDescriptor::CPPTYPE_STRING:
          repeated ? reflection->AddString(message, field, Text()) : reflection->SetString(message, field, Text());
          break;
        case FieldDescriptor::CPPTYPE_BOOL: reflection->SetBool(message, field, Number(0, 1) == 1); break;
        case FieldDescriptor::CPPTYPE_INT32: reflection->SetInt32(message, field, static_cast<int>(Number(-9, 99))); break;
        case FieldDescriptor::CPPTYPE_UINT64: reflection->SetUInt64(message, field, ~0ull - static_cast<uint64_t>(Number(0, 9))); break;
        case FieldDescriptor::CPPTYPE_INT64:
          repeated ? reflection->AddInt64(message, field, Number(INT64_MIN, INT64_MAX))
                   : reflection->SetInt64(message, field, Number(INT64_MIN, INT64_MAX));
          break;
        case FieldDescriptor::CPPTYPE_DOUBLE:
          repeated ? reflection->AddDouble(message, field, Real()) : reflection->SetDouble(message, field, Real());
          break;
        case FieldDescriptor::CPPTYPE_UINT32:
        case FieldDescriptor::CPPTYPE_FLOAT:
        case FieldDescriptor::CPPTYPE_ENUM:
          FAIL() << "a field of a type that the reader does not know: " << field->full_name();
      }
    }
  }

  std::mt19937 random_;
};

void CollectNames(const google::protobuf::Descriptor* type, std::set<std::string>* out) {
  if (type->file()->package() == "google.protobuf" || type->options().map_entry()) return;
  for (int i = 0; i < type->field_count(); ++i) {
    out->insert(type->field(i)->full_name());
    if (type->field(i)->message_type() != nullptr) CollectNames(type->field(i)->message_type(), out);
  }
}

TEST(SpecWriter, EveryFieldIsReadBackFromYamlAndJson) {
  std::set<std::string> visited;
  for (unsigned seed = 0; seed < 300; ++seed) {
    v1::JobSpec spec;
    RandomSpec random(seed);
    random.visited = &visited;
    random.Fill(&spec);
    for (const std::string& text : {SpecToYaml(spec), SpecToJson(spec)}) {
      absl::StatusOr<v1::JobSpec> back = ParseSpecDocument(text, {});
      ASSERT_OK(back) << "seed " << seed << "\n" << text;
      std::string difference;
      MessageDifferencer differencer;
      differencer.ReportDifferencesToString(&difference);
      ASSERT_TRUE(differencer.Compare(spec, *back)) << "seed " << seed << "\n" << difference << text;
    }
  }
  std::set<std::string> all;
  CollectNames(v1::JobSpec::descriptor(), &all);
  EXPECT_EQ(visited, all);
}

TEST(SpecWriter, WritesWhatPeopleWouldWrite) {
  EXPECT_EQ(SpecToYaml(Parse("train: {optimizer: {adam: {lr: 2e-3}}, data: {split: {train: 0..108}}}\n"
                             "resources: {time: 30m, nodes: 2}\nname: x")),
            "name: x\nresources:\n  nodes: 2\n  time: 30m\ntrain:\n  data:\n    split:\n      train: \"0..108\"\n"
            "  optimizer:\n    adam:\n      lr: 0.002\n");
  EXPECT_THAT(SpecToJson(Parse("resources: {ranks_per_node: 2, time: 30m}")),
              ::testing::AllOf(HasSubstr("\"ranks_per_node\":2"), HasSubstr("\"time\":\"1800s\""), Not(HasSubstr("\n"))));
}

}  // namespace
}  // namespace itwin
