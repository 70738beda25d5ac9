/* SPDX-License-Identifier: Apache-2.0 */
/* Which path runs, in which configuration, and why. */
#include <stdio.h>

#include "runtime/internal.h"

/* cublasGemmGroupedBatchedEx wants every matrix on 16 bytes; an expert's rows begin at any multiple of H or I. */
static moe_status check_grouped(const char *name, const moe_layer_desc *desc, struct moe_error *why)
{
    size_t element = moe_dtype_size(desc->dtype);
    if ((size_t)desc->hidden_size * element % 16 == 0 && (size_t)desc->intermediate_size * element % 16 == 0)
        return MOE_OK;
    return moe_fail(why, MOE_ERROR_UNSUPPORTED,
                    "path '%s' needs rows of a multiple of 16 bytes; hidden_size %lld, intermediate_size %lld in %s "
                    "are not",
                    name, (long long)desc->hidden_size, (long long)desc->intermediate_size,
                    moe_dtype_name(desc->dtype));
}

/* Its copies move 16 bytes of a row at a time, and packed weights interleave gate and up in groups of eight rows. */
static moe_status check_fused(const char *name, const moe_layer_desc *desc, struct moe_error *why)
{
    if (desc->dtype != MOE_BF16 && desc->dtype != MOE_F16)
        return moe_fail(why, MOE_ERROR_UNSUPPORTED, "path '%s' needs weights in bf16 or f16; these are in %s", name,
                        moe_dtype_name(desc->dtype));
    if (desc->hidden_size % 8 != 0)
        return moe_fail(why, MOE_ERROR_UNSUPPORTED, "path '%s' needs sizes in multiples of 8; hidden_size is %lld",
                        name, (long long)desc->hidden_size);
    if (desc->intermediate_size % 8 != 0)
        return moe_fail(why, MOE_ERROR_UNSUPPORTED,
                        "path '%s' needs sizes in multiples of 8; intermediate_size is %lld", name,
                        (long long)desc->intermediate_size);
    return MOE_OK;
}

/* desc NULL: on any shape; layout AUTO: in some layout. */
static moe_status available(const moe_context *ctx, const struct moe_path_info *info, const moe_layer_desc *desc,
                            moe_layout layout, struct moe_error *why)
{
    const char *name = moe_path_name(info->path);
    if (info->steps == NULL)
        return moe_fail(why, MOE_ERROR_UNSUPPORTED, "path '%s': %s", name, info->why_not);
    if (info->device != ctx->info.device)
        return moe_fail(why, MOE_ERROR_UNSUPPORTED, "path '%s' runs on %s, the context is on %s", name,
                        info->device == MOE_DEVICE_CUDA ? "a CUDA GPU" : "the CPU",
                        ctx->info.device == MOE_DEVICE_CUDA ? "a CUDA GPU" : "the CPU");
    bool cublas =
        info->path == MOE_PATH_CUBLAS_LOOP || info->path == MOE_PATH_CUBLAS_GROUPED || info->path == MOE_PATH_PADDED;
    if (cublas && ctx->exec.cublas == NULL)
        return moe_fail(why, MOE_ERROR_UNSUPPORTED, "path '%s': %s", name, ctx->cublas_why);
    if (layout != MOE_LAYOUT_AUTO && (info->layouts & layout) == 0)
        return moe_fail(why, MOE_ERROR_UNSUPPORTED, "path '%s' reads %s weights; this layer's are %s", name,
                        moe_layouts_name(info->layouts), moe_layouts_name(layout));
    if (desc == NULL)
        return MOE_OK;
    return info->path == MOE_PATH_CUBLAS_GROUPED ? check_grouped(name, desc, why)
           : info->layouts & MOE_LAYOUT_PACKED   ? check_fused(name, desc, why)
                                                 : MOE_OK;
}

static moe_status no_such_path(moe_path path, struct moe_error *why)
{
    return moe_fail(why, MOE_ERROR_INVALID_ARGUMENT, "path %d does not exist", (int)path);
}

static void say(char *reason, size_t bytes, const char *text)
{
    if (reason != NULL && bytes > 0)
        snprintf(reason, bytes, "%s", text);
}

moe_status moe_path_available(const moe_context *ctx, moe_path path, const moe_layer_desc *desc, char *reason,
                              size_t reason_bytes)
{
    struct moe_error why = {{0}};
    const struct moe_path_info *info = moe_path_info_get(path);
    moe_status status = MOE_OK;
    if (ctx == NULL)
        status = moe_fail(&why, MOE_ERROR_INVALID_ARGUMENT, "the context is NULL");
    else if (desc != NULL && !moe_struct_ok(desc, sizeof *desc, "moe_layer_desc", &why))
        status = MOE_ERROR_INVALID_ARGUMENT;
    else if (info != NULL)
        status = available(ctx, info, desc, MOE_LAYOUT_AUTO, &why);
    else if (path != MOE_PATH_AUTO) /* auto: each device has a path that takes every shape */
        status = no_such_path(path, &why);
    say(reason, reason_bytes, why.text);
    return status == MOE_ERROR_INVALID_ARGUMENT ? moe_context_report((moe_context *)ctx, status, &why) : status;
}

/* Up to how many tokens `auto` takes decode, by rows of an expert on average. On compute capability 9.0 (an H200)
 * decode is up to 3 % faster with uniform routing, up to there and some way beyond; with skewed routing prefill is
 * faster from 13 to 28 rows on, by the shape, and by 2 to 10 % at twice that. But not, up to 32 rows, as measured on
 * Mixtral, where all the tokens fit in decode's largest tile: then it reads each weight once, however they are routed.
 * Where few experts get all the tokens prefill has too few items for all SMs, and decode takes up to 30 % less time.
 * Elsewhere, not measured, decode multiplies small tiles where prefill pads them. `moe tune` knows better than both. */
static int64_t decode_most(const moe_layer *layer)
{
    enum { ROWS_WGMMA = 20, ROWS_ONE_TILE = 32, TILE = 128, ROWS_MMA = 48 };
    const int64_t experts = layer->desc.num_experts, top_k = layer->desc.top_k;
    if (layer->ctx->exec.compute_capability != 90)
        return ROWS_MMA * experts / top_k;
    const int64_t most = ROWS_WGMMA * experts / top_k, one_tile = ROWS_ONE_TILE * experts / top_k;
    return most > TILE ? most : one_tile < TILE ? one_tile : TILE;
}

/* What `auto` takes where no measurement says better, for which counts from *least on. */
static moe_path formula_path(const moe_layer *layer, int64_t tokens, int64_t *least)
{
    const moe_context *ctx = layer->ctx;
    *least = 0;
    if (ctx->info.device != MOE_DEVICE_CUDA)
        return MOE_PATH_CPU;
    /* What keeps one of these two from a layer keeps the other from it too. */
    if (available(ctx, moe_path_info_get(MOE_PATH_PREFILL), &layer->desc, layer->weights.layout, NULL) != MOE_OK)
        return MOE_PATH_SIMPLE;
    const int64_t most = decode_most(layer);
    if (tokens <= most)
        return MOE_PATH_DECODE;
    *least = most + 1;
    return MOE_PATH_PREFILL;
}

moe_status moe_choose(const moe_layer *layer, moe_path wanted, int64_t tokens, struct moe_choice *choice,
                      struct moe_error *err)
{
    const struct moe_tuned_entry *entry = moe_tuned_find(&layer->ctx->tuned, &layer->desc, layer->weights.layout);
    const struct moe_tuned_point *point = entry != NULL ? moe_tuned_at(entry, tokens) : NULL;
    int64_t least = 0;
    moe_path path = wanted;
    if (wanted == MOE_PATH_AUTO)
        path = point != NULL ? point->path : formula_path(layer, tokens, &least);
    *choice = (struct moe_choice){.path = moe_path_info_get(path), .least = least};
    if (choice->path == NULL)
        return no_such_path(wanted, err);
    if (point != NULL && point->path == path) {
        choice->tuned = point;
        choice->config = point->config;
        choice->least = point->tokens;
    }
    if (wanted == MOE_PATH_AUTO) /* a table was checked when it was read */
        return MOE_OK;
    return available(layer->ctx, choice->path, &layer->desc, layer->weights.layout, err);
}

/* The configuration that a batch without one of its own gets; 0: the path has none. */
static int32_t config_of(const moe_layer *layer, int64_t tokens, const struct moe_choice *choice)
{
    struct moe_call call;
    if (choice->config != 0 || choice->path->config == NULL)
        return choice->config;
    moe_call_shape(&call, layer, tokens, layer->desc.top_k, layer->desc.dtype);
    return choice->path->config(&call);
}

/* "prefill, configuration wgmma-192: 512 rows an expert on average". */
static void explain(const moe_layer *layer, moe_path wanted, int64_t tokens, const struct moe_choice *choice,
                    struct moe_error *why)
{
    const moe_path path = choice->path->path;
    const char *config = moe_path_config_name(path, config_of(layer, tokens, choice));
    const double rows = (double)tokens * layer->desc.top_k / layer->desc.num_experts;
    struct moe_error because = {{0}};
    if (choice->tuned != NULL)
        moe_fail(&because, MOE_OK, "tuned for %lld token%s and more in %s", (long long)choice->tuned->tokens,
                 choice->tuned->tokens == 1 ? "" : "s", layer->ctx->tuned.file);
    else if (config != NULL)
        moe_fail(&because, MOE_OK, "%.*f rows an expert on average", rows < 10, rows);
    else if (wanted == MOE_PATH_AUTO && path == MOE_PATH_SIMPLE)
        available(layer->ctx, moe_path_info_get(MOE_PATH_PREFILL), &layer->desc, layer->weights.layout, &because);
    else if (wanted == MOE_PATH_AUTO)
        moe_fail(&because, MOE_OK, "the fastest path on the CPU");
    const bool named = wanted != MOE_PATH_AUTO;
    moe_fail(why, MOE_OK, "%s%s%s: %s%s%s", moe_path_name(path), config != NULL ? ", configuration " : "",
             config != NULL ? config : "", named ? "asked for by name" : "", named && because.text[0] ? "; " : "",
             because.text);
}

moe_status moe_choose_config(const moe_context *ctx, const struct moe_path_info *path, int32_t config,
                             struct moe_error *why)
{
    return config == 0 || path->config_check == NULL ? MOE_OK : path->config_check(&ctx->exec, config, why);
}

/* What the table says of one shape must be possible here. */
static moe_status check_point(const moe_context *ctx, const struct moe_tuned_entry *entry,
                              struct moe_tuned_point *point, struct moe_error *why)
{
    const struct moe_path_info *info = moe_path_info_get(point->path);
    moe_layer_desc desc = moe_layer_desc_init(entry->dtype);
    desc.hidden_size = entry->hidden_size;
    desc.intermediate_size = entry->intermediate_size;
    desc.num_experts = entry->num_experts;
    desc.top_k = entry->top_k;
    moe_status status = available(ctx, info, &desc, entry->layout, why);
    if (status != MOE_OK)
        return status;
    if (info->synchronises)
        return moe_fail(why, MOE_ERROR_UNSUPPORTED, "path '%s' waits for the host, which 'auto' never does",
                        moe_path_name(point->path));
    const char *name = "";
    for (point->config = 0; name != NULL && strcmp(name, point->name) != 0; point->config++)
        name = moe_path_config_name(point->path, point->config + 1);
    return name != NULL ? moe_choose_config(ctx, info, point->config, why)
                        : moe_fail(why, MOE_ERROR_UNSUPPORTED, "path '%s' has no configuration '%s'",
                                   moe_path_name(point->path), point->name);
}

moe_status moe_choose_from(moe_context *ctx, struct moe_tuned *table, struct moe_error *err)
{
    struct moe_error why = {{0}};
    for (int32_t i = 0; i < table->count; i++)
        for (int32_t k = 0; k < table->entries[i].count; k++)
            if (check_point(ctx, &table->entries[i], &table->entries[i].points[k], &why) != MOE_OK)
                return moe_fail(err, MOE_ERROR_FILE, "%s: 'entries[%d].points[%d]': %s; 'moe tune' makes a new table",
                                table->file, (int)i, (int)k, why.text);
    ctx->tuned = *table;
    memset(table, 0, sizeof *table);
    return MOE_OK;
}

moe_status moe_choose_layout(const moe_context *ctx, const moe_layer_desc *desc, moe_layout wanted, moe_layout *layout,
                             struct moe_error *err)
{
    struct moe_error why = {{0}};
    *layout = MOE_LAYOUT_ROW_MAJOR;
    if (wanted == MOE_LAYOUT_ROW_MAJOR)
        return MOE_OK;
    if (wanted != MOE_LAYOUT_AUTO && wanted != MOE_LAYOUT_PACKED)
        return moe_fail(err, MOE_ERROR_INVALID_ARGUMENT, "layout %d does not exist", (int)wanted);
    moe_status status = available(ctx, moe_path_info_get(MOE_PATH_PREFILL), desc, MOE_LAYOUT_PACKED, &why);
    if (status == MOE_OK)
        *layout = MOE_LAYOUT_PACKED;
    return status == MOE_OK || wanted == MOE_LAYOUT_AUTO ? MOE_OK
                                                         : moe_fail(err, status, "packed weights: %s", why.text);
}

moe_status moe_path_choose(const moe_layer *layer, moe_path wanted, int64_t tokens, moe_path *path, char *reason,
                           size_t reason_bytes)
{
    struct moe_error why = {{0}};
    struct moe_choice choice;
    say(reason, reason_bytes, "");
    if (layer == NULL || path == NULL || tokens < 0)
        return moe_context_report(layer != NULL ? layer->ctx : NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    moe_status status = moe_choose(layer, wanted, tokens, &choice, &why);
    if (status == MOE_OK) {
        *path = choice.path->path;
        explain(layer, wanted, tokens, &choice, &why);
    }
    say(reason, reason_bytes, why.text);
    return moe_context_report(layer->ctx, status, &why);
}
