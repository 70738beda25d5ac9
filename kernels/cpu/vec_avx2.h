/* SPDX-License-Identifier: Apache-2.0 */
/* The vectors that the templates are written in, as AVX2 with FMA and F16C. */
#ifndef MOE_KERNELS_CPU_VEC_AVX2_H
#define MOE_KERNELS_CPU_VEC_AVX2_H

#include <immintrin.h>

#include "config/convert.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 8, BLOCK_ROWS = 6 };
#define MOST_DOT_TOKENS 8

typedef __m256 vf;

INLINE vf vf_set(float value)
{
    return _mm256_set1_ps(value);
}

INLINE vf vf_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

INLINE void vf_store(float *p, vf a)
{
    _mm256_storeu_ps(p, a);
}

INLINE vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}

INLINE vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}

INLINE vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}

INLINE vf vf_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}

INLINE vf vf_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}

/* a * b + c */
INLINE vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}

INLINE vf vf_round(vf a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* a * 2^n, for n from -126 to 127 */
INLINE vf vf_scale(vf a, vf n)
{
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}

INLINE vf vf_load_as(const void *p, moe_dtype dtype)
{
    if (dtype == MOE_F32)
        return _mm256_loadu_ps(p);
    __m128i half = _mm_loadu_si128(p);
    if (dtype == MOE_F16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Two vectors of bf16 as fp32: the even elements in a, the odd ones in b. */
INLINE void vf_load_pair(vf *a, vf *b, const void *p)
{
    __m256i bits = _mm256_loadu_si256(p);
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    *b = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xffff0000)));
}

/* 2 * LANES consecutive numbers in a and b, put into the order of vf_load_pair. */
INLINE void vf_part_pair(vf *a, vf *b)
{
    vf even = _mm256_shuffle_ps(*a, *b, 0x88), odd = _mm256_shuffle_ps(*a, *b, 0xdd);
    *a = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
    *b = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
}

/* The upper halves, rounded to nearest even, NaN kept quiet; as 32-bit numbers. */
INLINE __m256i bf16_bits(vf a)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}

INLINE void vf_store_as(void *p, moe_dtype dtype, vf a)
{
    if (dtype == MOE_F32) {
        _mm256_storeu_ps(p, a);
    } else if (dtype == MOE_F16) {
        _mm_storeu_si128(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    } else {
        __m256i bits = bf16_bits(a);
        _mm_storeu_si128(p, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
    }
}

INLINE vf vf_load_part(const void *p, moe_dtype dtype, int n)
{
    float whole[LANES] = {0};
    if (n > 0)
        memcpy(whole, p, (size_t)n * (dtype == MOE_F32 ? 4 : 2));
    return vf_load_as(whole, dtype);
}

INLINE void vf_store_part(void *p, moe_dtype dtype, vf a, int n)
{
    float whole[LANES];
    vf_store_as(whole, dtype, a);
    if (n > 0)
        memcpy(p, whole, (size_t)n * (dtype == MOE_F32 ? 4 : 2));
}

/* The sums of four vectors. */
INLINE void vf_sum4(float sum[4], vf a, vf b, vf c, vf d)
{
    vf abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(sum, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

/* a[i][j] <-> a[j][i] */
INLINE void vf_transpose(vf a[LANES])
{
    vf t[LANES], u[LANES];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        a[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

#include "kernels/cpu/vec_exp.h"

#endif
