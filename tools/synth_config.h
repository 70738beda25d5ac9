/* SPDX-License-Identifier: Apache-2.0 */
/* The config.json of a synthetic checkpoint: a released model's, or a file's, with some sizes changed. */
#ifndef MOE_TOOLS_SYNTH_CONFIG_H
#define MOE_TOOLS_SYNTH_CONFIG_H

#include <cjson/cJSON.h>

#include "config/config.h"

/* What to change; 0 (MOE_DTYPE_NONE) keeps a value. */
struct synth_changes {
    int64_t layers, hidden, intermediate, experts, top_k;
    moe_dtype dtype;
};

/* The names that synth_config_like knows; ends with NULL. */
extern const char *const synth_models[];

/* A new config of model `which` of synth_models; NULL if memory is short. */
cJSON *synth_config_like(int which);

/* Applies the changes to the config of a supported family, under the names that the family and the file use, and parses
 * the result into *config (the caller's, moe_config_free). */
moe_status synth_config_change(cJSON *root, const struct synth_changes *changes, const char *name,
                               struct moe_config *config, struct moe_error *err);

#endif
