/* SPDX-License-Identifier: Apache-2.0 */
/* One cublasGemmEx for each expert that has rows. */
#include "kernels/cuda/cublas/internal.h"

/* c[rows of g] = a[rows of g] . b[g]^T for each group g. cuBLAS counts columns first, so it sees c^T = b . a^T. */
static moe_status run(const struct moe_call *call, const void *a, const struct moe_weights_view *b, void *c,
                      const char *step)
{
    const float one = 1.0f, zero = 0.0f;
    const size_t size = moe_dtype_size(call->dtype);
    const cudaDataType type = moe_cublas_type(call->dtype);
    const int n = (int)b->rows, k = (int)b->cols;
    const struct moe_cublas *blas = call->exec->cublas;
    moe_status status;

    if (call->tokens == 0)
        return MOE_OK;
    status = moe_cublas_begin(call, step);
    if (status != MOE_OK)
        return status;

    for (int32_t g = 0; g < call->plan.groups && status == MOE_OK; g++) {
        const size_t first = (size_t)blas->offsets[g];
        const int rows = blas->offsets[g + 1] - blas->offsets[g];
        cublasStatus_t s;

        if (rows == 0)
            continue;
        s = blas->api.gemm(blas->handle, CUBLAS_OP_T, CUBLAS_OP_N, n, rows, k, &one,
                           (const char *)b->data + (size_t)g * n * k * size, type, k,
                           (const char *)a + first * k * size, type, k, &zero, (char *)c + first * n * size, type, n,
                           CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        if (s != CUBLAS_STATUS_SUCCESS)
            status = moe_cublas_failed(call, step, s);
    }
    moe_cublas_end(call);
    return status;
}

moe_status moe_gemm1_cublas_loop(const struct moe_call *call)
{
    return run(call, call->rows, &call->w13, call->gate_up, "gemm1 cublas-loop");
}

moe_status moe_gemm2_cublas_loop(const struct moe_call *call)
{
    return run(call, call->act, &call->w2, call->down, "gemm2 cublas-loop");
}
