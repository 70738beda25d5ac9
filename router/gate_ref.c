/* SPDX-License-Identifier: Apache-2.0 */
/* The gate in plain C: a token's logits, then its top_k experts and their weights. */
#include <math.h>
#include <stdbool.h>

#include "config/convert.h"
#include "router/router.h"

void moe_logits_ref(const struct moe_gate_args *args)
{
    int64_t hidden = args->hidden;
    size_t x_size = moe_dtype_size(args->x_dtype), gate_size = moe_dtype_size(args->gate_dtype);

    for (int64_t t = 0; t < args->tokens; t++) {
        const char *x = (const char *)args->x + t * hidden * x_size;

        for (int32_t e = 0; e < args->experts; e++) {
            const char *row = (const char *)args->gate + e * hidden * gate_size;
            double logit = moe_dot(x, args->x_dtype, row, args->gate_dtype, hidden);

            args->logits[t * args->experts + e] = moe_round_f32((float)logit, args->logits_dtype);
        }
    }
}

/* Does logit `a` go before logit `b` of a lower id? Equal ones do not, so that ties go to the lowest id; a NaN goes
 * before every number. */
static bool goes_before(float a, float b)
{
    return isnan(a) ? !isnan(b) : a > b;
}

/* Fills ids[0, top_k) by falling logit: each expert in turn is inserted where it belongs in the list of the best so
 * far. */
static void select_experts(const float *logits, int32_t experts, int32_t *ids, int32_t top_k)
{
    int32_t count = 0;

    for (int32_t e = 0; e < experts; e++) {
        int32_t at;

        if (count < top_k)
            at = count++;
        else if (goes_before(logits[e], logits[ids[top_k - 1]]))
            at = top_k - 1;
        else
            continue;
        for (; at > 0 && goes_before(logits[e], logits[ids[at - 1]]); at--)
            ids[at] = ids[at - 1];
        ids[at] = e;
    }
}

/*
 * The weight of a selected expert is its softmax over all experts, exp(l - max) / sum, in fp32, perhaps divided by the
 * sum over the selected. The largest logit is that of ids[0]. Where that is NaN or infinite the softmax has no value
 * and the weights are NaN; the ids are still those that the order above gives.
 */
void moe_topk_ref(const struct moe_gate_args *args, int64_t begin, int64_t end)
{
    for (int64_t t = begin; t < end; t++) {
        const float *logits = args->logits + t * args->experts;
        int32_t *ids = args->ids + t * args->top_k;
        float *weights = args->weights + t * args->top_k;
        float all = 0, selected = 0;

        select_experts(logits, args->experts, ids, args->top_k);

        for (int32_t e = 0; e < args->experts; e++)
            all += expf(logits[e] - logits[ids[0]]);
        for (int32_t k = 0; k < args->top_k; k++) {
            weights[k] = expf(logits[ids[k]] - logits[ids[0]]) / all;
            selected += weights[k];
        }
        for (int32_t k = 0; k < args->top_k; k++)
            weights[k] = moe_round_f32(args->renormalize ? weights[k] / selected : weights[k], args->topk_weight_dtype);
    }
}
