/* SPDX-License-Identifier: Apache-2.0 */
/* How wrong a path may be: the one table that tests and `moe replay --verify` go by. */
#ifndef MOE_KERNELS_BUDGET_H
#define MOE_KERNELS_BUDGET_H

#include "moe.h"

/* The most that a token's row of the layer's output may be off, ||out - exact|| / ||exact||, given the same ids and
 * weights; exact is the layer in fp64 on the operands as rounded to `dtype`. */
static inline double moe_error_budget(moe_dtype dtype)
{
    switch (dtype) {
    case MOE_BF16:
        return 1e-2;
    case MOE_F16:
        return 1.5e-3;
    default:
        return 1e-5;
    }
}

#endif
