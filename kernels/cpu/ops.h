/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inner loops of the `cpu` path, one table of functions filled for what the processor has: plain C first, then
 * overwritten by AVX2, AVX-512 and AVX-512 BF16.
 *
 * A product computes c[row][token] = weights[row] . x[token]. Operands are counted in units of 4 bytes of the depth:
 * one fp32, or two bf16 where the processor multiplies these in pairs. Tokens come packed, in one of two forms:
 *
 * - a panel, [units][2 * lanes], tokens side by side. tile() multiplies it with a block of
 *   weight rows, one weight for all tokens at a time: there is nothing to add up across a vector.
 * - rows, for dot(): few tokens, the weights streamed from memory and used where they stand. Groups of a few rows are
 *   cut into blocks of moe_cpu_dot_units, [group][block][tokens][units of the block], so that one block stays in the
 *   first-level cache.
 *
 * Depths are padded with zeros to MOE_CPU_PAD units, so that only what touches unpacked memory knows about tails.
 */
#ifndef MOE_KERNELS_CPU_OPS_H
#define MOE_KERNELS_CPU_OPS_H

#include <stdbool.h>

#include "kernels/kernels.h"

enum {
    MOE_CPU_PAD = 16,                             /* units */
    MOE_CPU_DEPTH = 512,                          /* units of a block of weights */
    MOE_CPU_STRIDE = MOE_CPU_DEPTH + MOE_CPU_PAD, /* from row to row of a block: off the powers of two, so that the
                                                     rows do not fight for the same cache sets */
    MOE_CPU_DOT_REGION = 256 << 10,               /* bytes of weights: two of them and x fit in 1 MiB of L2 */
    MOE_CPU_BLOCK_ROWS = 12,                      /* the most rows of a block */
    MOE_CPU_LANES = 16,                           /* the most lanes of a vector */
};

/* Weight rows as they lie in memory. */
struct moe_cpu_weights {
    const char *data;
    size_t row_bytes;
    moe_dtype dtype;
};

/* Where the next block of weights will be read: tile() fetches it while it computes. */
struct moe_cpu_ahead {
    const char *data; /* NULL: nothing to fetch */
    size_t row_bytes;
    size_t unit_bytes;
};

/* Units of a block of dot(). Up to four tokens are served by so many streams of weights that they come from the second
 * level fast enough, and long blocks cost fewer sums; more tokens leave room for the weights in the first (32 KiB). */
static inline int64_t moe_cpu_dot_units(int32_t tokens)
{
    return (tokens <= 4 ? 8192 : 4096) / tokens / MOE_CPU_PAD * MOE_CPU_PAD;
}

struct moe_cpu_product {
    int32_t per_unit; /* elements of the depth in a unit: 1 (any dtype, as fp32) or 2 (bf16) */

    /* rows[i], i < count <= 2 * lanes, each `depth` elements of dtype -> a panel. */
    void (*pack_panel)(float *to, const void *const *rows, int32_t count, moe_dtype dtype, int64_t depth);
    /* rows[i], i < count -> rows for dot() with weights of w_dtype. */
    void (*pack_rows)(float *to, const void *const *rows, int32_t count, moe_dtype dtype, moe_dtype w_dtype,
                      int64_t depth);
    /* `depth` elements of each of `rows` weight rows -> block[row][MOE_CPU_STRIDE], padded. */
    void (*load)(float *block, const struct moe_cpu_weights *w, int32_t rows, int64_t depth);
    /* c[row][token] (+)= block . panel, for ops.block_rows rows and 2 * lanes tokens. */
    void (*tile)(float *c, int64_t ldc, const float *block, const float *panel, int64_t units, bool add,
                 const struct moe_cpu_ahead *ahead);
    /* c[row][token] = w . x for `rows` weight rows and the `tokens` packed rows of x; `next` is where the weights after
     * these will be read, to be fetched. */
    void (*dot)(float *c, int64_t ldc, const struct moe_cpu_weights *w, int64_t rows, const float *x, int32_t tokens,
                int64_t depth, const char *next);
};

struct moe_cpu_ops {
    const char *features;
    int32_t lanes, block_rows;
    struct moe_cpu_product f32;  /* operands of any dtype */
    struct moe_cpu_product bf16; /* both operands bf16; tile NULL: use f32 */

    /* to[token][row] = silu(gate[row][token]) * up[row][token], and = c[row][token]; `to` has `stride` elements a
     * token. Reads rows and tokens up to a multiple of the lanes. */
    void (*silu)(void *to, moe_dtype dtype, int64_t stride, const float *gate, const float *up, int64_t ldc,
                 int64_t rows, int64_t tokens);
    void (*write)(float *to, int64_t stride, const float *c, int64_t ldc, int64_t rows, int64_t tokens);
    /* to[i] = sum over s < slots with slot_row[s] >= 0, in that order, of row_weight[row] * down[row][i], for i < n. */
    void (*combine)(void *to, moe_dtype dtype, const float *down, int64_t stride, const int32_t *slot_row,
                    const float *row_weight, int32_t slots, int64_t n);
    void (*convert)(void *to, moe_dtype to_dtype, const void *from, moe_dtype from_dtype, int64_t n);
};

/* The table for this processor, made on first use. */
const struct moe_cpu_ops *moe_cpu_ops(void);

/* For tests and measurements: "c", "avx2", "avx512" or "avx512_bf16" from now on, NULL: the best. False if the
 * processor lacks it. Not while a forward runs. */
bool moe_cpu_force(const char *isa);

void moe_cpu_fill_c(struct moe_cpu_ops *ops);
void moe_cpu_fill_avx2(struct moe_cpu_ops *ops);
void moe_cpu_fill_avx512(struct moe_cpu_ops *ops);
void moe_cpu_fill_avx512_bf16(struct moe_cpu_ops *ops);

#endif
