// SPDX-License-Identifier: Apache-2.0
#ifndef MOE_KERNELS_CUDA_COMMON_SCAN_CUH
#define MOE_KERNELS_CUDA_COMMON_SCAN_CUH

#include <stdint.h>

// The sum of v over this lane and all lower ones. By a whole warp.
static __device__ __forceinline__ int32_t moe_scan_warp(int32_t v)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int32_t lower = __shfl_up_sync(0xffffffffu, v, d);
        if (lane >= d)
            v += lower;
    }
    return v;
}

#endif
