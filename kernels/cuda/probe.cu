// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "kernels/cuda/device.h"

static __global__ void probe_kernel()
{
}

moe_status moe_cuda_probe(struct moe_error *err)
{
    struct cudaFuncAttributes attributes;
    const cudaError_t e = cudaFuncGetAttributes(&attributes, probe_kernel);
    if (e == cudaSuccess)
        return MOE_OK;
    cudaGetLastError();
    return moe_fail(err, MOE_ERROR_NO_DEVICE,
                    "this build's kernels do not run on this GPU (build option gpu_archs): %s", cudaGetErrorString(e));
}
