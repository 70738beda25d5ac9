/* SPDX-License-Identifier: Apache-2.0 */
#include "models/names.h"

#include <stdio.h>

/* What follows "model.layers.N."; %d is the expert. */
static const char *const per_expert[][MOE_ROLE_COUNT] = {
    [MOE_NAMING_MIXTRAL] =
        {
            [MOE_ROLE_GATE] = "block_sparse_moe.gate.weight",
            [MOE_ROLE_W1] = "block_sparse_moe.experts.%d.w1.weight",
            [MOE_ROLE_W3] = "block_sparse_moe.experts.%d.w3.weight",
            [MOE_ROLE_W2] = "block_sparse_moe.experts.%d.w2.weight",
        },
    [MOE_NAMING_QWEN] =
        {
            [MOE_ROLE_GATE] = "mlp.gate.weight",
            [MOE_ROLE_W1] = "mlp.experts.%d.gate_proj.weight",
            [MOE_ROLE_W3] = "mlp.experts.%d.up_proj.weight",
            [MOE_ROLE_W2] = "mlp.experts.%d.down_proj.weight",
        },
};

/* transformers 5 calls them alike in all families. */
static const char *const stacked[MOE_ROLE_COUNT] = {
    [MOE_ROLE_GATE] = "mlp.gate.weight",
    [MOE_ROLE_GATE_UP] = "mlp.experts.gate_up_proj",
    [MOE_ROLE_DOWN] = "mlp.experts.down_proj",
};

const char *moe_tensor_name(enum moe_naming naming, enum moe_form form, enum moe_role role, int32_t layer,
                            int32_t expert, char buffer[MOE_MAX_TENSOR_NAME])
{
    const char *pattern = form == MOE_FORM_STACKED ? stacked[role] : per_expert[naming][role];
    int used = snprintf(buffer, MOE_MAX_TENSOR_NAME, "model.layers.%d.", (int)layer);
    snprintf(buffer + used, MOE_MAX_TENSOR_NAME - (size_t)used, pattern, (int)expert);
    return buffer;
}
