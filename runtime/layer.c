/* SPDX-License-Identifier: Apache-2.0 */
/* A layer: its description and where its weights are, its own copy or the caller's. */
#include <stdlib.h>

#include "kernels/packed.h"
#include "runtime/internal.h"
#include "runtime/load.h"

static const char *const part_names[MOE_PART_COUNT] = {"gate", "w13", "w2"};

struct moe_weights_view moe_part_view(const moe_layer_desc *desc, enum moe_part part, moe_layout layout,
                                      const void *data)
{
    return (struct moe_weights_view){
        .data = data,
        .dtype = desc->dtype,
        .layout = layout,
        .experts = desc->num_experts,
        .rows = part == MOE_PART_W13 ? 2 * desc->intermediate_size : desc->hidden_size,
        .cols = part == MOE_PART_W13 ? desc->hidden_size : desc->intermediate_size,
    };
}

uint64_t moe_view_bytes(const struct moe_weights_view *view)
{
    return (uint64_t)view->experts * (view->layout == MOE_LAYOUT_PACKED
                                          ? moe_packed_expert_bytes(view->rows, view->cols)
                                          : (uint64_t)view->rows * (uint64_t)view->cols * moe_dtype_size(view->dtype));
}

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

/* Memory of the layer's own for its weights in `layout`; gate_bytes 0: it has no gate. */
static moe_status alloc_parts(moe_layer *layer, uint64_t gate_bytes, moe_layout layout, struct moe_error *err)
{
    moe_status status = gate_bytes > 0 ? alloc_part(layer, MOE_PART_GATE, gate_bytes, err) : MOE_OK;
    for (int part = MOE_PART_W13; part <= MOE_PART_W2 && status == MOE_OK; part++) {
        const struct moe_weights_view view = moe_part_view(&layer->desc, (enum moe_part)part, layout, NULL);
        status = alloc_part(layer, (enum moe_part)part, moe_view_bytes(&view), err);
    }
    layer->weights.gate = layer->parts[MOE_PART_GATE];
    layer->weights.w13 = layer->parts[MOE_PART_W13];
    layer->weights.w2 = layer->parts[MOE_PART_W2];
    layer->weights.layout = layout;
    return status;
}

static moe_status load(moe_layer *layer, const struct moe_layer_source *source, const moe_load_options *options,
                       struct moe_error *err)
{
    moe_layout layout;
    moe_status status = moe_choose_layout(layer->ctx, &layer->desc, options->layout, &layout, err);
    if (status == MOE_OK)
        status = alloc_parts(layer, source->part_bytes[MOE_PART_GATE], layout, err);
    if (status == MOE_OK)
        status = moe_load_parts(layer->ctx, source, layout, layer->parts, options, err);
    return status;
}

moe_status moe_layer_load(moe_checkpoint *checkpoint, int32_t index, const moe_load_options *options, moe_layer **out)
{
    struct moe_error err = {{0}};
    if (checkpoint == NULL || out == NULL)
        return moe_context_report(checkpoint != NULL ? checkpoint->ctx : NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *out = NULL;
    moe_context *ctx = checkpoint->ctx;
    moe_load_options whole = moe_load_options_init();
    if (options != NULL &&
        !moe_struct_in(&whole, options, MOE_LOAD_OPTIONS_FIRST, sizeof whole, "moe_load_options", &err))
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
        status = load(layer, &source, &whole, &err);
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
    moe_layer_weights whole;
    if (!moe_struct_ok(desc, sizeof *desc, "moe_layer_desc", &err) ||
        !moe_struct_in(&whole, weights, MOE_LAYER_WEIGHTS_FIRST, sizeof whole, "moe_layer_weights", &err))
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, &err);
    moe_layer_desc known = *desc;
    if (known.gate_dtype == MOE_DTYPE_NONE)
        known.gate_dtype = known.dtype;
    if (whole.layout == MOE_LAYOUT_AUTO)
        whole.layout = MOE_LAYOUT_ROW_MAJOR;
    moe_status status = moe_desc_check(&known, "moe_layer_desc", &err);
    if (status == MOE_OK)
        status = check_weights(&whole, &err);
    if (status == MOE_OK)
        status = moe_choose_layout(ctx, &known, whole.layout, &whole.layout, &err);
    if (status == MOE_OK)
        status = new_layer(ctx, &known, out);
    if (status != MOE_OK)
        return moe_context_report(ctx, status, &err);
    (*out)->weights = whole;
    return MOE_OK;
}

/* The device is current for this thread. */
static moe_status pack(const moe_layer *from, moe_layer *to, struct moe_error *err)
{
    const int32_t device = from->ctx->info.device_index;
    const void *const data[MOE_PART_COUNT] = {from->weights.gate, from->weights.w13, from->weights.w2};
    moe_status status = MOE_OK;
    for (int part = MOE_PART_W13; part <= MOE_PART_W2 && status == MOE_OK; part++) {
        const struct moe_weights_view view =
            moe_part_view(&to->desc, (enum moe_part)part, MOE_LAYOUT_PACKED, to->parts[part]);
        status = moe_pack_rows(&view, part == MOE_PART_W13, 0, view.experts * view.rows, data[part], to->parts[part],
                               NULL, err);
    }
    if (status == MOE_OK)
        status = moe_cuda_copy(device, to->parts[MOE_PART_GATE], from->weights.gate, to->part_bytes[MOE_PART_GATE],
                               NULL, err);
    moe_status last = moe_cuda_synchronize(device, NULL, status == MOE_OK ? err : NULL);
    return status == MOE_OK ? last : status;
}

moe_status moe_layer_pack(const moe_layer *layer, moe_layer **out)
{
    struct moe_error err = {{0}};
    if (layer == NULL || out == NULL)
        return moe_context_report(layer != NULL ? layer->ctx : NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *out = NULL;
    moe_context *ctx = layer->ctx;
    const moe_layer_desc *desc = &layer->desc;
    const uint64_t gate_bytes =
        layer->weights.gate == NULL
            ? 0
            : (uint64_t)desc->num_experts * (uint64_t)desc->hidden_size * moe_dtype_size(desc->gate_dtype);
    moe_layout layout;
    moe_layer *packed = NULL;
    moe_status status = moe_choose_layout(ctx, desc, MOE_LAYOUT_PACKED, &layout, &err);
    if (status == MOE_OK && layer->weights.layout == MOE_LAYOUT_PACKED)
        status = moe_fail(&err, MOE_ERROR_INVALID_ARGUMENT, "the layer's weights are packed already");
    if (status == MOE_OK)
        status = new_layer(ctx, desc, &packed);
    if (status == MOE_OK)
        status = alloc_parts(packed, gate_bytes, layout, &err);
    int32_t previous;
    bool capturing;
    if (status == MOE_OK)
        status = moe_cuda_enter(ctx->info.device_index, NULL, &previous, &capturing, &err);
    if (status == MOE_OK) {
        status = pack(layer, packed, &err);
        moe_cuda_leave(previous);
    }
    if (status != MOE_OK) {
        moe_layer_destroy(packed);
        return moe_context_report(ctx, status, &err);
    }
    *out = packed;
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
    moe_status status = moe_struct_out(desc, &layer->desc, sizeof *desc, sizeof *desc, "moe_layer_desc", &err);
    return moe_context_report(layer->ctx, status, &err);
}

moe_status moe_layer_weights_get(const moe_layer *layer, moe_layer_weights *weights)
{
    struct moe_error err = {{0}};
    if (layer == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    /* A caller that knows no layouts takes the pointers for row-major ones. */
    if (weights != NULL && weights->size == MOE_LAYER_WEIGHTS_FIRST && layer->weights.layout != MOE_LAYOUT_ROW_MAJOR) {
        moe_fail(&err, MOE_ERROR_UNSUPPORTED,
                 "the layer's weights are packed, which a moe_layer_weights of %zu bytes cannot say", weights->size);
        return moe_context_report(layer->ctx, MOE_ERROR_UNSUPPORTED, &err);
    }
    moe_status status =
        moe_struct_out(weights, &layer->weights, MOE_LAYER_WEIGHTS_FIRST, sizeof *weights, "moe_layer_weights", &err);
    return moe_context_report(layer->ctx, status, &err);
}
