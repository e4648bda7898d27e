"""Whatever a notebook calls data -> the spec's `data`, plus the file that is uploaded for it."""

import math
import os
import pathlib
import warnings

from itwin.errors import DataError, require

MAX_BYTES = 8 << 30          # of arrays handed over from memory
MAX_CHECK_BYTES = 512 << 20  # a file larger than this is not opened for the local check
SOURCES = ("netcdf", "idx", "npz", "npy", "csv", "synthetic")
_KEYS = (*SOURCES, "variables", "input", "target", "split", "transforms")
_SUFFIXES = {".nc": "netcdf", ".nc4": "netcdf", ".cdf": "netcdf", ".npz": "npz"}


def document(data, directory, target=None, classes=False):
    """(the spec's `data` as a dict, tensors of the first samples by name or None).

    `directory` is where a generated file goes. `target`: names of the target columns of a DataFrame; `classes`: it holds class
    numbers. Raises DataError that says which forms there are.
    """
    if isinstance(data, (str, os.PathLike)):
        return _from_path(os.fspath(data))
    if _is_frame(data):
        return _from_frame(data, directory, target, classes)
    if target is not None:
        raise DataError("target= names the target columns of a DataFrame; for this data give the targets with the data.")
    if isinstance(data, dict):
        if data and all(_is_array(value) for value in data.values()):
            if not {"input", "target"} <= data.keys():
                raise DataError(f"the arrays are named {', '.join(map(str, data))}; the model's input must be named 'input' and "
                                "what it should give 'target'.")
            return _write_npz({str(k): _array(v, k) for k, v in data.items()}, directory)
        for key in data:
            if key not in _KEYS and any(_is_array(value) for value in data.values()):
                raise DataError(f"data['{key}'] is no array like the others; a dict of arrays holds nothing else.")
        return dict(data), _peek(data) or _made_up(data)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(_is_array(part) for part in data):
        return _write_npz({"input": _array(data[0], "inputs"), "target": _array(data[1], "targets")}, directory)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (tuple, list, set)):
        return _from_dataset(data, directory)
    raise DataError(
        f"data={type(data).__name__} cannot be handed over. Known: a path (.npz, .nc, .cdf), a pair (inputs, targets) of arrays or "
        "tensors, a dict of named arrays, a torch Dataset with a length, a pandas DataFrame (with target=), or the spec's "
        "data as a dict.")


def absolute(path):
    """A file named in a keyword is relative to here, wherever the document lies."""
    return path if path.startswith(("sha256:", "site:")) else os.path.abspath(os.path.expanduser(path))


def split_document(split):
    """The spec's `split`; ranges may be given as "0..108", (0, 108), range or slice."""
    if not isinstance(split, dict):
        raise DataError("split is a dict such as {'train': '0..108', 'test': '108..132'} or {'test_fraction': 0.2}.")
    result = {}
    for key, value in split.items():
        if isinstance(value, (range, slice)):
            if value.step not in (None, 1) or value.stop is None:
                raise DataError(f"split['{key}'] must be one unbroken range with an end, such as '0..108'.")
            value = f"{value.start or 0}..{value.stop}"
        elif isinstance(value, (tuple, list)):
            if len(value) != 2:
                raise DataError(f"split['{key}'] has {len(value)} parts; it is (first, last), last not included.")
            value = f"{int(value[0])}..{int(value[1])}"
        result[key] = value
    return result


def _is_array(value):
    return type(value).__module__.split(".")[0] in ("numpy", "torch") and hasattr(value, "shape") and hasattr(value, "dtype")


def _is_frame(value):
    return type(value).__module__.startswith("pandas.") and hasattr(value, "columns")


def _from_path(path):
    suffix = pathlib.PurePath(path).suffix.lower()
    if suffix == ".csv":
        raise DataError(f"which columns of {path} are inputs and targets? Pass data={{'csv': {{'path': '{path}', 'inputs': "
                        "[…], 'targets': […]}}, or a pandas DataFrame with target=.")
    if suffix not in _SUFFIXES:
        raise DataError(f"data={path!r}: the ending says no known format ({', '.join(_SUFFIXES)}, .csv); pass a dict such as "
                        "{'npz': path}.")
    data = {_SUFFIXES[suffix]: absolute(path)}
    return data, _peek(data)


def _array(value, name):
    """A contiguous NumPy array of float32 or int64, the worker's types."""
    numpy = require("numpy", "handing over arrays")
    if type(value).__module__.split(".")[0] == "torch":
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        value = value.numpy()
    value = numpy.asarray(value)
    if value.ndim == 0:
        raise DataError(f"{name} is a single number; its first dimension must be the sample.")
    kind = value.dtype.kind
    if kind == "f":
        result = numpy.ascontiguousarray(value, dtype=numpy.float32)
        if not numpy.isfinite(result).all():
            warnings.warn(f"{name} holds NaN or infinity; the loss will too, unless the model copes with it.", stacklevel=5)
        return result
    if kind == "u" and value.dtype.itemsize == 8 and value.size and value.max() > 2**63 - 1:
        raise DataError(f"{name} holds numbers beyond 64-bit signed integers.")
    if kind in "iu":
        return numpy.ascontiguousarray(value, dtype=numpy.int64)
    if kind == "b":
        return numpy.ascontiguousarray(value, dtype=numpy.float32)
    raise DataError(f"{name} holds {value.dtype}, which is no number type; convert it to float32 or int64.")


def _write_npz(arrays, directory):
    numpy = require("numpy", "handing over arrays")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError("the arrays differ in their number of samples (first dimension): " +
                        ", ".join(f"{name} {length}" for name, length in lengths.items()) + ".")
    if not next(iter(lengths.values())):
        raise DataError("the data holds no samples.")
    size = sum(array.nbytes for array in arrays.values())
    if size > MAX_BYTES:
        raise DataError(f"the arrays take {size >> 30} GiB; at most {MAX_BYTES >> 30} GiB are handed over from memory. Put them into "
                        "a NetCDF or NPZ file at the site and name it as data={'netcdf': 'site:/path'}.")
    for name in arrays:
        if not name or any(c in name for c in "/\\\0"):
            raise DataError(f"{name!r} cannot be the name of an array.")
    path = os.path.join(directory, "data.npz")
    with open(path, "wb") as file:
        numpy.savez(file, **arrays)
    return {"npz": path}, _first_samples(arrays)


def _from_dataset(data, directory):
    torch = require("torch", "handing over a torch Dataset")
    count = len(data)
    if count == 0:
        raise DataError("the data holds no samples.")
    if isinstance(data, torch.utils.data.TensorDataset):
        columns = data.tensors
    else:
        columns, size = None, 0
        for index in range(count):
            sample = data[index]
            if isinstance(sample, dict) or not isinstance(sample, (tuple, list)) or len(sample) != 2:
                raise DataError(f"sample {index} of the Dataset is {type(sample).__name__}; it must be a pair (input, target) of "
                                "tensors, arrays or numbers.")
            try:
                pair = [torch.as_tensor(part) for part in sample]
            except Exception:
                raise DataError(f"sample {index} of the Dataset does not hold tensors (a transform such as ToTensor() may be "
                                "missing).") from None
            if columns is None:
                columns = ([], [])
            for column, value in zip(columns, pair):
                if column and column[0].shape != value.shape:
                    raise DataError(f"sample {index} of the Dataset has shape {tuple(value.shape)}, sample 0 has "
                                    f"{tuple(column[0].shape)}; all samples must have one shape.")
                column.append(value)
                size += value.numel() * value.element_size()
            if size > MAX_BYTES:
                raise DataError(f"the Dataset takes more than {MAX_BYTES >> 30} GiB in memory; put it into a file at the site.")
        columns = [torch.stack(column) for column in columns]
    if len(columns) != 2:
        raise DataError(f"the Dataset has {len(columns)} tensors per sample; it must be two: input and target.")
    return _write_npz({"input": _array(columns[0], "inputs"), "target": _array(columns[1], "targets")}, directory)


def _from_frame(frame, directory, target, classes):
    numpy = require("numpy", "handing over a DataFrame")
    columns = [str(column) for column in frame.columns]
    if target is None:
        raise DataError(f"which column is the target? Pass target='…' (columns: {', '.join(columns[:20])}).")
    targets = [target] if isinstance(target, str) else [str(name) for name in target]
    for name in targets:
        if name not in columns:
            import difflib
            near = difflib.get_close_matches(name, columns, 1)
            raise DataError(f"target column '{name}' is not in the DataFrame" + (
                f"; did you mean '{near[0]}'?" if near else f" (columns: {', '.join(columns[:20])})."))
    if len(set(columns)) != len(columns):
        raise DataError("two columns of the DataFrame have the same name; rename one.")
    inputs = [name for name in columns if name not in targets]
    if not inputs or not len(frame):
        raise DataError("the DataFrame has no input columns or no rows.")
    for name, column in zip(columns, frame.columns):
        if frame[column].dtype.kind not in "fiub":
            raise DataError(f"column '{name}' holds {frame[column].dtype}, not numbers; encode or drop it first.")
        if frame[column].isna().any():
            raise DataError(f"column '{name}' has empty cells; fill or drop those rows first (frame.dropna()).")
    as_class = classes and len(targets) == 1 and frame[frame.columns[columns.index(targets[0])]].dtype.kind in "iub"
    path = os.path.join(directory, "data.csv")
    flags = {column: int for column in frame.columns if frame[column].dtype.kind == "b"}
    frame.astype(flags).to_csv(path, index=False, header=columns)
    first = frame.iloc[:64]

    def pick(names):
        return first[[frame.columns[columns.index(name)] for name in names]].to_numpy(dtype=numpy.float64)

    target_array = pick(targets)
    target_array = target_array[:, 0].astype(numpy.int64) if as_class else target_array
    batch = _first_samples({"input": _array(pick(inputs), "inputs"), "target": _array(target_array, "targets")})
    return {"csv": {"path": path, "inputs": inputs, "targets": targets, "target_is_class": bool(as_class)}}, batch


def _peek(data):
    """The first samples of an .npz that is here; None for what only the worker reads."""
    path = data.get("npz")
    if not isinstance(path, (str, os.PathLike)) or str(path).startswith(("sha256:", "site:")):
        return None
    try:
        numpy = require("numpy", "reading an .npz")
        if os.path.getsize(path) > MAX_CHECK_BYTES:
            return None
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {name: _array(archive[name], name) for name in archive.files}
            for role in ("input", "target"):
                if data.get(role):
                    arrays[role] = arrays.pop(data[role])
            return _first_samples(arrays)
    except (OSError, KeyError, ValueError, ImportError, DataError):
        return None  # the worker says what is wrong with it


def _first_samples(arrays):
    try:
        import torch
    except ImportError:
        return None
    if "input" not in arrays or "target" not in arrays:
        return None
    from itwin.handover import CHECK_SAMPLES
    return {name: torch.from_numpy(array[:CHECK_SAMPLES].copy()) for name, array in arrays.items()}


def transformed(batch, transforms):
    """Samples of the shapes that the worker's transforms give, for trying a model and for its archive; statistics are those of these
    few samples. None where the transforms do not fit, which the worker says."""
    try:
        for transform in transforms or ():
            (kind, options), = transform.items()
            batch = _TRANSFORMS[kind]({**batch}, options or {})
        return batch
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError):
        return None


def _floats(batch, options):
    return [(name, array) for name, array in batch.items()
            if array.is_floating_point() and name in (options.get("arrays") or batch)]


def _standardize(batch, options):
    for name, array in _floats(batch, options):
        dims = [dim for dim in range(array.dim()) if dim != 1]
        deviation = array.std(dims, unbiased=False, keepdim=True)
        batch[name] = (array - array.mean(dims, keepdim=True)) / deviation.masked_fill(deviation == 0, 1)
    return batch


def _of_cells(function):
    def apply(batch, options):
        return {**batch, **{name: function(array, options) for name, array in _floats(batch, options)}}
    return apply


def _crop(batch, options):
    sizes = list(options["sizes"])
    for name, array in batch.items():
        if array.dim() > len(sizes):
            for dim, size in enumerate(sizes, array.dim() - len(sizes)):
                array = array.narrow(dim, 0, size)
            batch[name] = array.contiguous()
    return batch


def _coarsen(batch, options):
    import torch
    whole = batch["input"]
    return {**batch, "target": whole, "input": torch.nn.functional.avg_pool2d(whole, options["factor"])}


def _window(batch, options):
    length, samples = options["length"], len(batch["input"])
    ahead = length - 1 + options.get("horizon", 1)
    series, target = (array.repeat((samples + ahead) // samples + 1, *[1] * (array.dim() - 1))
                      for array in (batch["input"], batch["target"]))
    steps = series.unfold(0, length, 1).movedim(-1, 1)[:samples].contiguous()
    return {**batch, "input": steps, "target": target[ahead:ahead + samples]}


def _reshape(batch, options):
    name = options.get("array") or "input"
    return {**batch, name: batch[name].reshape(len(batch[name]), *options["shape"])}


_TRANSFORMS = {
    "standardize": _standardize, "crop": _crop, "coarsen": _coarsen, "window": _window, "reshape": _reshape,
    "scale": _of_cells(lambda array, options: array * options.get("multiply", 0) + options.get("add", 0)),
    "fill_missing": _of_cells(lambda array, options: array.nan_to_num(options.get("value") or 0.0)),
    "log": _of_cells(lambda array, options: (array + options.get("add", 0)).clamp_min(1e-6).log()),
    "clip": _of_cells(lambda array, options: array.clamp(options.get("min", -math.inf), options.get("max", math.inf))),
}


def _made_up(data):
    """Samples of the shapes that the spec or a file's header names, where their values are not at hand; else None."""
    try:
        import torch

        from itwin.handover import CHECK_SAMPLES as count
        if "synthetic" in data:
            shape = data["synthetic"]
            inputs, targets, classes = shape["input_shape"], shape.get("target_shape") or [1], shape.get("classes")
            if classes:
                targets = []
        elif "csv" in data:
            inputs, targets, classes = ([len(data["csv"]["inputs"])], [len(data["csv"]["targets"])],
                                        data["csv"].get("target_is_class"))
            if classes:
                targets = []
        elif "idx" in data:
            with open(os.path.expanduser(data["idx"]["train_images"]), "rb") as file:
                head = file.read(16)
            if head[:2] != b"\0\0" or head[3] != 3:
                return None
            inputs, targets, classes = [1, *(int.from_bytes(head[at:at + 4], "big") for at in (8, 12))], [], True
        else:
            return None
        target = torch.zeros(count, *targets, dtype=torch.int64) if classes else torch.rand(count, *targets)
        return {"input": torch.rand(count, *inputs), "target": target}
    except (OSError, KeyError, ValueError, TypeError, ImportError, IndexError):
        return None
