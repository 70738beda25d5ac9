/* SPDX-License-Identifier: Apache-2.0 */
/* How a family's tensors are called on disk. */
#ifndef MOE_MODELS_NAMES_H
#define MOE_MODELS_NAMES_H

#include "config/family.h"

/* The two forms of the experts: a tensor an expert and matrix, as the hub and save_pretrained have it, or one tensor
 * for all experts, as transformers 5 keeps them in memory and save_pretrained(save_original_format=False) writes. */
enum moe_form { MOE_FORM_PER_EXPERT, MOE_FORM_STACKED, MOE_FORM_COUNT };

enum moe_role {
    MOE_ROLE_GATE,    /* [E, H]: the router */
    MOE_ROLE_W1,      /* per expert [I, H]: the gate rows of w13 */
    MOE_ROLE_W3,      /* per expert [I, H]: the up rows */
    MOE_ROLE_W2,      /* per expert [H, I] */
    MOE_ROLE_GATE_UP, /* stacked [E, 2I, H]: gate rows, then up rows */
    MOE_ROLE_DOWN,    /* stacked [E, H, I] */
    MOE_ROLE_COUNT
};

#define MOE_MAX_TENSOR_NAME 128

/* Writes the name of a tensor; `expert` counts in the per-expert roles only. The gate is called differently in the two
 * forms of some families. Returns buffer. */
const char *moe_tensor_name(enum moe_naming naming, enum moe_form form, enum moe_role role, int32_t layer,
                            int32_t expert, char buffer[MOE_MAX_TENSOR_NAME]);

#endif
