"""torch.nn.Module -> a TorchScript file that the worker can train, tried for one step here first."""

import copy
import io
import re
import warnings

from itwin.errors import DataError, ModelError, SpecError, require

CHECK_SAMPLES = 4  # of the batch that is tried here

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


def script(module):
    """The scripted module. Raises ModelError that names the construct that is in the way."""
    torch = require("torch", "handing over a module")
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"model={type(module).__name__} is none: pass a torch.nn.Module, the path of a TorchScript file, the "
                         "name of a built-in model, or a dict.")
    _check_parameters(torch, module)
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        _refuse_baked_in(module)
        return module
    if any(p.device.type != "cpu" for p in list(module.parameters()) + list(module.buffers())):
        module = copy.deepcopy(module).cpu()
    own_step = getattr(type(module), "training_step", None)
    exported = own_step is not None and not hasattr(own_step, "_torchscript_modifier")
    if exported:
        torch.jit.export(own_step)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(module)
    except Exception as error:  # the compiler raises many unrelated types
        raise ModelError(_explain(kind, error)) from None
    finally:
        if exported:
            del own_step._torchscript_modifier
    if own_step is not None and not hasattr(scripted, "training_step"):
        raise ModelError(f"{kind} was scripted earlier in this session, without its training_step. Decorate training_step with "
                         "@torch.jit.export, run the class definition again and make the module anew.")
    return scripted


def save(scripted, path):
    """Writes the file that is uploaded."""
    scripted.save(str(path))


def check_step(scripted, loss, batch):
    """One forward, loss and backward on a copy, with (input, target). Raises ModelError or DataError saying what does not fit."""
    torch = require("torch", "handing over a module")
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    model = torch.jit.load(buffer, map_location="cpu")  # as the worker sees it; the user's module is left alone
    model.train()
    inputs, target = batch
    with torch.random.fork_rng(devices=[]):
        if loss:
            value = _named_loss(torch, model, loss, inputs, target)
        else:
            value = _own_loss(torch, model, inputs, target)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ModelError(f"the loss must be one number, but it is {shape}; end it with .mean().")
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


def _named_loss(torch, model, loss, inputs, target):
    f = torch.nn.functional
    losses = {"mse": f.mse_loss, "l1": f.l1_loss, "huber": f.huber_loss, "cross_entropy": f.cross_entropy,
              "bce_logits": f.binary_cross_entropy_with_logits, "nll": f.nll_loss}
    prediction = _forward(torch, model, inputs)
    if loss not in losses:
        return prediction.sum()  # the gateway says that there is no such loss, and which one is meant
    elementwise = loss in ("mse", "l1", "huber", "bce_logits")
    if elementwise and prediction.shape != target.shape:
        raise DataError(f"the model's output has shape {tuple(prediction.shape)} but the target {tuple(target.shape)} (for "
                        f"{len(inputs)} samples); loss '{loss}' needs equal shapes.")
    if not elementwise and target.dtype != torch.int64:
        raise DataError(f"loss '{loss}' needs class numbers (int64) as target, but the target is {target.dtype}.")
    if not elementwise and prediction.dim() >= 2 and target.numel():
        classes, low, high = prediction.shape[1], int(target.min()), int(target.max())
        if low < 0 or high >= classes:
            raise DataError(f"the target holds class {low if low < 0 else high}, but the model has {classes} outputs (0.."
                            f"{classes - 1}).")
    try:
        return losses[loss](prediction, target)
    except (RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"loss '{loss}' fails on output {tuple(prediction.shape)} and target {tuple(target.shape)} "
                        f"({target.dtype}): {_last_line(error)}.") from None


def _own_loss(torch, model, inputs, target):
    if not hasattr(model, "training_step"):
        raise SpecError("no loss is given: pass loss='mse' (or l1, huber, cross_entropy, bce_logits, nll), or give the module "
                        "a method training_step(self, input, target) that returns (loss, metrics).")
    try:
        result = model.training_step(inputs, target)
    except Exception as error:
        raise ModelError(f"training_step fails on inputs {tuple(inputs.shape)} and targets {tuple(target.shape)}: "
                         f"{_last_line(error)}.") from None
    return result[0] if isinstance(result, tuple) else result


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


def _refuse_baked_in(module):
    """A trace has train and eval mode baked in: dropout and batch norm would be wrong in one of them."""
    if type(module).__name__ not in ("TopLevelTracedModule", "TracedModule"):
        return
    graph = str(module.inlined_graph)
    for operator, name in (("dropout", "dropout"), ("batch_norm", "batch normalisation")):
        if f"aten::{operator}" in graph:
            raise ModelError(f"this traced module uses {name}, which a trace fixes in the mode it was traced in. Hand over the "
                             "nn.Module itself; it is scripted instead.")


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
