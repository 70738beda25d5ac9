/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hidden states in another dtype than the layer's: their converted copy lies in the caller's output, in `down` or in
 * memory of its own. Wherever it is, a call gives the bits that it gives with the copy apart from everything else.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "config/convert.h"
#include "runtime/internal.h"

enum { TOKENS = 67, HIDDEN = 72, INTERMEDIATE = 40, EXPERTS = 6, TOP_K = 3, PAIRS = TOKENS * TOP_K };

static const moe_dtype dtypes[] = {MOE_BF16, MOE_F16, MOE_F32};
enum { DTYPES = 3 };

static moe_context *ctx;

static void *make(size_t bytes, int poison)
{
    void *p = NULL;
    assert_int_equal(posix_memalign(&p, 64, bytes), 0);
    memset(p, poison, bytes);
    return p;
}

static void *make_random(int64_t count, moe_dtype dtype, float scale, uint32_t seed)
{
    void *p = make((size_t)count * moe_dtype_size(dtype), 0);
    for (int64_t i = 0; i < count; i++) {
        seed = seed * 1664525u + 1013904223u;
        moe_store_f32(p, dtype, i, scale * (float)(int32_t)seed * 0x1p-31f);
    }
    return p;
}

/* What a call writes: the output and the router's results. */
struct result {
    size_t output_bytes;
    void *output;
    float logits[TOKENS * EXPERTS], weights[PAIRS];
    int32_t ids[PAIRS];
};

static struct result *make_result(moe_dtype dtype)
{
    struct result *r = make(sizeof *r, 0x5a);
    r->output_bytes = (size_t)TOKENS * HIDDEN * moe_dtype_size(dtype);
    r->output = make(r->output_bytes, 0x5a);
    return r;
}

static void assert_same(const struct result *a, const struct result *b)
{
    assert_memory_equal(a->output, b->output, a->output_bytes);
    assert_memory_equal(a->logits, b->logits, sizeof a->logits);
    assert_memory_equal(a->weights, b->weights, sizeof a->weights);
    assert_memory_equal(a->ids, b->ids, sizeof a->ids);
}

static void free_result(struct result *r)
{
    free(r->output);
    free(r);
}

static moe_batch batch_into(const moe_batch *inputs, unsigned stages, struct result *r)
{
    moe_batch batch = *inputs;
    batch.output = r->output;
    if (stages & MOE_STAGE_TOPK) {
        batch.router_logits_out = r->logits;
        batch.topk_ids_out = r->ids;
        batch.topk_weights_out = r->weights;
    }
    return batch;
}

/* The same steps with x in memory of its own, after the check that it was where it should be. */
static void run_apart(const moe_layer *layer, const moe_batch *batch, unsigned stages, void *workspace, size_t bytes)
{
    const struct moe_path_info *path;
    struct moe_error err = {{0}};
    struct moe_call call;
    assert_int_equal(moe_call_prepare(&call, layer, batch, stages, workspace, bytes, NULL, &path, &err), MOE_OK);
    if (moe_dtype_size(call.dtype) > moe_dtype_size(call.io_dtype))
        assert_true(call.x != call.input && call.x != batch->output && call.x != call.down);
    else
        assert_ptr_equal(call.x, stages & MOE_STAGE_COMBINE ? batch->output : call.down);

    void *x = make((size_t)TOKENS * HIDDEN * moe_dtype_size(call.dtype), 0x5a);
    call.x = x;
    call.gate.x = x;
    for (const struct moe_step *step = path->steps; step->run != NULL; step++)
        if (step->stages & stages)
            assert_int_equal(step->run(&call), MOE_OK);
    free(x);
}

static void run_all(moe_dtype dtype, moe_dtype io_dtype)
{
    moe_layer_desc desc = moe_layer_desc_init(dtype);
    desc.hidden_size = HIDDEN;
    desc.intermediate_size = INTERMEDIATE;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    void *gate = make_random(EXPERTS * HIDDEN, dtype, 0.3f, 1);
    void *w13 = make_random(EXPERTS * 2 * INTERMEDIATE * HIDDEN, dtype, 0.3f, 2);
    void *w2 = make_random(EXPERTS * HIDDEN * INTERMEDIATE, dtype, 0.3f, 3);
    void *input = make_random(TOKENS * HIDDEN, io_dtype, 2.0f, 4);
    float *weights = make_random(PAIRS, MOE_F32, 1.0f, 5);
    int32_t ids[PAIRS];
    for (int i = 0; i < PAIRS; i++)
        ids[i] = i * 7 % (EXPERTS + 1); /* the last one is no expert */
    moe_layer_weights parts = moe_layer_weights_init();
    parts.gate = gate;
    parts.w13 = w13;
    parts.w2 = w2;
    moe_layer *layer;
    assert_int_equal(moe_layer_create(ctx, &desc, &parts, &layer), MOE_OK);

    moe_batch inputs = moe_batch_init();
    inputs.tokens = TOKENS;
    inputs.dtype = io_dtype;
    inputs.hidden_states = input;
    inputs.topk_ids = ids;
    inputs.topk_weights = weights;
    static const struct {
        unsigned stages;
        moe_status (*run)(const moe_layer *layer, const moe_batch *batch, void *workspace, size_t bytes, void *stream);
    } calls[] = {
        {MOE_STAGES_ALL, moe_forward}, {MOE_STAGES_EXPERTS, moe_experts_forward}, {MOE_STAGES_ROUTE, moe_route}};
    for (int path = MOE_PATH_REFERENCE; path <= MOE_PATH_CPU; path++) {
        moe_limits limits = moe_limits_init();
        limits.max_tokens = TOKENS;
        limits.path = inputs.path = (moe_path)path;
        size_t bytes;
        assert_int_equal(moe_workspace_size(layer, &limits, &bytes), MOE_OK);
        void *workspace = make((bytes + 255) / 256 * 256 + 256, 0xff);
        void *aligned = (char *)workspace + (256 - (uintptr_t)workspace % 256) % 256;
        for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
            struct result *apart = make_result(io_dtype), *got = make_result(io_dtype);
            const moe_batch a = batch_into(&inputs, calls[i].stages, apart);
            const moe_batch b = batch_into(&inputs, calls[i].stages, got);
            run_apart(layer, &a, calls[i].stages, aligned, bytes);
            assert_int_equal(calls[i].run(layer, &b, aligned, bytes, NULL), MOE_OK);
            assert_same(got, apart);
            free_result(apart);
            free_result(got);
        }
        free(workspace);
    }
    moe_layer_destroy(layer);
    free(gate);
    free(w13);
    free(w2);
    free(input);
    free(weights);
}

static void copies_give_the_same_bits(void **state)
{
    (void)state;
    for (int d = 0; d < DTYPES; d++)
        for (int io = 0; io < DTYPES; io++)
            if (io != d)
                run_all(dtypes[d], dtypes[io]);
}

/* So that a step may run on the copy wherever that is. */
static void paths_have_down_and_combine_last(void **state)
{
    (void)state;
    for (int p = MOE_PATH_AUTO + 1; p < MOE_PATH_COUNT; p++) {
        const struct moe_path_info *path = moe_path_info_get((moe_path)p);
        if (path->steps == NULL)
            continue;
        assert_true(path->needs & MOE_NEED_DOWN);
        const struct moe_step *last = path->steps;
        while (last[1].run != NULL)
            last++;
        assert_int_equal(last->stages, MOE_STAGE_COMBINE);
    }
}

static int open_context(void **state)
{
    (void)state;
    moe_context_options options = moe_context_options_init();
    options.device = MOE_DEVICE_CPU;
    options.threads = 3;
    return moe_context_create(&options, &ctx) == MOE_OK ? 0 : -1;
}

static int close_context(void **state)
{
    (void)state;
    moe_context_destroy(ctx);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(copies_give_the_same_bits),
                                       cmocka_unit_test(paths_have_down_and_combine_last)};
    return cmocka_run_group_tests(tests, open_context, close_context);
}
