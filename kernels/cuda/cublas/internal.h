/* SPDX-License-Identifier: Apache-2.0 */
/* What the cuBLAS paths share: the handle, and the beginning and end of a call. */
#ifndef MOE_KERNELS_CUDA_CUBLAS_INTERNAL_H
#define MOE_KERNELS_CUDA_CUBLAS_INTERNAL_H

#include <cublas_v2.h>
#include <pthread.h>

#include "kernels/cuda/cublas/cublas.h"
#include "kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The functions of libcublas that we call; those with _v2 in the library have the name without it here. */
struct moe_cublas_api {
    cublasStatus_t (*create)(cublasHandle_t *handle);
    cublasStatus_t (*destroy)(cublasHandle_t handle);
    cublasStatus_t (*set_stream)(cublasHandle_t handle, cudaStream_t stream);
    cublasStatus_t (*set_workspace)(cublasHandle_t handle, void *workspace, size_t bytes);
    cublasStatus_t (*set_math_mode)(cublasHandle_t handle, cublasMath_t mode);
    const char *(*status_string)(cublasStatus_t status);
    cublasStatus_t (*gemm)(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n,
                           int k, const void *alpha, const void *a, cudaDataType a_type, int lda, const void *b,
                           cudaDataType b_type, int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                           cublasComputeType_t compute, cublasGemmAlgo_t algo);
    cublasStatus_t (*gemm_strided)(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m,
                                   int n, int k, const void *alpha, const void *a, cudaDataType a_type, int lda,
                                   long long int a_stride, const void *b, cudaDataType b_type, int ldb,
                                   long long int b_stride, const void *beta, void *c, cudaDataType c_type, int ldc,
                                   long long int c_stride, int batch, cublasComputeType_t compute,
                                   cublasGemmAlgo_t algo);
    /* NULL before cuBLAS 12.5 */
    cublasStatus_t (*gemm_grouped)(cublasHandle_t handle, const cublasOperation_t transa[],
                                   const cublasOperation_t transb[], const int m[], const int n[], const int k[],
                                   const void *alpha, const void *const a[], cudaDataType a_type, const int lda[],
                                   const void *const b[], cudaDataType b_type, const int ldb[], const void *beta,
                                   void *const c[], cudaDataType c_type, const int ldc[], int groups,
                                   const int group_size[], cublasComputeType_t compute);
};

/* Host arrays of cublasGemmGroupedBatchedEx, an element for each expert that has rows. */
struct moe_cublas_groups {
    cublasOperation_t transa[MOE_MAX_EXPERTS], transb[MOE_MAX_EXPERTS];
    int m[MOE_MAX_EXPERTS], n[MOE_MAX_EXPERTS], k[MOE_MAX_EXPERTS];
    int lda[MOE_MAX_EXPERTS], ldb[MOE_MAX_EXPERTS], ldc[MOE_MAX_EXPERTS];
    int size[MOE_MAX_EXPERTS];
    float alpha[MOE_MAX_EXPERTS], beta[MOE_MAX_EXPERTS];
    const void *pointers[3 * MOE_MAX_EXPERTS]; /* all a, then all b, then all c */
};

struct moe_cublas {
    void *library; /* of dlopen */
    int device;
    struct moe_cublas_api api;
    cublasHandle_t handle;
    pthread_mutex_t lock; /* over handle, offsets and groups, during a call */
    int32_t *offsets;     /* [MOE_MAX_EXPERTS + 1], pinned: the plan's offsets on the host */
    struct moe_cublas_groups *groups;
};

/* call->scratch of the cuBLAS paths begins with cuBLAS's own workspace. */
enum { MOE_CUBLAS_WORKSPACE = 32 << 20 };

/* Takes the lock, gives the handle the call's stream and workspace, and reads the plan's offsets to blas->offsets, for
 * which it waits for the stream. After success moe_cublas_end gives the lock back. */
moe_status moe_cublas_begin(const struct moe_call *call, const char *step);
void moe_cublas_end(const struct moe_call *call);

moe_status moe_cublas_failed(const struct moe_call *call, const char *step, cublasStatus_t status);

cudaDataType moe_cublas_type(moe_dtype dtype);

#ifdef __cplusplus
}
#endif

#endif
