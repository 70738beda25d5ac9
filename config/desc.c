/* SPDX-License-Identifier: Apache-2.0 */
#include "config/config.h"
#include "config/convert.h"

static moe_status bad(struct moe_error *err, const char *name, const char *field, int64_t value, const char *expected)
{
    return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: %s is %lld, expected %s", name, field, (long long)value,
                    expected);
}

moe_status moe_desc_check(const moe_layer_desc *desc, const char *name, struct moe_error *err)
{
    const struct {
        const char *field;
        int64_t value, high;
    } sizes[] = {
        {"hidden_size", desc->hidden_size, MOE_MAX_SIZE},
        {"intermediate_size", desc->intermediate_size, MOE_MAX_SIZE},
        {"num_experts", desc->num_experts, MOE_MAX_EXPERTS},
        {"top_k", desc->top_k, desc->num_experts < MOE_MAX_TOP_K ? desc->num_experts : MOE_MAX_TOP_K},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].high)
            return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "%s: %s is %lld, expected 1 to %lld", name, sizes[i].field,
                            (long long)sizes[i].value, (long long)sizes[i].high);

    const char *floats = "MOE_BF16, MOE_F16 or MOE_F32";
    if (!moe_dtype_is_float(desc->dtype))
        return bad(err, name, "dtype", desc->dtype, floats);
    if (desc->gate_dtype != MOE_DTYPE_NONE && !moe_dtype_is_float(desc->gate_dtype))
        return bad(err, name, "gate_dtype", desc->gate_dtype, "MOE_DTYPE_NONE, MOE_BF16, MOE_F16 or MOE_F32");
    if (desc->scoring != MOE_SCORING_SOFTMAX)
        return bad(err, name, "scoring", desc->scoring, "MOE_SCORING_SOFTMAX");
    if (desc->renormalize != 0 && desc->renormalize != 1)
        return bad(err, name, "renormalize", desc->renormalize, "0 or 1");
    if (!moe_dtype_is_float(desc->logits_dtype))
        return bad(err, name, "logits_dtype", desc->logits_dtype, floats);
    if (!moe_dtype_is_float(desc->topk_weight_dtype))
        return bad(err, name, "topk_weight_dtype", desc->topk_weight_dtype, floats);
    if (desc->activation != MOE_ACTIVATION_SILU)
        return bad(err, name, "activation", desc->activation, "MOE_ACTIVATION_SILU");
    return MOE_OK;
}

const char *moe_layouts_name(unsigned layouts)
{
    return layouts == MOE_LAYOUT_ROW_MAJOR ? "row-major"
           : layouts == MOE_LAYOUT_PACKED  ? "packed"
                                           : "packed or row-major";
}
