#include "agent/worker/model/torchscript_import.h"

#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/frontend/parser.h>
#include <torch/csrc/jit/serialization/import_read.h>
#include <torch/csrc/jit/serialization/import_source.h>
#include <torch/script.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "agent/worker/error.h"

namespace itwin::worker {
namespace {

namespace jit = torch::jit;

constexpr char kCode[] = "code/";

bool IsVariable(const jit::TreeRef& tree, const std::string& name) {
  return tree->kind() == jit::TK_VAR && jit::Var(tree).name().name() == name;
}

// a.b.c, where a is the name: an entry of the table of constants, or of a class without an object.
bool IsPathFrom(const char* name, const jit::TreeRef& tree, int longest) {
  const jit::TreeRef* at = &tree;
  for (int steps = 0; (*at)->kind() == '.' && steps < longest; ++steps) at = &(*at)->tree(0);
  return IsVariable(*at, name);
}

// Whether an expression is a value written out, as torch.jit.save writes defaults and constants.
bool IsPlain(const jit::TreeRef& tree) {
  constexpr int kLongestPath = 100;
  const auto all_plain = [](const jit::TreeList& trees) {
    return std::all_of(trees.begin(), trees.end(), IsPlain);
  };
  switch (tree->kind()) {
    case jit::TK_CONST:
    case jit::TK_STRINGLITERAL:
    case jit::TK_TRUE:
    case jit::TK_FALSE:
    case jit::TK_NONE:
      return true;
    case jit::TK_LIST:
    case jit::TK_LIST_LITERAL:
    case jit::TK_TUPLE_LITERAL:
    case jit::TK_DICT_LITERAL:
    case jit::TK_UNARY_MINUS:
    case '+':  // complex numbers
    case '-':
      return all_plain(tree->trees());
    case jit::TK_VAR:
      return IsVariable(tree, "inf") || IsVariable(tree, "nan") || IsVariable(tree, "infj") ||
             IsVariable(tree, "nanj");
    case '.':
      return IsPathFrom("CONSTANTS", tree, 1) || IsPathFrom("__torch__", tree, kLongestPath);
    case jit::TK_APPLY: {
      const jit::Apply call(tree);
      const jit::TreeRef callee = call.callee().tree();
      const jit::TreeList& inputs = call.inputs().tree()->trees();
      if (IsVariable(callee, "annotate")) return inputs.size() == 2 && IsPlain(inputs[1]);
      return callee->kind() == '.' && IsVariable(callee->tree(0), "torch") &&
             jit::Select(callee).selector().name() == "device" && all_plain(inputs);
    }
    default:
      return false;
  }
}

// Looks at one source before it is compiled.
class SourceCheck {
 public:
  SourceCheck(std::string source, const std::string& field)
      : source_(std::move(source)), field_(field) {}

  void Check(const std::shared_ptr<jit::Source>& source) {
    jit::Parser parser(source);
    jit::Lexer& lexer = parser.lexer();
    if (lexer.cur().kind == jit::TK_IDENT && lexer.cur().text() == "op_version_set") {
      lexer.next();
      lexer.expect('=');
      lexer.expect(jit::TK_NUMBER);
      lexer.expect(jit::TK_NEWLINE);
    }
    while (lexer.cur().kind != jit::TK_EOF) {
      if (lexer.nextIf(jit::TK_IMPORT)) {
        lexer.expect(jit::TK_IDENT);
        while (lexer.nextIf('.')) lexer.expect(jit::TK_IDENT);
        lexer.expect(jit::TK_NEWLINE);
      } else if (lexer.cur().kind == jit::TK_CLASS_DEF) {
        Look(parser.parseClass());
      } else {
        Look(parser.parseFunction(/*is_method=*/false));
      }
    }
  }

 private:
  void Look(const jit::TreeRef& tree) const {
    if (tree->kind() == jit::TK_CLASS_DEF) LookAtConstants(tree);
    if (tree->kind() == jit::TK_DEF) {
      const std::string name = jit::Def(tree).name().name();
      if (name == "__setstate__" || name == "__getstate__") throw RunsWhileRead(name);
    }
    if (tree->kind() == jit::TK_PARAM) {
      const auto value = jit::Param(tree).defaultValue();
      if (value.present() && !IsPlain(value.get().tree())) {
        throw Computed("the default of the argument " + jit::Param(tree).ident().name());
      }
    }
    for (const jit::TreeRef& part : tree->trees()) Look(part);
  }

  // "name : type = value" of the class itself; "__annotations__[…] = type" is no value.
  void LookAtConstants(const jit::TreeRef& tree) const {
    if (tree->kind() == jit::TK_DEF) return;
    if (tree->kind() == jit::TK_ASSIGN) {
      const jit::Assign assign(tree);
      const bool one = assign.lhs_list().size() == 1;
      if (one && assign.lhs().kind() == jit::TK_SUBSCRIPT) return;
      if (!one || (assign.rhs().present() && !IsPlain(assign.rhs().get().tree()))) {
        throw Computed("a constant of a class");
      }
      return;
    }
    for (const jit::TreeRef& part : tree->trees()) LookAtConstants(part);
  }

  WorkerError RunsWhileRead(const std::string& method) const {
    return UserError(
        field_ + " has a method " + method + " (in " + source_ +
        "), which would run while the file is read, before its operators can be "
        "checked; leave it out: parameters and buffers are saved without one. Modules "
        "with quantised or packed weights cannot be trained; hand over the float module");
  }
  WorkerError Computed(const std::string& what) const {
    return UserError(field_ + ": " + what + " (in " + source_ +
                     ") is computed by code, which would run while the file is read, before its "
                     "operators can be checked; write the value itself");
  }

  const std::string source_;
  const std::string& field_;
};

}  // namespace

torch::jit::Module ImportTorchScript(std::shared_ptr<caffe2::serialize::ReadAdapterInterface> file,
                                     const std::string& field) {
  caffe2::serialize::PyTorchStreamReader reader(std::move(file));
  const auto load_source = [&](const std::string& qualifier) -> std::shared_ptr<jit::Source> {
    std::string path = qualifier;
    std::replace(path.begin(), path.end(), '.', '/');
    path = kCode + path + ".py";
    if (!reader.hasRecord(path)) return nullptr;
    const auto [bytes, size] = reader.getRecord(path);
    const auto source = std::make_shared<jit::Source>(
        std::string(static_cast<const char*>(bytes.get()), size), path, 1);
    SourceCheck(path, field).Check(source);
    return source;
  };
  const auto unit = std::make_shared<jit::CompilationUnit>();
  std::vector<c10::IValue> constants;
  const jit::SourceImporter importer(unit, &constants, load_source,
                                     static_cast<size_t>(reader.version()));
  const jit::TypeResolver resolve = [&](const c10::QualifiedName& name) {
    return c10::StrongTypePtr(unit, importer.loadType(name));
  };
  const jit::ObjLoader make_object = [&](const at::StrongTypePtr& type, c10::IValue state) {
    const auto cls = type.type_->expect<c10::ClassType>();
    if (cls->findMethod("__setstate__") !=
        nullptr) {  // sources have none: a class of LibTorch's own
      throw UserError(field + " holds an object of " + cls->name()->qualifiedName() +
                      ", which is not made of parameters and buffers; modules with quantised or "
                      "packed weights cannot be trained, hand over the float module");
    }
    const auto attributes = std::move(state).toGenericDict();
    const size_t count = cls->numAttributes();
    auto object = c10::ivalue::Object::create(type, count);
    for (size_t i = 0; i < count; ++i) object->setSlot(i, attributes.at(cls->getAttributeName(i)));
    return object;
  };
  const auto read = [&](const char* name) {
    return jit::readArchiveAndTensors(name, /*pickle_prefix=*/"", /*tensor_prefix=*/"", resolve,
                                      make_object, at::Device(at::kCPU), reader);
  };
  const c10::IValue table = read("constants");
  for (const c10::IValue& constant : table.toTupleRef().elements()) constants.push_back(constant);
  return jit::Module(read("data").toObject());
}

}  // namespace itwin::worker
