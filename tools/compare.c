/* SPDX-License-Identifier: Apache-2.0 */
#include "tools/compare.h"

#include <math.h>

#include "config/convert.h"
#include "kernels/budget.h"

double compare_budget(moe_dtype dtype)
{
    return 2 * moe_error_budget(dtype);
}

/* How far apart two elements are. The same infinity and two NaNs count as equal, any other one as infinitely far. */
static double difference(double got, double expected)
{
    if (isfinite(got) && isfinite(expected))
        return fabs(got - expected);
    return got == expected || (isnan(got) && isnan(expected)) ? 0 : INFINITY;
}

static double compare_row(const void *got, const void *expected, moe_dtype dtype, int64_t first, int64_t hidden,
                          struct row_mismatch *row)
{
    double norm = 0, error = 0, furthest = -1;
    for (int64_t i = 0; i < hidden; i++) {
        double g = moe_load_f32(got, dtype, first + i), e = moe_load_f32(expected, dtype, first + i);
        double d = difference(g, e);
        norm += isfinite(e) ? e * e : 0;
        error += d * d;
        if (d > furthest) {
            furthest = d;
            row->column = i;
            row->got = g;
            row->expected = e;
        }
    }
    return error == 0 ? 0 : norm == 0 ? INFINITY : sqrt(error / norm);
}

bool compare_rows(const void *got, const void *expected, moe_dtype dtype, int64_t tokens, int64_t hidden,
                  const bool *skip, double budget, double *worst, struct row_mismatch *mismatch)
{
    *worst = 0;
    for (int64_t t = 0; t < tokens; t++) {
        if (skip && skip[t])
            continue;
        struct row_mismatch row = {.token = t};
        row.error = compare_row(got, expected, dtype, t * hidden, hidden, &row);
        if (row.error > *worst)
            *worst = row.error;
        if (row.error > budget) {
            *mismatch = row;
            return false;
        }
    }
    return true;
}

/* The distance from the larger of two magnitudes to the next number of the dtype. */
static double ulp(double a, double b, moe_dtype dtype)
{
    int exponent, bits = dtype == MOE_F32 ? 24 : dtype == MOE_F16 ? 11 : 8;
    frexp(fmax(fabs(a), fabs(b)), &exponent);
    return ldexp(1, exponent - bits);
}

static bool is_tie(const float *logits, int32_t experts, int32_t a, int32_t b, moe_dtype dtype)
{
    if (a < 0 || a >= experts || b < 0 || b >= experts)
        return false;
    return fabs((double)logits[a] - logits[b]) < 2 * ulp(logits[a], logits[b], dtype);
}

bool compare_ids(const int32_t *got, const int32_t *expected, const float *logits, moe_dtype logits_dtype,
                 int32_t experts, int64_t tokens, int32_t k, bool *tied, struct id_mismatch *mismatch)
{
    for (int64_t t = 0; t < tokens; t++) {
        tied[t] = false;
        for (int32_t s = 0; s < k; s++) {
            int32_t g = got[t * k + s], e = expected[t * k + s];
            if (g == e)
                continue;
            if (!is_tie(logits + t * experts, experts, g, e, logits_dtype)) {
                *mismatch = (struct id_mismatch){t, s, g, e};
                return false;
            }
            tied[t] = true;
        }
    }
    return true;
}
