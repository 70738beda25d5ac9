# SPDX-License-Identifier: Apache-2.0
"""What stands around the two grouped GEMMs, as Triton kernels: top-k, rows into expert order, activation, sum."""
import torch
import triton
import triton.language as tl

COLUMNS = 1024  # of a row, that one program moves


@triton.jit
def _route(logits, ids, weights, ranks, counts, experts, top_k: tl.constexpr, slots: tl.constexpr, lanes: tl.constexpr):
    token = tl.program_id(0)
    expert, slot = tl.arange(0, lanes), tl.arange(0, slots)
    left = tl.load(logits + token * experts + expert, expert < experts, float("-inf")).to(tl.float32)
    largest = tl.max(left, 0)
    chosen = tl.zeros([slots], tl.int32)
    weight = tl.zeros([slots], tl.float32)
    for k in tl.static_range(top_k):
        value, best = tl.max(left, 0), tl.argmax(left, 0)
        chosen = tl.where(slot == k, best, chosen)
        weight = tl.where(slot == k, tl.exp(value - largest), weight)
        left = tl.where(expert == best, float("-inf"), left)
    there, at = slot < top_k, token * top_k + slot
    tl.store(ids + at, chosen, there)
    tl.store(weights + at, weight / tl.sum(weight, 0), there)
    tl.store(ranks + at, tl.atomic_add(counts + chosen, 1, there), there)


@triton.jit
def _permute(x, ids, ranks, counts, ends, rows, places, hidden, top_k: tl.constexpr, columns: tl.constexpr):
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * columns + tl.arange(0, columns)
    row = tl.load(x + token * hidden + column, column < hidden)
    for k in tl.static_range(top_k):
        expert = tl.load(ids + token * top_k + k)
        place = tl.load(ends + expert) - tl.load(counts + expert) + tl.load(ranks + token * top_k + k)
        tl.store(rows + place.to(tl.int64) * hidden + column, row, column < hidden)
        tl.store(places + token * top_k + k, place, block == 0)


@triton.jit
def _silu_mul(gate_up, act, width, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    gate = tl.load(gate_up + row * 2 * width + column, column < width).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, column < width).to(tl.float32)
    tl.store(act + row * width + column, (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty), column < width)


@triton.jit
def _combine(down, places, weights, y, hidden, top_k: tl.constexpr, columns: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    total = tl.zeros([columns], tl.float32)
    for k in tl.static_range(top_k):
        place = tl.load(places + token * top_k + k).to(tl.int64)
        row = tl.load(down + place * hidden + column, column < hidden).to(tl.float32)
        total += row * tl.load(weights + token * top_k + k)
    tl.store(y + token * hidden + column, total.to(y.dtype.element_ty), column < hidden)


def route(logits, top_k):
    """Ids and weights of each token's experts, each row's rank within its expert (in no particular order), and how many
    rows each expert has."""
    tokens, experts = logits.shape
    ids, ranks = (torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device) for _ in range(2))
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    counts = torch.zeros(experts, dtype=torch.int32, device=logits.device)
    _route[(tokens,)](logits, ids, weights, ranks, counts, experts, top_k, triton.next_power_of_2(top_k),
                      triton.next_power_of_2(experts), num_warps=1)
    return ids, weights, ranks, counts


def permute(x, ids, ranks, counts, ends):
    """The rows of x in expert order, and the place of each token's slots in it."""
    tokens, hidden = x.shape
    top_k = ids.shape[1]
    rows = torch.empty(tokens * top_k, hidden, dtype=x.dtype, device=x.device)
    places = torch.empty_like(ids)
    _permute[(tokens, triton.cdiv(hidden, COLUMNS))](x, ids, ranks, counts, ends, rows, places, hidden, top_k, COLUMNS)
    return rows, places


def silu_mul(gate_up):
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    act = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(rows, triton.cdiv(width, COLUMNS))](gate_up, act, width, COLUMNS)
    return act


def combine(down, places, weights):
    tokens, top_k = places.shape
    hidden = down.shape[1]
    y = torch.empty(tokens, hidden, dtype=down.dtype, device=down.device)
    _combine[(tokens, triton.cdiv(hidden, COLUMNS))](down, places, weights, y, hidden, top_k, COLUMNS)
    return y
