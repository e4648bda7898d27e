#include "agent/worker/model/graph.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/worker/model/operators.h"
#include "agent/worker/model/training_flags.h"
#include "tests/worker/data/scratch.h"

namespace itwin::worker {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;
using testing::UserErrorOf;
using Json = nlohmann::json;

// Three layers with a residual connection round the second, batch norm and dropout, as torch.export
// records it: sizes through `size` and arithmetic, in-place count of batches, tuple by `item`.
Json Net() {
  return Json::parse(R"({"format": 1,
    "inputs": [{"value": "x", "name": "input"}],
    "weights": [
      {"value": "w1", "name": "first.weight", "kind": "parameter"},
      {"value": "b1", "name": "first.bias", "kind": "parameter"},
      {"value": "w2", "name": "second.weight", "kind": "parameter"},
      {"value": "w3", "name": "third.weight", "kind": "parameter"},
      {"value": "g", "name": "norm.weight", "kind": "parameter"},
      {"value": "h", "name": "norm.bias", "kind": "parameter"},
      {"value": "m", "name": "norm.running_mean", "kind": "buffer"},
      {"value": "v", "name": "norm.running_var", "kind": "buffer"},
      {"value": "n", "name": "norm.num_batches_tracked", "kind": "buffer"}],
    "nodes": [
      {"op": "size", "args": {"self": {"v": "x"}, "dim": 0}, "out": ["rows"]},
      {"op": "aten::view", "args": {"self": {"v": "x"}, "size": [{"v": "rows"}, -1]}, "out": ["flat"]},
      {"op": "aten::linear", "args": {"input": {"v": "flat"}, "weight": {"v": "w1"}, "bias": {"v": "b1"}}, "out": ["a"]},
      {"op": "aten::add_", "overload": "Tensor", "args": {"self": {"v": "n"}, "other": 1}, "out": ["n2"]},
      {"op": "aten::batch_norm", "args": {"input": {"v": "a"}, "weight": {"v": "g"}, "bias": {"v": "h"},
        "running_mean": {"v": "m"}, "running_var": {"v": "v"}, "training": true, "momentum": 0.1, "eps": 1e-05,
        "cudnn_enabled": true}, "out": ["b"]},
      {"op": "aten::relu", "args": {"self": {"v": "b"}}, "out": ["c"]},
      {"op": "aten::linear", "args": {"input": {"v": "c"}, "weight": {"v": "w2"}}, "out": ["d"]},
      {"op": "aten::add", "overload": "Tensor", "args": {"self": {"v": "c"}, "other": {"v": "d"}}, "out": ["e"]},
      {"op": "aten::dropout", "args": {"input": {"v": "e"}, "p": 0.5, "train": true}, "out": ["f"]},
      {"op": "aten::mul", "overload": "Tensor", "args": {"self": {"v": "f"}, "other": 2}, "out": ["f2"]},
      {"op": "mul", "args": {"a": {"v": "rows"}, "b": 4}, "out": ["cells"]},
      {"op": "floordiv", "args": {"a": {"v": "cells"}, "b": 4}, "out": ["rows2"]},
      {"op": "aten::reshape", "args": {"self": {"v": "f2"}, "shape": [{"v": "rows2"}, 4]}, "out": ["f3"]},
      {"op": "aten::split", "overload": "Tensor", "args": {"self": {"v": "f3"}, "split_size": 2, "dim": 1}, "out": ["halves"]},
      {"op": "item", "args": {"list": {"v": "halves"}, "index": -1}, "out": ["half"]},
      {"op": "aten::linear", "args": {"input": {"v": "half"}, "weight": {"v": "w3"}, "bias": null}, "out": ["y"]}],
    "outputs": [{"value": "y", "name": "prediction"}]})");
}

at::Tensor Wave(std::vector<int64_t> shape, double frequency) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return at::arange(count, at::kFloat).mul(frequency).sin().view(shape);
}

NamedTensors Weights() {
  return {{"first.weight", Wave({4, 6}, 0.7)},  {"first.bias", Wave({4}, 0.3)},
          {"second.weight", Wave({4, 4}, 1.1)}, {"third.weight", Wave({1, 2}, 0.9)},
          {"norm.weight", at::ones({4})},       {"norm.bias", at::zeros({4})},
          {"norm.running_mean", at::zeros({4})}, {"norm.running_var", at::ones({4})},
          {"norm.num_batches_tracked", at::zeros({}, at::kLong)}};
}

at::Tensor ByHand(const at::Tensor& x, const Graph& graph, bool training) {
  std::map<std::string, at::Tensor> w(graph.parameters().begin(), graph.parameters().end());
  for (const auto& [name, tensor] : graph.buffers()) w[name] = tensor;
  const at::Tensor a = at::linear(x.flatten(1), w["first.weight"], w["first.bias"]);
  const at::Tensor c = at::batch_norm(a, w["norm.weight"], w["norm.bias"], w["norm.running_mean"].clone(),
                                      w["norm.running_var"].clone(), training, 0.1, 1e-5, true)
                           .relu();
  const at::Tensor f = at::dropout(c + at::linear(c, w["second.weight"]), 0.5, training) * 2;
  return at::linear(f.narrow(1, 2, 2), w["third.weight"]);
}

TEST(Graph, RunsAsTheSameCallsWouldForAnyBatch) {
  Graph graph(Net(), Weights(), "model");
  EXPECT_THAT(graph.inputs(), ElementsAre("input"));
  EXPECT_THAT(graph.parameters(), SizeIs(6));
  EXPECT_THAT(graph.buffers(), SizeIs(3));
  for (int64_t rows : {2, 5}) {
    const at::Tensor x = Wave({rows, 2, 3}, 1.3);
    at::manual_seed(7);
    const at::Tensor expected = ByHand(x, graph, true);  // the same numbers at random
    at::manual_seed(7);
    EXPECT_TRUE(graph.Run({{"input", x}})[0].equal(expected)) << rows;
  }
  EXPECT_EQ(graph.buffers()[2].second.item<int64_t>(), 2);  // batches
  EXPECT_NE(graph.buffers()[0].second.abs().sum().item<float>(), 0);
}

TEST(Graph, GradientsAreThoseOfTheCalls) {
  Graph graph(Net(), Weights(), "model"), other(Net(), Weights(), "model");
  const at::Tensor x = Wave({5, 6}, 1.3);
  at::manual_seed(7);
  graph.Run({{"input", x}})[0].sum().backward();
  at::manual_seed(7);
  ByHand(x, other, true).sum().backward();
  for (size_t i = 0; i < graph.parameters().size(); ++i) {
    const auto& [name, tensor] = graph.parameters()[i];
    ASSERT_TRUE(tensor.grad().defined()) << name;
    EXPECT_TRUE(tensor.grad().allclose(other.parameters()[i].second.grad())) << name;
  }
}

TEST(Graph, EvaluationOverridesTheFlagsAndLeavesBuffersAlone) {
  Graph graph(Net(), Weights(), "model");
  graph.Run({{"input", Wave({5, 6}, 1.3)}});
  std::vector<at::Tensor> before;
  for (const auto& [name, buffer] : graph.buffers()) before.push_back(buffer.clone());
  graph.Train(false);
  const at::Tensor x = Wave({3, 6}, 0.4);
  EXPECT_TRUE(graph.Run({{"input", x}})[0].equal(ByHand(x, graph, false)));
  for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(before[i].equal(graph.buffers()[i].second));
  graph.Train(true);
  EXPECT_FALSE(graph.Run({{"input", x}})[0].equal(ByHand(x, graph, false)));
}

// One operator on x, with its flag as it was recorded in training; weights m and v are buffers.
at::Tensor InEvaluation(const char* op, Json arguments, const at::Tensor& x, const char* overload = "") {
  arguments.emplace(c10::Dispatcher::singleton().findSchema({op, overload})->schema().arguments()[0].name(),
                    Json{{"v", "x"}});
  const Json json = {
      {"format", 1},
      {"inputs", {{{"value", "x"}, {"name", "input"}}}},
      {"weights", {{{"value", "m"}, {"name", "mean"}, {"kind", "buffer"}}, {{"value", "v"}, {"name", "var"}, {"kind", "buffer"}}}},
      {"nodes", {{{"op", op}, {"overload", overload}, {"args", arguments}, {"out", {"y"}}}}},
      {"outputs", {{{"value", "y"}, {"name", "prediction"}}}}};
  Graph graph(json, {{"mean", Wave({4}, 0.2)}, {"var", at::ones({4})}}, "model");
  graph.Train(false);
  return graph.Run({{"input", x}})[0];
}

TEST(Graph, NothingIsDrawnOrMeasuredInEvaluation) {
  const at::Tensor x = Wave({2, 4, 3, 3}, 0.7), mean = Wave({4}, 0.2), var = at::ones({4});
  EXPECT_TRUE(InEvaluation("aten::rrelu", {{"training", true}}, x).equal(at::leaky_relu(x, (0.125 + 1.0 / 3) / 2)));
  Json norm = {{"running_mean", {{"v", "m"}}}, {"running_var", {{"v", "v"}}}, {"use_input_stats", true},
               {"momentum", 0.1}, {"eps", 1e-5}, {"cudnn_enabled", true}};
  EXPECT_TRUE(InEvaluation("aten::instance_norm", norm, x)
                  .allclose((x - mean.view({4, 1, 1})) / std::sqrt(1 + 1e-5), 1e-5, 1e-6));
  norm["running_mean"] = norm["running_var"] = nullptr;  // then the sample's own are used
  EXPECT_TRUE(InEvaluation("aten::instance_norm", norm, x).allclose(at::instance_norm(x, {}, {}, {}, {}, true, 0.1, 1e-5, true)));
  for (const char* op : {"aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout"})
    EXPECT_TRUE(InEvaluation(op, {{"p", 0.5}, {"train", true}}, x).equal(x)) << op;
  const char* attention = IsAvailable("aten::scaled_dot_product_attention")
                              ? "aten::scaled_dot_product_attention"
                              : "aten::_scaled_dot_product_attention";
  const Json heads = {{"key", {{"v", "x"}}}, {"value", {{"v", "x"}}}, {"dropout_p", 0.9}};
  if (IsAvailable("aten::scaled_dot_product_attention")) {
    EXPECT_TRUE(InEvaluation(attention, heads, x).equal(InEvaluation(attention, heads, x)));
  } else {  // gives a pair
    const Json json = {{"format", 1}, {"inputs", {{{"value", "x"}, {"name", "input"}}}}, {"weights", Json::array()},
        {"nodes", {{{"op", attention}, {"args", {{"query", {{"v", "x"}}}, {"key", {{"v", "x"}}}, {"value", {{"v", "x"}}},
                    {"dropout_p", 0.9}}}, {"out", {"y", "w"}}}}},
        {"outputs", {{{"value", "y"}, {"name", "prediction"}}}}};
    Graph graph(json, {}, "model");
    graph.Train(false);
    EXPECT_TRUE(graph.Run({{"input", x}})[0].equal(graph.Run({{"input", x}})[0]));
  }
}

TEST(Graph, ValuesAreFreedAfterTheirLastUse) {
  // A chain of products: without gradients no more than two of the values may live at a time.
  Json json = Json::parse(R"({"format": 1, "inputs": [{"value": "v0", "name": "input"}],
    "weights": [{"value": "w", "name": "w", "kind": "parameter"}], "nodes": [], "outputs": []})");
  for (int i = 0; i < 20; ++i) {
    json["nodes"].push_back({{"op", "itwin_test::note"},
                             {"args", {{"self", {{"v", "v" + std::to_string(i)}}}, {"w", {{"v", "w"}}}}},
                             {"out", {"v" + std::to_string(i + 1)}}});
  }
  json["outputs"].push_back({{"value", "v20"}, {"name", "prediction"}});
  LoadOperatorLibrary(ITWIN_TEST_OPERATORS);
  Graph graph(json, {{"w", at::ones({1})}}, "model");
  const at::NoGradGuard no_grad;
  EXPECT_EQ(graph.Run({{"input", at::zeros({1})}})[0].item<float>(), 20);
  // itwin_test::most_alive says how many of note's results were alive at once.
  Json count = Json::parse(R"({"format": 1, "inputs": [{"value": "x", "name": "input"}],
    "weights": [{"value": "w", "name": "w", "kind": "parameter"}],
    "nodes": [{"op": "itwin_test::most_alive", "args": {"self": {"v": "x"}}, "out": ["y"]}],
    "outputs": [{"value": "y", "name": "prediction"}]})");
  EXPECT_LE(Graph(count, {{"w", at::ones({1})}}, "model").Run({{"input", at::zeros({1})}})[0].item<float>(), 2);
}

TEST(Graph, UnitsInARowAreTheWhole) {
  Graph graph(Net(), Weights(), "model");
  graph.Train(false);
  const std::vector<GraphUnit> units = graph.Units(3);
  ASSERT_THAT(units, SizeIs(3));
  EXPECT_EQ(units[0].first_node, 0u);
  EXPECT_EQ(units[2].last_node, 16u);
  int64_t elements = 0;
  for (const GraphUnit& unit : units) {
    EXPECT_FALSE(unit.parameters.empty());
    elements += unit.elements;
  }
  EXPECT_EQ(elements, 24 + 4 + 16 + 2 + 4 + 4);
  // Not within the residual connection: "c" and "d" both cross there.
  for (const GraphUnit& unit : units) EXPECT_NE(unit.first_node, 7u);
  const at::Tensor x = Wave({5, 2, 3}, 1.3);
  at::Tensor at = x;
  for (const GraphUnit& unit : units) at = graph.RunUnit(unit, at, x.size(0));
  EXPECT_TRUE(at.equal(graph.Run({{"input", x}})[0]));
  EXPECT_THAT(graph.Units(1), SizeIs(1));
  EXPECT_LE(graph.Units(100).size(), 6u);
}

TEST(Graph, TiedWeightsAndAlteredBuffersByValue) {
  const Json json = Json::parse(R"({"format": 1, "inputs": [{"value": "x", "name": "input"}],
    "weights": [{"value": "a", "name": "a", "kind": "parameter"},
                {"value": "b", "name": "b", "kind": "parameter", "same_as": "a"},
                {"value": "f", "name": "fixed", "kind": "parameter", "trainable": false},
                {"value": "c", "name": "count", "kind": "buffer"}],
    "nodes": [{"op": "aten::mul", "overload": "Tensor", "args": {"self": {"v": "x"}, "other": {"v": "a"}}, "out": ["p"]},
              {"op": "aten::mul", "overload": "Tensor", "args": {"self": {"v": "p"}, "other": {"v": "b"}}, "out": ["q"]},
              {"op": "aten::mul", "overload": "Tensor", "args": {"self": {"v": "q"}, "other": {"v": "f"}}, "out": ["r"]},
              {"op": "aten::add", "overload": "Tensor", "args": {"self": {"v": "c"}, "other": 1}, "out": ["d"]}],
    "outputs": [{"value": "r", "name": "prediction"}], "mutations": [{"buffer": "count", "value": "d"}]})");
  Graph graph(json, {{"a", at::full({1}, 3.0)}, {"b", at::full({1}, 9.0)}, {"fixed", at::ones({1})}, {"count", at::zeros({1})}},
              "model");
  ASSERT_THAT(graph.parameters(), SizeIs(2));
  EXPECT_FALSE(graph.parameters()[1].second.requires_grad());
  const at::Tensor y = graph.Run({{"input", at::ones({1})}})[0];
  EXPECT_EQ(y.item<float>(), 9);  // a², not a · 9
  y.backward();
  EXPECT_EQ(graph.parameters()[0].second.grad().item<float>(), 6);
  EXPECT_EQ(graph.buffers()[0].second.item<float>(), 1);
  graph.Train(false);
  graph.Run({{"input", at::ones({1})}});
  EXPECT_EQ(graph.buffers()[0].second.item<float>(), 1);
}

TEST(Graph, NamesWhatIsWrong) {
  const auto error = [](const std::function<void(Json&)>& change) {
    Json json = Net();
    change(json);
    return UserErrorOf([&] { Graph(json, Weights(), "train.model.archive: net.itw"); });
  };
  EXPECT_THAT(error([](Json& j) { j["nodes"][5]["op"] = "aten::from_file"; }),
              AllOf(HasSubstr("net.itw uses aten::from_file"), HasSubstr("may not use")));
  EXPECT_THAT(error([](Json& j) { j["nodes"][5]["op"] = "somewhere::relu"; }), HasSubstr("somewhere::relu"));
  EXPECT_THAT(error([](Json& j) { j["nodes"][7]["overload"] = "Tensr"; }),
              AllOf(HasSubstr("aten::add.Tensr"), HasSubstr("does not have")));
  EXPECT_THAT(error([](Json& j) { j["nodes"][5]["args"]["slope"] = 1; }), HasSubstr("aten::relu has no argument slope"));
  EXPECT_THAT(error([](Json& j) { j["nodes"][5]["args"].erase("self"); }), HasSubstr("aten::relu needs the argument self"));
  EXPECT_THAT(error([](Json& j) { j["nodes"][5]["args"]["self"]["v"] = "zz"; }), HasSubstr("zz is used before it is set"));
  EXPECT_THAT(error([](Json& j) { j["nodes"][8]["args"]["p"] = "much"; }), HasSubstr("aten::dropout got \"much\""));
  EXPECT_THAT(error([](Json& j) { j["weights"][0]["name"] = "lost"; }), HasSubstr("there is no tensor lost"));
  EXPECT_THAT(error([](Json& j) { j["format"] = 2; }), HasSubstr("format 2"));
  EXPECT_THAT(error([](Json& j) { j.erase("outputs"); }), HasSubstr("malformed"));
  EXPECT_THAT(UserErrorOf([] { Graph(Net(), Weights(), "net.itw").Run({}); }), HasSubstr("takes an array \"input\""));
}

TEST(Operators, ALibraryOfTheSiteAddsItsOwn) {
  LoadOperatorLibrary(ITWIN_TEST_OPERATORS);  // a second time, perhaps
  EXPECT_TRUE(IsAllowed("itwin_test::twice"));
  EXPECT_TRUE(IsAvailable("itwin_test::twice"));
  EXPECT_FALSE(IsAllowed("itwin_test::thrice"));
  EXPECT_THAT(DescribeOperators()["operators"], ::testing::Contains("itwin_test::twice"));
  EXPECT_THAT(UserErrorOf([] { LoadOperatorLibrary("/nowhere/lib.so"); }), HasSubstr("cannot be loaded"));
  EXPECT_THAT(UserErrorOf([] { LoadOperatorLibrary("lib.so"); }), HasSubstr("absolute path"));
}

TEST(Operators, TheAllowListKeepsToTensors) {
  for (const char* name : {"aten::linear", "aten::add.Tensor", "aten::lstm.input", "prim::ListConstruct"})
    EXPECT_TRUE(IsAllowed(name)) << name;
  for (const char* name : {"aten::from_file", "aten::save", "aten::set_.source_Tensor", "aten::manual_seed", "prim::PythonOp",
                           "prim::rpc_sync", "aten::wait", "quantized::linear", "linear"})
    EXPECT_FALSE(IsAllowed(name)) << name;
  EXPECT_FALSE(IsAvailable("aten::add.Tensr"));
}

TEST(Operators, TrainingArgumentsAreThoseOfTheSchemas) {
  // Operators that this LibTorch need not have: others have them.
  const std::set<std::string> of_some = {
      "aten::_flash_scaled_dot_product_attention", "aten::_scaled_dot_product_attention",
      "aten::_scaled_dot_product_attention_forward", "aten::_scaled_dot_product_flash_attention_for_cpu",
      "aten::scaled_dot_product_attention"};
  std::set<std::string> known, found;
  for (const TrainingArgument& entry : TrainingArguments()) {
    EXPECT_TRUE(IsAllowed(entry.op)) << entry.op;
    EXPECT_TRUE(known.insert(entry.op).second) << entry.op;
  }
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || !name.name.starts_with("aten::") || !IsAllowed(name.name)) continue;
    const c10::FunctionSchema& schema = op->schema();
    bool trains = name.name == "aten::_fused_dropout";
    for (const char* argument : {"train", "training", "use_input_stats", "dropout_p"})
      trains = trains || schema.argumentIndexWithName(argument);
    EXPECT_EQ(FindTrainingFlag(schema).has_value(), trains) << name;
    if (trains) found.insert(name.name);
  }
  for (const std::string& op : known) EXPECT_TRUE(found.contains(op) || of_some.contains(op)) << op;
}

TEST(Graph, TensorsThatItMakesAreWhereItWasMovedTo) {
  const Json json = Json::parse(R"({"format": 1, "inputs": [{"value": "x", "name": "input"}], "weights": [],
    "nodes": [{"op": "aten::zeros", "args": {"size": [2], "device": {"device": "cpu"}}, "out": ["z"]},
              {"op": "aten::add", "overload": "Tensor", "args": {"self": {"v": "z"}, "other": 1}, "out": ["y"]}],
    "outputs": [{"value": "y", "name": "prediction"}]})");
  Graph graph(json, {}, "train.model.archive: g.itw");
  EXPECT_TRUE(graph.Run({{"input", at::ones({1})}})[0].is_cpu());
  graph.MoveTo(at::Device(at::kMeta));  // stands for a GPU: a device that is not the CPU
  EXPECT_TRUE(graph.Run({{"input", at::ones({1})}})[0].is_meta());
}

}  // namespace
}  // namespace itwin::worker
