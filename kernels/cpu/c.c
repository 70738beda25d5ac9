/* SPDX-License-Identifier: Apache-2.0 */
/* Plain C: what a processor without a rung of its own runs. */
#include "kernels/cpu/vec_c.h"

#define PER_UNIT                     1
#define units_mac(acc, w, x)         vf_fma(w, x, acc)
#define units_load(p, dtype)         vf_load_as(p, dtype)
#define units_load_part(p, dtype, n) vf_load_part(p, dtype, n)
#define DOT_ROWS(tokens)             ((tokens) == 1 ? 4 : 2)
#include "kernels/cpu/product_tmpl.h"
#include "kernels/cpu/rows_tmpl.h"

void moe_cpu_fill_c(struct moe_cpu_ops *ops)
{
    ops->features = "none";
    ops->lanes = LANES;
    ops->block_rows = BLOCK_ROWS;
    ops->f32 = product;
    fill_rows(ops);
}
