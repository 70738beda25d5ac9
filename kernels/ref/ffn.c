/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The experts, as plainly as they can be written: expert(x) = down(silu(gate x) * up x), row by row of the plan.
 * Weights and gathered rows have the layer's dtype; everything between is fp32 in memory and double in a sum, so that
 * what other paths are compared with has no rounding of its own worth speaking of.
 */
#include <math.h>

#include "config/convert.h"
#include "kernels/kernels.h"

/* rows[r] = x[row_token[r]] */
moe_status moe_gather_ref(const struct moe_call *call)
{
    const struct moe_plan *plan = &call->plan.plan;
    size_t row_bytes = (size_t)call->hidden * moe_dtype_size(call->dtype);

    for (int32_t r = 0; r < plan->offsets[call->plan.groups]; r++)
        memcpy((char *)call->rows + r * row_bytes, (const char *)call->x + plan->row_token[r] * row_bytes, row_bytes);
    return MOE_OK;
}

/* out[r] = in[r] . weights[group of r]^T, where in is [R, cols] and out is [R, rows] in fp32. */
static void grouped_gemm(const struct moe_call *call, const struct moe_weights_view *weights, const void *in,
                         moe_dtype in_dtype, float *out)
{
    const int32_t *offsets = call->plan.plan.offsets;
    size_t weight_row_bytes = (size_t)weights->cols * moe_dtype_size(weights->dtype);
    size_t in_row_bytes = (size_t)weights->cols * moe_dtype_size(in_dtype);

    for (int32_t g = 0; g < call->plan.groups; g++) {
        const char *matrix = (const char *)weights->data + g * weights->rows * weight_row_bytes;

        for (int32_t r = offsets[g]; r < offsets[g + 1]; r++)
            for (int64_t n = 0; n < weights->rows; n++)
                out[r * weights->rows + n] =
                    (float)moe_dot((const char *)in + r * in_row_bytes, in_dtype, matrix + n * weight_row_bytes,
                                   weights->dtype, weights->cols);
    }
}

moe_status moe_gemm1_ref(const struct moe_call *call)
{
    grouped_gemm(call, &call->w13, call->rows, call->dtype, call->gate_up);
    return MOE_OK;
}

/* act[r][i] = silu(gate) * up, silu(v) = v / (1 + exp(-v)) */
moe_status moe_activation_ref(const struct moe_call *call)
{
    int64_t width = call->intermediate;
    int32_t rows = call->plan.plan.offsets[call->plan.groups];

    for (int32_t r = 0; r < rows; r++) {
        const float *gate = (const float *)call->gate_up + 2 * width * r, *up = gate + width;
        float *act = (float *)call->act + r * width;

        for (int64_t i = 0; i < width; i++)
            act[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
    return MOE_OK;
}

moe_status moe_gemm2_ref(const struct moe_call *call)
{
    grouped_gemm(call, &call->w2, call->act, MOE_F32, call->down);
    return MOE_OK;
}
