#include "agent/worker/model/graph.h"

#include <ATen/core/List.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <set>

#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"
#include "agent/worker/model/graph_nodes.h"
#include "agent/worker/model/operators.h"

namespace itwin::worker {
namespace {

using Json = nlohmann::json;
using c10::IValue;
using c10::TypeKind;

constexpr size_t kMaxNodes = 1'000'000;
constexpr int kMaxDepth = 8;  // of lists in arguments

const std::map<std::string, Builtin>& Builtins() {
  static const auto* const kNames = new std::map<std::string, Builtin>{
      {"size", Builtin::kSize},         {"item", Builtin::kItem},
      {"unpack", Builtin::kUnpack},     {"to_tensor", Builtin::kToTensor},
      {"to_int", Builtin::kToInt},      {"to_float", Builtin::kToFloat},
      {"add", Builtin::kAdd},           {"sub", Builtin::kSub},
      {"mul", Builtin::kMul},           {"floordiv", Builtin::kFloorDiv},
      {"truediv", Builtin::kTrueDiv},   {"mod", Builtin::kMod},
      {"neg", Builtin::kNeg},           {"pow", Builtin::kPow},
      {"max", Builtin::kMax},           {"min", Builtin::kMin},
  };
  return *kNames;
}
std::vector<std::string> BuiltinArguments(Builtin builtin) {
  if (builtin == Builtin::kSize) return {"self", "dim"};
  if (builtin == Builtin::kItem) return {"list", "index"};
  if (builtin == Builtin::kUnpack) return {"list"};
  const bool one = builtin == Builtin::kToTensor || builtin == Builtin::kToInt ||
                   builtin == Builtin::kToFloat || builtin == Builtin::kNeg;
  return one ? std::vector<std::string>{"a"} : std::vector<std::string>{"a", "b"};
}

std::optional<at::ScalarType> TypeNamed(const std::string& name) {
  static const auto* const kTypes = new std::map<std::string, at::ScalarType>{
      {"float32", at::kFloat}, {"float64", at::kDouble}, {"float16", at::kHalf},
      {"bfloat16", at::kBFloat16}, {"int64", at::kLong}, {"int32", at::kInt},
      {"int16", at::kShort}, {"int8", at::kChar}, {"uint8", at::kByte}, {"bool", at::kBool},
      {"complex64", at::kComplexFloat}, {"complex128", at::kComplexDouble}};
  const auto found = kTypes->find(name);
  return found == kTypes->end() ? std::nullopt : std::optional(found->second);
}

// A number where the operator wants a tensor: it takes part in type promotion as a number does.
at::Tensor NumberAsTensor(const IValue& number) {
  at::Tensor tensor = at::scalar_tensor(number.toScalar(), number.isDouble()
                                                               ? at::dtype(at::kDouble)
                                                           : number.isBool()
                                                               ? at::dtype(at::kBool)
                                                               : at::dtype(at::kLong));
  tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  return tensor;
}

bool IsNumber(const IValue& value) { return value.isInt() || value.isDouble() || value.isBool(); }

// A value as the operator's argument wants it. Nothing when it cannot be that.
std::optional<IValue> Fit(const IValue& value, const c10::Type& wanted) {
  if (value.isNone()) {
    if (wanted.kind() == TypeKind::OptionalType || wanted.kind() == TypeKind::NoneType) return value;
    if (wanted.kind() == TypeKind::TensorType) return IValue(at::Tensor());
    return std::nullopt;
  }
  const c10::Type& type = Inner(wanted);
  const TypeKind kind = type.kind();
  const auto only_if = [&](bool fits) { return fits ? std::optional<IValue>(value) : std::nullopt; };
  if (kind == TypeKind::TensorType) {
    if (IsNumber(value)) return IValue(NumberAsTensor(value));
    return only_if(value.isTensor());
  }
  if (kind == TypeKind::BoolType) return only_if(value.isBool());
  if (kind == TypeKind::StringType) return only_if(value.isString());
  if (kind == TypeKind::DeviceObjType) return only_if(value.isDevice());
  if (kind == TypeKind::ListType) return only_if(value.isList());
  if (kind == TypeKind::FloatType) {
    if (value.isDouble()) return value;
    if (value.isInt()) return IValue(static_cast<double>(value.toInt()));
  } else if (kind == TypeKind::NumberType) {
    if (IsNumber(value)) return value;
  } else {  // whole numbers: int, SymInt, element types, layouts, memory formats
    if (value.isInt()) return value;
    if (value.isBool()) return IValue(static_cast<int64_t>(value.toBool()));
  }
  // Sizes that went through tensors come as tensors of no dimension.
  if (value.isTensor() && value.toTensor().defined() && value.toTensor().numel() == 1) {
    const at::Scalar scalar = value.toTensor().item();
    if (kind == TypeKind::FloatType) return IValue(scalar.toDouble());
    if (kind == TypeKind::NumberType) return IValue(scalar);
    if (!scalar.isFloatingPoint()) return IValue(scalar.toLong());
  }
  return std::nullopt;
}

std::vector<IValue> Elements(const IValue& value) {  // of a list or a tuple
  std::vector<IValue> elements;
  if (value.isTuple()) {
    for (const IValue& element : value.toTupleRef().elements()) elements.push_back(element);
  } else {
    for (const IValue& element : value.toListRef()) elements.push_back(element);
  }
  return elements;
}

std::string KindOf(const IValue& value) {
  return value.isTensor() ? "a tensor" : value.isNone() ? "nothing" : value.isList() ? "a list" : "a " + value.tagKind();
}

}  // namespace

const c10::Type& Inner(const c10::Type& type) {
  const c10::Type* at = &type;
  while (at->kind() == TypeKind::OptionalType) at = at->castRaw<c10::OptionalType>()->getElementType().get();
  return *at;
}

std::optional<IValue> Graph::Argument::Get(const std::vector<Value>& values) const {
  if (is_list) {
    const c10::Type& element = Inner(*type);
    const auto collect = [&](auto result, auto unwrap) -> std::optional<IValue> {
      result.reserve(list.size());
      for (const Argument& entry : list) {
        std::optional<IValue> value = entry.Get(values);
        if (!value) return std::nullopt;
        result.push_back(unwrap(*value));
      }
      return IValue(std::move(result));
    };
    if (element.kind() == TypeKind::TensorType) {
      if (type->kind() == TypeKind::OptionalType) {
        return collect(c10::List<c10::optional<at::Tensor>>(), [](const IValue& v) {
          return v.isTensor() ? c10::optional<at::Tensor>(v.toTensor()) : c10::nullopt;
        });
      }
      return collect(c10::List<at::Tensor>(), [](const IValue& v) { return v.toTensor(); });
    }
    if (element.kind() == TypeKind::FloatType)
      return collect(c10::List<double>(), [](const IValue& v) { return v.toDouble(); });
    if (element.kind() == TypeKind::BoolType)
      return collect(c10::List<bool>(), [](const IValue& v) { return v.toBool(); });
    return collect(c10::List<int64_t>(), [](const IValue& v) { return v.toInt(); });
  }
  if (slot == kUndefinedSlot) return constant;
  return type == nullptr ? std::optional(values[static_cast<size_t>(slot)].value)
                         : Fit(values[static_cast<size_t>(slot)].value, *type);
}

void Graph::Argument::MoveTo(at::Device device) {
  if (constant.isDevice()) constant = IValue(device);
  for (Argument& entry : list) entry.MoveTo(device);
}

void Graph::Argument::Slots(std::vector<int>* slots) const {
  if (slot != kUndefinedSlot) slots->push_back(slot);
  for (const Argument& entry : list) entry.Slots(slots);
}

// Reads the JSON into a Graph.
class Graph::Reader {
 public:
  Reader(Graph* graph, const NamedTensors& weights) : g_(*graph), weights_(weights.begin(), weights.end()) {}

  void Read(const Json& json) {
    try {
      ReadFields(json);
    } catch (const Json::exception& error) {
      throw Malformed(error.what());
    }
  }

  WorkerError Malformed(const std::string& why) const {
    return UserError(g_.field_ + ": the graph is malformed (" + why + "); export the model again");
  }

 private:
  void ReadFields(const Json& json) {
    if (json.at("format").get<int>() != 1) {
      throw UserError(g_.field_ + ": the graph is of format " + json.at("format").dump() +
                      ", this worker reads format 1; export it with a matching itwin package");
    }
    for (const Json& entry : json.at("weights")) ReadWeight(entry);
    for (const Json& entry : json.at("inputs")) {
      g_.inputs_.push_back(entry.at("name").get<std::string>());
      g_.input_slots_.push_back(Define(entry.at("value").get<std::string>()));
    }
    if (json.at("nodes").size() > kMaxNodes) throw Malformed("it has too many nodes");
    for (const Json& entry : json.at("nodes")) ReadNode(entry);
    for (const Json& entry : json.at("outputs")) {
      g_.outputs_.push_back(entry.at("name").get<std::string>());
      g_.output_slots_.push_back(Slot(entry.at("value").get<std::string>()));
    }
    if (g_.outputs_.empty()) throw Malformed("it has no output");
    const auto mutations = json.find("mutations");
    if (mutations == json.end()) return FindLastUses();
    for (const Json& entry : *mutations) {
      const std::string buffer = entry.at("buffer").get<std::string>();
      const auto found = std::find_if(g_.buffers_.begin(), g_.buffers_.end(),
                                      [&](const auto& b) { return b.first == buffer; });
      if (found == g_.buffers_.end()) throw Malformed("it changes " + buffer + ", which is no buffer");
      g_.mutations_.push_back({found->second, Slot(entry.at("value").get<std::string>())});
    }
    FindLastUses();
  }

  void ReadWeight(const Json& entry) {
    const std::string name = entry.at("name").get<std::string>(), kind = entry.at("kind").get<std::string>();
    const auto found = weights_.find(name);
    if (found == weights_.end()) throw Malformed("there is no tensor " + name);
    const int slot = Define(entry.at("value").get<std::string>());
    at::Tensor tensor = found->second;
    // Two names of one tensor share it.
    const std::string same = entry.value("same_as", std::string());
    if (!same.empty()) {
      const auto original = tensors_.find(same);
      if (original == tensors_.end()) throw Malformed(name + " is the same as " + same + ", which comes later");
      tensor = original->second;
    }
    tensors_[name] = tensor;
    if (kind == "parameter") {
      if (same.empty()) {
        if (!tensor.is_floating_point()) throw Malformed("parameter " + name + " holds no floats");
        tensor.set_requires_grad(entry.value("trainable", true));
        g_.parameters_.emplace_back(name, tensor);
      }
      g_.parameter_of_slot_[slot] = same.empty() ? name : same;
    } else if (kind == "buffer") {
      if (same.empty()) g_.buffers_.emplace_back(name, tensor);
      buffer_slots_.insert(slot);
    } else if (kind != "constant") {
      throw Malformed(name + " is a " + kind);
    }
    Constant(slot) = IValue(tensor);
  }

  void ReadNode(const Json& entry) {
    Node node{.name = entry.at("op").get<std::string>()};
    const Json& arguments = entry.at("args");
    std::set<std::string> used;
    const auto take = [&](const std::string& name) -> const Json* {
      const auto found = arguments.find(name);
      if (found == arguments.end()) return nullptr;
      used.insert(name);
      return &*found;
    };
    if (const auto builtin = Builtins().find(node.name); builtin != Builtins().end()) {
      node.builtin = builtin->second;
      for (const std::string& name : BuiltinArguments(node.builtin)) {
        const Json* given = take(name);
        if (given == nullptr) throw Malformed(node.name + " lacks " + name);
        node.arguments.push_back(ReadArgument(*given, nullptr, node, 0));
      }
      node.from_batch_size = FollowsFromBatchSize(node);
    } else {
      ReadOperator(entry, take, &node);
    }
    for (const auto& [name, value] : arguments.items()) {
      if (used.contains(name)) continue;
      throw UserError(g_.field_ + ": " + node.name + " has no argument " + name +
                      " in LibTorch of this site; export the model with a torch nearer to the site's");
    }
    for (const Json& out : entry.at("out")) node.outputs.push_back(Define(out.get<std::string>()));
    if (node.from_batch_size) {
      for (int slot : node.outputs) from_batch_size_.insert(slot);
    }
    // An in-place operator on a buffer gives the buffer.
    if (node.changes_buffer && !node.outputs.empty()) buffer_slots_.insert(node.outputs[0]);
    g_.nodes_.push_back(std::move(node));
  }

  template <typename Take>
  void ReadOperator(const Json& entry, const Take& take, Node* node) {
    const std::string overload = entry.value("overload", std::string());
    const auto op = c10::Dispatcher::singleton().findSchema({node->name, overload});
    if (op) node->op.emplace(*op);
    if (!node->op) throw Malformed("there is no operator " + node->name + "." + overload);  // checked before
    const c10::FunctionSchema& schema = node->op->schema();
    if (!overload.empty()) node->name += "." + overload;
    for (const c10::Argument& argument : schema.arguments()) {
      if (const Json* given = take(argument.name())) {
        node->arguments.push_back(ReadArgument(*given, argument.type(), *node, 0));
      } else if (argument.default_value()) {
        node->arguments.push_back({.constant = *argument.default_value()});
      } else if (argument.type()->kind() == TypeKind::OptionalType) {
        node->arguments.push_back({});
      } else {
        throw UserError(g_.field_ + ": " + node->name + " needs the argument " + argument.name() +
                        " in LibTorch of this site; export the model with a torch nearer to the site's");
      }
    }
    node->training_flag = FindTrainingFlag(schema);
    if (node->training_flag && node->training_flag->statistic &&
        node->arguments[*node->training_flag->statistic].slot == kUndefinedSlot) {
      node->training_flag.reset();
    }
    const auto& first = schema.arguments();
    if (!first.empty() && first[0].alias_info() != nullptr && first[0].alias_info()->isWrite()) {
      node->changes_buffer = buffer_slots_.contains(node->arguments[0].slot);
    }
  }

  bool FollowsFromBatchSize(const Node& node) const {
    if (node.builtin == Builtin::kItem || node.builtin == Builtin::kUnpack) return false;
    if (node.builtin == Builtin::kSize) {
      return !g_.input_slots_.empty() && node.arguments[0].slot == g_.input_slots_[0] &&
             node.arguments[1].slot == kUndefinedSlot && node.arguments[1].constant.isInt() &&
             node.arguments[1].constant.toInt() == 0;
    }
    std::vector<int> slots;
    for (const Argument& argument : node.arguments) argument.Slots(&slots);
    return std::all_of(slots.begin(), slots.end(),
                       [&](int slot) { return from_batch_size_.contains(slot); });
  }

  // `type` null: whatever it is.
  Argument ReadArgument(const Json& json, const c10::TypePtr& type, const Node& node, int depth) {
    if (depth > kMaxDepth) throw Malformed("lists are nested too deep");
    Argument argument;
    argument.type = type;
    const auto fixed = [&](IValue value) {
      if (type == nullptr) {
        argument.constant = std::move(value);
        return argument;
      }
      const std::optional<IValue> fitted = Fit(value, *type);
      if (!fitted) throw Malformed(node.name + " got " + json.dump() + " where it wants " + type->annotation_str());
      argument.constant = *fitted;
      return argument;
    };
    if (json.is_null()) return fixed(IValue());
    if (json.is_boolean()) return fixed(IValue(json.get<bool>()));
    if (json.is_number_integer()) return fixed(IValue(json.get<int64_t>()));
    if (json.is_number_float()) return fixed(IValue(json.get<double>()));
    if (json.is_string()) return fixed(IValue(json.get<std::string>()));
    if (json.is_array()) {
      if (type == nullptr) throw Malformed(node.name + " got a list");
      const c10::Type& list = Inner(*type);
      if (list.kind() != TypeKind::ListType) {
        throw Malformed(node.name + " got a list where it wants " + type->annotation_str());
      }
      argument.is_list = true;
      argument.type = list.castRaw<c10::ListType>()->getElementType();
      std::vector<int> slots;
      for (const Json& entry : json) {
        argument.list.push_back(ReadArgument(entry, argument.type, node, depth + 1));
        argument.list.back().Slots(&slots);
      }
      if (slots.empty()) {  // made once
        std::optional<IValue> value = argument.Get(g_.constants_);
        return {.constant = *value};
      }
      return argument;
    }
    if (const auto slot = json.find("v"); slot != json.end()) {
      argument.slot = Slot(slot->get<std::string>());
      return argument;
    }
    if (const auto name = json.find("dtype"); name != json.end()) {
      const auto found = TypeNamed(name->get<std::string>());
      if (!found) throw Malformed("there is no element type " + name->dump());
      return fixed(IValue(static_cast<int64_t>(*found)));
    }
    if (json.contains("device")) return fixed(IValue(c10::Device(c10::kCPU)));  // where the model is
    if (const auto number = json.find("float"); number != json.end()) {  // what JSON has no number for
      const std::string text = number->get<std::string>();
      const double infinity = std::numeric_limits<double>::infinity();
      return fixed(IValue(text == "inf"    ? infinity
                          : text == "-inf" ? -infinity
                                           : std::numeric_limits<double>::quiet_NaN()));
    }
    if (const auto name = json.find("memory_format"); name != json.end()) {
      const std::map<std::string, at::MemoryFormat> formats = {
          {"contiguous", at::MemoryFormat::Contiguous}, {"preserve", at::MemoryFormat::Preserve},
          {"channels_last", at::MemoryFormat::ChannelsLast}, {"channels_last_3d", at::MemoryFormat::ChannelsLast3d}};
      const auto found = formats.find(name->get<std::string>());
      if (found == formats.end()) throw Malformed("there is no memory format " + name->dump());
      return fixed(IValue(static_cast<int64_t>(found->second)));
    }
    throw Malformed(node.name + " has an argument " + json.dump().substr(0, 100));
  }

  int Define(const std::string& name) {
    const auto slot = static_cast<int>(g_.constants_.size());
    if (!slots_.emplace(name, slot).second) throw Malformed(name + " is set twice");
    g_.constants_.emplace_back();
    return slot;
  }
  int Slot(const std::string& name) const {
    const auto found = slots_.find(name);
    if (found == slots_.end()) throw Malformed(name + " is used before it is set");
    return found->second;
  }
  IValue& Constant(int slot) { return g_.constants_[static_cast<size_t>(slot)].value; }

  void FindLastUses() {
    std::vector<size_t> last(g_.constants_.size(), 0);
    std::vector<bool> temporary(g_.constants_.size(), false);
    for (int slot : g_.input_slots_) temporary[static_cast<size_t>(slot)] = true;
    for (size_t n = 0; n < g_.nodes_.size(); ++n) {
      std::vector<int> slots;
      for (const Argument& argument : g_.nodes_[n].arguments) argument.Slots(&slots);
      for (int slot : slots) last[static_cast<size_t>(slot)] = n;
      for (int slot : g_.nodes_[n].outputs) {
        temporary[static_cast<size_t>(slot)] = true;
        last[static_cast<size_t>(slot)] = n;  // never used: freed at once
      }
    }
    for (int slot : g_.output_slots_) temporary[static_cast<size_t>(slot)] = false;
    for (const Mutation& m : g_.mutations_) temporary[static_cast<size_t>(m.slot)] = false;
    g_.freed_.resize(g_.nodes_.size());
    if (g_.nodes_.empty()) return;
    for (size_t slot = 0; slot < last.size(); ++slot) {
      if (temporary[slot]) g_.freed_[last[slot]].push_back(static_cast<int>(slot));
    }
  }

  Graph& g_;
  const std::map<std::string, at::Tensor> weights_;
  std::map<std::string, int> slots_;
  std::map<std::string, at::Tensor> tensors_;
  std::set<int> buffer_slots_, from_batch_size_;
};

Graph::Graph(const nlohmann::json& graph, const NamedTensors& weights, const std::string& field)
    : field_(field) {
  CheckOperators(OperatorsOf(graph, field), field);
  Reader(this, weights).Read(graph);
}
Graph::~Graph() = default;

std::set<std::string> Graph::OperatorsOf(const nlohmann::json& graph, const std::string& field) {
  std::set<std::string> names;
  try {
    for (const Json& node : graph.at("nodes")) {
      const std::string name = node.at("op").get<std::string>();
      if (Builtins().contains(name)) continue;
      const std::string overload = node.value("overload", std::string());
      names.insert(overload.empty() ? name : name + "." + overload);
    }
  } catch (const Json::exception& error) {
    throw UserError(field + ": the graph is malformed (" + error.what() + "); export the model again");
  }
  return names;
}

// What torch.nn.functional.batch_norm says; the operator itself would make running statistics NaN.
void Graph::RefuseOneSample(const Node& node, const std::vector<IValue>& arguments) {
  if (!node.name.ends_with("batch_norm") && node.name != "aten::_batch_norm_impl_index") return;
  const IValue& flag = arguments[node.training_flag->argument];
  if (!flag.isBool() || !flag.toBool() || !arguments[0].isTensor()) return;
  const at::Tensor& input = arguments[0].toTensor();
  TORCH_CHECK(input.dim() < 2 || input.numel() != input.size(1),
              "Expected more than 1 value per channel when training, got input size ",
              input.sizes());
}

void Graph::RunNode(const Node& node, std::vector<Value>& values) {
  const auto set = [&](size_t output, IValue value) {
    values[static_cast<size_t>(node.outputs[output])].value = std::move(value);
  };
  const auto argument = [&](size_t i) -> IValue { return *node.arguments[i].Get(values); };
  const auto number = [&](size_t i) -> at::Scalar {
    const IValue value = argument(i);
    return value.isTensor() ? value.toTensor().item() : value.toScalar();
  };
  const auto whole = [&](size_t i) { return number(i).toLong(); };
  const auto arithmetic = [&](auto f) {
    const at::Scalar a = number(0), b = number(1);
    if (a.isFloatingPoint() || b.isFloatingPoint()) return set(0, IValue(f(a.toDouble(), b.toDouble())));
    set(0, IValue(static_cast<int64_t>(f(a.toLong(), b.toLong()))));
  };
  switch (node.builtin) {
    case Builtin::kNone:
      break;
    case Builtin::kSize:
      return set(0, IValue(argument(0).toTensor().size(whole(1))));
    case Builtin::kItem: {
      const IValue list = argument(0);
      const int64_t index = whole(1);
      const std::vector<IValue> elements = Elements(list);
      const auto count = static_cast<int64_t>(elements.size());
      if (index < -count || index >= count) throw AppError(field_ + ": a list has no element " + std::to_string(index));
      return set(0, elements[static_cast<size_t>(index < 0 ? index + count : index)]);
    }
    case Builtin::kUnpack: {
      const IValue list = argument(0);
      const std::vector<IValue> elements = Elements(list);
      if (elements.size() != node.outputs.size()) throw AppError(field_ + ": a list has another length than when it was exported");
      for (size_t i = 0; i < elements.size(); ++i) set(i, elements[i]);
      return;
    }
    case Builtin::kToTensor:
      return set(0, IValue(at::scalar_tensor(number(0), at::dtype(number(0).isFloatingPoint() ? at::kDouble : at::kLong))));
    case Builtin::kToInt:
      return set(0, IValue(whole(0)));
    case Builtin::kToFloat:
      return set(0, IValue(number(0).toDouble()));
    case Builtin::kAdd:
      return arithmetic([](auto a, auto b) { return a + b; });
    case Builtin::kSub:
      return arithmetic([](auto a, auto b) { return a - b; });
    case Builtin::kMul:
      return arithmetic([](auto a, auto b) { return a * b; });
    case Builtin::kFloorDiv:
      return arithmetic([](auto a, auto b) { return std::floor(static_cast<double>(a) / static_cast<double>(b)); });
    case Builtin::kTrueDiv:
      return set(0, IValue(number(0).toDouble() / number(1).toDouble()));
    case Builtin::kMod:
      return arithmetic([](auto a, auto b) {
        return static_cast<double>(a) - std::floor(static_cast<double>(a) / static_cast<double>(b)) * static_cast<double>(b);
      });
    case Builtin::kNeg:
      return number(0).isFloatingPoint() ? set(0, IValue(-number(0).toDouble())) : set(0, IValue(-whole(0)));
    case Builtin::kPow:
      return arithmetic([](auto a, auto b) { return std::pow(static_cast<double>(a), static_cast<double>(b)); });
    case Builtin::kMax:
      return arithmetic([](auto a, auto b) { return std::max(a, b); });
    case Builtin::kMin:
      return arithmetic([](auto a, auto b) { return std::min(a, b); });
  }
  if (node.changes_buffer && !training_) {  // num_batches_tracked += 1
    if (!node.outputs.empty()) set(0, argument(0));
    return;
  }
  std::vector<IValue> stack;
  stack.reserve(node.arguments.size());
  for (size_t i = 0; i < node.arguments.size(); ++i) {
    if (!training_ && node.training_flag && node.training_flag->argument == i) {
      stack.push_back(node.training_flag->off);
      continue;
    }
    std::optional<IValue> value = node.arguments[i].Get(values);
    if (!value) {
      throw UserError(field_ + ": " + node.name + " got " +
                      KindOf(values[static_cast<size_t>(node.arguments[i].slot)].value) +
                      " for its argument " + node.op->schema().arguments()[i].name());
    }
    stack.push_back(std::move(*value));
  }
  if (training_ && node.training_flag && node.training_flag->statistic) RefuseOneSample(node, stack);
  node.op->callBoxed(&stack);
  if (node.outputs.size() == stack.size()) {
    for (size_t i = 0; i < stack.size(); ++i) set(i, std::move(stack[i]));
  } else if (node.outputs.size() == 1 && stack.size() > 1) {  // taken apart by "item"
    set(0, c10::ivalue::Tuple::create(std::move(stack)));
  } else if (!node.outputs.empty()) {
    throw AppError(field_ + ": " + node.name + " gave " + std::to_string(stack.size()) + " values where the graph has " +
                   std::to_string(node.outputs.size()));
  }
}

void Graph::MoveTo(at::Device device) {
  const at::NoGradGuard no_grad;
  for (const Value& constant : constants_) {
    if (!constant.value.isTensor()) continue;
    const at::Tensor& tensor = constant.value.toTensor();
    if (tensor.defined() && tensor.device() != device) tensor.set_data(tensor.detach().to(device));
  }
  for (Node& node : nodes_) {
    for (Argument& argument : node.arguments) argument.MoveTo(device);
  }
}

std::vector<at::Tensor> Graph::Run(const std::map<std::string, at::Tensor>& batch) {
  std::vector<Value> values = constants_;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const auto found = batch.find(inputs_[i]);
    if (found == batch.end()) throw UserError(field_ + " takes an array \"" + inputs_[i] + "\", which the data do not have");
    values[static_cast<size_t>(input_slots_[i])].value = found->second;
  }
  for (size_t n = 0; n < nodes_.size(); ++n) {
    RunNode(nodes_[n], values);
    for (int slot : freed_[n]) values[static_cast<size_t>(slot)].value = IValue();
  }
  if (training_) {
    const at::NoGradGuard no_grad;
    for (const Mutation& m : mutations_) m.buffer.copy_(values[static_cast<size_t>(m.slot)].value.toTensor());
  }
  std::vector<at::Tensor> outputs;
  for (int slot : output_slots_) {
    const IValue& value = values[static_cast<size_t>(slot)].value;
    if (!value.isTensor()) throw UserError(field_ + ": an output of the graph is " + KindOf(value) + ", not a tensor");
    outputs.push_back(value.toTensor());
  }
  return outputs;
}

std::vector<GraphUnit> Graph::Units(int count) const {
  GraphUnit whole{.first_node = 0, .last_node = nodes_.size()};
  for (const auto& [name, tensor] : parameters_) {
    whole.parameters.push_back(name);
    whole.elements += tensor.numel();
  }
  if (count <= 1 || inputs_.size() != 1 || outputs_.size() != 1 || nodes_.empty() || !mutations_.empty()) return {whole};

  // What is needed at and after each node.
  std::vector<size_t> last(constants_.size(), 0), made(constants_.size(), 0);
  std::vector<bool> crossing(constants_.size(), false);
  crossing[static_cast<size_t>(input_slots_[0])] = true;
  for (size_t n = 0; n < nodes_.size(); ++n) {
    if (nodes_[n].from_batch_size) continue;
    std::vector<int> slots;
    for (const Argument& argument : nodes_[n].arguments) argument.Slots(&slots);
    for (int slot : slots) last[static_cast<size_t>(slot)] = n + 1;
    for (int slot : nodes_[n].outputs) {
      crossing[static_cast<size_t>(slot)] = true;
      made[static_cast<size_t>(slot)] = n + 1;
    }
  }
  last[static_cast<size_t>(output_slots_[0])] = nodes_.size() + 1;
  // Alive between node n - 1 and n: made before, used at n or later.
  std::vector<int> alive(nodes_.size() + 1, 0), slot_alive(nodes_.size() + 1, -1);
  for (size_t slot = 0; slot < last.size(); ++slot) {
    if (!crossing[slot]) continue;
    for (size_t n = made[slot]; n < last[slot] && n <= nodes_.size(); ++n) {
      ++alive[n];
      slot_alive[n] = static_cast<int>(slot);
    }
  }
  const std::map<std::string, int64_t> sizes = [&] {
    std::map<std::string, int64_t> s;
    for (const auto& [name, tensor] : parameters_) s[name] = tensor.numel();
    return s;
  }();
  // Elements used up to each node, each parameter where it is first used.
  std::set<std::string> seen;
  std::vector<int64_t> before(nodes_.size() + 1, 0);
  for (size_t n = 0; n < nodes_.size(); ++n) {
    before[n + 1] = before[n];
    std::vector<int> slots;
    for (const Argument& argument : nodes_[n].arguments) argument.Slots(&slots);
    for (int slot : slots) {
      const auto parameter = parameter_of_slot_.find(slot);
      if (parameter != parameter_of_slot_.end() && seen.insert(parameter->second).second)
        before[n + 1] += sizes.at(parameter->second);
    }
  }
  // The places to cut: the smallest largest unit, by bisection over its size.
  std::vector<size_t> places;
  for (size_t n = 1; n < nodes_.size(); ++n) {
    if (alive[n] == 1) places.push_back(n);
  }
  const auto cut = [&](int64_t limit) {  // greedy: as far as the limit allows
    std::vector<size_t> cuts;
    size_t start = 0;
    for (size_t i = 0; i < places.size(); ++i) {
      const size_t next = i + 1 < places.size() ? places[i + 1] : nodes_.size();
      if (before[next] - before[start] > limit && before[places[i]] > before[start]) {
        cuts.push_back(places[i]);
        start = places[i];
      }
    }
    return cuts;
  };
  int64_t low = 0, high = before.back();
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const std::vector<size_t> cuts = cut(middle);
    size_t start = 0;
    int64_t largest = 0;
    for (size_t c : cuts) {
      largest = std::max(largest, before[c] - before[start]);
      start = c;
    }
    largest = std::max(largest, before.back() - before[start]);
    if (static_cast<int>(cuts.size()) + 1 <= count && largest <= middle) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  std::vector<size_t> cuts = cut(low);
  cuts.insert(cuts.begin(), 0);
  cuts.push_back(nodes_.size());
  // That may be fewer units than wanted: then the largest that can be is halved.
  while (static_cast<int>(cuts.size()) - 1 < count) {
    int64_t largest = 0, best_half = 0;
    size_t best_place = 0;
    for (size_t u = 0; u + 1 < cuts.size(); ++u) {
      const int64_t size = before[cuts[u + 1]] - before[cuts[u]];
      for (size_t place : places) {
        if (place <= cuts[u] || place >= cuts[u + 1]) continue;
        const int64_t front = before[place] - before[cuts[u]], half = std::max(front, size - front);
        if (front == 0 || front == size) continue;
        if (size > largest || (size == largest && half < best_half)) {
          largest = size;
          best_half = half;
          best_place = place;
        }
      }
    }
    if (best_place == 0) break;
    cuts.insert(std::upper_bound(cuts.begin(), cuts.end(), best_place), best_place);
  }
  cuts.erase(cuts.begin());
  std::vector<GraphUnit> units;
  size_t start = 0;
  for (size_t c : cuts) {
    GraphUnit unit{.first_node = start, .last_node = c};
    std::set<std::string> mine;
    for (size_t n = start; n < c; ++n) {
      std::vector<int> slots;
      for (const Argument& argument : nodes_[n].arguments) argument.Slots(&slots);
      for (int slot : slots) {
        const auto parameter = parameter_of_slot_.find(slot);
        if (parameter != parameter_of_slot_.end()) mine.insert(parameter->second);
      }
    }
    for (const auto& [name, tensor] : parameters_) {
      if (!mine.contains(name)) continue;
      unit.parameters.push_back(name);
      unit.elements += tensor.numel();
    }
    units.push_back(std::move(unit));
    start = c;
  }
  return units;
}

void Graph::KeepOnly(const GraphUnit& unit) {
  const std::set<std::string> kept(unit.parameters.begin(), unit.parameters.end());
  std::erase_if(parameters_, [&](const auto& parameter) { return !kept.contains(parameter.first); });
  for (const auto& [slot, name] : parameter_of_slot_) {
    if (!kept.contains(name)) constants_[static_cast<size_t>(slot)].value = IValue();
  }
}

at::Tensor Graph::RunUnit(const GraphUnit& unit, const at::Tensor& input, int64_t batch_size) {
  std::vector<Value> values = constants_;
  // The numbers that follow from the batch's size, wherever in the graph they are computed.
  for (const Node& node : nodes_) {
    if (!node.from_batch_size) continue;
    if (node.builtin == Builtin::kSize) {
      values[static_cast<size_t>(node.outputs[0])].value = IValue(batch_size);
    } else {
      RunNode(node, values);
    }
  }
  // The one tensor that comes in: of what the unit uses and does not make.
  if (unit.first_node == 0) {
    values[static_cast<size_t>(input_slots_[0])].value = input;
  } else {
    std::set<int> made;
    int found = kUndefinedSlot;
    for (size_t n = unit.first_node; n < nodes_.size() && found == kUndefinedSlot; ++n) {
      if (nodes_[n].from_batch_size) continue;
      std::vector<int> slots;
      for (const Argument& argument : nodes_[n].arguments) argument.Slots(&slots);
      for (int slot : slots) {
        if (!made.contains(slot) && values[static_cast<size_t>(slot)].value.isNone()) found = slot;
      }
      for (int slot : nodes_[n].outputs) made.insert(slot);
    }
    if (found == kUndefinedSlot) throw AppError(field_ + ": a unit has no input");
    values[static_cast<size_t>(found)].value = input;
  }
  int out = output_slots_[0];
  std::set<int> made;
  for (size_t n = unit.first_node; n < unit.last_node; ++n) {
    if (nodes_[n].from_batch_size) continue;
    RunNode(nodes_[n], values);
    for (int slot : nodes_[n].outputs) made.insert(slot);
    for (int slot : freed_[n]) values[static_cast<size_t>(slot)].value = IValue();
  }
  if (unit.last_node < nodes_.size()) {
    for (size_t n = unit.last_node; n < nodes_.size(); ++n) {
      std::vector<int> slots;
      for (const Argument& argument : nodes_[n].arguments) argument.Slots(&slots);
      const auto mine = std::find_if(slots.begin(), slots.end(), [&](int slot) { return made.contains(slot); });
      if (mine != slots.end()) {
        out = *mine;
        break;
      }
    }
  }
  return values[static_cast<size_t>(out)].value.toTensor();
}

}  // namespace itwin::worker
