/* SPDX-License-Identifier: Apache-2.0 */
/* The plain C gate: logits, order, ties and weights. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#include "config/convert.h"
#include "router/router.h"

/* One token's top-k of the given logits. */
static void topk(const float *logits, int32_t experts, int32_t top_k, int32_t renormalize, int32_t *ids, float *weights)
{
    struct moe_gate_args args = {.tokens = 1,
                                 .experts = experts,
                                 .top_k = top_k,
                                 .topk_weight_dtype = MOE_F32,
                                 .renormalize = renormalize,
                                 .logits = (float *)logits,
                                 .ids = ids,
                                 .weights = weights};
    moe_topk_ref(&args, 0, 1);
}

static void check_ids(const float *logits, int32_t experts, const int32_t *expected, int32_t top_k)
{
    int32_t ids[8];
    float weights[8];

    topk(logits, experts, top_k, 0, ids, weights);
    for (int32_t k = 0; k < top_k; k++)
        assert_int_equal(ids[k], expected[k]);
}

static void test_logits_round_once(void **state)
{
    (void)state;
    float x[2 * 3] = {1, 2, 3, 1e8f, 1, -1e8f}, gate[2 * 3] = {1, 1, 1, 0.001f, 0, 1};
    float logits[5] = {0, 0, 0, 0, 42};
    struct moe_gate_args args = {.tokens = 2,
                                 .hidden = 3,
                                 .experts = 2,
                                 .x_dtype = MOE_F32,
                                 .gate_dtype = MOE_F32,
                                 .logits_dtype = MOE_F32,
                                 .x = x,
                                 .gate = gate,
                                 .logits = logits};
    moe_logits_ref(&args);
    assert_true(logits[0] == 6 && logits[1] == 3.001f && logits[2] == 1);

    args.logits_dtype = MOE_BF16;
    moe_logits_ref(&args);
    assert_true(logits[0] == 6 && logits[1] == 3); /* bf16 steps by 1/64 there */
    assert_true(logits[3] == moe_round_f32(1e8f * 0.001f - 1e8f, MOE_BF16));
    assert_true(logits[4] == 42);
}

static void test_logits_of_mixed_dtypes(void **state)
{
    (void)state;
    float x[2] = {0.1f, -3}, gate[2] = {7, 0.3f}, logit;
    uint16_t x16[2], gate16[2];
    struct moe_gate_args args = {.tokens = 1,
                                 .hidden = 2,
                                 .experts = 1,
                                 .x_dtype = MOE_F16,
                                 .gate_dtype = MOE_BF16,
                                 .logits_dtype = MOE_F32,
                                 .x = x16,
                                 .gate = gate16,
                                 .logits = &logit};

    moe_convert(x16, MOE_F16, x, MOE_F32, 2);
    moe_convert(gate16, MOE_BF16, gate, MOE_F32, 2);
    moe_logits_ref(&args);
    assert_true(logit == (float)((double)moe_round_f32(0.1f, MOE_F16) * 7 - 3.0 * moe_round_f32(0.3f, MOE_BF16)));
}

static void test_order(void **state)
{
    (void)state;
    check_ids((float[]){0.1f, 4, -2, 3}, 4, (int32_t[]){1, 3, 0}, 3);
    check_ids((float[]){1, 2, 3, 4}, 4, (int32_t[]){3, 2, 1, 0}, 4);
    check_ids((float[]){-5}, 1, (int32_t[]){0}, 1);
}

static void test_ties_go_to_the_lowest_id(void **state)
{
    (void)state;
    check_ids((float[]){1, 1, 1, 1, 1}, 5, (int32_t[]){0, 1, 2}, 3);
    check_ids((float[]){1, 3, 2, 3, 2}, 5, (int32_t[]){1, 3, 2}, 3);
    check_ids((float[]){0.0f, -0.0f, 0.0f}, 3, (int32_t[]){0, 1}, 2);
}

static void test_nan_and_infinity(void **state)
{
    (void)state;
    check_ids((float[]){1, NAN, 3, NAN}, 4, (int32_t[]){1, 3, 2, 0}, 4);
    check_ids((float[]){1, INFINITY, NAN}, 3, (int32_t[]){2, 1}, 2);
    check_ids((float[]){NAN, NAN, NAN}, 3, (int32_t[]){0, 1}, 2);
    check_ids((float[]){-INFINITY, -INFINITY, -INFINITY}, 3, (int32_t[]){0, 1}, 2);
    check_ids((float[]){-INFINITY, -3, -INFINITY}, 3, (int32_t[]){1, 0, 2}, 3);
}

static void test_weights(void **state)
{
    (void)state;
    float logits[] = {0, logf(2), logf(5), -INFINITY}, weights[2];
    int32_t ids[2];

    topk(logits, 4, 2, 0, ids, weights);
    assert_true(fabsf(weights[0] - 5 / 8.0f) < 1e-6f && fabsf(weights[1] - 2 / 8.0f) < 1e-6f);
    topk(logits, 4, 2, 1, ids, weights);
    assert_true(fabsf(weights[0] - 5 / 7.0f) < 1e-6f && fabsf(weights[1] - 2 / 7.0f) < 1e-6f);
}

static void test_large_logits_do_not_overflow(void **state)
{
    (void)state;
    float weights[2];
    int32_t ids[2];

    topk((float[]){3e38f, 3e38f, -3e38f}, 3, 2, 1, ids, weights);
    assert_true(weights[0] == 0.5f && weights[1] == 0.5f);
    topk((float[]){-1000, -1001}, 2, 2, 0, ids, weights);
    assert_true(fabsf(weights[0] + weights[1] - 1) < 1e-6f && weights[0] > weights[1]);
}

static void test_weights_round_to_their_dtype(void **state)
{
    (void)state;
    float logits[] = {0.3f, 0.1f, 0}, exact[2], rounded[2];
    int32_t ids[2];
    struct moe_gate_args args = {.tokens = 1,
                                 .experts = 3,
                                 .top_k = 2,
                                 .topk_weight_dtype = MOE_BF16,
                                 .renormalize = 1,
                                 .logits = logits,
                                 .ids = ids,
                                 .weights = rounded};
    topk(logits, 3, 2, 1, ids, exact);
    moe_topk_ref(&args, 0, 1);
    for (int k = 0; k < 2; k++) {
        assert_true(rounded[k] == moe_round_f32(exact[k], MOE_BF16));
        assert_true(rounded[k] != exact[k]);
    }
}

static void test_only_the_range_is_written(void **state)
{
    (void)state;
    float logits[4 * 3] = {1, 2, 3, 3, 2, 1, 1, 3, 2, 9, 8, 7}, weights[4] = {-1, -1, -1, -1};
    int32_t ids[4] = {-7, -7, -7, -7};
    struct moe_gate_args args = {.tokens = 4,
                                 .experts = 3,
                                 .top_k = 1,
                                 .topk_weight_dtype = MOE_F32,
                                 .logits = logits,
                                 .ids = ids,
                                 .weights = weights};
    moe_topk_ref(&args, 1, 3);
    assert_int_equal(ids[0], -7);
    assert_int_equal(ids[1], 0);
    assert_int_equal(ids[2], 1);
    assert_int_equal(ids[3], -7);
    assert_true(weights[0] == -1 && weights[1] > 0 && weights[2] > 0 && weights[3] == -1);
}

static const float *sorted_logits;

static int by_falling_logit(const void *a, const void *b)
{
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    float x = sorted_logits[i], y = sorted_logits[j];

    return x != y ? (x < y ? 1 : -1) : (i > j) - (i < j);
}

static void test_against_a_full_sort(void **state)
{
    (void)state;
    enum { EXPERTS = MOE_MAX_EXPERTS, TOP_K = MOE_MAX_TOP_K };
    static float logits[EXPERTS];
    static int32_t order[EXPERTS];
    int32_t ids[TOP_K];
    float weights[TOP_K];
    uint32_t random = 1;

    for (int round = 0; round < 20; round++) {
        for (int32_t e = 0; e < EXPERTS; e++) {
            random = random * 1664525u + 1013904223u;
            logits[e] = (float)(random >> 20) / 64; /* 4096 values: many ties */
            order[e] = e;
        }
        sorted_logits = logits;
        qsort(order, EXPERTS, sizeof order[0], by_falling_logit);
        topk(logits, EXPERTS, TOP_K, 1, ids, weights);
        assert_memory_equal(ids, order, sizeof ids);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits_round_once),
        cmocka_unit_test(test_logits_of_mixed_dtypes),
        cmocka_unit_test(test_order),
        cmocka_unit_test(test_ties_go_to_the_lowest_id),
        cmocka_unit_test(test_nan_and_infinity),
        cmocka_unit_test(test_weights),
        cmocka_unit_test(test_large_logits_do_not_overflow),
        cmocka_unit_test(test_weights_round_to_their_dtype),
        cmocka_unit_test(test_only_the_range_is_written),
        cmocka_unit_test(test_against_a_full_sort),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
