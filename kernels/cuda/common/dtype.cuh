// SPDX-License-Identifier: Apache-2.0
// The three floating types on the device: conversion, loads and stores of several elements, and the step from a
// moe_dtype on the host to a type.
#ifndef MOE_KERNELS_CUDA_COMMON_DTYPE_CUH
#define MOE_KERNELS_CUDA_COMMON_DTYPE_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "moe.h"

static __device__ inline float moe_to_float(float v)
{
    return v;
}

static __device__ inline float moe_to_float(__nv_bfloat16 v)
{
    return __bfloat162float(v);
}

static __device__ inline float moe_to_float(__half v)
{
    return __half2float(v);
}

// Round to nearest even.
template <typename T> __device__ T moe_from_float(float v);

template <> __device__ inline float moe_from_float<float>(float v)
{
    return v;
}

template <> __device__ inline __nv_bfloat16 moe_from_float<__nv_bfloat16>(float v)
{
    return __float2bfloat16_rn(v);
}

template <> __device__ inline __half moe_from_float<__half>(float v)
{
    return __float2half_rn(v);
}

// Two elements of 16 bits in one register, x in the low half.
static __device__ inline uint32_t moe_pair(float x, float y, __nv_bfloat16)
{
    const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t *>(&v);
}

static __device__ inline uint32_t moe_pair(float x, float y, __half)
{
    const __half2 v = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t *>(&v);
}

// v as a value of `dtype`.
static __device__ inline float moe_round_to(float v, moe_dtype dtype)
{
    if (dtype == MOE_BF16)
        return moe_to_float(moe_from_float<__nv_bfloat16>(v));
    if (dtype == MOE_F16)
        return moe_to_float(moe_from_float<__half>(v));
    return v;
}

// N elements that the compiler moves with accesses of up to 16 bytes.
template <typename T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) moe_pack {
    T v[N];
};

// N elements from p as fp32. ALIGNED: p is aligned to the pack and all N are there; otherwise the first `valid` are,
// and the others count as 0.
template <bool ALIGNED, int N, typename T> __device__ inline void moe_load(const T *p, int64_t valid, float (&out)[N])
{
    if (ALIGNED) {
        const moe_pack<T, N> pack = *reinterpret_cast<const moe_pack<T, N> *>(p);
#pragma unroll
        for (int i = 0; i < N; i++)
            out[i] = moe_to_float(pack.v[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            out[i] = i < valid ? moe_to_float(p[i]) : 0.0f;
    }
}

// The reverse, rounding once.
template <bool ALIGNED, int N, typename T> __device__ inline void moe_store(T *p, int64_t valid, const float (&in)[N])
{
    if (ALIGNED) {
        moe_pack<T, N> pack;
#pragma unroll
        for (int i = 0; i < N; i++)
            pack.v[i] = moe_from_float<T>(in[i]);
        *reinterpret_cast<moe_pack<T, N> *>(p) = pack;
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < valid)
                p[i] = moe_from_float<T>(in[i]);
    }
}

// Calls f with a value of the type that `dtype` names: bf16, f16 or f32, which the runtime has checked.
template <typename F> void moe_with_dtype(moe_dtype dtype, F f)
{
    switch (dtype) {
    case MOE_BF16:
        f(__nv_bfloat16());
        break;
    case MOE_F16:
        f(__half());
        break;
    default:
        f(float());
        break;
    }
}

// Calls f with std::true_type-like constants, so that a flag can become a template argument.
template <bool V> struct moe_bool {
    static constexpr bool value = V;
};

template <typename F> void moe_with_bool(bool flag, F f)
{
    if (flag)
        f(moe_bool<true>());
    else
        f(moe_bool<false>());
}

#endif
