/* SPDX-License-Identifier: Apache-2.0 */
/* A build without CUDA. */
#include "kernels/cuda/cublas/cublas.h"
#include "kernels/cuda/device.h"

static moe_status none(struct moe_error *err)
{
    return moe_fail(err, MOE_ERROR_NO_DEVICE, "this build has no CUDA");
}

bool moe_cuda_built(void)
{
    return false;
}

moe_status moe_cuda_open(int32_t device, struct moe_cuda_facts *facts, struct moe_error *err)
{
    (void)device;
    (void)facts;
    return none(err);
}

moe_status moe_cuda_alloc(int32_t device, size_t bytes, void **pointer, struct moe_error *err)
{
    (void)device;
    (void)bytes;
    *pointer = NULL;
    return none(err);
}

void moe_cuda_free(int32_t device, void *pointer)
{
    (void)device;
    (void)pointer;
}

moe_status moe_cuda_copy(int32_t device, void *to, const void *from, size_t bytes, void *stream, struct moe_error *err)
{
    (void)device;
    (void)to;
    (void)from;
    (void)bytes;
    (void)stream;
    return none(err);
}

moe_status moe_cuda_synchronize(int32_t device, void *stream, struct moe_error *err)
{
    (void)device;
    (void)stream;
    return none(err);
}

moe_status moe_cuda_enter(int32_t device, void *stream, int32_t *previous, bool *capturing, struct moe_error *err)
{
    (void)device;
    (void)stream;
    *previous = -1;
    *capturing = false;
    return none(err);
}

void moe_cuda_leave(int32_t previous)
{
    (void)previous;
}

moe_status moe_cuda_stage_create(int32_t device, size_t bytes, bool lands, struct moe_cuda_stage **stage,
                                 struct moe_error *err)
{
    (void)device;
    (void)bytes;
    (void)lands;
    *stage = NULL;
    return none(err);
}

moe_status moe_cuda_stage_next(struct moe_cuda_stage *stage, void **host, struct moe_error *err)
{
    (void)stage;
    *host = NULL;
    return none(err);
}

moe_status moe_cuda_stage_send(struct moe_cuda_stage *stage, void *device, size_t bytes, struct moe_error *err)
{
    (void)stage;
    (void)device;
    (void)bytes;
    return none(err);
}

moe_status moe_cuda_stage_pack(struct moe_cuda_stage *stage, const struct moe_weights_view *view, bool w13,
                               int64_t first, int64_t rows, void *packed, struct moe_error *err)
{
    (void)stage;
    (void)view;
    (void)w13;
    (void)first;
    (void)rows;
    (void)packed;
    return none(err);
}

moe_status moe_cuda_stage_destroy(struct moe_cuda_stage *stage, struct moe_error *err)
{
    (void)stage;
    (void)err;
    return MOE_OK;
}

moe_status moe_cublas_create(struct moe_cublas **blas, struct moe_error *err)
{
    *blas = NULL;
    return none(err);
}

void moe_cublas_destroy(struct moe_cublas *blas)
{
    (void)blas;
}

moe_status moe_pack_rows(const struct moe_weights_view *view, bool w13, int64_t first, int64_t rows,
                         const void *canonical, void *packed, void *stream, struct moe_error *err)
{
    (void)view;
    (void)w13;
    (void)first;
    (void)rows;
    (void)canonical;
    (void)packed;
    (void)stream;
    return none(err);
}
