/* SPDX-License-Identifier: Apache-2.0 */
/* The layer in double, from the weights and hidden states as their dtypes hold them. Written apart from kernels/ref,
 * which it checks as well. */
#include <math.h>
#include <stdlib.h>

#include "tests/checkmoe/checkmoe.h"

/* a . b, and the sum of the products' squares; eight chains, because one would wait for itself. */
static double dot64(const double *a, const double *a_typical, const float *b, int64_t count, double *squares)
{
    double sum[8] = {0}, square[8] = {0};
    int64_t i = 0;

    for (; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++) {
            double typical = a_typical[i + j] * b[i + j];
            sum[j] += a[i + j] * b[i + j];
            square[j] += typical * typical;
        }
    for (; i < count; i++) {
        double typical = a_typical[i] * b[i];
        sum[0] += a[i] * b[i];
        square[0] += typical * typical;
    }
    *squares =
        ((square[0] + square[1]) + (square[2] + square[3])) + ((square[4] + square[5]) + (square[6] + square[7]));
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

/* out[r] = in[r] . matrix^T for a matrix of n rows and k columns */
static void gemm64(const void *matrix, moe_dtype dtype, int64_t n, int64_t k, int count, const double *in,
                   const double *in_typical, double *out, double *typical, float *line)
{
    for (int64_t row = 0; row < n; row++) {
        moe_convert(line, MOE_F32, (const char *)matrix + row * k * moe_dtype_size(dtype), dtype, k);
        for (int r = 0; r < count; r++) {
            double squares;
            out[r * n + row] = dot64(in + r * k, in_typical + r * k, line, k, &squares);
            typical[r * n + row] = sqrt(squares);
        }
    }
}

size_t rows64_work(const struct test_case *c)
{
    return (size_t)(BLOCK_ROWS * 6 * c->intermediate + c->hidden + c->intermediate);
}

void rows64(const struct test_case *c, int32_t expert, unsigned stages, int count, const double *in, double *out,
            double *typical, double *work)
{
    const int64_t hidden = c->hidden, width = c->intermediate;
    const size_t matrix_bytes = (size_t)hidden * width * moe_dtype_size(c->dtype);
    double *gate_up = work, *gate_up_typical = gate_up + BLOCK_ROWS * 2 * width;
    double *act = gate_up_typical + BLOCK_ROWS * 2 * width, *act_typical = act + BLOCK_ROWS * width;
    float *line = (float *)(act_typical + BLOCK_ROWS * width);
    const double *from = in, *from_typical = in;
    const double smallest = c->dtype == MOE_F16 ? 0x1p-14 : 0;

    if (stages & MOE_STAGE_GEMM1) {
        bool last = !(stages & MOE_STAGE_ACTIVATION);
        gemm64((const char *)c->w13 + expert * 2 * matrix_bytes, c->dtype, 2 * width, hidden, count, in, in,
               last ? out : gate_up, last ? typical : gate_up_typical, line);
        from = gate_up;
        from_typical = gate_up_typical;
    }
    if (stages & MOE_STAGE_ACTIVATION) {
        bool last = !(stages & MOE_STAGE_GEMM2);
        double *to = last ? out : act, *to_typical = last ? typical : act_typical;

        for (int r = 0; r < count; r++)
            for (int64_t i = 0; i < width; i++) {
                int64_t g = r * 2 * width + i, u = g + width;
                double sigmoid = 1 / (1 + exp(-from[g]));

                to[r * width + i] = from[g] * sigmoid * from[u];
                /* A quarter of the typical size counts where gate or up came out small by cancelling, and 2^-14 where
                 * an act of f16 is too small to be held with full precision. Far below zero silu multiplies the
                 * relative error of the gate: d ln silu / d ln gate = 1 + gate (1 - sigmoid). */
                double slope = fmax(1, fabs(1 + from[g] * (1 - sigmoid)));
                to_typical[r * width + i] =
                    fmax(smallest, slope * sigmoid * fmax(fabs(from[g]), 0.25 * fabs(from_typical[g])) *
                                       fmax(fabs(from[u]), 0.25 * fabs(from_typical[u])));
            }
        from = act;
        from_typical = act_typical;
    }
    if (stages & MOE_STAGE_GEMM2)
        gemm64((const char *)c->w2 + expert * matrix_bytes, c->dtype, hidden, width, count, from, from_typical, out,
               typical, line);
}

void expert_rows_free(struct expert_rows *rows)
{
    free(rows->expert);
    free(rows->down);
    free(rows->typical);
    memset(rows, 0, sizeof *rows);
}

void expert_rows_make(struct expert_rows *rows, const struct test_case *c, const void *ids, moe_dtype ids_dtype,
                      int32_t slots)
{
    const unsigned stages = MOE_STAGE_GEMM1 | MOE_STAGE_ACTIVATION | MOE_STAGE_GEMM2;
    const int64_t hidden = c->hidden, pairs = c->tokens * slots;
    bool same = rows->expert != NULL && rows->slots == slots;

    for (int64_t i = 0; same && i < pairs; i++)
        same = rows->expert[i] == expert_of(ids, ids_dtype, i, c->experts);
    if (same)
        return;

    expert_rows_free(rows);
    rows->slots = slots;
    rows->expert = must_alloc((size_t)pairs * sizeof(int32_t));
    rows->down = must_alloc((size_t)(pairs * hidden) * sizeof(double));
    rows->typical = must_alloc((size_t)(pairs * hidden) * sizeof(double));
    double *in = must_alloc((size_t)(3 * BLOCK_ROWS * hidden) * sizeof(double));
    double *work = must_alloc(rows64_work(c) * sizeof(double));

    for (int64_t i = 0; i < pairs; i++)
        rows->expert[i] = expert_of(ids, ids_dtype, i, c->experts);
    for (int32_t e = 0; e < c->experts; e++) {
        double *out = in + BLOCK_ROWS * hidden, *typical = out + BLOCK_ROWS * hidden;
        int64_t block[BLOCK_ROWS];
        int count = 0;

        for (int64_t i = 0; i <= pairs; i++) {
            if (i < pairs && rows->expert[i] == e) {
                for (int64_t h = 0; h < hidden; h++)
                    in[count * hidden + h] = moe_load_f32(c->x, c->dtype, i / slots * hidden + h);
                block[count++] = i;
            }
            if (count == BLOCK_ROWS || (i == pairs && count > 0)) {
                rows64(c, e, stages, count, in, out, typical, work);
                for (int r = 0; r < count; r++) {
                    memcpy(rows->down + block[r] * hidden, out + r * hidden, (size_t)hidden * sizeof(double));
                    memcpy(rows->typical + block[r] * hidden, typical + r * hidden, (size_t)hidden * sizeof(double));
                }
                count = 0;
            }
        }
    }
    free(in);
    free(work);
}

void logits64(const struct test_case *c, int64_t token, double *logits, double *tolerance)
{
    for (int32_t e = 0; e < c->experts; e++) {
        double sum = 0, size = 0;

        for (int64_t h = 0; h < c->hidden; h++) {
            double term = (double)moe_load_f32(c->x, c->dtype, token * c->hidden + h) *
                          moe_load_f32(c->gate, c->gate_dtype, e * c->hidden + h);
            sum += term;
            size += fabs(term);
        }
        logits[e] = sum;
        /* An fp32 sum in some order: rounding errors add up like a random walk. */
        tolerance[e] = 0x1p-24 * (4 + 2 * sqrt((double)c->hidden)) * size;
    }
}

void softmax64(const struct test_case *c, const float *logits, const int32_t *ids, double *weights)
{
    double all = 0, selected = 0;

    for (int32_t e = 0; e < c->experts; e++)
        all += exp((double)logits[e] - logits[ids[0]]);
    for (int32_t k = 0; k < c->top_k; k++) {
        weights[k] = exp((double)logits[ids[k]] - logits[ids[0]]) / all;
        selected += weights[k];
    }
    for (int32_t k = 0; k < c->top_k && c->renormalize; k++)
        weights[k] /= selected;
}
