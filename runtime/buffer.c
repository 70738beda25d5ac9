/* SPDX-License-Identifier: Apache-2.0 */
/* Memory and copies on a context's device, for callers without CUDA headers. */
#include <stdlib.h>

#include "runtime/internal.h"

moe_status moe_buffer_alloc(moe_context *ctx, size_t bytes, void **pointer)
{
    struct moe_error err = {{0}};
    if (ctx == NULL || pointer == NULL)
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, NULL);
    *pointer = NULL;
    if (ctx->info.device == MOE_DEVICE_CUDA) {
        moe_status status = moe_cuda_alloc(ctx->info.device_index, bytes > 0 ? bytes : 1, pointer, &err);
        return moe_context_report(ctx, status, &err);
    }
    if (posix_memalign(pointer, MOE_WORKSPACE_ALIGNMENT, bytes > 0 ? bytes : 1) != 0) {
        *pointer = NULL;
        moe_fail(&err, MOE_ERROR_OUT_OF_MEMORY, "cannot allocate %zu bytes of memory", bytes);
        return moe_context_report(ctx, MOE_ERROR_OUT_OF_MEMORY, &err);
    }
    return MOE_OK;
}

void moe_buffer_free(moe_context *ctx, void *pointer)
{
    if (ctx == NULL || pointer == NULL)
        return;
    if (ctx->info.device == MOE_DEVICE_CUDA)
        moe_cuda_free(ctx->info.device_index, pointer);
    else
        free(pointer);
}

static moe_status copy(moe_context *ctx, void *to, const void *from, size_t bytes, void *stream)
{
    struct moe_error err = {{0}};
    if (ctx == NULL || (bytes > 0 && (to == NULL || from == NULL)))
        return moe_context_report(ctx, MOE_ERROR_INVALID_ARGUMENT, NULL);
    if (bytes == 0)
        return MOE_OK;
    if (ctx->info.device == MOE_DEVICE_CPU) {
        memcpy(to, from, bytes);
        return MOE_OK;
    }
    moe_status status = moe_cuda_copy(ctx->info.device_index, to, from, bytes, stream, &err);
    return moe_context_report(ctx, status, &err);
}

moe_status moe_copy_in(moe_context *ctx, void *device, const void *host, size_t bytes, void *stream)
{
    return copy(ctx, device, host, bytes, stream);
}

moe_status moe_copy_out(moe_context *ctx, void *host, const void *device, size_t bytes, void *stream)
{
    return copy(ctx, host, device, bytes, stream);
}

moe_status moe_synchronize(moe_context *ctx, void *stream)
{
    struct moe_error err = {{0}};
    if (ctx == NULL)
        return moe_context_report(NULL, MOE_ERROR_INVALID_ARGUMENT, NULL);
    if (ctx->info.device == MOE_DEVICE_CPU)
        return MOE_OK;
    moe_status status = moe_cuda_synchronize(ctx->info.device_index, stream, &err);
    return moe_context_report(ctx, status, &err);
}
