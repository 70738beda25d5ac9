/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One arena, carved from front to back; the same function sizes and carves, so the two cannot disagree.
 *
 *   router   logits  ids  weights
 *   plan     counts  offsets  row_token  row_slot  row_weight  slot_row  scratch
 *   experts  x  rows  gate_up  act  down
 *   path     scratch
 *
 * There is an x only where it is wider than the caller's hidden states.
 *
 * T tokens, S slots, E experts (= groups), H hidden, I intermediate; every buffer begins on MOE_WORKSPACE_ALIGNMENT.
 */
#include "runtime/internal.h"

struct arena {
    char *base; /* NULL: only count */
    size_t used;
};

static void *take(struct arena *arena, uint64_t count, size_t element)
{
    size_t bytes = (size_t)count * element; /* limits in call.c keep this below 2^63 */
    void *pointer = arena->base != NULL ? arena->base + arena->used : NULL;
    arena->used += (bytes + MOE_WORKSPACE_ALIGNMENT - 1) / MOE_WORKSPACE_ALIGNMENT * MOE_WORKSPACE_ALIGNMENT;
    return pointer;
}

static void *take_if(struct arena *arena, bool needed, uint64_t count, moe_dtype dtype, moe_dtype layer_dtype)
{
    if (!needed)
        return NULL;
    return take(arena, count, moe_dtype_size(dtype != MOE_DTYPE_NONE ? dtype : layer_dtype));
}

size_t moe_workspace_carve(struct moe_call *call, const struct moe_path_info *path, void *workspace)
{
    struct arena arena = {workspace, 0};
    const uint64_t tokens = (uint64_t)call->tokens, experts = (uint64_t)call->gate.experts;
    const uint64_t rows = tokens * (uint64_t)call->slots;
    const uint64_t hidden = (uint64_t)call->hidden, intermediate = (uint64_t)call->intermediate;

    call->gate.logits = take(&arena, tokens * experts, sizeof(float));
    call->gate.ids = take(&arena, tokens * (uint64_t)call->gate.top_k, sizeof(int32_t));
    call->gate.weights = take(&arena, tokens * (uint64_t)call->gate.top_k, sizeof(float));

    struct moe_plan *plan = &call->plan.plan;
    plan->counts = take(&arena, experts, sizeof(int32_t));
    plan->offsets = take(&arena, experts + 1, sizeof(int32_t));
    plan->row_token = take(&arena, rows, sizeof(int32_t));
    plan->row_slot = take(&arena, rows, sizeof(int32_t));
    plan->row_weight = take(&arena, rows, sizeof(float));
    plan->slot_row = take(&arena, rows, sizeof(int32_t));
    call->plan.scratch = take(&arena, moe_plan_scratch_bytes(call->tokens, call->slots, call->plan.groups), 1);

    const bool converts = call->io_dtype != call->dtype;
    const bool widens = moe_dtype_size(call->dtype) > moe_dtype_size(call->io_dtype);
    call->x = take_if(&arena, widens, tokens * hidden, MOE_DTYPE_NONE, call->dtype);
    call->rows = take_if(&arena, path->needs & MOE_NEED_ROWS, rows * hidden, MOE_DTYPE_NONE, call->dtype);
    call->gate_up =
        take_if(&arena, path->needs & MOE_NEED_GATE_UP, rows * 2 * intermediate, path->gate_up_dtype, call->dtype);
    call->act = take_if(&arena, path->needs & MOE_NEED_ACT, rows * intermediate, path->act_dtype, call->dtype);
    call->down_dtype = path->down_dtype != MOE_DTYPE_NONE ? path->down_dtype : call->dtype;
    const size_t before_down = arena.used;
    call->down = take_if(&arena, path->needs & MOE_NEED_DOWN, rows * hidden, call->down_dtype, call->dtype);
    const size_t down_bytes = arena.used - before_down;
    /* Without a conversion to make, the input itself is x. Otherwise there is room in output, which nothing writes
     * before combine; a call without output ends before down is used, which every path has. */
    if (!converts)
        call->x = (void *)call->input;
    else if (!widens)
        call->x = call->output != NULL ? call->output : call->down;

    /* First: how much the FFN needs zero depends on it. */
    call->ffn_routes = call->stages == MOE_STAGES_ALL && path->routes != NULL && path->routes(call);
    call->scratch_bytes = path->scratch != NULL ? path->scratch(call) : 0;
    call->scratch = take(&arena, call->scratch_bytes, 1);
    const size_t zeroed = path->zeroed != NULL ? path->zeroed(call) : 0;
    /* Not where x lies in output: combine writes that while others' x is still read. And not beside SMs that are
     * somebody else's, on which combine would keep looking. */
    call->down_passed = call->ffn_routes && !converts && call->max_sms == 0;
    const size_t passed = call->down_passed ? down_bytes : 0; /* down lies right before scratch */
    call->gate.zeroed = call->down_passed ? call->down : call->scratch;
    call->gate.zeroed_bytes = call->ffn_routes ? passed + zeroed : 0;
    call->plan.zeroed = call->scratch;
    call->plan.zeroed_bytes = call->ffn_routes ? 0 : zeroed;
    return arena.used;
}
