/* SPDX-License-Identifier: Apache-2.0 */
/* The vectors that the templates are written in, for any processor: loops that a compiler can make vectors of. */
#ifndef MOE_KERNELS_CPU_VEC_C_H
#define MOE_KERNELS_CPU_VEC_C_H

#include <math.h>

#include "config/convert.h"

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 4, BLOCK_ROWS = 4 };
#define MOST_DOT_TOKENS 2

typedef struct {
    float v[LANES];
} vf;

#define EACH for (int i = 0; i < LANES; i++)

INLINE vf vf_set(float value)
{
    vf r;
    EACH r.v[i] = value;
    return r;
}

INLINE vf vf_load(const float *p)
{
    vf r;
    memcpy(&r, p, sizeof r);
    return r;
}

INLINE void vf_store(float *p, vf a)
{
    memcpy(p, &a, sizeof a);
}

INLINE vf vf_add(vf a, vf b)
{
    EACH a.v[i] += b.v[i];
    return a;
}

INLINE vf vf_mul(vf a, vf b)
{
    EACH a.v[i] *= b.v[i];
    return a;
}

/* a * b + c */
INLINE vf vf_fma(vf a, vf b, vf c)
{
    EACH c.v[i] += a.v[i] * b.v[i];
    return c;
}

INLINE vf vf_silu(vf a)
{
    EACH a.v[i] /= 1.0f + expf(-a.v[i]);
    return a;
}

INLINE vf vf_load_part(const void *p, moe_dtype dtype, int n)
{
    vf r = vf_set(0);
    for (int i = 0; i < n; i++)
        r.v[i] = moe_load_f32(p, dtype, i);
    return r;
}

INLINE vf vf_load_as(const void *p, moe_dtype dtype)
{
    return vf_load_part(p, dtype, LANES);
}

/* Two vectors of bf16 as fp32: the even elements in a, the odd ones in b. */
INLINE void vf_load_pair(vf *a, vf *b, const void *p)
{
    for (int i = 0; i < LANES; i++) {
        a->v[i] = moe_load_f32(p, MOE_BF16, 2 * i);
        b->v[i] = moe_load_f32(p, MOE_BF16, 2 * i + 1);
    }
}

/* 2 * LANES consecutive numbers in a and b, put into the order of vf_load_pair. */
INLINE void vf_part_pair(vf *a, vf *b)
{
    const vf both[2] = {*a, *b};
    for (int i = 0; i < LANES; i++) {
        a->v[i] = both[i / (LANES / 2)].v[2 * i % LANES];
        b->v[i] = both[i / (LANES / 2)].v[2 * i % LANES + 1];
    }
}

INLINE void vf_store_part(void *p, moe_dtype dtype, vf a, int n)
{
    for (int i = 0; i < n; i++)
        moe_store_f32(p, dtype, i, a.v[i]);
}

INLINE void vf_store_as(void *p, moe_dtype dtype, vf a)
{
    vf_store_part(p, dtype, a, LANES);
}

/* The sums of four vectors. */
INLINE void vf_sum4(float sum[4], vf a, vf b, vf c, vf d)
{
    const vf all[4] = {a, b, c, d};
    for (int j = 0; j < 4; j++)
        sum[j] = (all[j].v[0] + all[j].v[1]) + (all[j].v[2] + all[j].v[3]);
}

/* a[i][j] <-> a[j][i] */
INLINE void vf_transpose(vf a[LANES])
{
    vf t[LANES];
    for (int j = 0; j < LANES; j++)
        EACH t[j].v[i] = a[i].v[j];
    for (int j = 0; j < LANES; j++)
        a[j] = t[j];
}

#undef EACH

#endif
