// SPDX-License-Identifier: Apache-2.0
// How a block that chooses experts for a range of tokens tells the plan how many of them have chosen each (struct
// moe_tally in router.h): it counts in shared memory, by whatever threads, in the form that the tally has.
#ifndef MOE_ROUTER_TALLY_CUH
#define MOE_ROUTER_TALLY_CUH

#include "router/router.h"

static __host__ __device__ inline int moe_tally_words(int32_t experts)
{
    return (experts + 3) / 4;
}

// A range's row with no counts, by the whole block; the first may be added after its next barrier.
static __device__ inline void moe_tally_clear(uint32_t *row, int32_t experts)
{
    for (int w = threadIdx.x; w < moe_tally_words(experts); w += blockDim.x)
        row[w] = 0;
}

// One more token has chosen this expert.
static __device__ inline void moe_tally_add(uint32_t *row, int32_t expert)
{
    atomicAdd(&row[expert / 4], 1u << expert % 4 * 8);
}

// The row of range r goes to memory and has no counts again, by the whole block, between two barriers.
static __device__ inline void moe_tally_store(const moe_tally &tally, int64_t r, uint32_t *row, int32_t experts)
{
    const int words = moe_tally_words(experts);
    for (int w = threadIdx.x; w < words; w += blockDim.x) {
        tally.counts[r * words + w] = row[w];
        row[w] = 0;
    }
}

#endif
