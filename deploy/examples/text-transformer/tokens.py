#!/usr/bin/env python3
"""Bytes of plain text become tokens: input.npy and target.npy for job.yaml, in the current directory.

tokens.py [FILE...]    default: the licenses that every Debian has, /usr/share/common-licenses

A sample is a window of 64 bytes; its target is the same window one byte later, so the model learns to say the next byte
at each place. Bytes beyond ASCII become "?", which leaves 128 tokens. Needs nothing but Python.
"""
import array
import pathlib
import sys

CONTEXT = 64


def save(name, tokens):
    """A NumPy file of 16-bit integers, [samples, CONTEXT]."""
    shape = (len(tokens) // CONTEXT, CONTEXT)
    header = repr({"descr": "<i2", "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    values = array.array("h", tokens)
    if sys.byteorder == "big":
        values.byteswap()
    with open(name, "wb") as out:
        out.write(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values.tobytes())


def main(names):
    files = [pathlib.Path(name) for name in names] or sorted(
        path for path in pathlib.Path("/usr/share/common-licenses").iterdir() if not path.is_symlink())
    text = b"\n".join(path.read_bytes() for path in files)
    tokens = [byte if byte < 128 else ord("?") for byte in text]
    samples = (len(tokens) - 1) // CONTEXT
    save("input.npy", tokens[:samples * CONTEXT])
    save("target.npy", tokens[1:samples * CONTEXT + 1])
    print(f"{samples} samples of {CONTEXT} bytes from {len(files)} files")


if __name__ == "__main__":
    main(sys.argv[1:])
