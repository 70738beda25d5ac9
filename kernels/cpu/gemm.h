/* SPDX-License-Identifier: Apache-2.0 */
/* The grouped product of the `cpu` path: out[r] = x[r] . weights[group of r]^T on all threads of a pool. */
#ifndef MOE_KERNELS_CPU_GEMM_H
#define MOE_KERNELS_CPU_GEMM_H

#include "kernels/cpu/ops.h"
#include "kernels/cpu/pool.h"

/* G groups, R rows of x, K deep, N wide. Rows of one group stand together. */
struct moe_cpu_gemm {
    int32_t groups;
    const int32_t *offsets; /* [G + 1], ends with R */
    int64_t depth, width;   /* K, N */

    const void *x; /* [.., K] x_dtype */
    moe_dtype x_dtype;
    const int32_t *x_rows; /* [R]: which row of x; NULL: row r is x[r] */

    struct moe_weights_view w; /* [G][N][K], or with gated [G][2N][K] */
    bool gated;                /* out = silu(x . first N) * (x . last N) */

    void *out;           /* [R, N] out_dtype */
    moe_dtype out_dtype; /* fp32 if not gated */

    void *scratch; /* moe_cpu_gemm_scratch bytes, aligned to 64 */
};

/* Enough for `rows` rows of depth `depth`, however they fall on the groups. */
size_t moe_cpu_gemm_scratch(int32_t threads, int64_t rows, int32_t groups, int64_t depth);
void moe_cpu_gemm_run(const struct moe_cpu_gemm *gemm, struct moe_pool *pool);

#endif
