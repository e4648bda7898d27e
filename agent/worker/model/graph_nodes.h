// Inside of Graph: its nodes, for the files that run it and that write it as TorchScript.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>

#include "agent/worker/model/graph.h"
#include "agent/worker/model/training_flags.h"

namespace itwin::worker {

inline constexpr int kUndefinedSlot = -1;

// Calls that are no operator of the dispatcher: arithmetic on sizes, and taking lists apart.
enum class Builtin {
  kNone,
  kSize,      // size of a tensor's dimension
  kItem,      // of a list or tuple
  kUnpack,    // all of them
  kToTensor,  // a number as a tensor of no dimension
  kToInt,
  kToFloat,
  kAdd,
  kSub,
  kMul,
  kFloorDiv,
  kTrueDiv,
  kMod,
  kNeg,
  kPow,
  kMax,
  kMin,
};

// The type that an optional one may hold.
const c10::Type& Inner(const c10::Type& type);

struct Graph::Value {
  c10::IValue value;
};

// A constant, a slot, or a list of such.
struct Graph::Argument {
  c10::IValue constant{};
  int slot = kUndefinedSlot;
  bool is_list = false;
  std::vector<Argument> list{};
  c10::TypePtr type{};  // of the argument, or of the list's elements

  // As the operator wants it; nothing when the value cannot be that.
  std::optional<c10::IValue> Get(const std::vector<Value>& values) const;
  // Places where new tensors are made.
  void MoveTo(at::Device device);
  // Appends every slot that it reads.
  void Slots(std::vector<int>* slots) const;
};

struct Graph::Node {
  std::string name;  // as in the graph, for messages
  Builtin builtin = Builtin::kNone;
  std::optional<c10::OperatorHandle> op{};
  std::vector<Argument> arguments{};
  std::vector<int> outputs{};
  std::optional<TrainingFlag> training_flag{};  // what evaluation sets
  bool changes_buffer = false;  // in place; left out in evaluation
  bool from_batch_size = false; // a number that follows from the number of samples alone
};

}  // namespace itwin::worker
