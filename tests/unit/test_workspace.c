/* SPDX-License-Identifier: Apache-2.0 */
/* How much workspace `prefill` takes: little more than what lies between its two GEMMs and behind the second; that
 * what is enough for many tokens is for fewer; and who sets which part of it to zero. Sizes are arithmetic, so the
 * device is made up. In a build without CUDA the paths' own scratch memory counts for nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "runtime/internal.h"

static moe_context gpu = {.info = {.device = MOE_DEVICE_CUDA, .compute_capability = 90},
                          .exec = {.device = MOE_DEVICE_CUDA, .sms = 132, .compute_capability = 90}};

static const struct shape {
    const char *name;
    int64_t hidden, intermediate;
    int32_t experts, top_k;
    int64_t most; /* tokens */
} shapes[] = {
    {"mixtral-8x7b", 4096, 14336, 8, 2, 131072},
    {"phi3.5-moe", 4096, 6400, 16, 2, 16384},
    {"dsv3-ep4", 7168, 2048, 64, 8, 16384},
    {"gpt-oss", 2880, 2880, 32, 4, 16384},
    {"qwen2-moe-a2.7b", 2048, 1408, 60, 4, 16384},
    {"qwen3-30b-a3b", 2048, 768, 128, 8, 131072},
    {"olmoe", 2048, 1024, 64, 8, 16384},
    {"512 experts", 2048, 512, 512, 10, 131072},
    {"256 experts", 2048, 512, 256, 8, 16384},
    {"top 33", 2048, 512, 64, 33, 4096},
    {"tiny", 64, 64, 4, 1, 4096},
};

static moe_layer make_layer(const struct shape *s, moe_layout layout)
{
    moe_layer layer = {.ctx = &gpu, .desc = moe_layer_desc_init(MOE_BF16), .weights.layout = layout};
    layer.desc.hidden_size = s->hidden;
    layer.desc.intermediate_size = s->intermediate;
    layer.desc.num_experts = s->experts;
    layer.desc.top_k = s->top_k;
    return layer;
}

/* act and down, a tenth of them for the routing, the plan, the counters and sums of slices, and what small
 * batches need. */
static uint64_t bound(const struct shape *s, int64_t tokens)
{
    const uint64_t rows = (uint64_t)tokens * (uint64_t)s->top_k;
    const uint64_t bytes = (rows * (uint64_t)s->intermediate + rows * (uint64_t)s->hidden) * 2;
    return bytes + bytes / 10 + 8000000;
}

static uint64_t need_on(moe_path path, const moe_layer *layer, int64_t tokens, int32_t slots, moe_dtype io_dtype)
{
    struct moe_call call;
    moe_call_shape(&call, layer, tokens, slots, io_dtype);
    return moe_workspace_carve(&call, moe_path_info_get(path), NULL);
}

static uint64_t need(const moe_layer *layer, int64_t tokens, moe_dtype io_dtype)
{
    return need_on(MOE_PATH_PREFILL, layer, tokens, layer->desc.top_k, io_dtype);
}

static void prefill_stays_within_bound(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int layout = MOE_LAYOUT_ROW_MAJOR; layout <= MOE_LAYOUT_PACKED; layout++)
            for (int64_t tokens = 256; tokens <= shapes[i].most; tokens *= 2)
                for (int dtype = MOE_BF16; dtype <= MOE_F32; dtype++) {
                    const moe_layer layer = make_layer(&shapes[i], (moe_layout)layout);
                    const uint64_t bytes = need(&layer, tokens, (moe_dtype)dtype), most = bound(&shapes[i], tokens);
                    if (bytes > most)
                        fail_msg("%s, %lld tokens in %s: %llu bytes, expected at most %llu", shapes[i].name,
                                 (long long)tokens, moe_dtype_name((moe_dtype)dtype), (unsigned long long)bytes,
                                 (unsigned long long)most);
                }
}

/* What a caller is told serves every batch up to the limit, in any dtype: hidden states in another one are converted
 * where the output will be. */
static void size_is_what_batches_need(void **state)
{
    (void)state;
    if (moe_path_available(&gpu, MOE_PATH_PREFILL, NULL, NULL, 0) != MOE_OK)
        skip();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const moe_layer layer = make_layer(&shapes[i], MOE_LAYOUT_PACKED);
        moe_limits limits = moe_limits_init();
        size_t bytes;
        limits.path = MOE_PATH_PREFILL;
        for (limits.max_tokens = 256; limits.max_tokens <= shapes[i].most; limits.max_tokens *= 2) {
            assert_int_equal(moe_workspace_size(&layer, &limits, &bytes), MOE_OK);
            assert_int_equal(bytes, need(&layer, limits.max_tokens, MOE_F32));
            assert_int_equal(bytes, need(&layer, limits.max_tokens, MOE_F16));
            assert_true(bytes <= bound(&shapes[i], limits.max_tokens));
            for (int64_t tokens = 1; tokens <= limits.max_tokens; tokens = tokens * 3 + 1)
                assert_true(need(&layer, tokens, MOE_BF16) <= bytes && need(&layer, tokens, MOE_F32) <= bytes);
        }
    }
}

/* On the decode path, where a few tokens lie in memory in their own way. */
static void few_need_no_more_than_many(void **state)
{
    (void)state;
    if (moe_path_available(&gpu, MOE_PATH_DECODE, NULL, NULL, 0) != MOE_OK)
        skip();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const moe_layer layer = make_layer(&shapes[i], MOE_LAYOUT_PACKED);
        const int32_t slots[] = {1, shapes[i].top_k, MOE_MAX_TOP_K};
        moe_limits limits = moe_limits_init();
        size_t bytes;
        limits.path = MOE_PATH_DECODE;
        for (size_t k = 0; k < sizeof slots / sizeof *slots; k++) {
            uint64_t most = 0; /* of so many tokens or fewer */
            limits.top_k = slots[k];
            for (limits.max_tokens = 1; limits.max_tokens <= 512; limits.max_tokens++) {
                const uint64_t own = need_on(MOE_PATH_DECODE, &layer, limits.max_tokens, slots[k], MOE_BF16);
                most = own > most ? own : most;
                assert_int_equal(moe_workspace_size(&layer, &limits, &bytes), MOE_OK);
                assert_true(most <= bytes);
            }
        }
    }
}

/* Prefill cuts items from 40 blocks of 64 in GEMM 2's sums on, and has memory for what the slices leave: for 37 of them
 * even with one token, 7 MB. Their flags are set to zero, with the items' counters. */
static void long_sums_have_room(void **state)
{
    const struct moe_path_info *path = moe_path_info_get(MOE_PATH_PREFILL);
    uint64_t bytes[2], zeroed[2];
    (void)state;
    if (moe_path_available(&gpu, MOE_PATH_PREFILL, NULL, NULL, 0) != MOE_OK)
        skip();
    for (int64_t blocks = 39; blocks <= 40; blocks++) {
        const struct shape shape = {"long sums", 64, 64 * blocks, 8, 1, 1};
        const moe_layer layer = make_layer(&shape, MOE_LAYOUT_PACKED);
        struct moe_call call;
        moe_call_shape(&call, &layer, 1, 1, MOE_BF16);
        bytes[blocks - 39] = moe_workspace_carve(&call, path, NULL);
        zeroed[blocks - 39] = path->zeroed(&call);
    }
    assert_in_range(bytes[1] - bytes[0], 37 * 196608, 38 * 196608);
    assert_in_range(zeroed[1] - zeroed[0], 37 * 8 * 4, 37 * 8 * 4 + 255);
}

enum { WGMMA = 1, MMA }; /* decode's configurations */

static void check_zeroed(const moe_layer *layer, int64_t tokens, unsigned stages, moe_dtype io_dtype, int config,
                         int32_t max_sms)
{
    const struct moe_path_info *path = moe_path_info_get(MOE_PATH_DECODE);
    const moe_layer_desc *desc = &layer->desc;
    struct moe_call call;

    moe_call_shape(&call, layer, tokens, desc->top_k, io_dtype);
    call.stages = stages;
    call.config = config;
    call.max_sms = max_sms;
    const size_t bytes = moe_workspace_carve(&call, path, NULL);
    void *workspace = aligned_alloc(MOE_WORKSPACE_ALIGNMENT, bytes);
    assert_non_null(workspace);
    assert_int_equal(moe_workspace_carve(&call, path, workspace), bytes);
    const bool routes =
        stages == MOE_STAGES_ALL && config != MMA && tokens <= 16 && desc->num_experts <= 256 && desc->top_k <= 32;
    const size_t zeroed = path->zeroed(&call);
    const char *end = (const char *)call.scratch + zeroed;
    assert_int_equal(call.ffn_routes, routes);
    assert_int_equal(call.down_passed, routes && io_dtype == MOE_BF16 && max_sms == 0);
    assert_ptr_equal(call.gate.zeroed, call.down_passed ? call.down : call.scratch);
    assert_int_equal(call.gate.zeroed_bytes, routes ? (size_t)(end - (const char *)call.gate.zeroed) : 0);
    assert_ptr_equal(call.plan.zeroed, call.scratch);
    assert_int_equal(call.plan.zeroed_bytes, routes ? 0 : zeroed);
    call.ffn_routes = false; /* partial sums are looked for only where the FFN routes */
    const size_t otherwise = path->zeroed(&call);
    assert_true(otherwise > 0 && (routes && tokens > 1 ? zeroed > otherwise : zeroed >= otherwise));
    call.config = MMA; /* it looks for nothing, but has the same memory */
    assert_true(tokens <= 4 && config != MMA ? path->zeroed(&call) < otherwise : path->zeroed(&call) == otherwise);
    assert_int_equal(moe_workspace_carve(&call, path, NULL), bytes);
    free(workspace);
}

/* Where decode's FFN routes by itself no plan runs: the logits' kernel sets to zero what the plan does otherwise. And
 * down, for combine to look into, which lies before it, unless a conversion has put x into output or only some SMs may
 * be used. */
static void one_kernel_sets_to_zero(void **state)
{
    static const unsigned stages[] = {MOE_STAGES_ALL, MOE_STAGES_EXPERTS, MOE_STAGES_ROUTE};
    static const moe_dtype io[] = {MOE_BF16, MOE_F16, MOE_F32};
    const struct moe_path_info *path = moe_path_info_get(MOE_PATH_DECODE);
    (void)state;
    if (moe_path_available(&gpu, MOE_PATH_DECODE, NULL, NULL, 0) != MOE_OK ||
        moe_choose_config(&gpu, path, WGMMA, NULL) != MOE_OK)
        skip();
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const moe_layer layer = make_layer(&shapes[i], MOE_LAYOUT_PACKED);
        for (int64_t tokens = 1; tokens <= 32; tokens++)
            for (size_t k = 0; k < sizeof stages / sizeof *stages; k++)
                for (size_t n = 0; n < sizeof io / sizeof *io; n++)
                    for (int config = 0; config <= MMA; config++)
                        for (int32_t max_sms = 0; max_sms <= 66; max_sms += 66)
                            check_zeroed(&layer, tokens, stages[k], io[n], config, max_sms);
    }
}

/* One token's partial sums: zeros only where a shape leaves some. */
static void sums_are_zero_where_bands_are_cut(void **state)
{
    static const struct shape cut = {"cut", 2048, 1408, 60, 4, 1}, whole = {"whole", 2048, 1024, 64, 8, 1};
    const struct shape *both[] = {&cut, &whole};
    const struct moe_path_info *path = moe_path_info_get(MOE_PATH_DECODE);
    (void)state;
    if (moe_path_available(&gpu, MOE_PATH_DECODE, NULL, NULL, 0) != MOE_OK ||
        moe_choose_config(&gpu, path, WGMMA, NULL) != MOE_OK)
        skip();
    for (size_t i = 0; i < 2; i++) {
        const moe_layer layer = make_layer(both[i], MOE_LAYOUT_PACKED);
        struct moe_call call;
        moe_call_shape(&call, &layer, 1, both[i]->top_k, MOE_BF16);
        call.ffn_routes = false;
        const size_t otherwise = path->zeroed(&call);
        call.ffn_routes = true;
        assert_true(both[i] == &cut ? path->zeroed(&call) > otherwise : path->zeroed(&call) == otherwise);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prefill_stays_within_bound), cmocka_unit_test(size_is_what_batches_need),
        cmocka_unit_test(few_need_no_more_than_many), cmocka_unit_test(long_sums_have_room),
        cmocka_unit_test(one_kernel_sets_to_zero),    cmocka_unit_test(sums_are_zero_where_bands_are_cut)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
