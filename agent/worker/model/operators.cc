#include "agent/worker/model/operators.h"

#include <dlfcn.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/script.h>
#include <torch/version.h>

#include <algorithm>
#include <string_view>
#include <utility>

#include "agent/worker/data/nearest_name.h"
#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

// Constructs and conversions of TorchScript itself; they stay within the interpreter.
const std::set<std::string>& AllowedPrims() {
  static const auto* const kNames = new std::set<std::string>{
      "AutogradAdd", "CallFunction", "CallMethod", "Closure", "Constant", "ConstantChunk",
      "ConstantMKLDNNTensor", "CreateObject", "DictConstruct", "EnumName", "EnumValue", "Enter",
      "Exit", "FusedConcat", "GetAttr", "HasAttr", "If", "IfThenElse", "isinstance", "is_none",
      "ListConstruct", "ListUnpack", "Loop", "ModuleContainerIndex", "NumToTensor", "Param",
      "Print", "RaiseException", "Return", "SetAttr", "StringIndex", "TupleConstruct",
      "TupleIndex", "TupleSlice", "TupleUnpack", "Uninitialized", "VarConcat", "VarStack", "abs",
      "annotate", "device", "dtype", "index", "is_cpu", "is_cuda", "is_meta", "is_mkldnn", "is_nested",
      "is_quantized", "is_sparse", "layout", "max",
      "min", "name", "rangelist", "requires_grad", "shape", "tolist", "type", "unchecked_cast",
      "unchecked_unwrap_optional", "data"};
  return *kNames;
}

const std::set<std::string>& AllowedAten() {
  static const auto* const kNames = new std::set<std::string>{
#include "agent/worker/model/allowed_operators.inc"
  };
  return *kNames;
}

// What libraries brought, by full name, and where they lie.
std::set<std::string>& LibraryOperators() {
  static auto* const names = new std::set<std::string>;
  return *names;
}
std::vector<std::string>& Libraries() {
  static auto* const paths = new std::vector<std::string>;
  return *paths;
}

std::string BaseName(const std::string& name) {
  const size_t colons = name.find("::");
  const size_t dot = name.find('.', colons == std::string::npos ? 0 : colons);
  return name.substr(0, dot);
}

std::string Joined(const std::string& name, const std::string& overload) {
  return overload.empty() ? name : name + "." + overload;
}

// Full names of all operators there are, those of the dispatcher and those of TorchScript alone.
std::set<std::string> AllOperators() {
  std::set<std::string> names;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (c10::Dispatcher::singleton().findSchema(name))  // others are implementations without one
      names.insert(Joined(name.name, name.overload_name));
  }
  for (const auto& op : torch::jit::getAllOperators()) {
    names.insert(Joined(op->schema().name(), op->schema().overload_name()));
  }
  return names;
}

// What a block may run, and the functions that it calls.
struct Uses {
  std::set<std::string> names;
  std::vector<torch::jit::Function*> called;

  void Collect(const torch::jit::Block* block) {
    for (const torch::jit::Node* node : block->nodes()) {
      const std::string kind = node->kind().toQualString();
      if (const c10::FunctionSchema* schema = node->maybeSchema()) {
        names.insert(Joined(schema->name(), schema->overload_name()));
      } else {
        names.insert(kind);
      }
      for (const torch::jit::Value* input : node->inputs()) CollectType(*input->type());
      for (const torch::jit::Value* output : node->outputs()) CollectType(*output->type());
      for (const torch::jit::Block* inner : node->blocks()) Collect(inner);
      if (node->hasAttribute(torch::jit::attr::Subgraph)) {
        Collect(node->g(torch::jit::attr::Subgraph)->block());
      }
    }
  }

  // Methods of a class written in C++ are no operators, yet a module may call them.
  void CollectType(const c10::Type& type) {
    constexpr std::string_view kCustom = "__torch__.torch.classes.";
    if (const auto* function = type.castRaw<c10::FunctionType>()) {
      called.push_back(function->function());
    } else if (const auto* cls = type.castRaw<c10::ClassType>(); cls && cls->name()) {
      const std::string name = cls->name()->qualifiedName();
      if (name.starts_with(kCustom)) names.insert("torch.classes." + name.substr(kCustom.size()));
    }
  }
};

std::string Sentence(const std::vector<std::string>& names) {
  constexpr size_t kMost = 12;
  std::string text;
  for (size_t i = 0; i < names.size() && i < kMost; ++i) text += (i ? ", " : "") + names[i];
  if (names.size() > kMost) text += " and " + std::to_string(names.size() - kMost) + " more";
  return text;
}

}  // namespace

void LoadOperatorLibrary(const std::filesystem::path& path) {
  const std::set<std::string> before = AllOperators();
  if (!path.is_absolute()) {
    throw UserError("--allow-library " + path.string() + ": give an absolute path");
  }
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    const char* reason = dlerror();
    throw UserError("--allow-library " + path.string() + " cannot be loaded: " +
                    (reason == nullptr ? "no reason given" : reason));
  }
  for (const std::string& name : AllOperators()) {
    if (!before.contains(name)) LibraryOperators().insert(name);
  }
  Libraries().push_back(path.string());
}

bool IsAllowed(const std::string& name) {
  const std::string base = BaseName(name);
  if (base.starts_with("aten::") && AllowedAten().contains(base.substr(6))) return true;
  if (base.starts_with("prim::")) return AllowedPrims().contains(base.substr(6));
  const std::set<std::string>& library = LibraryOperators();
  if (library.contains(name)) return true;
  const auto next = library.lower_bound(base);  // any overload, for a base name
  return name == base && next != library.end() && BaseName(*next) == base;
}

bool IsAvailable(const std::string& name) {
  if (name.starts_with("prim::")) return true;  // the loader knows its own
  if (name != BaseName(name)) {
    static const auto* const kThere = new std::set<std::string>(AllOperators());
    return kThere->contains(name) || LibraryOperators().contains(name);
  }
  const auto symbol = c10::Symbol::fromQualString(name);
  return !torch::jit::getAllOperatorsFor(symbol).empty();
}

void CheckOperators(const std::set<std::string>& names, const std::string& field) {
  std::vector<std::string> forbidden, missing;
  for (const std::string& name : names) {
    if (!IsAllowed(name)) {
      forbidden.push_back(name);
    } else if (!IsAvailable(name)) {
      missing.push_back(name);
    }
  }
  if (forbidden.empty() && missing.empty()) return;
  std::string text = field;
  if (!forbidden.empty()) {
    text += " uses " + Sentence(forbidden) +
            ", which a model may not use at a site (allow-list " +
            std::to_string(kAllowListVersion) +
            "): models compute with tensors, they do not reach for files, threads or other "
            "processes. An operator of a library of yours has to be allowed by the site's "
            "administrator (--allow-library)";
  }
  if (!missing.empty()) {
    text += std::string(forbidden.empty() ? "" : ". It also") + " uses " + Sentence(missing) +
            ", which LibTorch " TORCH_VERSION
            " of this site does not have; write it with older operators, or use a site with a "
            "newer LibTorch";
  }
  throw UserError(text);
}

std::set<std::string> OperatorsOf(const torch::jit::Module& module) {
  Uses uses;
  std::set<const torch::jit::Function*> seen;
  const auto look = [&](torch::jit::Function* function) {
    if (function == nullptr || !seen.insert(function).second) return;
    function->ensure_defined();
    if (function->isGraphFunction()) {
      uses.Collect(torch::jit::toGraphFunction(*function).graph()->block());
    } else {
      uses.names.insert(function->qualname().qualifiedName());
    }
  };
  const auto unit = module._ivalue()->compilation_unit();
  for (size_t before = 0;;) {  // until nothing new is called: looking may compile more
    for (torch::jit::Function* function : unit->get_functions()) look(function);
    for (torch::jit::Function* function : std::exchange(uses.called, {})) look(function);
    if (seen.size() == before) return uses.names;
    before = seen.size();
  }
}

nlohmann::json DescribeOperators() {
  std::vector<std::string> operators;
  for (const std::string& name : AllOperators()) {
    if (IsAllowed(name) && !name.starts_with("prim::")) operators.push_back(name);
  }
  return {{"libtorch", TORCH_VERSION},
          {"allow_list", kAllowListVersion},
          {"libraries", Libraries()},
          {"operators", operators}};
}

}  // namespace itwin::worker
