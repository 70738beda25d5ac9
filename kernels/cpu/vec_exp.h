/* SPDX-License-Identifier: Apache-2.0 */
/* exp and silu in the vectors of the including file: vf_set, _add, _mul, _fma, _div, _max, _min, _round and _scale. */
#ifndef MOE_KERNELS_CPU_VEC_EXP_H
#define MOE_KERNELS_CPU_VEC_EXP_H

/* exp(a) = 2^n * exp(r) with n = round(a / ln 2) and |r| <= ln 2 / 2; the Taylor series to r^7 errs by 4e-9 there, so
 * that the rounding of fp32 is what remains. Beyond the range of fp32 it stays at the ends; NaN stays NaN. */
INLINE vf vf_exp(vf a)
{
    /* max and min return their second operand where one is NaN */
    a = vf_min(vf_set(88.3f), vf_max(vf_set(-87.3f), a));
    vf n = vf_round(vf_mul(a, vf_set(1.44269504f)));
    /* ln 2 in two parts: n times the first is exact */
    vf r = vf_fma(n, vf_set(-0.693359375f), a);
    r = vf_fma(n, vf_set(2.12194440e-4f), r);

    vf p = vf_set(1.0f / 5040);
    p = vf_fma(p, r, vf_set(1.0f / 720));
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
    return vf_scale(p, n);
}

/* Where the exponential ends a number below zero must end too: the result is -4e-37 there, not a share of it. */
INLINE vf vf_silu(vf a)
{
    vf e = vf_exp(vf_mul(a, vf_set(-1.0f)));

    return vf_div(vf_max(vf_set(-88.3f), a), vf_add(vf_set(1.0f), e));
}

#endif
