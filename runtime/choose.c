/* SPDX-License-Identifier: Apache-2.0 */
/* Which path runs, and why. */
#include <stdio.h>

#include "runtime/internal.h"

const char *moe_layouts_name(unsigned layouts)
{
    return layouts == MOE_LAYOUT_ROW_MAJOR ? "row-major"
           : layouts == MOE_LAYOUT_PACKED  ? "packed"
                                           : "packed or row-major";
}

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
static moe_status check_prefill(const char *name, const moe_layer_desc *desc, struct moe_error *why)
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
           : info->path == MOE_PATH_PREFILL      ? check_prefill(name, desc, why)
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

/* What `auto` takes for a batch of `tokens` on `layer`, and why. */
static moe_path best_path(const moe_layer *layer, int64_t tokens, struct moe_error *why)
{
    (void)tokens; /* one fast path a device so far: the count decides nothing yet */
    const moe_context *ctx = layer->ctx;
    struct moe_error why_not = {{0}};
    if (ctx->info.device != MOE_DEVICE_CUDA) {
        moe_fail(why, MOE_OK, "the fastest path on the CPU");
        return MOE_PATH_CPU;
    }
    if (available(ctx, moe_path_info_get(MOE_PATH_PREFILL), &layer->desc, layer->weights.layout, &why_not) == MOE_OK) {
        moe_fail(why, MOE_OK, "the fastest path on a GPU, which reads %s weights",
                 moe_layouts_name(layer->weights.layout));
        return MOE_PATH_PREFILL;
    }
    moe_fail(why, MOE_OK, "%s", why_not.text);
    return MOE_PATH_SIMPLE;
}

moe_status moe_choose(const moe_layer *layer, moe_path wanted, int64_t tokens, const struct moe_path_info **info,
                      struct moe_error *why)
{
    *info = moe_path_info_get(wanted != MOE_PATH_AUTO ? wanted : best_path(layer, tokens, why));
    if (*info == NULL)
        return no_such_path(wanted, why);
    if (wanted == MOE_PATH_AUTO)
        return MOE_OK;
    moe_status status = available(layer->ctx, *info, &layer->desc, layer->weights.layout, why);
    return status == MOE_OK ? moe_fail(why, MOE_OK, "asked for by name") : status;
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
    const struct moe_path_info *info;
    say(reason, reason_bytes, "");
    if (layer == NULL || path == NULL || tokens < 0)
        return moe_context_report(layer != NULL ? layer->ctx : NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    moe_status status = moe_choose(layer, wanted, tokens, &info, &why);
    say(reason, reason_bytes, why.text);
    if (status == MOE_OK)
        *path = info->path;
    return moe_context_report(layer->ctx, status, &why);
}
