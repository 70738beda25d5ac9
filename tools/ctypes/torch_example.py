#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs libmoe on torch tensors: a layer of random weights on the GPU, enqueued on torch's current stream, compared with
the same layer in torch, captured in a CUDA graph and timed.

    python3 tools/ctypes/torch_example.py build/runtime/libmoe.so --tokens 16 --path simple
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import libmoe  # noqa: E402


def reference(x, gate, w13, w2, top_k):
    """The layer in fp32."""
    logits = torch.nn.functional.linear(x, gate).float()  # rounded to x's dtype, as Mixtral's router does
    weights, ids = logits.softmax(dim=-1).topk(top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(gate)):
        token, slot = torch.where(ids == expert)
        gate_rows, up_rows = (x[token].float() @ w13[expert].float().T).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate_rows) * up_rows) @ w2[expert].float().T
        output.index_add_(0, token, rows * weights[token, slot, None])
    return output


def time_graph(run, repetitions=20):
    """The median time of `run` as a CUDA graph, in microseconds, with L2 flushed before each."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    flush = torch.ones(96 << 20, dtype=torch.float32, device="cuda")
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.sum()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--shape", default="4096,14336,8,2", help="hidden, intermediate, experts, top_k")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--path", default="auto")
    arguments = parser.parse_args()
    hidden, intermediate, experts, top_k = map(int, arguments.shape.split(","))

    torch.manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    gate = normal(experts, hidden) / hidden**0.5
    w13 = normal(experts, 2 * intermediate, hidden) / hidden**0.5
    w2 = normal(experts, hidden, intermediate) / intermediate**0.5
    x = normal(arguments.tokens, hidden)
    y = torch.empty_like(x)
    torch.cuda.synchronize()  # the weights are there before the library first looks at them

    context = libmoe.Context(libmoe.load(arguments.library), device=libmoe.CUDA,
                             device_index=torch.cuda.current_device())
    desc = libmoe.mixtral_desc(hidden, intermediate, experts, top_k, libmoe.BF16)
    layer = context.create_layer(desc, gate.data_ptr(), w13.data_ptr(), w2.data_ptr())
    # torch's allocations are aligned to 512 bytes, which is more than a workspace asks for.
    workspace = torch.empty(layer.workspace_size(arguments.tokens, arguments.path), dtype=torch.uint8, device="cuda")

    def run():
        layer.forward(x.data_ptr(), y.data_ptr(), arguments.tokens, libmoe.BF16, workspace.data_ptr(),
                      workspace.numel(), stream=torch.cuda.current_stream().cuda_stream, path=arguments.path)

    run()
    expected = reference(x, gate, w13, w2, top_k)
    error = ((y.float() - expected).norm() / expected.norm()).item()
    print(f"relative error {error:.2e}")
    try:
        print(f"{time_graph(run):.1f} us")
    except libmoe.Error as failure:  # a path that waits for the host cannot be captured
        print(f"not timed: {failure}")
    torch.cuda.synchronize()
    layer.close()
    context.close()
    return 0 if error < 1e-2 else 1


if __name__ == "__main__":
    sys.exit(main())
