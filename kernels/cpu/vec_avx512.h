/* SPDX-License-Identifier: Apache-2.0 */
/* The vectors that the templates are written in, as AVX-512 F, BW, DQ and VL. */
#ifndef MOE_KERNELS_CPU_VEC_AVX512_H
#define MOE_KERNELS_CPU_VEC_AVX512_H

#include <immintrin.h>

#include "config/convert.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, BLOCK_ROWS = 12 };
#define MOST_DOT_TOKENS 8

typedef __m512 vf;

INLINE vf vf_set(float value)
{
    return _mm512_set1_ps(value);
}

INLINE vf vf_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

INLINE void vf_store(float *p, vf a)
{
    _mm512_storeu_ps(p, a);
}

INLINE vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}

INLINE vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}

INLINE vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}

INLINE vf vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}

INLINE vf vf_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}

/* a * b + c */
INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}

INLINE vf vf_round(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* a * 2^n */
INLINE vf vf_scale(vf a, vf n)
{
    return _mm512_scalef_ps(a, n);
}

INLINE __mmask16 first_lanes(int n)
{
    return (__mmask16)((1u << n) - 1u);
}

INLINE vf f32_from_bf16(__m256i half)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE vf vf_load_as(const void *p, moe_dtype dtype)
{
    if (dtype == MOE_F32)
        return _mm512_loadu_ps(p);
    __m256i half = _mm256_loadu_si256(p);
    return dtype == MOE_F16 ? _mm512_cvtph_ps(half) : f32_from_bf16(half);
}

INLINE vf vf_load_part(const void *p, moe_dtype dtype, int n)
{
    if (dtype == MOE_F32)
        return _mm512_maskz_loadu_ps(first_lanes(n), p);
    __m256i half = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return dtype == MOE_F16 ? _mm512_cvtph_ps(half) : f32_from_bf16(half);
}

/* Two vectors of bf16 as fp32: the even elements in a, the odd ones in b. */
INLINE void vf_load_pair(vf *a, vf *b, const void *p)
{
    __m512i bits = _mm512_loadu_si512(p);
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    *b = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)));
}

/* 2 * LANES consecutive numbers in a and b, put into the order of vf_load_pair. */
INLINE void vf_part_pair(vf *a, vf *b)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    const vf first = *a;
    *a = _mm512_permutex2var_ps(first, even, *b);
    *b = _mm512_permutex2var_ps(first, odd, *b);
}

/* The upper halves, rounded to nearest even, NaN kept quiet. Not vcvtneps2bf16, which makes zeros of subnormals. */
INLINE __m256i bf16_bits(vf a)
{
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE void vf_store_part(void *p, moe_dtype dtype, vf a, int n)
{
    if (dtype == MOE_F32)
        _mm512_mask_storeu_ps(p, first_lanes(n), a);
    else
        _mm256_mask_storeu_epi16(p, first_lanes(n),
                                 dtype == MOE_F16 ? _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT) : bf16_bits(a));
}

INLINE void vf_store_as(void *p, moe_dtype dtype, vf a)
{
    vf_store_part(p, dtype, a, LANES);
}

/* The sums of four vectors. */
INLINE void vf_sum4(float sum[4], vf a, vf b, vf c, vf d)
{
    vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vf cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    /* abcd of a quarter in each quarter */
    vf abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(sum, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

/* a[i][j] <-> a[j][i] */
INLINE void vf_transpose(vf a[LANES])
{
    vf t[LANES], u[LANES];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    /* u[i + k]: column 4 * quarter + k of rows i to i + 3, in each quarter */
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int k = 0; k < 4; k++) {
        vf top_even = _mm512_shuffle_f32x4(u[k], u[k + 4], 0x88), top_odd = _mm512_shuffle_f32x4(u[k], u[k + 4], 0xdd);
        vf low_even = _mm512_shuffle_f32x4(u[k + 8], u[k + 12], 0x88);
        vf low_odd = _mm512_shuffle_f32x4(u[k + 8], u[k + 12], 0xdd);
        a[k] = _mm512_shuffle_f32x4(top_even, low_even, 0x88);
        a[k + 8] = _mm512_shuffle_f32x4(top_even, low_even, 0xdd);
        a[k + 4] = _mm512_shuffle_f32x4(top_odd, low_odd, 0x88);
        a[k + 12] = _mm512_shuffle_f32x4(top_odd, low_odd, 0xdd);
    }
}

#include "kernels/cpu/vec_exp.h"

#endif
