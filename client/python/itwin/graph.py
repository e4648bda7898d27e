"""torch.nn.Module -> a list of operator calls with named arguments, which the worker runs without Python and without TorchScript.

Where torch.export exists (2.x) it records the graph; before, a trace at operator level does. Either way nothing of Python's control
flow is kept, so a graph is only given out when recording it for two sizes of batch gives the same calls.
"""

import contextlib
import copy
import logging
import math
import re
import warnings

from itwin.errors import ModelError, require

FORMAT = 1
_DTYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 9: "complex64",
           10: "complex128", 11: "bool", 15: "bfloat16"}
_MEMORY_FORMATS = {0: "contiguous", 1: "preserve", 2: "channels_last", 3: "channels_last_3d"}
_ARITHMETIC = {"add": "add", "sub": "sub", "mul": "mul", "floordiv": "floordiv", "truediv": "truediv", "mod": "mod", "neg": "neg",
               "pow": "pow", "sym_max": "max", "sym_min": "min", "max": "max", "min": "min"}


def export(module, batch, own_loss):
    """(graph, {name: tensor}, frontend) of a module in training mode. `batch`: arrays of at least two samples by name. With
    `own_loss` the graph is that of training_step, else of forward(input)."""
    torch = require("torch", "exporting a module")
    samples = len(batch["input"])
    if samples < 2:
        raise ModelError("exporting a module needs at least two samples, so that the size of the batch can be told from other sizes.")
    names = list(batch) if own_loss else ["input"]
    call, outputs = _calling(torch, copy.deepcopy(module).cpu().train(), names, own_loss, batch)
    arrays = tuple(batch[name] for name in names)
    if hasattr(torch, "export") and hasattr(torch.export, "export"):
        graph, tensors = _exported(torch, call, arrays, names, outputs)
        return graph, tensors, "torch.export"
    first = _traced(torch, call, arrays, names, outputs)
    more = tuple(torch.cat([array, array[:1]]) for array in arrays)
    call, _ = _calling(torch, copy.deepcopy(module).cpu().train(), names, own_loss, batch)
    _refuse_fixed_batch(first, _traced(torch, call, more, names, outputs), samples)
    return first[0], first[1], "torch.jit.trace"


def operators(graph):
    """Full names of the operators that a graph calls."""
    return sorted({node["op"] + ("." + node["overload"] if node.get("overload") else "")
                   for node in graph["nodes"] if "::" in node["op"]})


def _calling(torch, module, names, own_loss, batch):
    """A module that takes the arrays one by one and returns a tuple of tensors, and the outputs' names."""
    if not own_loss:
        class Forward(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.module = module

            def forward(self, input):
                return self.module(input)
        return Forward(), ["prediction"]

    with torch.random.fork_rng(devices=[]):
        _, metrics = copy.deepcopy(module).training_step({name: batch[name] for name in names})
    metric_names = list(metrics)

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *arrays):
            loss, values = self.module.training_step(dict(zip(names, arrays)))
            return (loss, *(values[name].detach() for name in metric_names))
    return Step(), ["loss"] + metric_names


def _plain_name(name):
    return name[len("module."):] if name.startswith("module.") else name


class _Weights:
    """The tensors of a graph, each once; a second name of one says whose it is."""

    def __init__(self, module):
        self.tensors, self.entries = {}, []
        self._parameters = dict(module.named_parameters(remove_duplicate=False)) if _keeps_duplicates(module) else None
        if self._parameters is None:
            self._parameters = {f"{prefix}.{name}" if prefix else name: p for prefix, part in module.named_modules()
                                for name, p in part._parameters.items() if p is not None}
        self._buffers = {f"{prefix}.{name}" if prefix else name: b for prefix, part in module.named_modules()
                         for name, b in part._buffers.items() if b is not None}
        self._values, self._first = {}, {}  # a tensor's first name, in the order of the module
        for name, tensor in [*self._parameters.items(), *self._buffers.items()]:
            self._first.setdefault(id(tensor), name)

    def value(self, name):
        """The graph's name for a parameter or buffer of the module."""
        if name in self._values:
            return self._values[name]
        kind = "parameter" if name in self._parameters else "buffer"
        tensor = self._parameters.get(name, self._buffers.get(name))
        if tensor is None:
            raise ModelError(f"the module holds {name!r}, which is no parameter and no buffer: register it with register_buffer.")
        owner = self._first[id(tensor)]
        if owner != name:
            self.value(owner)
        plain = _plain_name(name)
        entry = {"value": f"w.{plain}", "name": plain, "kind": kind}
        if kind == "parameter" and not tensor.requires_grad:
            entry["trainable"] = False
        if owner != name:
            entry["same_as"] = _plain_name(owner)
        self.tensors[plain] = tensor.detach().clone().contiguous()
        self.entries.append(entry)
        self._values[name] = entry["value"]
        return entry["value"]

    def constant(self, tensor):
        name = f"constant.{sum(entry['kind'] == 'constant' for entry in self.entries)}"
        self.entries.append({"value": f"w.{name}", "name": name, "kind": "constant"})
        self.tensors[name] = tensor.detach().clone().contiguous()
        return {"v": f"w.{name}"}

    def add_unused(self):
        """Parameters and buffers that the graph does not use still belong to the model."""
        for name in [*self._parameters, *self._buffers]:
            self.value(name)


def _keeps_duplicates(module):
    import inspect
    return "remove_duplicate" in inspect.signature(module.named_parameters).parameters


def _literal(torch, value, argument, weights):
    """A value of Python as the graph writes it."""
    if value is None or isinstance(value, (bool, str)):
        if argument == "device" and isinstance(value, str):
            return {"device": "model"}
        return value
    if isinstance(value, int):
        if argument == "dtype":
            return {"dtype": _DTYPES[value]}
        if argument == "memory_format":
            return {"memory_format": _MEMORY_FORMATS[value]}
        return None if argument == "layout" else value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).split(".")[1]}
    if isinstance(value, torch.device):
        return {"device": "model"}
    if isinstance(value, torch.memory_format):
        return {"memory_format": {torch.contiguous_format: "contiguous", torch.preserve_format: "preserve",
                                  torch.channels_last: "channels_last"}.get(value, "contiguous")}
    if isinstance(value, torch.layout):
        return None
    if isinstance(value, torch.Tensor):
        return _literal(torch, value.item(), argument, weights) if value.dim() == 0 else weights.constant(value)
    if isinstance(value, (list, tuple)):
        return [_literal(torch, entry, argument, weights) for entry in value]
    raise ModelError(f"the graph has an argument {argument} of type {type(value).__name__}, which cannot be handed over.")


# ---- operator-level trace (torch 1.x) --------------------------------------------------------------------------------

def _traced(torch, call, arrays, names, outputs):
    """(graph, tensors, places): places[i] is where in the user's code node i comes from."""
    untouched = copy.deepcopy(call)  # tracing runs the module, which changes running statistics
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("always")
        try:
            traced = torch.jit.trace(call, arrays, check_trace=False, strict=False)
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise ModelError(f"{type(call.module).__name__} cannot be exported: {lines[-1] if lines else error}.") from None
    for warning in caught:
        # Numbers taken out of tensors (len, int, iteration) are found by recording a second time.
        if (issubclass(warning.category, torch.jit.TracerWarning) and "/torch/" not in (warning.filename or "")
                and "Python boolean" in str(warning.message)):
            raise _decides_by_values(call, f"{warning.filename}:{warning.lineno}: {str(warning.message).split('.')[0]}")
    graph = traced.inlined_graph.copy()
    torch._C._jit_pass_inline(graph)
    reader = _TraceReader(torch, untouched, names)
    return reader.read(graph, outputs)


class _TraceReader:
    def __init__(self, torch, call, names):
        self.torch, self.names = torch, names
        self.kind = type(call.module).__name__
        self.weights = _Weights(call)
        self.paths = {}  # value -> attribute path
        self.nodes, self.places = [], []

    def read(self, graph, outputs):
        inputs = list(graph.inputs())
        self.paths[inputs[0].debugName()] = ""
        entries = [{"value": value.debugName(), "name": name} for value, name in zip(inputs[1:], self.names)]
        for node in graph.nodes():
            self._node(node)
        results = []
        for value in graph.outputs():
            results += list(value.node().inputs()) if value.node().kind() == "prim::TupleConstruct" else [value]
        if any(value.node().kind() in ("prim::DictConstruct", "prim::ListConstruct") for value in results) or len(results) != len(
                outputs):
            raise ModelError(f"{self.kind}.forward must return one tensor; give the module a training_step for more.")
        self.weights.add_unused()
        document = {"format": FORMAT, "inputs": entries, "weights": self.weights.entries, "nodes": self.nodes,
                    "outputs": [{"value": self._argument(value, "")["v"], "name": name}
                                for value, name in zip(results, outputs)]}
        return document, self.weights.tensors, self.places

    def _node(self, node):
        kind = node.kind()
        if kind == "prim::GetAttr":
            base = self.paths[list(node.inputs())[0].debugName()]
            self.paths[node.output().debugName()] = f"{base}.{node.s('name')}" if base else node.s("name")
            return
        if kind in ("prim::Constant", "prim::ListConstruct", "prim::TupleConstruct"):
            return
        inputs, outputs = list(node.inputs()), [value.debugName() for value in node.outputs()]
        if list(node.blocks()):
            raise ModelError(f"{self.kind} has control flow of TorchScript inside ({node.sourceRange()}); hand the whole module "
                             "over as TorchScript (torch.jit.script).")
        if kind in ("prim::ListUnpack", "prim::TupleUnpack"):
            return self._add(node, "unpack", {"list": self._argument(inputs[0], "list")}, outputs)
        if kind == "prim::NumToTensor":
            return self._add(node, "to_tensor", {"a": self._argument(inputs[0], "a")}, outputs)
        if kind in ("aten::Int", "aten::IntImplicit", "aten::Float", "aten::FloatImplicit", "aten::ScalarImplicit"):
            dtype = inputs[0].type().dtype() if inputs[0].isCompleteTensor() else None
            whole = "Int" in kind or (kind == "aten::ScalarImplicit" and dtype is not None and not dtype.is_floating_point)
            return self._add(node, "to_int" if whole else "to_float", {"a": self._argument(inputs[0], "a")}, outputs)
        if kind == "aten::size" and len(inputs) == 2:
            return self._add(node, "size", {"self": self._argument(inputs[0], "self"), "dim": self._argument(inputs[1], "dim")},
                             outputs)
        if kind == "aten::__getitem__":
            return self._add(node, "item", {"list": self._argument(inputs[0], "list"),
                                            "index": self._argument(inputs[1], "index")}, outputs)
        if "::" not in kind or kind.startswith("prim::"):
            raise ModelError(f"{self.kind} cannot be exported: {kind} ({_place(node)}) is no operator on tensors.")
        schema = self.torch._C.parse_schema(node.schema())
        arguments = {argument.name: self._argument(value, argument.name)
                     for argument, value in zip(schema.arguments, inputs)}
        self._add(node, schema.name, arguments, outputs, schema.overload_name)

    def _add(self, node, op, arguments, outputs, overload=""):
        entry = {"op": op, "args": arguments, "out": outputs}
        if overload:
            entry["overload"] = overload
        self.nodes.append(entry)
        self.places.append(_place(node))

    def _argument(self, value, name):
        node = value.node()
        kind = node.kind()
        if kind == "prim::Constant":
            return _literal(self.torch, value.toIValue(), name, self.weights)
        if kind == "prim::ListConstruct":
            return [self._argument(entry, name) for entry in node.inputs()]
        path = self.paths.get(value.debugName())
        if path:
            return {"v": self.weights.value(path)}
        return {"v": value.debugName()}


def _decides_by_values(call, place):
    return ModelError(f"{type(call.module).__name__} decides in Python by the values of tensors ({place}); an exported graph would keep "
                      "only one branch. Use tensor operations such as torch.where, or write that part so that torch.jit.script takes "
                      "it.")


def _built_in(samples, rest):
    return ModelError(f"the size of the batch ({samples}), or a value in it, is built into the exported graph{rest}")


def _place(node):
    lines = re.findall(r"([^\s(]+\.py)\((\d+)\): (\w+)", node.sourceRange())
    for file, line, function in lines:
        if "/torch/" not in file:
            return f"{file}:{line}"
    return f"{lines[0][0]}:{lines[0][1]}" if lines else node.scopeName() or "?"


def _refuse_fixed_batch(first, second, samples):
    """Raises ModelError when the graph recorded with one more sample is another."""
    (graph, _, places), (other, _, _) = first, second

    def differs(a, b):
        if isinstance(a, dict) and isinstance(b, dict):
            if "v" in a and "v" in b:
                return False  # names follow the order of the calls, which are compared
            return a.keys() != b.keys() or any(differs(a[key], b[key]) for key in a)
        if isinstance(a, list) and isinstance(b, list):
            return len(a) != len(b) or any(map(differs, a, b))
        return a != b

    for index, (a, b) in enumerate(zip(graph["nodes"], other["nodes"])):
        same_call = (a["op"], a.get("overload")) == (b["op"], b.get("overload"))
        if same_call and not differs(a["args"], b["args"]):
            continue
        what = f"{a['op']} has it as a fixed number" if same_call else "the calls depend on it"
        raise _built_in(samples, f": {what} ({places[index]}). Take the size from the input there, as in x.shape[0] without int() or "
                                 "len(), or use -1.")
    if len(graph["nodes"]) != len(other["nodes"]):
        raise _built_in(samples, ": the number of calls depends on it (a Python loop over samples). Use tensor operations over the whole "
                                 "batch.")


# ---- torch.export (2.x) ----------------------------------------------------------------------------------------------

def _exported(torch, call, arrays, names, outputs):
    record = getattr(torch.export, "export_for_training", torch.export.export)  # from 2.9 on, export records training graphs
    batch = torch.export.Dim("batch", min=2, max=2**31 - 1)  # without an end, recurrent layers are refused
    shapes = tuple({0: batch} for _ in arrays)
    if len(outputs) > 1 or outputs == ["loss"]:
        shapes = (shapes,)  # of *arrays
    try:
        with _quiet("torch._guards"):
            program = record(call, arrays, dynamic_shapes=shapes)
    except Exception as error:  # of several types, which differ between versions
        raise _explain_export(call, str(error), len(arrays[0])) from None
    return from_program(torch, program, call, names, outputs)


@contextlib.contextmanager
def _quiet(name):
    """Without what a part of PyTorch prints beside its exception."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _explain_export(call, text, samples):
    places = [f"{file}:{line}" for file, line in re.findall(r'File "([^"]+)", line (\d+)', text)
              if "/torch/" not in file and file != __file__]
    place = places[-1] if places else "torch.export does not say where"
    if "ontrol flow" in text or "data-dependent" in text:
        return _decides_by_values(call, place)
    if "inferred to be a constant" in text:
        return _built_in(samples, f" ({place}). Take the size from the input, as in x.shape[0], or use -1, and use tensor operations "
                                  "over the whole batch in place of loops over samples.")
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return ModelError(f"{type(call.module).__name__} cannot be exported (torch.export): {' '.join(lines[:2]) or 'no reason given'} "
                      f"({place})")


def from_program(torch, program, call, names, outputs):
    """(graph, tensors) of an ExportedProgram of the training IR. `call`: the module it was recorded from."""
    weights = _Weights(call)
    values, entries, nodes, mutations = {}, [], [], []
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    constants = getattr(program, "constants", {})
    remaining = list(names)

    def argument(value, name):
        if isinstance(value, torch.fx.Node):
            return values[value.name]
        if isinstance(value, (list, tuple)):
            return [argument(entry, name) for entry in value]
        return _literal(torch, value, name, weights)

    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            kind = spec.kind.name
            if kind in ("PARAMETER", "BUFFER"):
                values[node.name] = {"v": weights.value(spec.target)}
            elif kind == "USER_INPUT":
                entries.append({"value": node.name, "name": remaining.pop(0)})
                values[node.name] = {"v": node.name}
            elif kind == "CONSTANT_TENSOR":
                values[node.name] = weights.constant(constants[spec.target])
            else:
                raise ModelError(f"the exported graph takes a {kind.lower()} ({node.name}), which cannot be handed over.")
        elif node.op == "get_attr":
            values[node.name] = weights.constant(getattr(program.graph_module, node.target))
        elif node.op == "call_function":
            entry = _function(torch, node, argument)
            values[node.name] = {"v": node.name}
            if entry is not None:
                nodes.append(entry)
        elif node.op == "output":
            targets = []
            for value, spec in zip(node.args[0], program.graph_signature.output_specs):
                if spec.kind.name == "BUFFER_MUTATION":
                    mutations.append({"buffer": _plain_name(spec.target), "value": values[value.name]["v"]})
                else:
                    targets.append(values[value.name]["v"])
            if len(targets) != len(outputs):
                raise ModelError("forward must return one tensor; give the module a training_step for more.")
    weights.add_unused()
    document = {"format": FORMAT, "inputs": entries, "weights": weights.entries, "nodes": nodes,
                "outputs": [{"value": value, "name": name} for value, name in zip(targets, outputs)]}
    if mutations:
        document["mutations"] = mutations
    return document, weights.tensors


def _function(torch, node, argument):
    """One call_function node; None for a check that nothing depends on."""
    target = node.target
    name = getattr(target, "__name__", str(target))
    if not isinstance(target, torch._ops.OpOverload):
        if name == "getitem":
            return {"op": "item", "args": {"list": argument(node.args[0], "list"), "index": argument(node.args[1], "index")},
                    "out": [node.name]}
        if name in _ARITHMETIC:
            pairs = dict(zip(("a", "b"), (argument(value, "") for value in node.args)))
            return {"op": _ARITHMETIC[name], "args": pairs, "out": [node.name]}
        if not node.users:
            return None  # a comparison for an assertion
        raise ModelError(f"the exported graph calls {name}, which is no operator on tensors; take it out of forward, or hand the "
                         "module over as TorchScript.")
    schema = target._schema
    if schema.name in ("aten::sym_size", "aten::size"):
        return {"op": "size", "args": {"self": argument(node.args[0], "self"), "dim": argument(node.args[1], "dim")},
                "out": [node.name]}
    if not node.users and ("assert" in schema.name or "sym_constrain" in schema.name):
        return None
    if schema.name in ("aten::item", "aten::_local_scalar_dense"):
        raise ModelError("forward takes a number out of a tensor (.item(), float() or int()), which has no gradient and is no part of an "
                         "exported graph; keep it a tensor.")
    arguments = {declared.name: argument(value, declared.name) for declared, value in zip(schema.arguments, node.args)}
    arguments.update({key: argument(value, key) for key, value in node.kwargs.items()})
    entry = {"op": schema.name, "args": arguments, "out": [node.name] if schema.returns else []}
    if schema.overload_name:
        entry["overload"] = schema.overload_name
    return entry
