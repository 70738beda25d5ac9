/* SPDX-License-Identifier: Apache-2.0 */
/* AVX-512 F, BW, DQ and VL: 32 registers, 12 rows by 2 vectors of sums. */
#include "kernels/cpu/vec_avx512.h"

#define PER_UNIT                     1
#define units_mac(acc, w, x)         vf_fma(w, x, acc)
#define units_load(p, dtype)         vf_load_as(p, dtype)
#define units_load_part(p, dtype, n) vf_load_part(p, dtype, n)
#define DOT_ROWS(tokens)             ((tokens) <= 2 ? 8 : (tokens) <= 4 ? 6 : (tokens) <= 6 ? 4 : 3)
#include "kernels/cpu/product_tmpl.h"
#include "kernels/cpu/rows_tmpl.h"

void moe_cpu_fill_avx512(struct moe_cpu_ops *ops)
{
    ops->features = "avx512";
    ops->lanes = LANES;
    ops->block_rows = BLOCK_ROWS;
    ops->f32 = product;
    fill_rows(ops);
}
