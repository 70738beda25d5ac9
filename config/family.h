/* SPDX-License-Identifier: Apache-2.0 */
/* The model families: one row of families.inc each. */
#ifndef MOE_CONFIG_FAMILY_H
#define MOE_CONFIG_FAMILY_H

#include <stdbool.h>
#include <stddef.h>

#include "moe.h"

enum moe_sparse_rule {
    MOE_SPARSE_ALL,  /* every layer */
    MOE_SPARSE_STEP, /* not in mlp_only_layers, and (N + 1) % decoder_sparse_step == 0 */
};

enum moe_renorm_rule {
    MOE_RENORM_ALWAYS,
    MOE_RENORM_KEY, /* as the key norm_topk_prob says; false without it */
};

/* How a family's tensors are named on disk; models/names.c holds the patterns. */
enum moe_naming {
    MOE_NAMING_MIXTRAL, /* block_sparse_moe.gate, block_sparse_moe.experts.N.w1/w3/w2, or stacked mlp.experts.* */
    MOE_NAMING_QWEN,    /* mlp.gate, mlp.experts.N.gate_proj/up_proj/down_proj, or stacked mlp.experts.* */
};

struct moe_family {
    const char *model_type;
    const char *experts_key[3]; /* the first one present counts; two that disagree are an error */
    const char *top_k_key[2];
    const char *intermediate_key[2];
    enum moe_sparse_rule sparse_rule;
    enum moe_renorm_rule renorm_rule;
    bool topk_weight_in_model_dtype; /* else fp32 */
    enum moe_naming naming;
    const char *why_not; /* NULL, or what this version lacks to run the family */
};

/* NULL for an unknown model_type. */
const struct moe_family *moe_family_find(const char *model_type);
/* For lists: the i-th family, NULL past the last. */
const struct moe_family *moe_family_at(size_t i);

#endif
