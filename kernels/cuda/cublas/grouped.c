/* SPDX-License-Identifier: Apache-2.0 */
/* One cublasGemmGroupedBatchedEx for all experts that have rows, each a group of one. */
#include <cuda_runtime.h>

#include "kernels/cuda/cublas/internal.h"

/* Fills the arguments of c[rows of g] = a[rows of g] . b[g]^T for each group that has rows (cuBLAS counts columns
 * first, so it sees c^T = b . a^T) and returns how many there are. */
static int fill(const struct moe_call *call, const void *a, const struct moe_weights_view *b, void *c)
{
    const struct moe_cublas *blas = call->exec->cublas;
    struct moe_cublas_groups *groups = blas->groups;
    const size_t size = moe_dtype_size(call->dtype);
    const int n = (int)b->rows, k = (int)b->cols;
    int used = 0;

    for (int32_t g = 0; g < call->plan.groups; g++)
        used += blas->offsets[g + 1] > blas->offsets[g];
    for (int32_t g = 0, i = 0; g < call->plan.groups; g++) {
        const size_t first = (size_t)blas->offsets[g];
        const int rows = blas->offsets[g + 1] - blas->offsets[g];

        if (rows == 0)
            continue;
        groups->transa[i] = CUBLAS_OP_T;
        groups->transb[i] = CUBLAS_OP_N;
        groups->m[i] = groups->ldc[i] = n;
        groups->n[i] = rows;
        groups->k[i] = groups->lda[i] = groups->ldb[i] = k;
        groups->size[i] = 1;
        groups->alpha[i] = 1.0f;
        groups->beta[i] = 0.0f;
        groups->pointers[i] = (const char *)b->data + (size_t)g * n * k * size;
        groups->pointers[used + i] = (const char *)a + first * k * size;
        groups->pointers[2 * used + i] = (char *)c + first * n * size;
        i++;
    }
    return used;
}

static moe_status multiply(const struct moe_call *call, const void *a, const struct moe_weights_view *b, void *c,
                           const char *step)
{
    const struct moe_cublas *blas = call->exec->cublas;
    const struct moe_cublas_groups *groups = blas->groups;
    const cudaDataType type = moe_cublas_type(call->dtype);
    void **pointers = (void **)((char *)call->scratch + MOE_CUBLAS_WORKSPACE);
    const int used = fill(call, a, b, c);
    cublasStatus_t status;
    cudaError_t e;

    if (used == 0)
        return MOE_OK;
    /* From pageable memory, so that the array is free again when this returns. */
    e = cudaMemcpyAsync(pointers, groups->pointers, 3 * (size_t)used * sizeof(void *), cudaMemcpyHostToDevice,
                        (cudaStream_t)call->stream);
    if (e != cudaSuccess) {
        cudaGetLastError();
        return moe_fail(call->error, MOE_ERROR_DEVICE, "%s: %s", step, cudaGetErrorString(e));
    }
    status = blas->api.gemm_grouped(
        blas->handle, groups->transa, groups->transb, groups->m, groups->n, groups->k, groups->alpha,
        (const void *const *)pointers, type, groups->lda, (const void *const *)pointers + used, type, groups->ldb,
        groups->beta, (void *const *)pointers + 2 * used, type, groups->ldc, used, groups->size, CUBLAS_COMPUTE_32F);
    return status == CUBLAS_STATUS_SUCCESS ? MOE_OK : moe_cublas_failed(call, step, status);
}

static moe_status run(const struct moe_call *call, const void *a, const struct moe_weights_view *b, void *c,
                      const char *step)
{
    const int64_t whole = 16 / (int64_t)moe_dtype_size(call->dtype);
    moe_status status;

    if (call->tokens == 0)
        return MOE_OK;
    if (call->exec->cublas && !call->exec->cublas->api.gemm_grouped)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED, "%s: cublasGemmGroupedBatchedEx needs cuBLAS 12.5", step);
    if (b->rows % whole != 0 || b->cols % whole != 0)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED,
                        "%s: cublasGemmGroupedBatchedEx needs rows of whole 16 bytes, the weights are %lld x %lld %s",
                        step, (long long)b->rows, (long long)b->cols, moe_dtype_name(call->dtype));
    status = moe_cublas_begin(call, step);
    if (status != MOE_OK)
        return status;
    status = multiply(call, a, b, c, step);
    moe_cublas_end(call);
    return status;
}

moe_status moe_gemm1_cublas_grouped(const struct moe_call *call)
{
    return run(call, call->rows, &call->w13, call->gate_up, "gemm1 cublas-grouped");
}

moe_status moe_gemm2_cublas_grouped(const struct moe_call *call)
{
    return run(call, call->act, &call->w2, call->down, "gemm2 cublas-grouped");
}
