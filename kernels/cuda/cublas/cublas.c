/* SPDX-License-Identifier: Apache-2.0 */
/* libcublas: opened at run time, one handle for all calls of a context. */
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/cublas/internal.h"

static void *open_library(void)
{
    static const char *const names[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so"};
    void *library = NULL;

    for (size_t i = 0; i < sizeof names / sizeof names[0] && !library; i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    return library;
}

/* Copies the address of `name` to the function pointer at `function`: ISO C has no cast from void * to one. */
static int find(void *library, const char *name, void *function)
{
    void *address = dlsym(library, name);

    memcpy(function, &address, sizeof address);
    return address != NULL;
}

static moe_status load_api(void *library, struct moe_cublas_api *api, struct moe_error *err)
{
    const struct {
        const char *name;
        void *function;
    } needed[] = {
        {"cublasCreate_v2", &api->create},
        {"cublasDestroy_v2", &api->destroy},
        {"cublasSetStream_v2", &api->set_stream},
        {"cublasSetWorkspace_v2", &api->set_workspace},
        {"cublasSetMathMode", &api->set_math_mode},
        {"cublasGetStatusString", &api->status_string},
        {"cublasGemmEx", &api->gemm},
        {"cublasGemmStridedBatchedEx", &api->gemm_strided},
    };

    for (size_t i = 0; i < sizeof needed / sizeof needed[0]; i++)
        if (!find(library, needed[i].name, needed[i].function))
            return moe_fail(err, MOE_ERROR_UNSUPPORTED, "libcublas has no function '%s'", needed[i].name);
    find(library, "cublasGemmGroupedBatchedEx", &api->gemm_grouped);
    return MOE_OK;
}

static moe_status make_handle(struct moe_cublas *blas, struct moe_error *err)
{
    cublasStatus_t status = blas->api.create(&blas->handle);

    if (status != CUBLAS_STATUS_SUCCESS) {
        cudaGetLastError();
        blas->handle = NULL;
        return moe_fail(err, MOE_ERROR_UNSUPPORTED, "cublasCreate: %s", blas->api.status_string(status));
    }
    /* fp32 stays fp32 (no TF32), and sums of 16-bit products stay fp32 where cuBLAS splits K. */
    status = blas->api.set_math_mode(blas->handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
    if (status != CUBLAS_STATUS_SUCCESS)
        return moe_fail(err, MOE_ERROR_UNSUPPORTED, "cublasSetMathMode: %s", blas->api.status_string(status));
    return MOE_OK;
}

static moe_status fill(struct moe_cublas *blas, struct moe_error *err)
{
    cudaError_t e = cudaGetDevice(&blas->device);
    moe_status status;

    blas->library = open_library();
    if (!blas->library)
        return moe_fail(err, MOE_ERROR_UNSUPPORTED, "libcublas.so.13 or .12 was not found");
    status = load_api(blas->library, &blas->api, err);
    if (status != MOE_OK)
        return status;
    blas->groups = malloc(sizeof *blas->groups);
    if (!blas->groups)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for cuBLAS's arguments");
    if (e == cudaSuccess)
        e = cudaHostAlloc((void **)&blas->offsets, (MOE_MAX_EXPERTS + 1) * sizeof blas->offsets[0],
                          cudaHostAllocDefault);
    if (e != cudaSuccess) {
        cudaGetLastError();
        return moe_fail(err, MOE_ERROR_DEVICE, "pinned memory for cuBLAS: %s", cudaGetErrorString(e));
    }
    return make_handle(blas, err);
}

moe_status moe_cublas_create(struct moe_cublas **blas, struct moe_error *err)
{
    struct moe_cublas *b = calloc(1, sizeof *b);
    moe_status status;

    *blas = NULL;
    if (!b)
        return moe_fail(err, MOE_ERROR_OUT_OF_MEMORY, "no memory for a cuBLAS handle");
    pthread_mutex_init(&b->lock, NULL);
    status = fill(b, err);
    if (status != MOE_OK) {
        moe_cublas_destroy(b);
        return status;
    }
    *blas = b;
    return MOE_OK;
}

void moe_cublas_destroy(struct moe_cublas *blas)
{
    int previous = 0;

    if (!blas)
        return;
    if (cudaGetDevice(&previous) != cudaSuccess)
        previous = blas->device;
    if (cudaSetDevice(blas->device) == cudaSuccess) {
        if (blas->handle)
            blas->api.destroy(blas->handle);
        if (blas->offsets)
            cudaFreeHost(blas->offsets);
        if (previous != blas->device)
            cudaSetDevice(previous);
    }
    cudaGetLastError();
    if (blas->library)
        dlclose(blas->library);
    pthread_mutex_destroy(&blas->lock);
    free(blas->groups);
    free(blas);
}

/* ---- A call ---- */

moe_status moe_cublas_failed(const struct moe_call *call, const char *step, cublasStatus_t status)
{
    cudaGetLastError();
    return moe_fail(call->error, status == CUBLAS_STATUS_NOT_SUPPORTED ? MOE_ERROR_UNSUPPORTED : MOE_ERROR_DEVICE,
                    "%s: cuBLAS: %s", step, call->exec->cublas->api.status_string(status));
}

static moe_status prepare(const struct moe_call *call, const char *step)
{
    struct moe_cublas *blas = call->exec->cublas;
    cudaStream_t stream = (cudaStream_t)call->stream;
    cublasStatus_t status = blas->api.set_stream(blas->handle, stream);
    cudaError_t e;

    /* In this order: setting the stream resets the workspace. */
    if (status == CUBLAS_STATUS_SUCCESS)
        status = blas->api.set_workspace(blas->handle, call->scratch, MOE_CUBLAS_WORKSPACE);
    if (status != CUBLAS_STATUS_SUCCESS)
        return moe_cublas_failed(call, step, status);

    e = cudaMemcpyAsync(blas->offsets, call->plan.plan.offsets,
                        ((size_t)call->plan.groups + 1) * sizeof blas->offsets[0], cudaMemcpyDeviceToHost, stream);
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(stream);
    if (e != cudaSuccess) {
        cudaGetLastError();
        return moe_fail(call->error, MOE_ERROR_DEVICE, "%s: reading the counts: %s", step, cudaGetErrorString(e));
    }
    return MOE_OK;
}

moe_status moe_cublas_begin(const struct moe_call *call, const char *step)
{
    struct moe_cublas *blas = call->exec->cublas;
    moe_status status;

    if (!blas)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED, "%s: there is no cuBLAS", step);
    if (call->w13.rows > INT32_MAX || call->w13.cols > INT32_MAX)
        return moe_fail(call->error, MOE_ERROR_UNSUPPORTED, "%s: weights of %lld x %lld are too large for cuBLAS", step,
                        (long long)call->w13.rows, (long long)call->w13.cols);
    pthread_mutex_lock(&blas->lock);
    status = prepare(call, step);
    if (status != MOE_OK)
        pthread_mutex_unlock(&blas->lock);
    return status;
}

void moe_cublas_end(const struct moe_call *call)
{
    pthread_mutex_unlock(&call->exec->cublas->lock);
}

cudaDataType moe_cublas_type(moe_dtype dtype)
{
    return dtype == MOE_BF16 ? CUDA_R_16BF : dtype == MOE_F16 ? CUDA_R_16F : CUDA_R_32F;
}

/* After cuBLAS's workspace come the device copies of the grouped call's pointers. */
size_t moe_scratch_cublas(const struct moe_call *call)
{
    return MOE_CUBLAS_WORKSPACE + 3 * (size_t)call->plan.groups * sizeof(void *);
}
