// SPDX-License-Identifier: Apache-2.0
// Weights that will be used first if most experts get tokens, asked for before the routing is known: little else reads
// memory while the routing runs.
#ifndef MOE_KERNELS_CUDA_COMMON_GUESS_CUH
#define MOE_KERNELS_CUDA_COMMON_GUESS_CUH

#include "kernels/cuda/common/ptx.cuh"
#include "kernels/packed.h"

// Tiles (MOE_PACKED_TILE_BYTES) of a band that a block asks for, `all` of them where most groups get tokens: with fewer
// pairs of token and slot than twice the groups half of them, with fewer than half the groups none.
static inline int32_t moe_guessed_tiles(int64_t pairs, int32_t groups, int32_t all)
{
    return pairs >= 2 * (int64_t)groups ? all : pairs >= groups / 2 ? all / 2 : 0;
}

// By one thread of a block: `tiles` tiles from the front of a band of packed w13. Bands are numbered through all
// groups.
static __device__ inline void moe_fetch_guess(const char *w13, int hidden, int intermediate, int groups, int band,
                                              int tiles)
{
    const int bands = (2 * intermediate + MOE_PACKED_ROWS - 1) / MOE_PACKED_ROWS, group = band / bands;
    const int64_t rows = 2 * (int64_t)intermediate, blocks = moe_packed_blocks(hidden);
    const int64_t left = moe_packed_rows(rows) - band % bands * MOE_PACKED_ROWS;
    const uint32_t bytes = left >= MOE_PACKED_ROWS ? MOE_PACKED_TILE_BYTES : (uint32_t)left * MOE_PACKED_ROW_BYTES;
    const char *from =
        w13 + group * moe_packed_expert_bytes(rows, hidden) + band % bands * blocks * MOE_PACKED_TILE_BYTES;
    for (int i = 0; group < groups && i < tiles && i < blocks; i++)
        moe_prefetch_l2(from + (int64_t)i * bytes, bytes);
}

#endif
