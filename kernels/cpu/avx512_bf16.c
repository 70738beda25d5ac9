/* SPDX-License-Identifier: Apache-2.0 */
/*
 * AVX-512 BF16: products of two bf16 by vdpbf16ps, twice as many a cycle as fp32. The products are exact and summed in
 * fp32, but the instruction takes subnormal operands for zeros and flushes subnormal results: both are below 1.2e-38.
 */
#include "kernels/cpu/vec_avx512.h"

INLINE vf pairs_mac(vf acc, vf w, vf x)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
}

INLINE vf pairs_load_part(const void *p, int elements)
{
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((__mmask32)((1ull << elements) - 1), p));
}

#define PER_UNIT                            2
#define units_mac(acc, w, x)                pairs_mac(acc, w, x)
#define units_load(p, dtype)                ((void)(dtype), _mm512_loadu_ps(p))
#define units_load_part(p, dtype, elements) ((void)(dtype), pairs_load_part(p, elements))
#define DOT_ROWS(tokens)                    ((tokens) <= 2 ? 8 : (tokens) <= 4 ? 6 : (tokens) <= 6 ? 4 : 3)
#include "kernels/cpu/product_tmpl.h"

void moe_cpu_fill_avx512_bf16(struct moe_cpu_ops *ops)
{
    ops->features = "avx512 avx512_bf16";
    ops->bf16 = product;
}
