#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""test_ctypes.py ROOT LIBRARY: the ctypes binding says what moe.h says, and runs a layer on the CPU."""
import ctypes
import math
import random
import re
import sys
import unittest
from array import array
from pathlib import Path

ROOT, LIBRARY = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(ROOT / "tools/ctypes"))
import libmoe  # noqa: E402

HEADER = re.sub(r"/\*[\s\S]*?\*/", "", (ROOT / "runtime/include/moe.h").read_text())
C_TYPES = {"size_t": ctypes.c_size_t, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
           "int32_t": ctypes.c_int32, "double": ctypes.c_double, "char": ctypes.c_char, "int": ctypes.c_int,
           "moe_log_fn": libmoe.LogFn, "moe_progress_fn": libmoe.ProgressFn}
ENUMS = set(re.findall(r"typedef enum (\w+)", HEADER))


def c_type(declaration):
    """The ctypes type of "const void *" and the like."""
    base = re.sub(r"\bconst\b|\bstruct\b", "", declaration).split("*")[0].strip()
    if "*" in declaration:
        return ctypes.c_char_p if base == "char" else ctypes.c_void_p
    return ctypes.c_int if base in ENUMS else C_TYPES[base]


def header_structs():
    """Struct name -> [(field, type)]."""
    structs = {}
    for name, body in re.findall(r"typedef struct (moe_\w+) \{(.*?)\} \1;", HEADER, re.S):
        fields = []
        for declaration in filter(None, (d.strip() for d in body.split(";"))):
            kind, field, length = re.fullmatch(r"(.*?)(\w+)(?:\[(\d+)\])?", declaration, re.S).groups()
            fields.append((field, c_type(kind) * int(length) if length else c_type(kind)))
        structs[name] = fields
    return structs


def header_functions():
    """Function name -> number of arguments."""
    functions = {}
    for name, arguments in re.findall(r"MOE_API\b[^;(]*?\b(moe_\w+)\(([^)]*)\);", HEADER):
        functions[name] = 0 if arguments.strip() == "void" else arguments.count(",") + 1
    return functions


class Header(unittest.TestCase):
    def test_structs(self):
        structs = header_structs()
        self.assertGreaterEqual(len(structs), 9)
        for name, fields in structs.items():
            self.assertEqual(getattr(libmoe, name)._fields_, fields, name)
            self.assertEqual(getattr(libmoe, name)().size, ctypes.sizeof(getattr(libmoe, name)))

    def test_functions(self):
        functions = header_functions()
        self.assertGreaterEqual(len(functions), 35)
        self.assertEqual({name: len(arguments) for name, (_, arguments) in libmoe.PROTOTYPES.items()}, functions)

    def test_constants(self):
        values = dict(re.findall(r"\bMOE_(?:DEVICE_|LAYOUT_)?(\w+) = (\d+)", HEADER))
        for name in ("BF16", "F16", "F32", "I32", "I64", "AUTO", "CPU", "CUDA", "ROW_MAJOR", "PACKED"):
            self.assertEqual(getattr(libmoe, name), int(values[name]), name)
        self.assertIn(f"#define MOE_WORKSPACE_ALIGNMENT {libmoe.WORKSPACE_ALIGNMENT}\n", HEADER)


def floats(values):
    """Values as a ctypes array of float."""
    return (ctypes.c_float * len(values))(*values)


def address(buffer, alignment=1):
    start = ctypes.addressof(buffer)
    return start + -start % alignment


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


class Layer(unittest.TestCase):
    HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 16, 24, 6, 2, 5

    def setUp(self):
        random.seed(1)

        def normal(count, deviation):
            return array("f", (random.gauss(0, deviation) for _ in range(count)))

        h, i, e = self.HIDDEN, self.INTERMEDIATE, self.EXPERTS
        self.x = normal(self.TOKENS * h, 1)
        self.gate, self.w13, self.w2 = normal(e * h, 0.3), normal(2 * e * i * h, 0.3), normal(e * h * i, 0.3)
        self.context = libmoe.Context(libmoe.load(LIBRARY), device=libmoe.CPU, threads=2)
        self.buffers = []
        desc = libmoe.mixtral_desc(h, i, e, self.TOP_K, libmoe.F32)
        self.layer = self.context.create_layer(desc, *(self.place(w) for w in (self.gate, self.w13, self.w2)))

    def tearDown(self):
        self.layer.close()
        self.context.close()

    def place(self, values):
        """The address of a copy, aligned as weights must be, that lives as long as the test."""
        buffer = ctypes.create_string_buffer(len(values) * 4 + 16)
        self.buffers.append(buffer)
        at = address(buffer, 16)
        ctypes.memmove(at, values.tobytes(), len(values) * 4)
        return at

    def expert(self, x, expert):
        h, i = self.HIDDEN, self.INTERMEDIATE
        rows = self.w13[expert * 2 * i * h:]
        gate = [dot(x, rows[r * h:(r + 1) * h]) for r in range(i)]
        up = [dot(x, rows[(i + r) * h:(i + r + 1) * h]) for r in range(i)]
        act = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up)]
        down = self.w2[expert * h * i:]
        return [dot(act, down[r * i:(r + 1) * i]) for r in range(h)]

    def expected(self):
        h = self.HIDDEN
        output, ids, weights = [], [], []
        for t in range(self.TOKENS):
            x = self.x[t * h:(t + 1) * h]
            logits = [dot(x, self.gate[e * h:(e + 1) * h]) for e in range(self.EXPERTS)]
            chosen = sorted(range(self.EXPERTS), key=lambda e: -logits[e])[:self.TOP_K]
            scores = [math.exp(logits[e] - logits[chosen[0]]) for e in chosen]
            ids += chosen
            weights += [s / sum(scores) for s in scores]
            rows = [self.expert(x, e) for e in chosen]
            output += [dot(column, weights[-self.TOP_K:]) for column in zip(*rows)]
        return output, ids, weights

    def workspace(self, path):
        size = self.layer.workspace_size(self.TOKENS, path)
        buffer = ctypes.create_string_buffer(size + libmoe.WORKSPACE_ALIGNMENT)
        self.buffers.append(buffer)
        return address(buffer, libmoe.WORKSPACE_ALIGNMENT), size

    def test_forward(self):
        expected, expected_ids, expected_weights = self.expected()
        for path in ("cpu", "reference", "auto"):
            output = floats([math.nan] * len(expected))
            ids, weights = (ctypes.c_int32 * len(expected_ids))(), floats([0] * len(expected_ids))
            self.layer.forward(self.place(self.x), address(output), self.TOKENS, libmoe.F32, *self.workspace(path),
                               path=path, topk_ids_out=address(ids), topk_weights_out=address(weights))
            self.context.synchronize()
            self.assertEqual(list(ids), expected_ids, path)
            for got, wanted in zip([*output, *weights], [*expected, *expected_weights]):
                self.assertAlmostEqual(got, wanted, delta=1e-4, msg=path)

            again = floats([math.nan] * len(expected))
            self.layer.experts_forward(self.place(self.x), address(again), self.TOKENS, libmoe.F32, address(ids),
                                       address(weights), *self.workspace(path), path=path)
            self.assertEqual(bytes(again), bytes(output), path)

    def test_checkpoint(self):
        layer = self.context.load_layer(ROOT / "tests/fixtures/mixtral-f32", 1)
        desc = layer.describe()
        self.assertEqual((desc.hidden_size, desc.num_experts, desc.top_k, desc.dtype), (48, 8, 2, libmoe.F32))
        layer.close()

    def test_failures(self):
        with self.assertRaises(libmoe.Error) as failure:
            self.context.load_layer("/nonexistent", 0)
        self.assertEqual(failure.exception.status, 9)
        self.assertIn("/nonexistent", str(failure.exception))
        output = floats([0] * len(self.x))
        with self.assertRaises(libmoe.Error) as failure:
            self.layer.forward(self.place(self.x), address(output), self.TOKENS, libmoe.F32, None, 0)
        self.assertEqual(failure.exception.status, 2)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
