// SPDX-License-Identifier: Apache-2.0
// Host side of a kernel launch: the launch, its size, and what went wrong.
#ifndef MOE_KERNELS_CUDA_COMMON_LAUNCH_CUH
#define MOE_KERNELS_CUDA_COMMON_LAUNCH_CUH

#include <cuda_runtime.h>

#include "config/error.h"

// True if this build has an image for compute capability 9.0. Only that holds moe_grid_wait(): the images of older
// architectures, which would run there too, leave it empty.
constexpr bool moe_built_for_90()
{
    constexpr int archs[] = {__CUDA_ARCH_LIST__};
    for (int arch : archs)
        if (arch == 900)
            return true;
    return false;
}

static inline bool moe_has_wgmma(int32_t compute_capability)
{
    return compute_capability == 90 && moe_built_for_90();
}

// kernel<<<grid, block, shared, stream>>>(args...) in clusters of `cluster` blocks, of which grid.x is a multiple: 1,
// or on a device of compute capability 9.0 up to 8, or more where the kernel may have clusters of a size that is not
// portable. `dependent` (the device is one): the kernel may start before the one ahead of it in the stream has
// finished, and must call moe_grid_wait() (ptx.cuh). moe_launched() tells how it went.
template <typename... Params, typename... Args>
void moe_launch_cluster(void (*kernel)(Params...), unsigned cluster, dim3 grid, dim3 block, size_t shared, void *stream,
                        bool dependent, const Args &...args)
{
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = (cudaStream_t)stream;
    config.attrs = attributes;
    if (dependent && moe_built_for_90()) {
        cudaLaunchAttribute &early = attributes[config.numAttrs++];
        early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early.val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        cudaLaunchAttribute &blocks = attributes[config.numAttrs++];
        blocks.id = cudaLaunchAttributeClusterDimension;
        blocks.val.clusterDim = {cluster, 1, 1};
    }
    cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// The same without clusters.
template <typename... Params, typename... Args>
void moe_launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, void *stream, bool dependent,
                const Args &...args)
{
    moe_launch_cluster(kernel, 1, grid, block, shared, stream, dependent, args...);
}

// After a launch. Reading the error also clears it, so that one failed call does not poison the next.
static inline moe_status moe_launched(struct moe_error *err, const char *kernel)
{
    const cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess)
        return MOE_OK;
    return moe_fail(err, MOE_ERROR_DEVICE, "%s: %s", kernel, cudaGetErrorString(e));
}

// Blocks for a kernel whose blocks loop over `work` items: never more than there is work, on at most max_sms SMs if
// that is set (one block on each), else per_sm on each of `sms`.
static inline unsigned moe_grid(int64_t work, int32_t max_sms, int32_t sms, int32_t per_sm)
{
    const int64_t most = max_sms > 0 ? max_sms : (int64_t)sms * per_sm;
    return (unsigned)(work < most ? work : most);
}

static inline int64_t moe_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline bool moe_aligned16(const void *p)
{
    return ((uintptr_t)p & 15) == 0;
}

#endif
