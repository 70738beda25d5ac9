#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times libmoe against torch in one process: the same random layer on libmoe's paths, on pipelines around
torch._grouped_mm and, where it is installed, in the transformers block with its grouped_mm experts.

Every output is first compared with an fp32 result. Samples take turns in an order that changes, each after a read of
384 MiB that empties L2, as CUDA graphs where the call can be captured; times are medians.

    python3 tools/ctypes/torch_compare.py build/runtime/libmoe.so --shapes mixtral-8x7b,qwen3-30b-a3b --tokens 1024,8192
"""
import argparse
import functools
import json
import math
import random
import statistics
import sys
from importlib import metadata
from pathlib import Path

try:
    import torch
except ImportError:
    print("torch_compare: torch is not installed", file=sys.stderr)
    sys.exit(3)

sys.path.insert(0, str(Path(__file__).parent))
import libmoe  # noqa: E402
import torch_layers  # noqa: E402

# Hidden, intermediate, experts, top_k; the names are those of `moe bench`.
SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "phi3.5-moe": (4096, 6400, 16, 2),
    "dsv3-ep4": (7168, 2048, 64, 8),
    "gpt-oss": (2880, 2880, 32, 4),
    "qwen2-moe-a2.7b": (2048, 1408, 60, 4),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "olmoe": (2048, 1024, 64, 8),
}
# Name, path, whether on packed weights, whether it can be captured.
PATHS = [("auto", "auto", True, True), ("prefill", "prefill", True, True),
         ("prefill (row-major)", "prefill", False, True), ("cublas-grouped", "cublas-grouped", False, False),
         ("cublas-loop", "cublas-loop", False, False)]
OURS = "libmoe auto"
PIPELINE, BLOCK = "_grouped_mm, ", "transformers "
RIVALS = [("best_pipeline", PIPELINE, "the best pipeline"), ("block", BLOCK, "the block"),
          ("cublas_grouped", "libmoe cublas-grouped", "cublas-grouped")]  # key, prefix of the name, words
ERROR_LIMIT = 2e-2  # of the worst token
CHECKED_TOKENS = 256
FLUSH_FLOATS = 96 << 20
FEW_REPS, LONG_MS = 10, 10  # samples of what takes longer


def first_line(failure):
    return str(failure).partition("\n")[0]


class Run:
    """Something to time: `call` enqueues it on torch's current stream and returns its output."""

    def __init__(self, name, call, capture=True):
        self.name, self.call, self.capture = name, call, capture
        self.graph, self.output, self.milliseconds, self.error, self.note = None, None, [], None, ""

    def prepare(self, tokens, expected):
        """Runs it, compares the output at `tokens`, and captures it. False: it cannot run, or its output is wrong."""
        try:
            output = self.call()[tokens].float()
            torch.cuda.synchronize()
        except Exception as failure:  # of any of several packages
            self.note = "cannot run: " + first_line(failure)
            return False
        error = ((output - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        self.error = error if math.isfinite(error) else None
        if not error < ERROR_LIMIT:
            self.note = f"wrong: relative error {error:.1e}"
            return False
        if self.capture:
            self.record()
        return True

    def record(self):
        """As a graph; what refuses to be captured is timed as it is."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.output = self.call()  # kept: the graph writes there
            graph.replay()
            self.graph = graph
        except (RuntimeError, libmoe.Error) as failure:
            self.note = "not captured: " + first_line(failure)
        torch.cuda.synchronize()

    def sample(self, flush, begin, end):
        flush()
        begin.record()
        if self.graph:
            self.graph.replay()
        else:
            self.call()
        end.record()
        end.synchronize()
        self.milliseconds.append(begin.elapsed_time(end))

    def wants(self, reps):
        long = self.milliseconds and self.milliseconds[0] > LONG_MS
        return len(self.milliseconds) < (min(reps, FEW_REPS) if long else reps)

    @property
    def median(self):
        return statistics.median(self.milliseconds) if self.milliseconds else None


class Layers:
    """A layer of random weights in libmoe, row-major in torch's memory and packed, and in torch."""

    def __init__(self, library, shape, family):
        self.shape, self.family = shape, family
        self.weights = torch_layers.random_weights(*shape)
        torch.cuda.synchronize()  # the weights are there before the library first looks at them
        self.context = libmoe.Context(library, device=libmoe.CUDA, device_index=torch.cuda.current_device())
        desc = libmoe.mixtral_desc(*shape, libmoe.BF16)
        if family == "qwen3":
            desc.topk_weight_dtype = libmoe.BF16
        pointers = (part.data_ptr() for part in self.weights[:3])
        self.row_major = self.context.create_layer(desc, *pointers)
        self.packed, self.why_not_packed = None, ""
        try:
            self.packed = self.row_major.pack()
        except libmoe.Error as failure:
            self.why_not_packed = str(failure)

    @functools.cached_property
    def block(self):
        return torch_layers.block(self.weights, self.family)

    def path(self, x, path, packed):
        layer = self.packed if packed and self.packed else self.row_major
        y, workspace = torch.empty_like(x), None

        def call():
            nonlocal workspace
            if workspace is None:
                workspace = torch.empty(layer.workspace_size(len(x), path), dtype=torch.uint8, device="cuda")
            layer.forward(x.data_ptr(), y.data_ptr(), len(x), libmoe.BF16, workspace.data_ptr(), workspace.numel(),
                          stream=torch.cuda.current_stream().cuda_stream, path=path)
            return y

        return call

    def runs(self, x):
        runs = [Run("libmoe " + name, self.path(x, path, packed), capture) for name, path, packed, capture in PATHS]
        runs += [Run(PIPELINE + name, lambda pipeline=pipeline: pipeline(self.weights, x))
                 for name, pipeline in torch_layers.PIPELINES.items()]
        return runs + [Run(BLOCK + self.family, lambda: self.block(x))]

    def close(self):
        for layer in (self.packed, self.row_major):
            if layer:
                layer.close()
        self.context.close()


def measure(layers, tokens, reps):
    """All runs at one token count."""
    x = torch.randn(tokens, layers.shape[0], dtype=torch.bfloat16, device="cuda")
    checked = torch_layers.clear_tokens(layers.weights, x, CHECKED_TOKENS)
    expected = torch_layers.reference(layers.weights, x[checked])
    runs = layers.runs(x)
    ready = [run for run in runs if run.prepare(checked, expected)]
    data = torch.ones(FLUSH_FLOATS, dtype=torch.float32, device="cuda")
    total = torch.empty((), dtype=torch.float32, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    order = random.Random(1)
    while waiting := [run for run in ready if run.wants(reps)]:
        order.shuffle(waiting)
        for run in waiting:
            run.sample(lambda: torch.sum(data, 0, out=total), begin, end)
    return runs


def best(runs, prefix):
    """The fastest of the runs whose names begin so, or None."""
    measured = [run for run in runs if run.name.startswith(prefix) and run.median]
    return min(measured, key=lambda run: run.median, default=None)


def point(shape, tokens, runs):
    """What is known of one token count, as JSON takes it."""
    hidden, intermediate, experts, top_k = shape
    flops = tokens * (6.0 * top_k * hidden * intermediate + 2.0 * hidden * experts)
    ours = best(runs, OURS)
    entries = []
    for run in runs:
        entry = {"name": run.name, "relative_error": run.error}
        if run.median:
            entry |= {"microseconds": 1e3 * run.median, "samples": len(run.milliseconds),
                      "graph": run.graph is not None, "tflop_per_s": 1e-9 * flops / run.median}
            if ours:
                entry["libmoe_over_this"] = ours.median / run.median
        if run.note:
            entry["why"] = run.note
        entries.append(entry)
    result = {"tokens": tokens, "flops": flops, "runs": entries}
    for key, prefix, _ in RIVALS:
        rival = best(runs, prefix)
        if ours and rival:
            result[key] = {"name": rival.name, "libmoe_over_this": ours.median / rival.median}
    return result


def show(result):
    print(f"\n{result['tokens']} tokens")
    for run in result["runs"]:
        if "microseconds" not in run:
            print(f"  {run['name']:<28} {run['why']}")
            continue
        ratio = f"{run['libmoe_over_this']:8.3f}" if "libmoe_over_this" in run else ""
        print(f"  {run['name']:<28} {run['microseconds']:>10.1f} us {run['tflop_per_s']:>7.1f} TFLOP/s {ratio}"
              f"{'' if run['graph'] else '  launched'} {run.get('why', '')}".rstrip())
    for key, _, text in RIVALS:
        if key in result:
            print(f"  {OURS} takes {result[key]['libmoe_over_this']:.3f} of {text}'s time ({result[key]['name']})")
    sys.stdout.flush()


def parse_shape(name):
    try:
        shape = SHAPES.get(name) or tuple(map(int, name.split("x")))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1 or shape[3] > shape[2]:
        raise argparse.ArgumentTypeError(f"'{name}' is no shape: a name, or HIDDENxINTERMEDIATExEXPERTSxTOP_K")
    return name, shape


def listed(parse):
    """Of a list with commas."""
    return lambda text: [parse(word) for word in text.split(",")]


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--shapes", type=listed(parse_shape), default="mixtral-8x7b,qwen3-30b-a3b",
                        help="names, as of `moe bench`, or HxIxExK (default: %(default)s)")
    parser.add_argument("--tokens", type=listed(positive), default="1024,2048,4096,8192,16384",
                        help="counts (default: %(default)s)")
    parser.add_argument("--reps", type=positive, default=20, help=f"samples (default: %(default)s; {FEW_REPS} of what "
                        f"takes over {LONG_MS} ms)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="JSON, at the end")
    return parser.parse_args()


def measure_shape(library, name, shape, arguments):
    """One layer at all token counts; prints them but for --json."""
    family = "qwen3" if name.startswith("qwen") else "mixtral"
    layers = Layers(library, shape, family)
    if not arguments.json:
        print(f"\n{name}: hidden {shape[0]}, intermediate {shape[1]}, {shape[2]} experts, top {shape[3]}, bf16; last "
              f"column: the time of {OURS} over this one's")
        if layers.why_not_packed:
            print(f"row-major weights only: {layers.why_not_packed}")
    results = []
    for tokens in arguments.tokens:
        results.append(point(shape, tokens, measure(layers, tokens, arguments.reps)))
        if not arguments.json:
            show(results[-1])
        torch.cuda.empty_cache()  # what the graphs held
    torch.cuda.synchronize()
    layers.close()
    return {"shape": name, "hidden_size": shape[0], "intermediate_size": shape[1], "num_experts": shape[2],
            "top_k": shape[3], "points": results}  # fmt: skip


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main():
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print("torch_compare: torch finds no CUDA GPU", file=sys.stderr)
        return 3
    try:
        library = libmoe.load(arguments.library)
    except (OSError, AttributeError) as failure:
        print(f"torch_compare: {failure}", file=sys.stderr)
        return 3
    torch.manual_seed(1)
    about = {"device": torch.cuda.get_device_name()}
    about |= {package: version(package) for package in ("torch", "triton", "transformers")}
    if not arguments.json:
        print(", ".join(f"{key} {value}" if value else f"no {key}" for key, value in about.items()))
    try:
        with torch.no_grad():
            layers = [measure_shape(library, name, shape, arguments) for name, shape in arguments.shapes]
    except (libmoe.Error, torch.cuda.OutOfMemoryError) as failure:
        print(f"torch_compare: {first_line(failure)}", file=sys.stderr)
        return 3
    if arguments.json:
        print(json.dumps(about | {"layers": layers}, indent=1))
    notes = [run.get("why", "") for layer in layers for result in layer["points"] for run in result["runs"]]
    return 1 if any(note.startswith("wrong") for note in notes) else 0


if __name__ == "__main__":
    sys.exit(main())
