// SPDX-License-Identifier: Apache-2.0
#ifndef MOE_KERNELS_CUDA_COMMON_ACTIVATION_CUH
#define MOE_KERNELS_CUDA_COMMON_ACTIVATION_CUH

static __device__ inline float moe_silu(float v)
{
    return v / (1.0f + expf(-v));
}

// To a few units in the last place of fp32, in as few instructions as can be: for results that round to 16 bits. Where
// the exponential is infinite the result is zero.
static __device__ inline float moe_silu_fast(float v)
{
    float e, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * -1.442695041f)); // log2(e)
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + e));
    return v * inverse;
}

#endif
