/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Division by a number that the host knows before a kernel runs: a product and a shift, where a GPU takes twenty
 * instructions that wait for each other to divide by a number of which it knows nothing. In plain C, so that it can be
 * tested without a GPU.
 */
#ifndef MOE_KERNELS_CUDA_COMMON_DIVISOR_H
#define MOE_KERNELS_CUDA_COMMON_DIVISOR_H

#include "kernels/packed.h"

/* 2^shift / d, rounded up. With 2^(shift - 31) at least d the error, less than one in the last place, does not reach
 * the quotient of a number below 2^31. */
struct moe_divisor {
    uint32_t magic;
    uint32_t shift;
};

/* d: 1 to INT32_MAX. */
static inline struct moe_divisor moe_divisor_make(int32_t d)
{
    struct moe_divisor divisor = {0, 31};
    while ((uint64_t)1 << (divisor.shift - 31) < (uint64_t)d)
        divisor.shift++;
    divisor.magic = (uint32_t)((((uint64_t)1 << divisor.shift) + (uint64_t)d - 1) / (uint64_t)d);
    return divisor;
}

/* n / d, n from 0 on. */
static MOE_HOST_DEVICE inline int32_t moe_divide(int32_t n, struct moe_divisor by)
{
    return (int32_t)((uint64_t)(uint32_t)n * by.magic >> by.shift);
}

#endif
