"""torch.nn.Module -> a TorchScript file that the worker can train, tried for one step here first."""

import copy
import io
import re
import warnings

from itwin import losses
from itwin.errors import ModelError, SpecError, require

CHECK_SAMPLES = 4  # of the batch that is tried here
_STEPS = ("training_step", "evaluation_step")

# What TorchScript's compiler says -> what to do about it.
_ADVICE = (
    (r"(could not|can't) get source|source code is not available",
     "its source cannot be found: define the class in a file or in a notebook cell, not in exec or python -c"),
    (r"(variable number of arguments|\*args|\*\*kwargs|[Vv]ararg|keyword-arg expansion)",
     "write out the arguments of forward instead of *args or **kwargs"),
    (r"super\(", "super() does not work in forward: give the base class's code a name of its own and call that"),
    (r"lambda", "replace the lambda by a method or a named function"),
    (r"(Try|Raise|With|try/except|[Gg]enerator|Yield|ListComp|DictComp|SetComp|GlobalStmt|Delete|Await|Async) ?\w* ?"
     r"(nodes?|aren't supported|is not supported|comprehension)|aren't supported",
     "rewrite that statement with plain loops, conditions and tensor operations"),
    (r"(Expected a value of type 'Tensor|of type 'Tensor \(inferred\)')",
     "annotate arguments that are not tensors (for example `def forward(self, x: torch.Tensor, n: int)`)"),
    (r"numpy|ndarray", "use torch operations instead of NumPy inside forward"),
    (r"has no attribute|failed to be converted|nonexistent attribute",
     "make it a torch tensor (register_buffer), a number, a string or a submodule, or annotate it in the class body"),
    (r"previously (has|had) type|has type .* but .* expected|type mismatch",
     "keep one type per variable, in every branch"),
    (r"undefined value|is not defined|python value of type|cannot be used as a value|Unknown builtin|builtin",
     "TorchScript knows torch functions, math and its own subset of Python: replace that call by one of them"),
)


def script(module, loss=""):
    """The scripted module. Without a named loss its training_step (and evaluation_step) are exported as well. Raises ModelError
    that names the construct that is in the way."""
    torch = require("torch", "handing over a module")
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"model={type(module).__name__} is none: pass a torch.nn.Module, the path of a TorchScript file, the "
                         "name of a built-in model, or a dict.")
    _check_parameters(torch, module)
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module
    else:
        scripted = _compile(torch, module, kind, () if loss else _STEPS)
    for name in _STEPS:
        method = getattr(scripted, name, None)
        if method is not None and loss:
            raise ModelError(f"{kind} brings its own loss by its {name}: leave loss= out, or remove @torch.jit.export from it.")
        if method is not None:
            _check_signature(kind, name, method.schema)
    _refuse_fixed_flags(torch, scripted, kind)
    for part in scripted.modules():
        if part._c._has_method("__setstate__"):
            raise ModelError(f"{kind} has a part with a method __setstate__ ({part.original_name}), which would run while the site reads "
                             "the file, before anything is checked: leave it out. Quantised and packed modules, which need it, "
                             "cannot be trained.")
    return scripted


def _compile(torch, module, kind, steps):
    if any(p.device.type != "cpu" for p in list(module.parameters()) + list(module.buffers())):
        module = copy.deepcopy(module).cpu()
    own = {name: getattr(type(module), name) for name in steps if hasattr(type(module), name)}
    exported = [method for method in own.values() if not hasattr(method, "_torchscript_modifier")]
    for method in exported:
        torch.jit.export(method)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = _script_afresh(torch, module)
    except Exception as error:  # the compiler raises many unrelated types
        raise ModelError(_explain(kind, error)) from None
    finally:
        for method in exported:
            del method._torchscript_modifier
    return scripted


def _script_afresh(torch, module):
    """torch.jit.script, but not with the methods that an earlier scripting of the same class happened to export."""
    recursive = torch.jit._recursive
    try:
        create, infer = recursive.create_script_module, recursive.infer_methods_to_compile
    except AttributeError:  # internals of another torch
        return torch.jit.script(module)
    return create(module, infer, share_types=False)


def _check_signature(kind, name, schema):
    if (len(schema.arguments) == 2 and str(schema.arguments[1].type) == "Dict[str, Tensor]"
            and len(schema.returns) == 1 and str(schema.returns[0].type) == "Tuple[Tensor, Dict[str, Tensor]]"):
        return
    given = ", ".join(str(argument.type) for argument in schema.arguments[1:])
    returned = ", ".join(str(value.type) for value in schema.returns)
    raise ModelError(f"{kind}.{name} is (self, {given}) -> {returned}; it must be {name}(self, batch: Dict[str, torch.Tensor]) -> "
                     "Tuple[torch.Tensor, Dict[str, torch.Tensor]]: from batch['input'] and batch['target'] to the loss and the "
                     "metrics.")


def save(scripted, path):
    """Writes the file that is uploaded."""
    scripted.save(str(path))


def is_script(module):
    torch = require("torch", "handing over a module")
    return isinstance(module, torch.jit.ScriptModule)


def to_bytes(scripted):
    """What save() would write."""
    torch = require("torch", "handing over a module")
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    return buffer.getvalue()


def check_step(module, loss, batch, options=None):
    """One forward, loss and backward on a copy, with the arrays of a few samples by name ("input", "target", …). Raises ModelError
    or DataError saying what does not fit."""
    torch = require("torch", "handing over a module")
    if isinstance(module, torch.jit.ScriptModule):
        model = torch.jit.load(io.BytesIO(to_bytes(module)), map_location="cpu")  # as the worker sees it
    else:
        model = copy.deepcopy(module).cpu()  # the user's module is left alone
    model.train()
    with torch.random.fork_rng(devices=[]):
        value = _named_loss(torch, model, loss, batch["input"], batch["target"], options) if loss else _own_loss(model, batch)
        if value.numel() != 1:
            raise ModelError(f"the loss must be one number, but it has shape {tuple(value.shape)}; end it with .mean().")
        if not value.requires_grad:
            raise ModelError("the loss does not depend on any trainable parameter: forward must not use no_grad() or detach().")
        if not torch.isfinite(value):
            raise ModelError(f"the loss of the first samples is {float(value)}: check the data for NaN and infinity and the "
                             "scale of the inputs.")
        try:
            value.backward()
        except RuntimeError as error:
            raise ModelError(f"backward fails on the first samples: {_last_line(error)}.") from None
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        warnings.warn(f"{len(unused)} trainable parameters take no part in the loss (first: {unused[0]}); they will not change.",
                      stacklevel=4)


def _named_loss(torch, model, loss, inputs, target, options):
    prediction = _forward(torch, model, inputs)
    if loss not in losses.NAMES:
        return prediction.sum()  # the gateway says that there is no such loss, and which one is meant
    return losses.compute(torch, loss, prediction, target, options)


def _own_loss(model, batch):
    if not hasattr(model, "training_step"):
        raise SpecError("no loss is given: pass loss='mse' (or cross_entropy, …: docs/models.md lists them), or give the module "
                        "a method training_step(self, batch: Dict[str, torch.Tensor]) -> Tuple[torch.Tensor, Dict[str, "
                        "torch.Tensor]] that returns the loss and the metrics.")
    try:
        loss, metrics = model.training_step(batch)
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in batch.items())
        raise ModelError(f"training_step fails on {shapes}: {_last_line(error)}.") from None
    for name, value in metrics.items():
        if value.numel() != 1:
            raise ModelError(f"training_step gives the metric {name!r} with shape {tuple(value.shape)}; it must be one number, the "
                             "mean over the samples.")
    return loss


def _forward(torch, model, inputs):
    try:
        prediction = model(inputs)
    except Exception as error:
        raise ModelError(f"forward fails on inputs of shape {tuple(inputs.shape)} ({inputs.dtype}): {_last_line(error)}. The "
                         "first dimension is the sample.") from None
    if not isinstance(prediction, torch.Tensor):
        raise ModelError(f"forward returns {type(prediction).__name__}; with a named loss it must return one tensor. Give the "
                         "module a training_step instead.")
    return prediction


def _check_parameters(torch, module):
    kind = type(module).__name__
    parameters = list(module.parameters())
    uninitialized = getattr(torch.nn.parameter, "UninitializedParameter", ())
    if uninitialized and any(isinstance(p, uninitialized) for p in parameters):
        raise ModelError(f"{kind} has lazy parameters without a shape yet: run it once on a batch, then submit.")
    if not parameters:
        raise ModelError(f"{kind} has no parameters, so there is nothing to train. A frozen module (torch.jit.freeze) has lost "
                         "them: hand over the module as it was before freezing.")
    if not any(p.requires_grad for p in parameters):
        raise ModelError(f"all {len(parameters)} parameters of {kind} are frozen (requires_grad is False): call "
                         "requires_grad_(True) on those to train.")


def _refuse_fixed_flags(torch, scripted, kind):
    """A constant training flag (a trace, or F.dropout without training=self.training) would not obey train() and eval()."""
    methods = [getattr(scripted, name) for name in ("forward", *_STEPS) if hasattr(scripted, name)]
    for method in methods:
        graph = method.graph.copy()
        torch._C._jit_pass_inline(graph)
        operator = _fixed_flag(torch, graph)
        if operator:
            raise ModelError(f"{operator} in {kind} has a fixed training flag, so it would behave the same in training and in "
                             "evaluation. A traced module (torch.jit.trace) is always so: hand over the nn.Module itself. In a "
                             "function call pass training=self.training, or use the module form (nn.Dropout, nn.BatchNorm2d).")


# Operators that do something else in training than in evaluation: the argument that says which. agent/worker/model/training_flags.cc has the same table.
TRAINING_ARGUMENTS = {
    "_batch_norm_impl_index": "training", "_flash_scaled_dot_product_attention": "dropout_p", "_fused_dropout": "p",
    "_scaled_dot_product_attention": "dropout_p", "_scaled_dot_product_attention_forward": "dropout_p",
    "_scaled_dot_product_attention_math": "dropout_p", "_scaled_dot_product_flash_attention_for_cpu": "dropout_p",
    "_triton_scaled_dot_attention": "dropout_p", "alpha_dropout": "train", "alpha_dropout_": "train", "batch_norm": "training",
    "dropout": "train", "dropout_": "train", "feature_alpha_dropout": "train", "feature_alpha_dropout_": "train",
    "feature_dropout": "train", "feature_dropout_": "train", "gru": "train", "instance_norm": "use_input_stats", "lstm": "train",
    "native_batch_norm": "training", "native_dropout": "train", "rnn_relu": "train", "rnn_tanh": "train", "rrelu": "training",
    "rrelu_": "training", "rrelu_with_noise": "training", "rrelu_with_noise_": "training",
    "scaled_dot_product_attention": "dropout_p",
}


def _fixed_flag(torch, block):
    for node in block.nodes():
        kind = node.kind()
        flag = TRAINING_ARGUMENTS.get(kind[len("aten::"):]) if kind.startswith("aten::") else None
        if flag:
            names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
            values = dict(zip(names, node.inputs()))
            constants = {name: value.toIValue() for name, value in values.items() if value.node().kind() == "prim::Constant"}
            if flag in ("dropout_p", "p"):
                fixed = flag in constants and constants[flag] != (1 if flag == "p" else 0)
            elif "running_mean" in values:  # without them training and evaluation are the same
                fixed = flag in constants and values["running_mean"].type().kind() != "NoneType"
            else:
                fixed = flag in constants and constants.get("dropout", constants.get("p")) != 0
            if fixed:
                return kind[len("aten::"):].rstrip("_")
        for inner in node.blocks():
            found = _fixed_flag(torch, inner)
            if found:
                return found
    return None


def _explain(kind, error):
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    what = lines[0].strip().rstrip(":. ") if lines else type(error).__name__
    where = ""
    marker = next((i for i, line in enumerate(lines) if "<--- HERE" in line), None)
    if marker:
        code = lines[marker - 1].strip()
        place = re.search(r'File "([^"]+)", line (\d+)', text)
        file = ""
        if place and "ipykernel" not in place.group(1) and not place.group(1).startswith("<"):
            file = f" ({place.group(1)}:{place.group(2)})"
        where = f" The construct: `{code}`{file}."
    advice = next((hint for pattern, hint in _ADVICE if re.search(pattern, text, re.IGNORECASE)),
                  "rewrite that part of forward in TorchScript's subset of Python; what is not needed for training can be "
                  "marked @torch.jit.unused")
    return f"{kind} cannot be scripted (TorchScript): {what}.{where} What to do: {advice}."


def _last_line(error):
    """The line of a TorchScript or torch error that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith(("RuntimeError:", "ValueError:", "IndexError:", "AssertionError:")):
            return line.split(":", 1)[1].strip().rstrip(".")
    return lines[-1].rstrip(".") if lines else type(error).__name__
