/* SPDX-License-Identifier: Apache-2.0 */
/* A layer: its description and where its weights are, its own copy or the caller's. */
#include <stdlib.h>

#include "runtime/internal.h"
#include "runtime/load.h"

static const char *const part_names[MOE_PART_COUNT] = {"gate", "w13", "w2"};

static moe_status new_layer(moe_context *ctx, const moe_layer_desc *desc, moe_layer **out)
{
    moe_layer *layer = calloc(1, sizeof *layer);
    if (layer == NULL)
        return MOE_ERROR_OUT_OF_MEMORY;
    layer->ctx = ctx;
    layer->desc = *desc;
    layer->desc.size = sizeof layer->desc;
    layer->weights = moe_layer_weights_init();
    *out = layer;
    return MOE_OK;
}

static moe_status alloc_part(moe_layer *layer, enum moe_part part, uint64_t bytes, struct moe_error *err)
{
    moe_status status = layer->ctx->info.device == MOE_DEVICE_CUDA
                            ? moe_cuda_alloc(layer->ctx->info.device_index, bytes, &layer->parts[part], err)
                            : moe_host_alloc(bytes, &layer->parts[part]);
    if (status != MOE_OK) {
        layer->parts[part] = NULL;
        if (status == MOE_ERROR_OUT_OF_MEMORY)
            moe_fail(err, status, "cannot allocate %llu bytes of memory for the layer's %s weights",
                     (unsigned long long)bytes, part_names[part]);
        return status;
    }
    layer->part_bytes[part] = bytes;
    return MOE_OK;
}

static moe_status load(moe_layer *layer, const struct moe_layer_source *source, const moe_load_options *options,
                       struct moe_error *err)
{
    moe_status status = MOE_OK;
    for (int part = 0; part < MOE_PART_COUNT && status == MOE_OK; part++)
        status = alloc_part(layer, (enum moe_part)part, source->part_bytes[part], err);
    if (status == MOE_OK)
        status = moe_load_parts(layer->ctx, source, layer->parts, options, err);
    layer->weights.gate = layer->parts[MOE_PART_GATE];
    layer->weights.w13 = layer->parts[MOE_PART_W13];
    layer->weights.w2 = layer->parts[MOE_PART_W2];
    return status;
}

moe_status moe_layer_load(moe_checkpoint *checkpoint, int32_t index, const moe_load_options *options, moe_layer **out)
{
    struct moe_error err = {{0}};
    if (checkpoint == NULL || out == NULL)
        return moe_context_report(checkpoint != NULL ? checkpoint->ctx : NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *out = NULL;
    moe_context *ctx = checkpoint->ctx;
    moe_load_options defaults = moe_load_options_init();
    if (options == NULL)
        options = &defaults;
    if (!moe_struct_ok(options, sizeof *options, "moe_load_options", &err))
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, &err);

    struct moe_layer_source source;
    moe_status status = moe_model_layer(checkpoint->model, index, &source, &err);
    if (status != MOE_OK)
        return moe_context_report(ctx, status, &err);
    const moe_layer_desc *config = &moe_model_config(checkpoint->model)->layer;
    if (config->dtype != MOE_DTYPE_NONE && config->dtype != source.desc.dtype)
        moe_context_log(ctx, MOE_LOG_WARNING,
                        "%s: config.json says %s, but the tensors of layer %d are %s: running in %s",
                        moe_model_directory(checkpoint->model), moe_dtype_name(config->dtype), (int)index,
                        moe_dtype_name(source.desc.dtype), moe_dtype_name(source.desc.dtype));

    moe_layer *layer = NULL;
    status = new_layer(ctx, &source.desc, &layer);
    if (status == MOE_OK)
        status = load(layer, &source, options, &err);
    moe_layer_source_free(&source);
    if (status != MOE_OK) {
        moe_layer_destroy(layer);
        return moe_context_report(ctx, status, &err);
    }
    *out = layer;
    return MOE_OK;
}

static moe_status check_weights(const moe_layer_weights *weights, struct moe_error *err)
{
    const void *const parts[MOE_PART_COUNT] = {weights->gate, weights->w13, weights->w2};
    for (int part = 0; part < MOE_PART_COUNT; part++) {
        if (parts[part] == NULL && part != MOE_PART_GATE)
            return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_layer_weights.%s is NULL", part_names[part]);
        if ((uintptr_t)parts[part] % 16 != 0)
            return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "moe_layer_weights.%s is not aligned to 16 bytes",
                            part_names[part]);
    }
    return MOE_OK;
}

moe_status moe_layer_create(moe_context *ctx, const moe_layer_desc *desc, const moe_layer_weights *weights,
                            moe_layer **out)
{
    struct moe_error err = {{0}};
    if (ctx == NULL || out == NULL)
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *out = NULL;
    if (!moe_struct_ok(desc, sizeof *desc, "moe_layer_desc", &err) ||
        !moe_struct_ok(weights, sizeof *weights, "moe_layer_weights", &err))
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, &err);
    moe_layer_desc whole = *desc;
    if (whole.gate_dtype == MOE_DTYPE_NONE)
        whole.gate_dtype = whole.dtype;
    moe_status status = moe_desc_check(&whole, "moe_layer_desc", &err);
    if (status == MOE_OK)
        status = check_weights(weights, &err);
    if (status == MOE_OK)
        status = new_layer(ctx, &whole, out);
    if (status != MOE_OK)
        return moe_context_report(ctx, status, &err);
    (*out)->weights = *weights;
    (*out)->weights.size = sizeof *weights;
    return MOE_OK;
}

void moe_layer_destroy(moe_layer *layer)
{
    if (layer == NULL)
        return;
    for (int part = 0; part < MOE_PART_COUNT; part++) {
        if (layer->parts[part] == NULL)
            continue;
        if (layer->ctx->info.device == MOE_DEVICE_CUDA)
            moe_cuda_free(layer->ctx->info.device_index, layer->parts[part]);
        else
            moe_host_free(layer->parts[part], layer->part_bytes[part]);
    }
    free(layer);
}

moe_status moe_layer_describe(const moe_layer *layer, moe_layer_desc *desc)
{
    struct moe_error err = {{0}};
    if (layer == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    moe_status status = moe_struct_out(desc, &layer->desc, sizeof layer->desc, "moe_layer_desc", &err);
    return moe_context_report(layer->ctx, status, &err);
}

moe_status moe_layer_weights_get(const moe_layer *layer, moe_layer_weights *weights)
{
    struct moe_error err = {{0}};
    if (layer == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    moe_status status = moe_struct_out(weights, &layer->weights, sizeof layer->weights, "moe_layer_weights", &err);
    return moe_context_report(layer->ctx, status, &err);
}
