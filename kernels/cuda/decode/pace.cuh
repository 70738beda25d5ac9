// SPDX-License-Identifier: Apache-2.0
// How a block of decode's FFN for compute capability 9.0 paces itself at the end (wgmma.cu). The pieces of GEMM 2 are
// cut so that all blocks end at the same time, but memory does not serve all SMs alike: over a hundred microseconds
// they drift apart by several, most of them at random. So blocks report how far they are in their last pieces. Who is
// behind the average gets more stages under way, who is ahead fewer, and with them more or less of the memory's speed.
// That changes when weights are read, but not what is computed of them, nor in which order.
#ifndef MOE_KERNELS_CUDA_DECODE_PACE_CUH
#define MOE_KERNELS_CUDA_DECODE_PACE_CUH

#include "kernels/cuda/decode/decode.cuh"

// A piece's last blocks of K, or three quarters of the average piece if that is fewer: enough to catch up by what
// blocks are apart. With 132 workers these are some 70 additions a microsecond to one number; for longer that has cost
// more than it gave.
constexpr int MOE_PACED_BLOCKS = 64;
constexpr int MOE_PACE_STEP = 4; // blocks from one report to the next
// Stages under way: one more than usual for every two blocks that the average is ahead, one fewer for every two that it
// is behind. Many are no harm as long as few blocks have them (wgmma_block.cuh).
constexpr int MOE_PACED_LEAST = 3, MOE_PACED_MOST = 8;

// What a block has reported, by one of its threads. All blocks add it up in args.paced.
struct moe_decode_pace {
    int32_t reported = 0; // blocks, of those that are paced

    // When the block is at its last piece, of which it has `left` blocks to ask for, or past it. False: that is not
    // worth a report yet. Else *behind tells by how many blocks the average is ahead of it.
    __device__ __forceinline__ bool report(const moe_decode_args &args, const moe_decode_walk &walk, int32_t left,
                                           int32_t *behind)
    {
        const int32_t paced = min(MOE_PACED_BLOCKS, walk.work.size / 4 * 3), more = paced - left - reported;
        if (more < MOE_PACE_STEP)
            return false;
        reported += more;
        *behind = moe_divide(atomicAdd(args.paced, more) + more, walk.gemm.work.by_workers) - reported;
        return true;
    }
};

#endif
