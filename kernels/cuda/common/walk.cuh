// SPDX-License-Identifier: Apache-2.0
// Which tile of a grouped GEMM is which, for persistent blocks that do not know the counts before they run: tiles are
// numbered group after group, and a block's numbers rise, so that it looks for the group from where it was.
#ifndef MOE_KERNELS_CUDA_COMMON_WALK_CUH
#define MOE_KERNELS_CUDA_COMMON_WALK_CUH

#include <stdint.h>

struct moe_tile_walk {
    int32_t group = 0;
    int64_t before = 0; // tiles of the groups before `group`
};

// Moves the walk to the group that holds tile number `tile`, with `rows` rows of the plan a tile and `columns` tiles
// side by side; false: there are no more tiles. Called by whole warps, each for itself: 32 groups a step.
static __device__ inline bool moe_find_group(const int32_t *offsets, int32_t groups, int rows, int64_t columns,
                                             int64_t tile, moe_tile_walk &walk)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    const int lane = threadIdx.x % 32;

    while (walk.group < groups) {
        const int32_t group = walk.group + lane;
        const int64_t count = group < groups ? offsets[group + 1] - offsets[group] : 0;
        const int64_t own = (count + rows - 1) / rows * columns;
        int64_t sum = own;
        for (int d = 1; d < 32; d *= 2) {
            const int64_t v = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d)
                sum += v;
        }
        const unsigned past = __ballot_sync(ALL_LANES, walk.before + sum > tile);
        const int last = past ? __ffs(past) - 1 : 31;
        walk.before += __shfl_sync(ALL_LANES, past ? sum - own : sum, last);
        if (past) {
            walk.group += last;
            return true;
        }
        walk.group += 32;
    }
    return false;
}

// Blocks that run at the same time should share weights and rows in L2: bands of 16 row tiles, in a band all columns,
// the row tiles of a column following each other.
static __device__ inline void moe_place_tile(int64_t index, int64_t row_tiles, int64_t columns, int64_t *row_tile,
                                             int64_t *column)
{
    constexpr int64_t BAND = 16;
    const int64_t band = index / (BAND * columns);
    const int64_t left = row_tiles - band * BAND, height = left < BAND ? left : BAND;
    index -= band * BAND * columns;
    *row_tile = band * BAND + index % height;
    *column = index / height;
}

#endif
