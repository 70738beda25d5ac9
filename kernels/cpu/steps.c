/* SPDX-License-Identifier: Apache-2.0 */
/* The steps of the `cpu` path (kernels/kernels.h), all threads each. */
#include "config/convert.h"
#include "kernels/cpu/gemm.h"

enum { ELEMENTS = 4096 /* that a thread takes at a time where it only moves data */ };

/* ---- entry ---- */

static void entry_thread(void *argument, int32_t thread, int32_t threads)
{
    const struct moe_call *call = argument;
    const int64_t count = call->tokens * call->hidden;
    const size_t from_size = moe_dtype_size(call->io_dtype), to_size = moe_dtype_size(call->dtype);
    (void)thread;
    (void)threads;

    for (int64_t i; (i = moe_pool_next(call->exec->pool, ELEMENTS)) < count;)
        moe_cpu_ops()->convert((char *)call->x + (size_t)i * to_size, call->dtype,
                               (const char *)call->input + (size_t)i * from_size, call->io_dtype,
                               count - i < ELEMENTS ? count - i : ELEMENTS);
}

moe_status moe_entry_cpu(const struct moe_call *call)
{
    if (call->io_dtype != call->dtype && call->tokens > 0)
        moe_pool_run(call->exec->pool, entry_thread, (void *)call);
    return MOE_OK;
}

/* ---- logits ---- */

static void round_thread(void *argument, int32_t thread, int32_t threads)
{
    const struct moe_call *call = argument;
    const int64_t count = call->gate.tokens * call->gate.experts;
    (void)thread;
    (void)threads;

    for (int64_t i; (i = moe_pool_next(call->exec->pool, ELEMENTS)) < count;)
        for (int64_t end = i + ELEMENTS < count ? i + ELEMENTS : count; i < end; i++)
            call->gate.logits[i] = moe_round_f32(call->gate.logits[i], call->gate.logits_dtype);
}

moe_status moe_logits_cpu(const struct moe_call *call)
{
    const struct moe_gate_args *gate = &call->gate;
    const int32_t offsets[2] = {0, (int32_t)gate->tokens};
    const struct moe_cpu_gemm gemm = {
        .groups = 1,
        .offsets = offsets,
        .depth = gate->hidden,
        .width = gate->experts,
        .x = gate->x,
        .x_dtype = gate->x_dtype,
        .w = {gate->gate, gate->gate_dtype, MOE_LAYOUT_ROW_MAJOR, 1, gate->experts, gate->hidden},
        .out = gate->logits,
        .out_dtype = MOE_F32,
        .scratch = call->scratch,
    };

    moe_cpu_gemm_run(&gemm, call->exec->pool);
    if (gate->logits_dtype != MOE_F32 && gate->tokens > 0)
        moe_pool_run(call->exec->pool, round_thread, (void *)call);
    return MOE_OK;
}

/* ---- topk ---- */

static void topk_thread(void *argument, int32_t thread, int32_t threads)
{
    enum { TOKENS = 8 };
    const struct moe_call *call = argument;
    const int64_t tokens = call->gate.tokens;
    (void)thread;
    (void)threads;

    for (int64_t t; (t = moe_pool_next(call->exec->pool, TOKENS)) < tokens;)
        moe_topk_ref(&call->gate, t, t + TOKENS < tokens ? t + TOKENS : tokens);
}

moe_status moe_topk_cpu(const struct moe_call *call)
{
    if (call->gate.tokens > 0)
        moe_pool_run(call->exec->pool, topk_thread, (void *)call);
    return MOE_OK;
}

/* ---- gemm1 and gemm2 ---- */

moe_status moe_gemm1_cpu(const struct moe_call *call)
{
    const struct moe_cpu_gemm gemm = {
        .groups = call->plan.groups,
        .offsets = call->plan.plan.offsets,
        .depth = call->hidden,
        .width = call->intermediate,
        .x = call->x,
        .x_dtype = call->dtype,
        .x_rows = call->plan.plan.row_token,
        .w = call->w13,
        .gated = true,
        .out = call->act,
        .out_dtype = call->dtype,
        .scratch = call->scratch,
    };

    moe_cpu_gemm_run(&gemm, call->exec->pool);
    return MOE_OK;
}

moe_status moe_gemm2_cpu(const struct moe_call *call)
{
    const struct moe_cpu_gemm gemm = {
        .groups = call->plan.groups,
        .offsets = call->plan.plan.offsets,
        .depth = call->intermediate,
        .width = call->hidden,
        .x = call->act,
        .x_dtype = call->dtype,
        .w = call->w2,
        .out = call->down,
        .out_dtype = MOE_F32,
        .scratch = call->scratch,
    };

    moe_cpu_gemm_run(&gemm, call->exec->pool);
    return MOE_OK;
}

/* ---- combine ---- */

static void combine_thread(void *argument, int32_t thread, int32_t threads)
{
    const struct moe_call *call = argument;
    const struct moe_plan *plan = &call->plan.plan;
    const int64_t pieces = (call->hidden + ELEMENTS - 1) / ELEMENTS, jobs = call->tokens * pieces;
    (void)thread;
    (void)threads;

    for (int64_t j; (j = moe_pool_next(call->exec->pool, 1)) < jobs;) {
        int64_t token = j / pieces, column = j % pieces * ELEMENTS;
        int64_t count = call->hidden - column < ELEMENTS ? call->hidden - column : ELEMENTS;
        moe_cpu_ops()->combine((char *)call->output +
                                   (size_t)(token * call->hidden + column) * moe_dtype_size(call->io_dtype),
                               call->io_dtype, (const float *)call->down + column, call->hidden,
                               plan->slot_row + token * call->slots, plan->row_weight, call->slots, count);
    }
}

moe_status moe_combine_cpu(const struct moe_call *call)
{
    if (call->tokens > 0)
        moe_pool_run(call->exec->pool, combine_thread, (void *)call);
    return MOE_OK;
}

/* One step at a time uses the scratch. */
size_t moe_scratch_cpu(const struct moe_call *call)
{
    const int32_t threads = moe_pool_threads(call->exec->pool);
    const int64_t rows = call->tokens * call->slots;
    const size_t bytes[3] = {
        moe_cpu_gemm_scratch(threads, call->gate.tokens, 1, call->hidden),
        moe_cpu_gemm_scratch(threads, rows, call->plan.groups, call->hidden),
        moe_cpu_gemm_scratch(threads, rows, call->plan.groups, call->intermediate),
    };
    size_t most = bytes[0] > bytes[1] ? bytes[0] : bytes[1];

    return most > bytes[2] ? most : bytes[2];
}
