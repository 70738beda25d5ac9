// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "kernels/cuda/device.h"

static __global__ void probe_kernel()
{
}

moe_status moe_cuda_probe(int32_t *cluster, struct moe_error *err)
{
    struct cudaFuncAttributes attributes;
    const cudaError_t e = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (e != cudaSuccess) {
        cudaGetLastError();
        return moe_fail(err, MOE_ERROR_NO_DEVICE,
                        "this build's kernels do not run on this GPU (build option gpu_archs): %s",
                        cudaGetErrorString(e));
    }

    // Of blocks as large as any in clusters of more than 8 (router/plan.cu), which have to be allowed.
    cudaLaunchConfig_t config = {};
    config.gridDim = 32;
    config.blockDim = 512;
    config.dynamicSmemBytes = 48 * 1024;
    int most = 0;
    cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    *cluster = cudaOccupancyMaxPotentialClusterSize(&most, probe_kernel, &config) == cudaSuccess ? most : 1;
    cudaGetLastError(); // before 9.0 there are no clusters, and that is an error
    return MOE_OK;
}
