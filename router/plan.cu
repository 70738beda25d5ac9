// SPDX-License-Identifier: Apache-2.0
// The plan on the GPU: a stable counting sort of all (token, slot) pairs by group. The pairs are cut into one range for
// each block. The blocks first count their ranges, each into its own row of the scratch; then each adds up the rows of
// the blocks before it, which says where its rows of each group begin, and places its pairs. Few pairs do both in one
// block.
//
// A block places a tile of pairs at a time, one pair a thread: a warp ranks its 32 pairs among themselves, a scan over
// the warps' counts ranks the warps. So a tile costs a few hundred cycles of latency, whatever the routing.
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "router/router.h"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;

// A thread looks after these groups: threadIdx.x + THREADS * i.
constexpr int PER_THREAD = MOE_MAX_EXPERTS / THREADS;

// Up to this many pairs, one block is quicker than two launches.
constexpr int64_t ALONE_PAIRS = 4 * THREADS;

// As many blocks as there are SMs, about: each reads the counts of all.
constexpr int MAX_BLOCKS = 128;

// Dynamic shared memory: int32 [groups], then uint16 [ranking warps][groups], all within the 48 KB that need no leave.
// With very many groups not all warps have counters; the others then take no pairs.
constexpr int SHARED_BYTES = 46 * 1024;
static_assert((SHARED_BYTES - MOE_MAX_EXPERTS * 4) / (MOE_MAX_EXPERTS * 2) >= 1, "a warp's counters must fit");

inline int ranking_warps(int groups)
{
    const int fit = (SHARED_BYTES - groups * 4) / (groups * 2);
    return fit < WARPS ? fit : WARPS;
}

// The group of pair i; -1: none.
__device__ inline int group_of(const moe_plan_args &args, int64_t i)
{
    const int64_t id = args.ids_dtype == MOE_I64 ? ((const int64_t *)args.ids)[i] : ((const int32_t *)args.ids)[i];
    if (id < 0 || id >= args.experts)
        return -1;
    return args.expert_group ? args.expert_group[id] : (int)id;
}

// Pairs [begin, end) counted into counts[groups] in shared memory, by the whole block. Which thread adds first has no
// influence on a sum of integers.
__device__ void count_pairs(const moe_plan_args &args, int64_t begin, int64_t end, int32_t *counts)
{
    constexpr int AHEAD = 4;
    for (int g = threadIdx.x; g < args.groups; g += THREADS)
        counts[g] = 0;
    __syncthreads();
    for (int64_t i = begin + threadIdx.x; i < end; i += AHEAD * THREADS) {
        int group[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            group[a] = i + a * THREADS < end ? group_of(args, i + a * THREADS) : -1;
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (group[a] >= 0)
                atomicAdd(&counts[group[a]], 1);
    }
    __syncthreads();
}

// Exclusive scan of one number a thread; `sum` becomes the sum of all.
__device__ inline int32_t scan_block(int32_t own, int32_t &sum)
{
    __shared__ int32_t warp_sums[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto scan_warp = [&](int32_t v) {
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int32_t lower = __shfl_up_sync(ALL_LANES, v, d);
            if (lane >= d)
                v += lower;
        }
        return v;
    };
    const int32_t inclusive = scan_warp(own);
    if (lane == 31)
        warp_sums[warp] = inclusive;
    __syncthreads();
    const int32_t warps = scan_warp(warp_sums[lane]);
    sum = __shfl_sync(ALL_LANES, warps, WARPS - 1);
    const int32_t before = __shfl_sync(ALL_LANES, warps, warp > 0 ? warp - 1 : 0);
    __syncthreads(); // warp_sums is written again
    return inclusive - own + (warp > 0 ? before : 0);
}

// Places pairs [begin, end). next[i]: where the next row of this thread's i-th group goes.
__device__ void place_pairs(const moe_plan_args &args, int64_t begin, int64_t end, int ranking,
                            int32_t (&next)[PER_THREAD], int32_t *first, uint16_t *counts)
{
    constexpr int AHEAD = 8;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, groups = args.groups;
    const unsigned lower = (1u << lane) - 1;
    const int tile = ranking * 32;
    const moe_plan &plan = args.plan;

    const auto fetch = [&](int64_t i) { return warp < ranking && i < end ? group_of(args, i) : -1; };
    int following = fetch(begin + threadIdx.x);
    for (int64_t i0 = begin; i0 < end; i0 += tile) {
        const int64_t i = i0 + threadIdx.x;
        const bool mine = warp < ranking && i < end;
        const int g = following;
        following = fetch(i + tile);
        const float weight = mine ? args.weights[i] : 0.0f;

        for (int c = threadIdx.x; c < (ranking * groups + 1) / 2; c += THREADS)
            ((uint32_t *)counts)[c] = 0;
        __syncthreads();
        const unsigned same = __match_any_sync(ALL_LANES, g);
        if (g >= 0 && (same & lower) == 0)
            counts[warp * groups + g] = (uint16_t)__popc(same);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            const int own = threadIdx.x + k * THREADS;
            if (own >= groups)
                break;
            int32_t before = 0;
            for (int w0 = 0; w0 < ranking; w0 += AHEAD) {
                int32_t count[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; a++)
                    count[a] = w0 + a < ranking ? counts[(w0 + a) * groups + own] : 0;
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    if (w0 + a < ranking)
                        counts[(w0 + a) * groups + own] = (uint16_t)before;
                    before += count[a];
                }
            }
            first[own] = next[k];
            next[k] += before;
        }
        __syncthreads();
        if (mine) {
            const int32_t row = g >= 0 ? first[g] + counts[warp * groups + g] + __popc(same & lower) : -1;
            plan.slot_row[i] = row;
            if (g >= 0) {
                const uint32_t pair = (uint32_t)i, slots = (uint32_t)args.slots;
                plan.row_token[row] = (int32_t)(pair / slots);
                plan.row_slot[row] = (int32_t)(pair % slots);
                plan.row_weight[row] = weight;
            }
        }
        __syncthreads(); // counts and first are written again
    }
}

// Scratch [block][groups]: each block's counts.
__global__ void __launch_bounds__(THREADS, 1) plan_count(const moe_plan_args args, int64_t range)
{
    extern __shared__ int32_t shared[];
    moe_grid_launch_dependents();
    moe_grid_wait();
    const int64_t pairs = args.tokens * args.slots, begin = blockIdx.x * range;
    count_pairs(args, begin, begin + range < pairs ? begin + range : pairs, shared);
    for (int g = threadIdx.x; g < args.groups; g += THREADS)
        ((int32_t *)args.scratch)[(int64_t)blockIdx.x * args.groups + g] = shared[g];
}

// The counts of all blocks added up, for group g of this thread: `sum` of all, `before` of those before this block.
__device__ inline void add_counts(const moe_plan_args &args, int g, int32_t &sum, int32_t &before)
{
    constexpr int AHEAD = 16;
    const int32_t *counts = (const int32_t *)args.scratch + g;
    const int blocks = gridDim.x;
    sum = before = 0;
    for (int b0 = 0; b0 < blocks; b0 += AHEAD) {
        int32_t count[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            count[a] = b0 + a < blocks ? counts[(int64_t)(b0 + a) * args.groups] : 0;
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            sum += count[a];
            before += b0 + a < blockIdx.x ? count[a] : 0;
        }
    }
}

// ALONE: the only block, which counts by itself.
template <bool ALONE>
__global__ void __launch_bounds__(THREADS, 1) plan_place(const moe_plan_args args, int64_t range, int ranking)
{
    extern __shared__ int32_t shared[];
    moe_grid_launch_dependents();
    moe_grid_wait();

    const int groups = args.groups;
    const int64_t pairs = args.tokens * args.slots;
    const int64_t begin = blockIdx.x * range, end = begin + range < pairs ? begin + range : pairs;
    if (ALONE)
        count_pairs(args, begin, end, shared);

    int32_t next[PER_THREAD] = {}, rows = 0;
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
        if (k * THREADS >= groups)
            break;
        const int g = k * THREADS + threadIdx.x;
        int32_t count = 0, before = 0, sum;
        if (g < groups) {
            if (ALONE)
                count = shared[g];
            else
                add_counts(args, g, count, before);
        }
        const int32_t offset = rows + scan_block(count, sum);
        rows += sum;
        next[k] = offset + before;
        if (blockIdx.x == 0 && g < groups) {
            args.plan.counts[g] = count;
            args.plan.offsets[g] = offset;
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        args.plan.offsets[groups] = rows;
    place_pairs(args, begin, end, ranking, next, shared, (uint16_t *)(shared + groups));
}

} // namespace

// With no tokens the counts and offsets are still written, as zeros.
moe_status moe_plan_cuda(const struct moe_plan_args *args, const struct moe_gpu *gpu)
{
    const int64_t pairs = args->tokens * args->slots;
    const int ranking = ranking_warps(args->groups);
    const size_t first_bytes = args->groups * sizeof(int32_t);
    const size_t shared = first_bytes + (size_t)(ranking * args->groups + 1) / 2 * sizeof(uint32_t);
    if (pairs <= ALONE_PAIRS) {
        moe_launch(plan_place<true>, 1, THREADS, shared, gpu->stream, gpu->dependent, *args, pairs, ranking);
        return moe_launched(NULL, "plan_place");
    }

    // A whole number of MOE_PLAN_BLOCK pairs each, so that there are no more blocks than the scratch has room for.
    const int64_t parts = moe_ceil_div(pairs, MOE_PLAN_BLOCK);
    const int64_t most = gpu->max_sms > 0 && gpu->max_sms < MAX_BLOCKS ? gpu->max_sms : MAX_BLOCKS;
    const int64_t range = MOE_PLAN_BLOCK * moe_ceil_div(parts, most);
    const unsigned blocks = (unsigned)moe_ceil_div(pairs, range);
    moe_launch(plan_count, blocks, THREADS, first_bytes, gpu->stream, gpu->dependent, *args, range);
    const moe_status status = moe_launched(NULL, "plan_count");
    if (status != MOE_OK)
        return status;
    moe_launch(plan_place<false>, blocks, THREADS, shared, gpu->stream, gpu->dependent, *args, range, ranking);
    return moe_launched(NULL, "plan_place");
}
