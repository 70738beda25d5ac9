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

// The same of two numbers with one reciprocal, that of both denominators' product: reciprocals and exponentials go
// through a unit of half a warp a cycle, which a tile's end waits for. Exponentials end at 2^60, so that the product is
// finite, and numbers at -64 there: where that is in use a result is at most 6e-17. NaN stays with its own number.
static __device__ inline void moe_silu_fast_both(float &v, float &w)
{
    float e, f, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(fminf(v * -1.442695041f, 60.0f)));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(f) : "f"(fminf(w * -1.442695041f, 60.0f)));
    e += 1.0f;
    f += 1.0f;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(e * f));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(-64.0f));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(w) : "f"(-64.0f));
    v *= inverse * f;
    w *= inverse * e;
}

#endif
