/* SPDX-License-Identifier: Apache-2.0 */
/* config.json of a checkpoint -> what its MoE layers are. */
#ifndef MOE_CONFIG_CONFIG_H
#define MOE_CONFIG_CONFIG_H

#include "config/error.h"
#include "config/family.h"

/* The largest hidden or intermediate size. With MOE_MAX_EXPERTS it keeps the bytes of a layer far from 2^63. */
#define MOE_MAX_SIZE (1 << 20)

struct moe_config {
    const struct moe_family *family;
    char model_type[64];
    int32_t num_layers;
    moe_layer_desc layer; /* dtype and gate_dtype as config.json says, MOE_DTYPE_NONE if it says none;
                             the tensors have the last word */
    /* which layers are sparse, by family->sparse_rule */
    int32_t sparse_step;                /* MOE_SPARSE_STEP: (N + 1) % step == 0 */
    int32_t *dense_layers, dense_count; /* MOE_SPARSE_STEP: mlp_only_layers */
};

/* `name` is the file as messages call it. On success *config owns memory: moe_config_free. */
moe_status moe_config_parse(const char *text, size_t length, const char *name, struct moe_config *config,
                            struct moe_error *err);
moe_status moe_config_load(const char *path, struct moe_config *config, struct moe_error *err);
void moe_config_free(struct moe_config *config);
bool moe_config_layer_is_sparse(const struct moe_config *config, int32_t layer);

/* Checks a description, from a file or from a caller; `name` is what messages call it. MOE_ERROR_INVALID_ARGUMENT. */
moe_status moe_desc_check(const moe_layer_desc *desc, const char *name, struct moe_error *err);

/* "row-major", "packed" or, for a mask of both, "packed or row-major". */
const char *moe_layouts_name(unsigned layouts);

#endif
