/* SPDX-License-Identifier: Apache-2.0 */
/* The public face of models/model.h. */
#include <stdio.h>
#include <stdlib.h>

#include "runtime/internal.h"

moe_status moe_checkpoint_open(moe_context *ctx, const char *directory, moe_checkpoint **out)
{
    struct moe_error err = {{0}};
    if (ctx == NULL || directory == NULL || out == NULL)
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *out = NULL;
    moe_checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    if (checkpoint == NULL)
        return moe_context_report(ctx, MOE_ERROR_OUT_OF_MEMORY, NULL);
    checkpoint->ctx = ctx;
    moe_status status = moe_model_open(directory, &checkpoint->model, &err);
    if (status != MOE_OK) {
        free(checkpoint);
        return moe_context_report(ctx, status, &err);
    }
    *out = checkpoint;
    return MOE_OK;
}

void moe_checkpoint_close(moe_checkpoint *checkpoint)
{
    if (checkpoint == NULL)
        return;
    moe_model_close(checkpoint->model);
    free(checkpoint);
}

moe_status moe_checkpoint_describe(const moe_checkpoint *checkpoint, moe_checkpoint_info *info)
{
    struct moe_error err = {{0}};
    if (checkpoint == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    const struct moe_config *config = moe_model_config(checkpoint->model);
    moe_checkpoint_info filled = moe_checkpoint_info_init();
    snprintf(filled.model_type, sizeof filled.model_type, "%s", config->model_type);
    filled.num_layers = config->num_layers;
    filled.first_moe_layer = -1;
    for (int32_t i = 0; i < config->num_layers && filled.first_moe_layer < 0; i++)
        if (moe_config_layer_is_sparse(config, i))
            filled.first_moe_layer = i;
    filled.num_files = moe_model_file_count(checkpoint->model);
    filled.file_bytes = moe_model_file_bytes(checkpoint->model);
    moe_status status = moe_struct_out(info, &filled, sizeof *info, sizeof *info, "moe_checkpoint_info", &err);
    return moe_context_report(checkpoint->ctx, status, &err);
}

moe_status moe_checkpoint_layer(const moe_checkpoint *checkpoint, int32_t index, moe_layer_desc *desc)
{
    struct moe_error err = {{0}};
    if (checkpoint == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    struct moe_layer_source source;
    moe_status status = moe_model_layer(checkpoint->model, index, &source, &err);
    if (status == MOE_OK) {
        status = moe_struct_out(desc, &source.desc, sizeof *desc, sizeof *desc, "moe_layer_desc", &err);
        moe_layer_source_free(&source);
    }
    return moe_context_report(checkpoint->ctx, status, &err);
}
