"""One file per handed-over model (`.itw`): model, how to train it, the operators it uses, and a sample batch with its loss.

It is a safetensors file; the texts lie in its metadata, so reading one runs no code. docs/models.md defines it.
"""

import copy
import json

from itwin import graph as graphs, handover, losses, safetensors
from itwin.errors import ModelError, require
from itwin.version import __version__

FORMAT = 1
MAX_SAMPLES = 4  # of the sample batch


def export(module, sample, path, loss="", loss_options=None, train=None, form=None):
    """Writes `module` and what belongs to it into `path` and returns the manifest.

    sample        arrays of two or more samples by name ("input", "target", …); without any, only a script, and no handshake
    loss          a named loss, or none when the module has its own training_step
    train         more of the job's `train` part that travels with the model: optimizer, schedule, parameter_groups
    form          "script", "graph", or None: script where TorchScript takes the module, else a graph; never a trace as a script

    Raises ModelError that names what is in the way.
    """
    torch = require("torch", "exporting a module")
    sample = {name: array[:MAX_SAMPLES].contiguous() for name, array in sample.items()}
    if form not in (None, "script", "graph"):
        raise ModelError(f"form={form!r} is unknown: use 'script' or 'graph'.")
    tensors, metadata = {}, {}
    manifest = {"format": FORMAT, "itwin": __version__, "torch": torch.__version__.split("+")[0], "model": type(module).__name__}
    scripted = None
    if form != "graph":
        try:
            scripted = handover.script(module, loss)
        except ModelError as error:
            if form == "script" or isinstance(module, torch.jit.ScriptModule):
                raise
            script_problem = error
    if scripted is not None:
        manifest["kind"], manifest["frontend"] = "script", "torch.jit.script"
        manifest["operators"] = script_operators(torch, scripted)
        tensors["script"] = torch.frombuffer(bytearray(handover.to_bytes(scripted)), dtype=torch.uint8)
    else:
        try:
            graph, weights, frontend = graphs.export(module, sample, own_loss=not loss)
        except ModelError as error:
            if form == "graph":
                raise
            raise ModelError(f"{error} (It was exported as a graph because TorchScript does not take it: {script_problem})") from None
        manifest["kind"], manifest["frontend"] = "graph", frontend
        manifest["operators"] = graphs.operators(graph)
        metadata["itwin.graph"] = json.dumps(graph, allow_nan=False)
        tensors.update({f"weights/{name}": tensor for name, tensor in weights.items()})
    manifest["train"] = {key: value for key, value in {"loss": loss, "loss_options": loss_options, **(train or {})}.items() if value}
    manifest["data"] = {name: {"shape": list(array.shape[1:]), "dtype": str(array.dtype).split(".")[1]}
                        for name, array in sample.items()}
    manifest["handshake"] = _handshake(torch, module, sample, loss, loss_options) if sample else {}
    tensors.update({f"sample/{name}": array for name, array in sample.items()})
    metadata["itwin.manifest"] = json.dumps(manifest, allow_nan=False)
    safetensors.write(path, tensors, metadata)
    return manifest


def read_manifest(path):
    """The manifest of an archive."""
    text = safetensors.metadata(path).get("itwin.manifest")
    if text is None:
        raise ModelError(f"{path} is no model archive: it has no manifest. Write one with itwin.export(model, …).")
    return json.loads(text)


def script_operators(torch, scripted):
    """Full names of the operators that any method of a scripted module may run."""
    names = set()

    def collect(block):
        for node in block.nodes():
            schema = node.schema()
            if "::" in schema and not node.kind().startswith("prim::"):
                names.add(schema.split("(")[0])
            for inner in node.blocks():
                collect(inner)

    for part in scripted.modules():
        for name in part._c._method_names():
            inlined = part._c._get_method(name).graph.copy()
            torch._C._jit_pass_inline(inlined)
            collect(inlined)
    return sorted(names)


def _handshake(torch, module, sample, loss, options):
    """The losses that the worker must find again: in evaluation mode, and in training mode where nothing is drawn at random."""
    def value(training, seed):
        model = copy.deepcopy(module).cpu().train(training)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            if loss:
                result = losses.compute(torch, loss, model(sample["input"]), sample["target"], options)
            else:
                step = model.training_step if training else getattr(model, "evaluation_step", None) or model.training_step
                result, _ = step(dict(sample))
        return float(result)

    result = {"samples": len(sample["input"])}
    for name, training in (("loss", False), ("training_loss", True)):
        if training and not loss and not hasattr(module, "training_step"):
            continue  # phases, each with a step of its own
        first = value(training, 1)
        if first == value(training, 2):
            result[name] = first
    return result
