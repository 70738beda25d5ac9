// SPDX-License-Identifier: Apache-2.0
#ifndef MOE_KERNELS_CUDA_COMMON_ACTIVATION_CUH
#define MOE_KERNELS_CUDA_COMMON_ACTIVATION_CUH

static __device__ inline float moe_silu(float v)
{
    return v / (1.0f + expf(-v));
}

// To a few units in the last place of fp32, without a subroutine: for results that round to 16 bits.
static __device__ inline float moe_silu_fast(float v)
{
    return __fdividef(v, 1.0f + __expf(-v));
}

#endif
