#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/dead_code_elimination.h>
#include <torch/csrc/jit/passes/lower_tuples.h>
#include <torch/script.h>

#include <map>
#include <memory>
#include <vector>

#include "agent/worker/error.h"
#include "agent/worker/model/graph_nodes.h"
#include "agent/worker/model/torchscript_export.h"

namespace itwin::worker {
namespace {

namespace jit = torch::jit;
using c10::IValue;

// A number that Graph made a tensor of for the dispatcher is a number here again: TorchScript has an
// overload for it, and its type promotion.
IValue AsNumber(const IValue& value) {
  if (!value.isTensor() || !value.toTensor().defined()) return value;
  const at::Tensor& tensor = value.toTensor();
  return tensor.unsafeGetTensorImpl()->is_wrapped_number() ? IValue(tensor.item()) : value;
}

}  // namespace

// Makes the calls of a graph's nodes in TorchScript's own representation.
class Graph::Writer {
 public:
  Writer(const Graph& graph, jit::Graph* out) : g_(graph), out_(*out), values_(graph.constants_.size(), nullptr) {}

  void Write(const c10::TypePtr& type_of_self) {
    self_ = out_.addInput("self")->setType(type_of_self);
    for (size_t i = 0; i < g_.inputs_.size(); ++i) {
      values_[static_cast<size_t>(g_.input_slots_[i])] = out_.addInput(g_.inputs_[i]);
    }
    for (const auto& [name, tensor] : g_.parameters_) names_[tensor.unsafeGetTensorImpl()] = name;
    for (const auto& [name, tensor] : g_.buffers_) names_[tensor.unsafeGetTensorImpl()] = name;
    for (const Node& node : g_.nodes_) {
      if (node.builtin == Builtin::kNone) {
        Call(node);
      } else {
        CallBuiltin(node);
      }
    }
    std::vector<jit::Value*> outputs;
    for (const int slot : g_.output_slots_) outputs.push_back(At(slot));
    out_.registerOutput(outputs.size() == 1 ? outputs[0] : out_.insertNode(out_.createTuple(outputs))->output());
  }

 private:
  jit::Value* At(int slot) {
    jit::Value*& value = values_[static_cast<size_t>(slot)];
    if (value != nullptr) return value;
    const IValue& constant = g_.constants_[static_cast<size_t>(slot)].value;
    if (!constant.isTensor()) throw AppError("a value is used before it is made");
    const auto named = names_.find(constant.toTensor().unsafeGetTensorImpl());
    return value = named == names_.end() ? out_.insertConstant(constant.toTensor().detach()) : Attribute(named->second);
  }

  jit::Value* Attribute(const std::string& name) {
    jit::Value* value = self_;
    size_t begin = 0;
    while (true) {
      const size_t dot = name.find('.', begin);
      value = out_.insertGetAttr(value, name.substr(begin, dot == std::string::npos ? dot : dot - begin));
      if (dot == std::string::npos) return value;
      begin = dot + 1;
    }
  }

  jit::Value* Constant(const IValue& value) {
    // Where the first input is, wherever the module is moved to.
    if (value.isDevice()) return out_.insert(jit::prim::device, {At(g_.input_slots_[0])});
    return out_.insertConstant(AsNumber(value));
  }

  jit::Value* ValueOf(const Argument& argument) {
    if (argument.is_list) {
      std::vector<jit::Value*> elements;
      for (const Argument& entry : argument.list) elements.push_back(ValueOf(entry));
      const c10::Type& element = Inner(*argument.type);
      c10::TypePtr type = c10::IntType::get();
      if (element.kind() == c10::TypeKind::TensorType) {
        type = argument.type->kind() == c10::TypeKind::OptionalType ? c10::TypePtr(c10::OptionalType::ofTensor())
                                                                     : c10::TypePtr(c10::TensorType::get());
      } else if (element.kind() == c10::TypeKind::FloatType) {
        type = c10::FloatType::get();
      } else if (element.kind() == c10::TypeKind::BoolType) {
        type = c10::BoolType::get();
      } else {
        for (jit::Value*& entry : elements) {  // sizes that went through tensors
          if (entry->type()->isSubtypeOf(*c10::TensorType::get())) entry = out_.insert(jit::aten::Int, {entry});
        }
      }
      return out_.insertNode(out_.createList(type, elements))->output();
    }
    return argument.slot == kUndefinedSlot ? Constant(argument.constant) : At(argument.slot);
  }

  void Set(const Node& node, size_t output, jit::Value* value) {
    values_[static_cast<size_t>(node.outputs[output])] = value;
  }

  void Call(const Node& node) {
    if (node.changes_buffer) {  // as in evaluation
      if (!node.outputs.empty()) Set(node, 0, ValueOf(node.arguments[0]));
      return;
    }
    const std::vector<c10::Argument>& schema = node.op->schema().arguments();
    std::vector<jit::NamedValue> positional, named;
    for (size_t i = 0; i < schema.size(); ++i) {
      const bool flag = node.training_flag && node.training_flag->argument == i;
      jit::Value* value = flag ? out_.insertConstant(node.training_flag->off) : ValueOf(node.arguments[i]);
      if (schema[i].kwarg_only()) {
        // Left out where it says nothing: another overload may not have it.
        const Argument& given = node.arguments[i];
        const bool is_default = given.slot == kUndefinedSlot && !given.is_list && given.constant.isNone();
        if (!is_default) named.emplace_back(schema[i].name(), value);
      } else {
        positional.emplace_back(value);
      }
    }
    Outputs(node, out_.insert(jit::Symbol::fromQualString(node.op->schema().name()), positional, named));
  }

  // A node's outputs, of a value that is one of them or a tuple of all.
  void Outputs(const Node& node, jit::Value* result) {
    if (node.outputs.empty()) return;
    const auto tuple = result->type()->cast<c10::TupleType>();
    if (node.outputs.size() == 1) return Set(node, 0, result);  // a tuple is taken apart by "item"
    if (!tuple) throw AppError(node.name + " gives one value, not " + std::to_string(node.outputs.size()));
    const auto parts = out_.insertNode(out_.createTupleUnpack(result))->outputs();
    for (size_t i = 0; i < node.outputs.size(); ++i) Set(node, i, parts[i]);
  }

  void CallBuiltin(const Node& node) {
    std::vector<jit::NamedValue> arguments;
    for (const Argument& argument : node.arguments) arguments.emplace_back(ValueOf(argument));
    const auto type = [&](size_t i) { return arguments[i].value(out_)->type(); };
    const auto call = [&](jit::Symbol symbol) { Set(node, 0, out_.insert(symbol, arguments)); };
    switch (node.builtin) {
      case Builtin::kNone:
        return;
      case Builtin::kSize:
        return call(jit::aten::size);
      case Builtin::kItem: {
        const auto tuple = type(0)->cast<c10::TupleType>();
        if (!tuple) return call(jit::aten::__getitem__);
        const auto index = node.arguments[1].constant.toInt();
        const auto count = static_cast<int64_t>(tuple->elements().size());
        const int64_t at = index < 0 ? index + count : index;
        if (at < 0 || at >= count) throw AppError("a tuple has no element " + std::to_string(index));
        return Set(node, 0, out_.insertNode(out_.createTupleIndex(arguments[0].value(out_), arguments[1].value(out_),
                                                                  tuple->elements()[static_cast<size_t>(at)]))->output());
      }
      case Builtin::kUnpack: {
        jit::Value* list = arguments[0].value(out_);
        if (type(0)->cast<c10::TupleType>()) return Outputs(node, list);
        const auto parts = out_.insertNode(out_.createListUnpack(list, node.outputs.size()))->outputs();
        for (size_t i = 0; i < node.outputs.size(); ++i) Set(node, i, parts[i]);
        return;
      }
      case Builtin::kToTensor:
        return call(jit::Symbol::fromQualString("prim::NumToTensor"));
      case Builtin::kToInt:
        return call(jit::aten::Int);
      case Builtin::kToFloat:
        return call(jit::aten::Float);
      case Builtin::kAdd:
        return call(jit::aten::add);
      case Builtin::kSub:
        return call(jit::aten::sub);
      case Builtin::kMul:
        return call(jit::aten::mul);
      case Builtin::kFloorDiv:
        return call(jit::aten::floordiv);
      case Builtin::kTrueDiv:
        return call(jit::aten::div);
      case Builtin::kMod:
        return call(jit::aten::remainder);
      case Builtin::kNeg:
        return call(jit::aten::neg);
      case Builtin::kPow: {
        const bool whole = type(0)->kind() == c10::TypeKind::IntType && type(1)->kind() == c10::TypeKind::IntType;
        call(jit::aten::pow);
        if (whole) Set(node, 0, out_.insert(jit::aten::Int, {At(node.outputs[0])}));  // TorchScript's is a float
        return;
      }
      case Builtin::kMax:
        return call(jit::prim::max);
      case Builtin::kMin:
        return call(jit::prim::min);
    }
  }

  const Graph& g_;
  jit::Graph& out_;
  jit::Value* self_ = nullptr;
  std::vector<jit::Value*> values_;  // by slot; null: not made yet
  std::map<const c10::TensorImpl*, std::string> names_;
};

jit::Module Graph::Script() const {
  jit::Module module = ModuleWith(parameters_, buffers_);
  auto out = std::make_shared<jit::Graph>();
  Writer(*this, out.get()).Write(module.type());
  jit::LowerSimpleTuples(out);
  jit::EliminateDeadCode(out);
  SetForward(module, out);
  return module;
}

}  // namespace itwin::worker
