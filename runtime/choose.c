/* SPDX-License-Identifier: Apache-2.0 */
/* Which path runs, and why. */
#include <stdio.h>

#include "runtime/internal.h"

/* cublasGemmGroupedBatchedEx wants every matrix on 16 bytes; an expert's rows begin at any multiple of H or I. */
static bool rows_aligned(const moe_layer_desc *desc)
{
    size_t element = moe_dtype_size(desc->dtype);
    return (size_t)desc->hidden_size * element % 16 == 0 && (size_t)desc->intermediate_size * element % 16 == 0;
}

static moe_status available(const moe_context *ctx, const struct moe_path_info *info, const moe_layer_desc *desc,
                            struct moe_error *why)
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
    if (info->path == MOE_PATH_CUBLAS_GROUPED && desc != NULL && !rows_aligned(desc))
        return moe_fail(
            why, MOE_ERROR_UNSUPPORTED,
            "path '%s' needs rows of a multiple of 16 bytes; hidden_size %lld, intermediate_size %lld in %s "
            "are not",
            name, (long long)desc->hidden_size, (long long)desc->intermediate_size, moe_dtype_name(desc->dtype));
    return MOE_OK;
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
        status = available(ctx, info, desc, &why);
    else if (path != MOE_PATH_AUTO) /* auto: each device has a path that takes every shape */
        status = no_such_path(path, &why);
    say(reason, reason_bytes, why.text);
    return status == MOE_ERROR_INVALID_ARGUMENT ? moe_context_report((moe_context *)ctx, status, &why) : status;
}

moe_status moe_choose(const moe_layer *layer, moe_path wanted, int64_t tokens, const struct moe_path_info **info,
                      struct moe_error *why)
{
    (void)tokens; /* one fast path a device so far: the count decides nothing yet */
    const bool cuda = layer->ctx->info.device == MOE_DEVICE_CUDA;
    moe_path path = wanted != MOE_PATH_AUTO ? wanted : cuda ? MOE_PATH_SIMPLE : MOE_PATH_CPU;
    *info = moe_path_info_get(path);
    if (*info == NULL)
        return no_such_path(wanted, why);
    moe_status status = available(layer->ctx, *info, &layer->desc, why);
    if (status != MOE_OK)
        return status;
    if (wanted != MOE_PATH_AUTO)
        return moe_fail(why, MOE_OK, "asked for by name");
    return moe_fail(why, MOE_OK,
                    cuda ? "the fastest CUDA path of this version that does not wait for the device"
                         : "the fastest path on the CPU");
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
