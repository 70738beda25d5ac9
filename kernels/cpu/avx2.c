/* SPDX-License-Identifier: Apache-2.0 */
/* AVX2, FMA and F16C: 16 registers, so 6 rows by 2 vectors of sums. */
#include "kernels/cpu/vec_avx2.h"

#define PER_UNIT                     1
#define units_mac(acc, w, x)         vf_fma(w, x, acc)
#define units_load(p, dtype)         vf_load_as(p, dtype)
#define units_load_part(p, dtype, n) vf_load_part(p, dtype, n)
#define DOT_ROWS(tokens)             ((tokens) <= 2 ? 4 : (tokens) <= 5 ? 2 : 1)
#include "kernels/cpu/product_tmpl.h"
#include "kernels/cpu/rows_tmpl.h"

void moe_cpu_fill_avx2(struct moe_cpu_ops *ops)
{
    ops->features = "avx2";
    ops->lanes = LANES;
    ops->block_rows = BLOCK_ROWS;
    ops->f32 = product;
    fill_rows(ops);
}
