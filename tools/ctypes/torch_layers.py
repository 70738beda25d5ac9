# SPDX-License-Identifier: Apache-2.0
"""The layer in torch: an exact one to compare with, pipelines around torch._grouped_mm, and the transformers block.

Each pipeline is a function of (weights, x); none waits for the device, so that all can be captured.
"""
from typing import NamedTuple

import torch
from torch.nn import functional


class Weights(NamedTuple):
    gate: torch.Tensor  # [experts, hidden]
    w13: torch.Tensor  # [experts, 2 * intermediate, hidden]: gate rows, then up rows
    w2: torch.Tensor  # [experts, hidden, intermediate]
    top_k: int


def random_weights(hidden, intermediate, experts, top_k, dtype=torch.bfloat16, device="cuda"):
    def normal(*shape):
        return torch.randn(shape, dtype=dtype, device=device).div_(shape[-1] ** 0.5)

    return Weights(normal(experts, hidden), normal(experts, 2 * intermediate, hidden),
                   normal(experts, hidden, intermediate), top_k)


def route(weights, x):
    """Mixtral's rule: logits round to x's dtype, softmax in fp32, the chosen weights divided by their sum."""
    logits = functional.linear(x, weights.gate).float()
    scores, ids = logits.softmax(dim=-1).topk(weights.top_k, dim=-1)
    return scores / scores.sum(dim=-1, keepdim=True), ids


def reference(weights, x):
    """In fp32, but for the logits."""
    scores, ids = route(weights, x)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(len(weights.gate)):
        token, slot = torch.where(ids == expert)
        gate, up = (x[token].float() @ weights.w13[expert].float().T).chunk(2, dim=-1)
        rows = (functional.silu(gate) * up) @ weights.w2[expert].float().T
        y.index_add_(0, token, rows * scores[token, slot, None])
    return y


def clear_tokens(weights, x, most):
    """Up to `most` tokens whose choice of experts no rounding of the logits can change: others may rightly differ."""
    logits = functional.linear(x.float(), weights.gate.float())
    if weights.top_k == logits.shape[1]:
        return torch.arange(min(most, len(x)), device=x.device)
    top = logits.topk(weights.top_k + 1, dim=-1).values
    last, next_one = top[:, -2], top[:, -1]
    return torch.where(last - next_one > 0.02 * torch.maximum(last.abs(), next_one.abs()))[0][:most]


# ---- On torch._grouped_mm: [rows, k] in expert order times [experts, k, n]; `ends`: where each expert's rows end ----


def _sorted_rows(weights, ids):
    """The permutation that puts the slots in expert order, and where each expert ends."""
    ordered, permutation = ids.flatten().to(torch.int16).sort(stable=True)
    experts = torch.arange(len(weights.gate), dtype=torch.int16, device=ids.device)
    return permutation, torch.searchsorted(ordered, experts, right=True, out_int32=True)


def _experts(weights, rows, ends):
    gate, up = torch._grouped_mm(rows, weights.w13.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    return torch._grouped_mm(functional.silu(gate) * up, weights.w2.transpose(-2, -1), offs=ends)


def sort_gather(weights, x):
    """Sorted by torch.sort; each token gathers its rows and sums them."""
    scores, ids = route(weights, x)
    permutation, ends = _sorted_rows(weights, ids)
    down = _experts(weights, x[permutation // weights.top_k], ends)
    place = torch.empty_like(permutation)
    place[permutation] = torch.arange(len(permutation), device=x.device)
    return (down[place].view(len(x), weights.top_k, -1) * scores[..., None]).sum(dim=1).to(x.dtype)


def sort_index_add(weights, x):
    """Sorted by torch.sort; rows are added to their tokens in fp32."""
    scores, ids = route(weights, x)
    permutation, ends = _sorted_rows(weights, ids)
    token = permutation // weights.top_k
    down = _experts(weights, x[token], ends)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return y.index_add_(0, token, down * scores.flatten()[permutation, None]).to(x.dtype)


def fused(weights, x):
    """All but the GEMMs in Triton."""
    import triton_glue as glue
    ids, scores, ranks, counts = glue.route(functional.linear(x, weights.gate), weights.top_k)
    ends = counts.cumsum(0, dtype=torch.int32)
    rows, places = glue.permute(x, ids, ranks, counts, ends)
    gate_up = torch._grouped_mm(rows, weights.w13.transpose(-2, -1), offs=ends)
    down = torch._grouped_mm(glue.silu_mul(gate_up), weights.w2.transpose(-2, -1), offs=ends)
    return glue.combine(down, places, scores)


PIPELINES = {"fused": fused, "sort, gather": sort_gather, "sort, index_add": sort_index_add}


# ---- transformers ----


def block(weights, family):
    """The block of `family`, "mixtral" or "qwen3", on these weights with its grouped_mm experts: a function of x."""
    experts, hidden, intermediate = weights.w2.shape
    common = {"hidden_size": hidden, "num_experts_per_tok": weights.top_k, "experts_implementation": "grouped_mm"}
    if family == "qwen3":
        from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling
        config = modeling.Qwen3MoeConfig(num_experts=experts, moe_intermediate_size=intermediate, norm_topk_prob=True,
                                         **common)
        kind = modeling.Qwen3MoeSparseMoeBlock
    else:
        from transformers.models.mixtral import modeling_mixtral as modeling
        config = modeling.MixtralConfig(num_local_experts=experts, intermediate_size=intermediate, **common)
        kind = modeling.MixtralSparseMoeBlock
    with torch.device("meta"):
        module = kind(config).eval()
    module.gate.weight = torch.nn.Parameter(weights.gate, requires_grad=False)
    module.experts.gate_up_proj = torch.nn.Parameter(weights.w13, requires_grad=False)
    module.experts.down_proj = torch.nn.Parameter(weights.w2, requires_grad=False)
    return lambda x: module(x[None])[0]
