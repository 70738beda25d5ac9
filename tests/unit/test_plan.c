/* SPDX-License-Identifier: Apache-2.0 */
/* The plain C plan: rows of a group together, in (token, slot) order, and no row for an id without a group. */
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "router/router.h"

enum { MAX_PAIRS = 4096, MAX_GROUPS = 300 };

static struct {
    int32_t counts[MAX_GROUPS], offsets[MAX_GROUPS + 1], row_token[MAX_PAIRS], row_slot[MAX_PAIRS], slot_row[MAX_PAIRS];
    float row_weight[MAX_PAIRS];
} out;

static struct moe_plan_args plan_args(int64_t tokens, int32_t slots, int32_t experts, const void *ids,
                                      moe_dtype ids_dtype, const float *weights)
{
    struct moe_plan_args args = {.tokens = tokens,
                                 .slots = slots,
                                 .experts = experts,
                                 .groups = experts,
                                 .ids = ids,
                                 .ids_dtype = ids_dtype,
                                 .weights = weights,
                                 .plan = {.counts = out.counts,
                                          .offsets = out.offsets,
                                          .row_token = out.row_token,
                                          .row_slot = out.row_slot,
                                          .row_weight = out.row_weight,
                                          .slot_row = out.slot_row}};
    memset(&out, 0xee, sizeof out);
    return args;
}

static void check(const char *what, const int32_t *got, const int32_t *expected, int count)
{
    for (int i = 0; i < count; i++)
        if (got[i] != expected[i])
            fail_msg("%s[%d] is %d, expected %d", what, i, got[i], expected[i]);
}

#define CHECK(array, ...)                                                                                              \
    check(#array, out.array, (int32_t[]){__VA_ARGS__}, sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t))

static void test_by_hand(void **state)
{
    (void)state;
    int32_t ids[] = {2, 0, /* */ 0, 2, /* */ 2, 2};
    float weights[] = {0.1f, 0.2f, 0.3f, 0.4f, 0.5f, 0.6f};
    struct moe_plan_args args = plan_args(3, 2, 4, ids, MOE_I32, weights);

    moe_plan_ref(&args);
    CHECK(counts, 2, 0, 4, 0);
    CHECK(offsets, 0, 2, 2, 6, 6);
    CHECK(row_token, 0, 1, 0, 1, 2, 2);
    CHECK(row_slot, 1, 0, 0, 1, 0, 1);
    CHECK(slot_row, 2, 0, 1, 3, 4, 5);
    assert_true(out.row_weight[0] == 0.2f && out.row_weight[1] == 0.3f && out.row_weight[2] == 0.1f &&
                out.row_weight[3] == 0.4f && out.row_weight[4] == 0.5f && out.row_weight[5] == 0.6f);
}

static void test_ids_outside_get_no_row(void **state)
{
    (void)state;
    int32_t ids[] = {-1, 3, 1, INT32_MAX, INT32_MIN, 2};
    float weights[] = {1, 2, 3, 4, 5, 6};
    struct moe_plan_args args = plan_args(2, 3, 3, ids, MOE_I32, weights);

    moe_plan_ref(&args);
    CHECK(counts, 0, 1, 1);
    CHECK(offsets, 0, 0, 1, 2);
    CHECK(slot_row, -1, -1, 0, -1, -1, 1);
    assert_true(out.row_weight[0] == 3 && out.row_weight[1] == 6);
}

static void test_64_bit_ids_are_not_cut(void **state)
{
    (void)state;
    int64_t ids[] = {1, (INT64_C(1) << 32) + 1, INT64_MIN, INT64_MAX, -1, 0};
    float weights[6] = {0};
    struct moe_plan_args args = plan_args(3, 2, 2, ids, MOE_I64, weights);

    moe_plan_ref(&args);
    CHECK(counts, 1, 1);
    CHECK(slot_row, 1, -1, -1, -1, -1, 0);
}

static void test_expert_group(void **state)
{
    (void)state;
    int32_t ids[] = {0, 1, 2, 3, 2, 0}, expert_group[] = {1, -1, 0, 1};
    float weights[6] = {0};
    struct moe_plan_args args = plan_args(3, 2, 4, ids, MOE_I32, weights);

    args.groups = 2;
    args.expert_group = expert_group;
    moe_plan_ref(&args);
    CHECK(counts, 2, 3);
    CHECK(offsets, 0, 2, 5);
    CHECK(row_token, 1, 2, 0, 1, 2);
    CHECK(row_slot, 0, 0, 0, 1, 1);
    CHECK(slot_row, 2, -1, 0, 3, 1, 4);
}

static void test_zeroed(void **state)
{
    (void)state;
    int32_t ids[] = {1, 0, 1};
    float weights[3] = {0};
    _Alignas(16) unsigned char memory[3 * 16], expected[3 * 16];
    struct moe_plan_args args = plan_args(3, 1, 2, ids, MOE_I32, weights);

    memset(memory, 0xee, sizeof memory);
    memset(expected, 0xee, sizeof expected);
    moe_plan_ref(&args); /* nothing asked for, nowhere */
    args.zeroed = memory + 16;
    moe_plan_ref(&args);
    assert_memory_equal(memory, expected, sizeof memory);

    args.zeroed_bytes = 16;
    moe_plan_ref(&args);
    memset(expected + 16, 0, 16);
    assert_memory_equal(memory, expected, sizeof memory);
    CHECK(slot_row, 1, 0, 2);

    args.tokens = 0;
    memset(memory, 0xee, sizeof memory);
    moe_plan_ref(&args);
    assert_memory_equal(memory, expected, sizeof memory);
}

static void test_no_tokens(void **state)
{
    (void)state;
    struct moe_plan_args args = plan_args(0, 2, 3, NULL, MOE_I32, NULL);

    moe_plan_ref(&args);
    CHECK(counts, 0, 0, 0);
    CHECK(offsets, 0, 0, 0, 0);
}

/* The contract, word by word, on random ids. */
static void test_random(void **state)
{
    (void)state;
    static int32_t ids[MAX_PAIRS];
    static float weights[MAX_PAIRS];
    uint32_t random = 7;

    for (int round = 0; round < 200; round++) {
        int32_t slots = 1 + round % 9, experts = 1 + round * 7 % MAX_GROUPS,
                tokens = MAX_PAIRS / slots * (round % 5) / 4;
        struct moe_plan_args args = plan_args(tokens, slots, experts, ids, MOE_I32, weights);
        int32_t next = 0;

        for (int32_t i = 0; i < tokens * slots; i++) {
            random = random * 1664525u + 1013904223u;
            ids[i] = (int32_t)(random >> 16) % (experts + 2) - 1;
            weights[i] = (float)i;
        }
        moe_plan_ref(&args);
        for (int32_t g = 0; g < experts; g++) {
            assert_int_equal(out.offsets[g], next);
            for (int32_t i = 0; i < tokens * slots; i++)
                if (ids[i] == g) {
                    assert_int_equal(out.slot_row[i], next);
                    assert_int_equal(out.row_token[next], i / slots);
                    assert_int_equal(out.row_slot[next], i % slots);
                    assert_true(out.row_weight[next] == (float)i);
                    next++;
                }
            assert_int_equal(out.counts[g], next - out.offsets[g]);
        }
        assert_int_equal(out.offsets[experts], next);
        for (int32_t i = 0; i < tokens * slots; i++)
            if (ids[i] < 0 || ids[i] >= experts)
                assert_int_equal(out.slot_row[i], -1);
        if (next < MAX_PAIRS) /* not a byte past the rows in use */
            assert_int_equal((uint32_t)out.row_token[next], 0xeeeeeeee);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_by_hand),
        cmocka_unit_test(test_ids_outside_get_no_row),
        cmocka_unit_test(test_64_bit_ids_are_not_cut),
        cmocka_unit_test(test_expert_group),
        cmocka_unit_test(test_zeroed),
        cmocka_unit_test(test_no_tokens),
        cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
