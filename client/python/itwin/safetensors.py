"""Reads and writes the safetensors format: header length, JSON header, raw bytes. Holds no code, so a file cannot do anything.

Every length is checked against the file before it is believed.
"""

import json
import os

from itwin.errors import DamagedError, ModelError, require

MAX_HEADER_BYTES = 100 << 20
_DTYPES = {  # name: (torch attribute, bytes)
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def read(path):
    """{name: torch.Tensor}, in file order. Raises DamagedError that names the file and what is wrong with it."""
    torch = require("torch", "loading weights")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if size < 8:
            raise DamagedError(f"{path} is not a safetensors file: it has {size} bytes.")
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise DamagedError(f"{path} is damaged: its header would be {length} bytes long in a file of {size}.")
        header = _parse(path, file.read(length))
        data = bytearray(file.read())
    entries = _check(path, header, len(data))
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        kind = getattr(torch, _DTYPES[dtype][0])
        if begin == end:
            tensors[name] = torch.zeros(shape, dtype=kind)
            continue
        raw = bytearray(data[begin:end])  # own memory, aligned for every type
        if dtype == "BOOL" and raw.strip(b"\0\1"):
            raise DamagedError(f"{path} is damaged: {name!r} holds a boolean that is neither 0 nor 1.")
        tensors[name] = torch.frombuffer(raw, dtype=kind).reshape(shape)
    return tensors


def metadata(path):
    """The texts in the header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise DamagedError(f"{path} is damaged: its header would be {length} bytes long.")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except ValueError as error:
            raise DamagedError(f"{path} is no safetensors file: its header is not JSON ({error}).") from None
    texts = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    return texts if isinstance(texts, dict) else {}


def write(path, tensors, metadata=None):
    """Writes {name: torch.Tensor} and texts."""
    torch = require("torch", "writing weights")
    names = {getattr(torch, attribute): name for name, (attribute, _) in _DTYPES.items()}
    header, blocks, at = {}, [], 0
    if metadata:
        header["__metadata__"] = metadata
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype not in names:
            raise ModelError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold.")
        block = bytes(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else b""
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(block)]}
        at += len(block)
        blocks.append(block)
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors begin on an 8-byte boundary
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blocks)


def _parse(path, raw):
    def unique(pairs):
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a name appears twice")
        return values
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: its header is not JSON ({error}).") from None
    if not isinstance(header, dict):
        raise DamagedError(f"{path} is damaged: its header is not a JSON object.")
    header.pop("__metadata__", None)
    return header


def _check(path, header, data_size):
    entries = {}
    for name, entry in header.items():
        problem = _problem(entry, data_size)
        if problem:
            raise DamagedError(f"{path} is damaged: tensor {name!r} {problem}.")
        entries[name] = (entry["dtype"], entry["shape"], *entry["data_offsets"])
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise DamagedError(f"{path} is damaged: tensor {name!r} does not begin where the one before it ends.")
        at = end
    if at != data_size:
        raise DamagedError(f"{path} is damaged: {data_size - at} bytes belong to no tensor.")
    return entries


def _problem(entry, data_size):
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"has the unknown type {dtype!r}"
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(d) is int and 0 <= d < 2**62 for d in shape):
        return "has a shape that is no list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        return "has offsets that are no pair of numbers"
    begin, end = offsets
    if not 0 <= begin <= end <= data_size:
        return f"lies at {begin}..{end}, outside the file's {data_size} bytes of data"
    count = 1
    for d in shape:
        count *= d
    if count * _DTYPES[dtype][1] != end - begin:
        return f"has {end - begin} bytes, which its shape {shape} does not need"
    return None
