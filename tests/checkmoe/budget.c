/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How wrong a result may be. Errors are measured by rows: ||got - expected|| / ||expected||, the worst row counts.
 *
 * A row's norm is the wrong yardstick where its sums cancel (a token whose experts point against each other, or a row
 * of one element): the rounding errors of the terms stay while the sum goes. So the denominator is never less than a
 * share of the norm that the row would have if all its terms had random signs ("typical", fp64.c). From 16 elements on
 * that share is a half, which a row of random numbers falls below once in thousands; shorter rows have no norm to speak
 * of and take the typical one whole, which about half of them need. Elements of f16 results count as at least 2^-14,
 * because f16 has no relative precision below that.
 *
 * The budgets of the 16-bit dtypes are for sums in which rounding errors average out. In a layer of fewer than 16
 * hidden or intermediate columns they do not, and the cuBLAS paths, which keep gate, up and down in the layer's dtype,
 * may be off by every rounding in full: gate, up, act, down, output. They alone get more there.
 */
#include <math.h>

#include "kernels/budget.h"
#include "tests/checkmoe/checkmoe.h"

static const struct {
    double operation; /* one operation, given its inputs: one rounding of the result, and fp32 sums */
    int fraction_bits, lowest_exponent;
} budgets[] = {
    [MOE_BF16] = {4.5e-3, 7, -126},
    [MOE_F16] = {6e-4, 10, -14},
    [MOE_F32] = {1e-5, 23, -126},
};

bool budget_rounds_inside(moe_path path)
{
    const struct moe_path_info *info = moe_path_info_get(path); /* NULL: auto, which picks no cuBLAS path */

    return info != NULL && info->synchronises;
}

double budget_layer(moe_path path, const struct test_case *c, moe_dtype result)
{
    const bool rounds = budget_rounds_inside(path) && c->dtype != MOE_F32;
    const bool narrow = c->hidden < 16 || c->intermediate < 16;

    return fmax(moe_error_budget(c->dtype) * (rounds && narrow ? 2.5 : 1), moe_error_budget(result));
}

double budget_operation(moe_dtype result)
{
    return budgets[result].operation;
}

/* The step between numbers of `dtype` around `value`. */
double budget_ulp(double value, moe_dtype dtype)
{
    int exponent;

    frexp(value, &exponent); /* value = [0.5, 1) * 2^exponent */
    exponent = exponent - 1 < budgets[dtype].lowest_exponent ? budgets[dtype].lowest_exponent : exponent - 1;
    return ldexp(1, exponent - budgets[dtype].fraction_bits);
}

double row_error(const struct result_row *row, int64_t *column)
{
    double difference = 0, norm = 0, floor = 0, worst = -1;

    for (int64_t i = 0; i < row->count; i++) {
        double error = fabs(moe_load_f32(row->got, row->dtype, row->first + i) - row->expected[i]);

        if (!(error <= worst)) { /* also if error is NaN */
            worst = isnan(error) ? INFINITY : error;
            *column = i;
        }
        difference += error * error;
        norm += row->expected[i] * row->expected[i];
        floor += row->typical[i] * row->typical[i];
    }
    if (isnan(difference))
        return INFINITY;
    floor = sqrt(floor) * (row->count < 16 ? 1 : 0.5);
    if (row->any_f16)
        floor = fmax(floor, sqrt((double)row->count) * 0x1p-14);
    norm = fmax(sqrt(norm), floor);
    return difference == 0 ? 0 : sqrt(difference) / norm;
}
