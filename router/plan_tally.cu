// SPDX-License-Identifier: Apache-2.0
// The plan of many tokens on the GPU, by a tally of their experts (router.h): one launch, of a block for each SM, which
// takes so many ranges. A block adds up the tally's rows, which says how many rows an expert has and how many of them
// before the block's own; and it places its tokens by a word for each expert, with a bit for each of 32 tokens that
// have chosen it. So every SM stores its part of the rows, which is what takes longest.
//
// All blocks read all of the tally: 32 KB for 4096 tokens and 128 experts, 128 KB for 131072. Even that, some 2 us, is
// less than a launch to add up parts of it first would take; and it grows with tokens and experts as the logits do.
#include <algorithm>

#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "router/plan.cuh"
#include "router/tally.cuh"

namespace
{

// Of a block: few enough for two of them on an SM beside each other and to meet soon, and enough to have 32 KB of the
// tally on their way. A thread has one expert at most.
constexpr int TALLY_THREADS = MOE_TALLY_EXPERTS;
constexpr int TALLY_WARPS = TALLY_THREADS / 32;

// Tokens are placed a tile at a time: up to so many words of 32, and pairs.
constexpr int TILE_WORDS = 4;
constexpr int PER_THREAD = 2;
constexpr int TILE_PAIRS = PER_THREAD * TALLY_THREADS;
static_assert(TILE_PAIRS >= 32 * MOE_TALLY_TOP_K, "a word's tokens must fit");

// What the host works out.
struct tiling {
    int ranges; // of the tally
    int own;    // of them a block's
    int tile;   // tokens
};

// What a warp has added up: of 128 experts, lane l of experts 4l on.
struct warp_sums_of {
    int4 all[32], before[32];
};

// This thread's part of the tally. The warps take turns at the rows, several at a time with few experts; with many,
// each takes 128 of the experts.
struct tally_part {
    int words, across;  // words of a row, and how many of them, a power of two, lie side by side in a warp
    int chunks, groups; // warps that take one row together, and how many rows are taken so
    int word, row, step;

    __device__ explicit tally_part(int experts)
    {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        words = moe_tally_words(experts);
        across = words >= 32 ? 32 : 1 << (32 - __clz(words - 1));
        chunks = (words + 31) / 32;
        groups = TALLY_WARPS / chunks;
        const int group = warp / chunks;
        word = (warp - group * chunks) * 32 + lane % across;
        row = group * (32 / across) + lane / across;
        step = groups * (32 / across);
    }
};

// How many tokens have chosen expert e = threadIdx.x, and how many of them in ranges before `first`. By the whole
// block, with a barrier in it.
__device__ inline int2 sum_tally(const moe_tally &tally, const tally_part &part, int experts, int ranges, int first,
                                 warp_sums_of (&sums)[TALLY_WARPS])
{
    constexpr int AHEAD = 16;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

    // The block's own rows come first, so that not all blocks ask for the same at once; then those behind them; and at
    // last those before.
    uint32_t all[4] = {}, before[4] = {};
    if (part.word < part.words && part.row < part.step) {
        const int behind = ranges - first;
        for (int i0 = part.row; i0 < ranges; i0 += AHEAD * part.step) {
            uint32_t four[AHEAD];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const int i = i0 + a * part.step, r = i < behind ? first + i : i - behind;
                four[a] = i < ranges ? tally.counts[(int64_t)r * part.words + part.word] : 0;
            }
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                const uint32_t earlier = i0 + a * part.step < behind ? 0 : four[a];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    all[e] = __dp4a(four[a], 1u << 8 * e, all[e]);
                    before[e] = __dp4a(earlier, 1u << 8 * e, before[e]);
                }
            }
        }
    }
    for (int d = part.across; d < 32; d *= 2)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            all[e] += __shfl_xor_sync(ALL_LANES, all[e], d);
            before[e] += __shfl_xor_sync(ALL_LANES, before[e], d);
        }
    sums[warp].all[lane] = make_int4(all[0], all[1], all[2], all[3]);
    sums[warp].before[lane] = make_int4(before[0], before[1], before[2], before[3]);
    __syncthreads();

    int2 sum = {};
    if (thread < experts)
#pragma unroll 4
        for (int g = 0; g < part.groups; g++) {
            const warp_sums_of &of = sums[g * part.chunks + thread / 128];
            sum.x += ((const int32_t *)of.all)[thread % 128];
            sum.y += ((const int32_t *)of.before)[thread % 128];
        }
    return sum;
}

// This thread's pairs of a tile: numbers threadIdx.x + k * TALLY_THREADS. An id of -1 stands for none.
struct tile_pairs {
    int id[PER_THREAD];
    float weight[PER_THREAD];

    // Of tokens [token, end), at most `tile`.
    __device__ void load(const moe_plan_args &args, int64_t token, int64_t end, int tile)
    {
        const int pairs = (int)min(end - token, (int64_t)tile) * args.slots;
        const int64_t first = token * args.slots;
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            const int p = threadIdx.x + k * TALLY_THREADS;
            id[k] = p < pairs ? ((const int32_t *)args.ids)[first + p] : -1;
            weight[k] = p < pairs ? args.weights[first + p] : 0.0f;
        }
    }
};

__global__ void __launch_bounds__(TALLY_THREADS, 2)
    plan_tally(const moe_plan_args args, const moe_tally tally, const tiling cut)
{
    extern __shared__ uint32_t shared[];
    __shared__ warp_sums_of sums[TALLY_WARPS];
    __shared__ int32_t scanned[WARPS];
    moe_grid_launch_dependents();
    const int thread = threadIdx.x, experts = args.experts, words = (cut.tile + 31) / 32 * experts;
    uint32_t *const chosen = shared;                  // [tile / 32][experts]: by which tokens
    int32_t *const row = (int32_t *)(shared + words); // [experts]: of the first of them
    const auto clear = [&] {
#pragma unroll 1
        for (int w = thread; w < words; w += TALLY_THREADS)
            chosen[w] = 0;
    };
    const tally_part part(experts);
    int token[PER_THREAD]; // of this thread's pairs, in the tile
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++)
        token[k] = (int)((uint32_t)(thread + k * TALLY_THREADS) / (uint32_t)args.slots);
    clear();
    __syncthreads();
    moe_grid_wait();

    const int first = blockIdx.x * cut.own;
    int64_t token0 = (int64_t)first * tally.range;
    const int64_t end = min(token0 + (int64_t)cut.own * tally.range, args.tokens);
    tile_pairs pairs;
    pairs.load(args, token0, end, cut.tile);
    moe_set_zeroed(args.zeroed, args.zeroed_bytes);
    const auto mark = [&] {
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++)
            if (pairs.id[k] >= 0)
                atomicOr(&chosen[token[k] / 32 * experts + pairs.id[k]], 1u << token[k] % 32);
    };

    const int2 own = sum_tally(tally, part, experts, cut.ranges, first, sums);
    mark();
    int32_t all;
    const int32_t offset = scan_block(own.x, scanned, all);
    if (blockIdx.x == 0) {
        if (thread < experts) {
            args.plan.counts[thread] = own.x;
            args.plan.offsets[thread] = offset;
        }
        if (thread == 0)
            args.plan.offsets[experts] = all;
    }

    int32_t next = offset + own.y; // row of this thread's expert
    for (;;) {
        const bool last = token0 + cut.tile >= end;
        if (thread < experts)
            row[thread] = next;
        __syncthreads();
        tile_pairs following;
        if (!last)
            following.load(args, token0 + cut.tile, end, cut.tile);
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++)
            if (pairs.id[k] >= 0) {
                const uint32_t *const of = chosen + pairs.id[k];
                const int word = token[k] / 32;
                int rank = __popc(of[word * experts] & ((1u << token[k] % 32) - 1));
#pragma unroll
                for (int w = 0; w < TILE_WORDS - 1; w++)
                    if (w < word)
                        rank += __popc(of[w * experts]);
                moe_place_pair(args.plan, args.slots, token0 * args.slots + thread + k * TALLY_THREADS,
                               (uint32_t)(token0 + token[k]), row[pairs.id[k]] + rank, pairs.weight[k]);
            }
        if (last)
            break;

        if (thread < experts)
#pragma unroll 1
            for (int w = thread; w < words; w += experts)
                next += __popc(chosen[w]);
        token0 += cut.tile;
        pairs = following;
        __syncthreads();
        clear();
        __syncthreads();
        mark();
    }
}

} // namespace

moe_status moe_plan_tally_cuda(const struct moe_plan_args *args, const struct moe_tally *tally,
                               const struct moe_gpu *gpu)
{
    const int64_t ranges = moe_ceil_div(args->tokens, tally->range);
    const int64_t own = moe_ceil_div(ranges, moe_grid(ranges, gpu->max_sms, gpu->sms, 1));
    const int64_t most = std::min(TILE_PAIRS / (32 * args->slots), TILE_WORDS) * 32;
    const tiling cut = {(int)ranges, (int)own, (int)std::min(most, own * tally->range)};
    const size_t bytes = ((cut.tile + 31) / 32 + 1) * args->experts * sizeof(int32_t);
    moe_launch(plan_tally, (unsigned)moe_ceil_div(ranges, own), TALLY_THREADS, bytes, gpu->stream, gpu->dependent,
               *args, *tally, cut);
    return moe_launched(NULL, "plan_tally");
}
