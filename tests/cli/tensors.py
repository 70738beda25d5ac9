# SPDX-License-Identifier: Apache-2.0
"""Safetensors files with nothing but the standard library: small, and independent of the code under test."""

import json
import struct

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}
LETTERS = {"F16": "e", "F32": "f", "I32": "i", "I64": "q"}


def pack(dtype, values):
    """Values (floats or integers) as little-endian bytes; BF16 by truncation, which is exact for what tests write."""
    if dtype == "BF16":
        return b"".join(struct.pack("<f", v)[2:] for v in values)
    return struct.pack(f"<{len(values)}{LETTERS[dtype]}", *values)


def unpack(dtype, data):
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    return list(struct.unpack(f"<{len(data) // SIZES[dtype]}{LETTERS[dtype]}", data))


def write(path, tensors, padding=0):
    """tensors: name -> (dtype, shape, bytes). `padding` spaces in the header move the data off its alignment."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode() + b" " * padding
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(t[2] for t in tensors.values()))


def read(path):
    """name -> (dtype, shape, bytes); fails unless the file is whole."""
    with open(path, "rb") as f:
        data = f.read()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body, tensors, end = data[8 + length :], {}, 0
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], body[begin:stop])
        end = max(end, stop)
    assert end == len(body), f"{path}: {len(body)} bytes of data, header says {end}"
    return tensors


def values(tensors, name):
    return unpack(tensors[name][0], tensors[name][2])
