// SPDX-License-Identifier: Apache-2.0
#ifndef MOE_KERNELS_CUDA_COMMON_ACTIVATION_CUH
#define MOE_KERNELS_CUDA_COMMON_ACTIVATION_CUH

static __device__ inline float moe_silu(float v)
{
    return v / (1.0f + expf(-v));
}

#endif
