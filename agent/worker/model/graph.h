// An exported model as data: a flat list of operator calls with named arguments, and an interpreter
// that makes each call through LibTorch's dispatcher, as eager code does. Autograd, autocast and
// hooks therefore see what they see of any model. docs/models.md defines the JSON.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "agent/worker/checkpoint/safetensors.h"

namespace torch::jit {
struct Module;
}

namespace itwin::worker {

// Part of a graph that takes one tensor (the input, or what the part before puts out) and gives
// one: a stage of a pipeline, or what is gathered and freed together when parameters are sharded.
struct GraphUnit {
  size_t first_node = 0, last_node = 0;  // half-open
  std::vector<std::string> parameters{};  // in the model's order; a tied one is in several units
  int64_t elements = 0;                  // of its parameters
};

// Used by one thread.
class Graph {
 public:
  // Takes `weights` for the parameters, buffers and constants that the graph names. Throws UserError,
  // beginning with `field`, for a graph that is malformed, calls what is not allowed or not there, or
  // whose arguments do not fit the schemas here.
  Graph(const nlohmann::json& graph, const NamedTensors& weights, const std::string& field);
  ~Graph();

  // In the graph's order. Parameters require a gradient unless the graph says that they do not.
  const std::vector<std::pair<std::string, at::Tensor>>& parameters() const { return parameters_; }
  const std::vector<std::pair<std::string, at::Tensor>>& buffers() const { return buffers_; }
  const std::vector<std::string>& inputs() const { return inputs_; }    // names in the batch
  const std::vector<std::string>& outputs() const { return outputs_; }  // names; "prediction", or "loss" and metrics
  // Every operator of a graph, without making one of it.
  static std::set<std::string> OperatorsOf(const nlohmann::json& graph, const std::string& field);

  // In evaluation, dropout, recurrent dropout and batch norm get their training flags as false
  // (batch norm without running statistics keeps its own), and buffers are left alone.
  void Train(bool training) { training_ = training; }

  // Parameters, buffers, constants and the places where the graph makes new tensors.
  void MoveTo(at::Device device);

  // One tensor per output. Values are freed after their last use. Missing inputs are a UserError.
  std::vector<at::Tensor> Run(const std::map<std::string, at::Tensor>& batch);

  // As a module that takes the inputs in their order and gives the output, or a tuple of them, as
  // evaluation does; operators are called by their names, so that a later LibTorch may choose another
  // overload of the same. Throws for what TorchScript cannot say.
  torch::jit::Module Script() const;

  // Cuts the graph, where one tensor alone crosses, into at most `count` units of about equal numbers
  // of parameters, each with some. Fewer where there are not enough places to cut; sizes that follow
  // from the batch's size alone are computed anew in each unit and do not count as crossing. For
  // graphs of one input and one output.
  std::vector<GraphUnit> Units(int count) const;
  // Frees the weights that the unit does not use: from here on this is a part of the graph.
  void KeepOnly(const GraphUnit& unit);
  // Runs one of Units(). `batch_size` is the number of samples of the graph's input.
  at::Tensor RunUnit(const GraphUnit& unit, const at::Tensor& input, int64_t batch_size);

 private:
  struct Value;
  struct Argument;
  struct Node;
  class Reader;
  class Writer;

  void RunNode(const Node& node, std::vector<Value>& values);
  static void RefuseOneSample(const Node& node, const std::vector<c10::IValue>& arguments);

  const std::string field_;
  std::vector<std::pair<std::string, at::Tensor>> parameters_, buffers_;
  std::vector<std::string> inputs_, outputs_;
  std::vector<Node> nodes_;
  std::vector<Value> constants_;  // by slot: parameters, buffers and constants; others empty
  std::vector<int> input_slots_, output_slots_;
  struct Mutation {
    at::Tensor buffer;
    int slot = 0;
  };
  std::vector<Mutation> mutations_;
  std::vector<std::vector<int>> freed_;  // slots whose last use is the node
  std::map<int, std::string> parameter_of_slot_;
  bool training_ = true;
};

}  // namespace itwin::worker
