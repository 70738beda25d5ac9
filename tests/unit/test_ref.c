/* SPDX-License-Identifier: Apache-2.0 */
/* The plain C operations on a layer small enough to do by hand: two experts, hidden 2, intermediate 1. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "config/convert.h"
#include "kernels/kernels.h"

enum { TOKENS = 3, SLOTS = 2, HIDDEN = 2, INTERMEDIATE = 1, EXPERTS = 2, ROWS = TOKENS * SLOTS };

/* expert 0: gate = x0, up = x1, down = (1, 2) * act; expert 1: gate = -x1, up = 3 x0, down = (0, -1) * act */
static const float w13[EXPERTS * 2 * INTERMEDIATE * HIDDEN] = {1, 0, 0, 1, 0, -1, 3, 0};
static const float w2[EXPERTS * HIDDEN * INTERMEDIATE] = {1, 2, 0, -1};
static const float input[TOKENS * HIDDEN] = {1, 2, -0.5f, 4, 0.25f, -8};
static const int32_t ids[ROWS] = {1, 0, 0, -1, 9, -1};
static const float weights[ROWS] = {0.5f, 0.25f, 2, 7, 7, 7};

static struct {
    int32_t counts[EXPERTS], offsets[EXPERTS + 1], row_token[ROWS], row_slot[ROWS], slot_row[ROWS];
    float row_weight[ROWS], x[TOKENS * HIDDEN], rows[ROWS * HIDDEN], gate_up[ROWS * 2], act[ROWS], down[ROWS * HIDDEN];
    float output[TOKENS * HIDDEN], w13[EXPERTS * 4], w2[EXPERTS * 2], input[TOKENS * HIDDEN];
} memory;

static struct moe_call make_call(moe_dtype dtype, moe_dtype io_dtype)
{
    struct moe_call call = {
        .tokens = TOKENS,
        .hidden = HIDDEN,
        .intermediate = INTERMEDIATE,
        .slots = SLOTS,
        .dtype = dtype,
        .activation = MOE_ACTIVATION_SILU,
        .w13 = {memory.w13, dtype, MOE_LAYOUT_ROW_MAJOR, EXPERTS, 2 * INTERMEDIATE, HIDDEN},
        .w2 = {memory.w2, dtype, MOE_LAYOUT_ROW_MAJOR, EXPERTS, HIDDEN, INTERMEDIATE},
        .io_dtype = io_dtype,
        .input = memory.input,
        .output = memory.output,
        .plan = {.tokens = TOKENS,
                 .slots = SLOTS,
                 .experts = EXPERTS,
                 .groups = EXPERTS,
                 .ids = ids,
                 .ids_dtype = MOE_I32,
                 .weights = weights,
                 .plan = {memory.counts, memory.offsets, memory.row_token, memory.row_slot, memory.row_weight,
                          memory.slot_row}},
        .x = dtype == io_dtype ? memory.input : memory.x,
        .rows = memory.rows,
        .gate_up = memory.gate_up,
        .act = memory.act,
        .down = memory.down,
    };

    memset(&memory, 0xff, sizeof memory);
    moe_convert(memory.w13, dtype, w13, MOE_F32, EXPERTS * 4);
    moe_convert(memory.w2, dtype, w2, MOE_F32, EXPERTS * 2);
    moe_convert(memory.input, io_dtype, input, MOE_F32, TOKENS * HIDDEN);
    return call;
}

static void run(const struct moe_call *call)
{
    assert_int_equal(moe_entry_ref(call), MOE_OK);
    moe_plan_ref(&call->plan);
    assert_int_equal(moe_gather_ref(call), MOE_OK);
    assert_int_equal(moe_gemm1_ref(call), MOE_OK);
    assert_int_equal(moe_activation_ref(call), MOE_OK);
    assert_int_equal(moe_gemm2_ref(call), MOE_OK);
    assert_int_equal(moe_combine_ref(call), MOE_OK);
}

static double silu(double v)
{
    return v / (1 + exp(-v));
}

static void test_layer(void **state)
{
    (void)state;
    static const moe_dtype dtypes[] = {MOE_F32, MOE_BF16, MOE_F16};
    double a0 = silu(1) * 2, a1 = silu(-2) * 3, b0 = silu(-0.5) * 4;
    double expected[TOKENS * HIDDEN] = {0.25 * a0, 0.25 * 2 * a0 - 0.5 * a1, 2 * b0, 4 * b0, 0, 0};

    for (int d = 0; d < 3; d++)
        for (int io = 0; io < 3; io++) {
            struct moe_call call = make_call(dtypes[d], dtypes[io]);
            double step = dtypes[io] == MOE_F32 ? 1e-6 : dtypes[io] == MOE_F16 ? 0x1p-11 : 0x1p-8;

            run(&call); /* all numbers are exact in every dtype, so that only the output rounds */
            for (int i = 0; i < TOKENS * HIDDEN; i++)
                assert_true(fabs(moe_load_f32(memory.output, dtypes[io], i) - expected[i]) <= step * fabs(expected[i]));
        }
}

static void test_stages(void **state)
{
    (void)state;
    struct moe_call call = make_call(MOE_F32, MOE_F32);

    run(&call); /* plan order: token 0 and 1 on expert 0, token 0 on expert 1 */
    static const float rows[] = {1, 2, -0.5f, 4, 1, 2}, gate_up[] = {1, 2, -0.5f, 4, -2, 3};
    assert_memory_equal(memory.rows, rows, sizeof rows);
    assert_memory_equal(memory.gate_up, gate_up, sizeof gate_up);
    assert_true(memory.act[0] == 1 / (1 + expf(-1)) * 2);
    assert_true(memory.down[0] == memory.act[0] && memory.down[1] == 2 * memory.act[0]);
    assert_true(memory.down[4] == 0 && memory.down[5] == -memory.act[2]);
    assert_true(isnan(memory.act[3]) && isnan(memory.down[6])); /* past the rows in use nothing is written */
}

static void test_entry_rounds(void **state)
{
    (void)state;
    struct moe_call call = make_call(MOE_BF16, MOE_F32);

    memory.input[0] = 1 + 0x1p-8f; /* halfway between two bf16 */
    memory.input[1] = 1 + 3 * 0x1p-8f;
    assert_int_equal(moe_entry_ref(&call), MOE_OK);
    assert_true(moe_load_f32(memory.x, MOE_BF16, 0) == 1);
    assert_true(moe_load_f32(memory.x, MOE_BF16, 1) == 1 + 0x1p-6f);
}

static void test_activation_of_large_numbers(void **state)
{
    (void)state;
    struct moe_call call = make_call(MOE_F32, MOE_F32);
    static const float gates[] = {100, -100, 0};

    moe_plan_ref(&call.plan);
    for (int r = 0; r < 3; r++) {
        memory.gate_up[2 * r] = gates[r];
        memory.gate_up[2 * r + 1] = 2;
    }
    assert_int_equal(moe_activation_ref(&call), MOE_OK);
    assert_true(memory.act[0] == 200 && memory.act[1] <= 0 && memory.act[1] > -1e-30f && memory.act[2] == 0);
}

static void test_combine_adds_in_slot_order(void **state)
{
    (void)state;
    struct moe_call call = make_call(MOE_F32, MOE_F32);
    static const int32_t slot_row[] = {1, 0, 2, -1, -1, -1};
    static const float row_weight[] = {1, 1, 0.5f};
    static const float down[] = {1, 1e8f, 3, -1e8f, 6, 7};

    call.slots = 3;
    call.tokens = 2;
    memcpy(memory.slot_row, slot_row, sizeof slot_row);
    memcpy(memory.row_weight, row_weight, sizeof row_weight);
    memcpy(memory.down, down, sizeof down);
    assert_int_equal(moe_combine_ref(&call), MOE_OK);
    /* (-1e8 + 1e8) + 3.5: in another order the 3.5 would be rounded away */
    assert_true(memory.output[0] == 7 && memory.output[1] == 3.5f && memory.output[2] == 0 && memory.output[3] == 0);
    assert_true(isnan(memory.output[4]));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layer),
        cmocka_unit_test(test_stages),
        cmocka_unit_test(test_entry_rounds),
        cmocka_unit_test(test_activation_of_large_numbers),
        cmocka_unit_test(test_combine_adds_in_slot_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
