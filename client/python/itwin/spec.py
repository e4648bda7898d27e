"""Documents: keywords -> the spec a gateway checks, and the files a checked spec names -> uploads."""

import datetime
import json
import os
import pathlib
import re

from itwin import archive, dataset, handover, losses, optimizer as optimizers, schedule
from itwin.errors import ModelError, OptimizerError, SpecError
from itwin.v1 import spec_pb2

MAX_DOCUMENT_BYTES = 1 << 20  # as the gateway has it
_MODEL_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript", ".itw")
_LOSSES = {  # torch.nn class or torch.nn.functional function -> name
    "MSELoss": "mse", "mse_loss": "mse", "L1Loss": "l1", "l1_loss": "l1", "HuberLoss": "huber", "huber_loss": "huber",
    "CrossEntropyLoss": "cross_entropy", "cross_entropy": "cross_entropy", "BCEWithLogitsLoss": "bce_logits",
    "binary_cross_entropy_with_logits": "bce_logits", "NLLLoss": "nll", "nll_loss": "nll",
    "SmoothL1Loss": "smooth_l1", "smooth_l1_loss": "smooth_l1",
}
_LOSS_DEFAULTS = {"reduction": "mean", "weight": None, "pos_weight": None, "ignore_index": -100}
_LOSS_OPTIONS = {"label_smoothing": (0.0, ("cross_entropy",)), "delta": (1.0, ("huber",)), "beta": (1.0, ("smooth_l1",))}


def read(spec):
    """(document text, directory that its file names are relative to) of a path, a dict or the text itself."""
    if isinstance(spec, dict):
        return to_text(spec), pathlib.Path.cwd()
    if isinstance(spec, os.PathLike) or (isinstance(spec, str) and _looks_like_path(spec)):
        path = pathlib.Path(spec).expanduser()
        try:
            with open(path, "rb") as file:
                text = _bounded(file.read(MAX_DOCUMENT_BYTES + 1), path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SpecError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
        except OSError as error:
            raise SpecError(f"{path} cannot be read ({error.strerror}); give the path of a job.yaml.") from None
        return text, path.resolve().parent
    if isinstance(spec, str):
        return _bounded(spec, "the document"), pathlib.Path.cwd()
    raise SpecError(f"spec={type(spec).__name__} is none: pass the path of a job.yaml, its text, or a dict; a module goes into "
                    "model=.")


def _looks_like_path(text):
    return "\n" not in text and not text.lstrip().startswith("{") and (
        text.lower().endswith((".yaml", ".yml", ".json")) or ": " not in text)


def to_text(document):
    """The document as JSON, which is also YAML."""
    try:
        text = json.dumps(document, default=_plain, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SpecError(f"the spec holds something that is no plain value ({error}). Modules and arrays go into the keywords "
                        "model= and data=.") from None
    return _bounded(text, "the spec")


def _bounded(text, what):
    if len(text) > MAX_DOCUMENT_BYTES:
        raise SpecError(f"{what} has {len(text) / (1 << 20):.1f} MiB; at most 1 MiB is accepted. Data belongs into files that the "
                        "spec names.")
    return text


def _plain(value):
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, datetime.timedelta):
        return duration(value)
    if hasattr(value, "item") and getattr(value, "size", None) == 1:
        return value.item()
    raise TypeError(f"{type(value).__name__}")


def duration(value):
    """"1800s" from seconds or timedelta; text such as "30m" is left to the gateway."""
    if isinstance(value, str):
        return value
    seconds = value.total_seconds() if isinstance(value, datetime.timedelta) else float(value)
    if not 0 < seconds < 31 * 86400:
        raise SpecError(f"time={value!r}: a wall-time limit is between a second and 30 days, such as '30m'.")
    return f"{seconds:g}s" if seconds != int(seconds) else f"{int(seconds)}s"


def resources(ranks=None, nodes=None, ranks_per_node=None, time=None, more=None):
    """The spec's `resources` from the keywords; only what was given."""
    result = dict(more or {})
    for name, value in (("ranks", ranks), ("nodes", nodes), ("ranks_per_node", ranks_per_node)):
        if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
            raise SpecError(f"{name}={value!r}: it is a whole number from 1.")
    if ranks is not None:
        if nodes and ranks_per_node and nodes * ranks_per_node != ranks:
            raise SpecError(f"ranks={ranks} is not nodes × ranks_per_node = {nodes * ranks_per_node}; give two of the three.")
        if ranks_per_node and not nodes:
            if ranks % ranks_per_node:
                raise SpecError(f"ranks={ranks} cannot be spread over nodes with {ranks_per_node} ranks each.")
            nodes = ranks // ranks_per_node
        elif not ranks_per_node:
            if ranks % (nodes or 1):
                raise SpecError(f"ranks={ranks} cannot be spread evenly over {nodes} nodes.")
            nodes, ranks_per_node = nodes or 1, ranks // (nodes or 1)
    if nodes is not None:
        result["nodes"] = int(nodes)
    if ranks_per_node is not None:
        result["ranks_per_node"] = int(ranks_per_node)
    if time is not None:
        result["time"] = duration(time)
    return result


def loss_name(loss):
    """The spec's name of a loss given as name, torch.nn module or torch.nn.functional function."""
    if loss is None or isinstance(loss, str):
        return loss or ""
    kind = getattr(loss, "__name__", None) or type(loss).__name__
    if kind not in _LOSSES:
        raise SpecError(f"loss={kind} is not known at the site. Known: {', '.join(losses.NAMES)}; any other loss goes into the "
                        "module's own training_step(self, batch).")
    if not isinstance(loss, type):
        for option, neutral in _LOSS_DEFAULTS.items():
            value = getattr(loss, option, neutral)
            same = value is neutral if neutral is None else value == neutral
            if not same:
                advice = ("give loss_options={'class_weights': […]} (there the mean is one over samples)"
                          if option == "weight" and _LOSSES[kind] in losses.CLASSES
                          else "put the loss into the module's own training_step(self, batch)")
                raise SpecError(f"{kind}({option}={value!r}) is not known at the site, only {kind}(); {advice}.")
    return _LOSSES[kind]


def loss_options(loss, given=None):
    """The spec's `loss_options`: those of a torch module, and those given."""
    name, result = loss_name(loss), {}
    if loss is not None and not isinstance(loss, (str, type)):
        for option, (neutral, names) in _LOSS_OPTIONS.items():
            value = getattr(loss, option, neutral)
            if name in names and value != neutral:
                result[option] = float(value)
    return {**result, **(given or {})}


def train(directory, model=None, loss=None, data=None, target=None, split=None, transforms=None, optimizer=None, check=True,
          scheduler=None, options=None, **plain):
    """The spec's `train` from the keywords of Gateway.submit; only what was given. Files are generated into `directory`."""
    result = {key: value for key, value in plain.items() if value is not None}
    name, options = loss_name(loss), loss_options(loss, options)
    if name:
        result["loss"] = name
    if options:
        result["loss_options"] = options
    batch = None
    if data is not None:
        result["data"], batch = dataset.document(data, directory, target, classes=name in losses.CLASSES)
    elif target is not None:
        raise SpecError("target= goes with data=<DataFrame>.")
    for key, value in (("split", split), ("transforms", transforms)):
        if value is not None:
            result.setdefault("data", {})[key] = dataset.split_document(value) if key == "split" else list(value)
    module = model if model is not None and not isinstance(model, (dict, str, os.PathLike)) else None
    if optimizer is not None:
        result["optimizer"] = optimizers.document(optimizer, module)
        rates = None
        if scheduler is not None and hasattr(scheduler, "optimizer"):
            if scheduler.optimizer is not optimizer:
                raise OptimizerError("the scheduler belongs to another optimizer; make it of the one that is passed as optimizer=.")
            rates = schedule.rates(scheduler)
            next(iter(result["optimizer"].values()))["lr"] = rates[0]
        groups = optimizers.groups(optimizer, module, rates)
        if groups:
            result["parameter_groups"] = [*groups, *result.get("parameter_groups", [])]
    if scheduler is not None:
        result["schedule"] = schedule.document(scheduler)
    if module is not None and not name and result.get("metrics"):
        raise SpecError("metrics= goes with a named loss; a module with its own training_step returns its metrics there.")
    if module is not None:
        batch = batch and dataset.transformed(batch, result.get("data", {}).get("transforms"))
        result["model"] = _hand_over(module, directory, name, options, batch, check)
    elif model is not None:
        result["model"] = _model(model)
    return result


def _hand_over(module, directory, loss, options, batch, check):
    """A module of the user's in an archive, which lists its operators: scripted where TorchScript takes it, else exported as a graph,
    for which samples are needed."""
    path = os.path.join(directory, "model.itw")
    if batch is None or not check or (loss and loss not in losses.NAMES):
        try:
            archive.export(module, {}, path, loss, options, form="script")
        except ModelError as error:
            if batch is None and "cannot be scripted" in str(error):
                raise ModelError(f"{error} Or give the data as arrays: with samples at hand the module can be exported as a graph "
                                 "instead.") from None
            raise
        return {"archive": path}
    handover.check_step(_checked(module, loss), loss, batch, options)
    archive.export(module, batch, path, loss, options)
    return {"archive": path}


def _checked(module, loss):
    """What the first step is tried on: the scripted module where there is one, else the module itself, which becomes a graph. There
    training flags obey train() and eval() whatever the code says (nn.TransformerEncoderLayer fixes one)."""
    try:
        return handover.script(module, loss)
    except ModelError as error:
        other_way = "cannot be scripted" in str(error) or "fixed training flag" in str(error)
        if not other_way or handover.is_script(module):
            raise
        return module


def _model(model):
    if isinstance(model, dict):
        return model
    text = os.fspath(model)
    if text.lower().endswith(".itw"):
        return {"archive": dataset.absolute(text)}
    if isinstance(model, os.PathLike) or text.lower().endswith(_MODEL_SUFFIXES) or os.sep in text or text.startswith(
            ("sha256:", "site:")):
        return {"torchscript": dataset.absolute(text)}
    return {"builtin": text}


def overrides(change):
    """The keywords as overrides of a document ("train.epochs=5"): resources, env, labels and the fields of `train` one by one,
    all else replaced as a whole."""
    result = []
    for key, value in change.items():
        if key in ("resources", "env", "labels", "train"):
            for field, inner in value.items():
                if key == "train" and field == "data" and not any(source in inner for source in dataset.SOURCES):
                    result += [f"train.data.{part}={to_text(laid)}" for part, laid in inner.items()]  # split, transforms
                elif re.fullmatch(r"[A-Za-z0-9_.-]+", field):
                    result.append(f"{key}.{field}={to_text(inner)}")
                else:
                    raise SpecError(f"{key}: {field!r} cannot be laid over a spec; write it into the document.")
        else:
            result.append(f"{key}={to_text(value)}")
    return result


def set_field(spec, field, value):
    """Replaces the text at a path such as "train.data.idx.train_images" or "command.files[2]" in a JobSpec."""
    parts = re.findall(r"[^.\[\]]+", field)
    at = spec
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if part.isdigit():
            if last:
                at[int(part)] = value
            else:
                at = at[int(part)]
        elif last:
            setattr(at, part, value)
        else:
            at = getattr(at, part)


def local_files(files, base_directory):
    """[(field, value, absolute path)] of a checked spec's FileReferences that lie here and must be uploaded."""
    result = []
    for reference in files:
        value = reference.value
        if value.startswith(("sha256:", "site:")):
            continue
        path = pathlib.Path(value).expanduser()
        path = path if path.is_absolute() else pathlib.Path(base_directory) / path
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise SpecError(f"{reference.field}: {path} {what}. File names are relative to {base_directory}; a file that is "
                            "already at the site is written 'site:<path>'.")
        result.append((reference.field, value, path))
    return result


class WorkingDirectory:
    """The files a job will find: each content under one name."""

    def __init__(self, taken=()):
        self._names = {entry.path: entry.sha256 for entry in taken}
        self.added = []

    def add(self, wanted, sha256, path):
        """The name under which the file goes in: `wanted` where it is a clean relative path, else its last part."""
        pure = pathlib.PurePosixPath(wanted)
        clean = not pure.is_absolute() and ".." not in pure.parts and not wanted.startswith("~")
        name = str(pure) if clean else pure.name
        if self._names.get(name, sha256) != sha256:
            name = f"{sha256[:8]}-{pure.name}"
        return self._put(name, sha256, path)

    def add_as(self, name, sha256, path, what):
        """As add(), but the name is a promise: a clash is an error."""
        if self._names.get(name, sha256) != sha256:
            raise SpecError(f"{what}: two different files would be called '{name}' in the working directory; rename one.")
        return self._put(name, sha256, path)

    def _put(self, name, sha256, path):
        if name not in self._names:
            self._names[name] = sha256
            self.added.append(spec_pb2.InputFile(path=name, sha256=sha256, executable=os.access(path, os.X_OK)))
        return name


def input_paths(inputs):
    """{name in the working directory: local path} of the keyword `inputs`: a dict of that form, or a list of paths."""
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    if not isinstance(inputs, dict):
        named = {}
        for path in inputs:
            name = pathlib.Path(path).name
            if name in named:
                raise SpecError(f"inputs: two files are called '{name}'; pass a dict {{'name/at/the/site': path}}.")
            named[name] = path
        inputs = named
    result = {}
    for name, path in inputs.items():
        pure = pathlib.PurePosixPath(str(name))
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise SpecError(f"inputs: '{name}' is not a path inside the working directory.")
        path = pathlib.Path(path).expanduser()
        if not path.is_file():
            raise SpecError(f"inputs: {path} {'is a directory' if path.is_dir() else 'does not exist'}.")
        result[str(pure)] = path.resolve()
    return result
