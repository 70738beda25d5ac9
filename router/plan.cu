// SPDX-License-Identifier: Apache-2.0
// The plan on the GPU: a stable counting sort of all (token, slot) pairs by group. The pairs are cut into chunks and
// one warp walks a chunk in order, with a counter for each group in shared memory. First each chunk is counted, then a
// scan over the chunks says where each chunk's rows of each group begin, then the chunks are walked again and the rows
// placed. Few pairs do all that in one block; many take one kernel for each step.
#include "kernels/cuda/common/launch.cuh"
#include "router/router.h"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int MAX_WARPS = 32;

// Counters of all warps of a block: at most 32 KB, and 16 KB of them for one warp with the most groups there can be.
constexpr int MAX_COUNTERS = 8192;
static_assert(MAX_COUNTERS >= MOE_MAX_EXPERTS, "a warp's counters must fit");

// Up to this many pairs a warp, one block is quicker than three launches.
constexpr int64_t SMALL_CHUNK = 128;

// More chunks than this are made longer instead, which bounds the scan over them.
constexpr int64_t MAX_CHUNKS = 1024;

// The group of pair i; -1: none.
__device__ inline int group_of(const moe_plan_args &args, int64_t i)
{
    const int64_t id = args.ids_dtype == MOE_I64 ? ((const int64_t *)args.ids)[i] : ((const int32_t *)args.ids)[i];
    if (id < 0 || id >= args.experts)
        return -1;
    return args.expert_group ? args.expert_group[id] : (int)id;
}

// Walks pairs [begin, end) with a whole warp, 32 at a time, and calls visit(i, group, row) for each, where row is what
// counters[group] says of the pair: the pair's place if the counters start at each group's place. i >= end: no pair.
// Ids are fetched ahead, four at a time, because the walk itself waits at each step.
template <typename F>
__device__ void walk(const moe_plan_args &args, int64_t begin, int64_t end, int32_t *counters, F visit)
{
    constexpr int AHEAD = 4;
    const int lane = threadIdx.x % 32;
    const unsigned lower = (1u << lane) - 1;

    for (int64_t i0 = begin; i0 < end; i0 += AHEAD * 32) {
        int group[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int64_t i = i0 + a * 32 + lane;
            group[a] = i < end ? group_of(args, i) : -1;
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int g = group[a];
            const unsigned same = __match_any_sync(ALL_LANES, g);
            const int32_t first = g >= 0 ? counters[g] : 0;
            __syncwarp();
            if (g >= 0 && (same & lower) == 0)
                counters[g] = first + __popc(same);
            __syncwarp();
            visit(i0 + a * 32 + lane, g, first + __popc(same & lower));
        }
    }
}

__device__ void count_chunk(const moe_plan_args &args, int64_t begin, int64_t end, int32_t *counters)
{
    walk(args, begin, end, counters, [](int64_t, int, int32_t) {});
}

__device__ void place_chunk(const moe_plan_args &args, int64_t begin, int64_t end, int32_t *counters)
{
    const moe_plan &plan = args.plan;
    walk(args, begin, end, counters, [&](int64_t i, int g, int32_t row) {
        if (i >= end)
            return;
        plan.slot_row[i] = g >= 0 ? row : -1;
        if (g < 0)
            return;
        const uint32_t pair = (uint32_t)i, slots = (uint32_t)args.slots;
        plan.row_token[row] = (int32_t)(pair / slots);
        plan.row_slot[row] = (int32_t)(pair % slots);
        plan.row_weight[row] = args.weights[i];
    });
}

// Exclusive scan over the groups by a whole block: calls use(g, offset) for each group, where count(g) is its count,
// and returns the sum of all.
template <typename C, typename F> __device__ int32_t scan_groups(int groups, C count, F use)
{
    __shared__ int32_t warp_sums[MAX_WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int32_t before = 0; // the groups of earlier rounds

    for (int g0 = 0; g0 < groups; g0 += blockDim.x) {
        const int g = g0 + threadIdx.x;
        const int32_t own = g < groups ? count(g) : 0;
        int32_t sum = own;
        for (int d = 1; d < 32; d *= 2) {
            const int32_t v = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane >= d)
                sum += v;
        }
        if (lane == 31)
            warp_sums[warp] = sum;
        __syncthreads();
        int32_t round = 0;
        for (int w = 0; w < warps; w++) {
            if (w == warp)
                sum += before + round;
            round += warp_sums[w];
        }
        if (g < groups)
            use(g, sum - own);
        before += round;
        __syncthreads(); // warp_sums is written again
    }
    return before;
}

// ---- All in one block ----

__global__ void __launch_bounds__(MAX_WARPS * 32) plan_small(const moe_plan_args args, int64_t chunk)
{
    extern __shared__ int32_t shared_counters[]; // [warps][groups]
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, groups = args.groups;
    const int64_t pairs = args.tokens * args.slots;
    const int64_t begin = warp * chunk, end = begin + chunk < pairs ? begin + chunk : pairs;

    for (int i = threadIdx.x; i < warps * groups; i += blockDim.x)
        shared_counters[i] = 0;
    __syncthreads();
    count_chunk(args, begin, end, shared_counters + warp * groups);
    __syncthreads();

    const int32_t rows = scan_groups(
        groups,
        [&](int g) {
            int32_t count = 0;
            for (int w = 0; w < warps; w++)
                count += shared_counters[w * groups + g];
            args.plan.counts[g] = count;
            return count;
        },
        [&](int g, int32_t offset) {
            args.plan.offsets[g] = offset;
            for (int w = 0; w < warps; w++) {
                const int32_t count = shared_counters[w * groups + g];
                shared_counters[w * groups + g] = offset;
                offset += count;
            }
        });
    if (threadIdx.x == 0)
        args.plan.offsets[groups] = rows;
    __syncthreads();
    place_chunk(args, begin, end, shared_counters + warp * groups);
}

// ---- One kernel a step; args.scratch is [chunks][groups] ----

__global__ void plan_count(const moe_plan_args args, int64_t chunk, int chunks)
{
    extern __shared__ int32_t shared_counters[]; // [warps][groups]
    const int lane = threadIdx.x % 32, groups = args.groups;
    const int c = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    int32_t *counters = shared_counters + threadIdx.x / 32 * groups;
    int32_t *counts = (int32_t *)args.scratch + (int64_t)c * groups;
    if (c >= chunks)
        return;

    const int64_t pairs = args.tokens * args.slots;
    const int64_t begin = c * chunk, end = begin + chunk < pairs ? begin + chunk : pairs;
    for (int g = lane; g < groups; g += 32)
        counters[g] = 0;
    __syncwarp();
    count_chunk(args, begin, end, counters);
    __syncwarp();
    for (int g = lane; g < groups; g += 32)
        counts[g] = counters[g];
}

// Each chunk's count of a group becomes the sum of the chunks before it. A block takes 32 groups; its 32 rows of
// threads share the chunks.
__global__ void __launch_bounds__(1024) plan_scan(const moe_plan_args args, int chunks)
{
    __shared__ int32_t sums[32][33];
    const int x = threadIdx.x, y = threadIdx.y, groups = args.groups;
    const int g = blockIdx.x * 32 + x;
    int32_t *counts = (int32_t *)args.scratch;
    const int share = (chunks + 31) / 32, begin = y * share, end = begin + share < chunks ? begin + share : chunks;

    int32_t sum = 0;
    if (g < groups)
        for (int c = begin; c < end; c++)
            sum += counts[(int64_t)c * groups + g];
    sums[y][x] = sum;
    __syncthreads();
    if (g >= groups)
        return;

    int32_t before = 0;
    for (int i = 0; i < y; i++)
        before += sums[i][x];
    for (int c = begin; c < end; c++) {
        const int32_t count = counts[(int64_t)c * groups + g];
        counts[(int64_t)c * groups + g] = before;
        before += count;
    }
    if (y == 31)
        args.plan.counts[g] = before;
}

__global__ void plan_place(const moe_plan_args args, int64_t chunk, int chunks)
{
    extern __shared__ int32_t shared_counters[]; // [warps][groups]
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, groups = args.groups;
    const int c0 = blockIdx.x * warps, c = c0 + warp;
    const int32_t *before = (const int32_t *)args.scratch;

    const int32_t rows = scan_groups(
        groups, [&](int g) { return args.plan.counts[g]; },
        [&](int g, int32_t offset) {
            if (blockIdx.x == 0)
                args.plan.offsets[g] = offset;
            for (int w = 0; w < warps && c0 + w < chunks; w++)
                shared_counters[w * groups + g] = offset + before[(int64_t)(c0 + w) * groups + g];
        });
    if (blockIdx.x == 0 && threadIdx.x == 0)
        args.plan.offsets[groups] = rows;
    __syncthreads();
    if (c >= chunks)
        return;

    const int64_t pairs = args.tokens * args.slots;
    const int64_t begin = c * chunk, end = begin + chunk < pairs ? begin + chunk : pairs;
    place_chunk(args, begin, end, shared_counters + warp * groups);
}

} // namespace

// With no tokens the counts and offsets are still written, as zeros.
moe_status moe_plan_cuda(const struct moe_plan_args *args, void *stream)
{
    const int groups = args->groups;
    const int64_t pairs = args->tokens * args->slots;
    const int fit = MAX_COUNTERS / groups;

    int warps = fit < MAX_WARPS ? fit : MAX_WARPS;
    if (pairs <= warps * SMALL_CHUNK) {
        const int64_t chunk = moe_ceil_div(moe_ceil_div(pairs, warps), 32) * 32;
        plan_small<<<1, warps * 32, warps * groups * sizeof(int32_t), (cudaStream_t)stream>>>(*args, chunk);
        return moe_launched(NULL, "plan_small");
    }

    const int64_t chunk = MOE_PLAN_BLOCK * moe_ceil_div(pairs, MOE_PLAN_BLOCK * MAX_CHUNKS);
    const int chunks = (int)moe_ceil_div(pairs, chunk);
    warps = fit < 4 ? fit : 4;
    const unsigned blocks = (unsigned)moe_ceil_div(chunks, warps);
    const size_t shared = warps * groups * sizeof(int32_t);
    plan_count<<<blocks, warps * 32, shared, (cudaStream_t)stream>>>(*args, chunk, chunks);
    moe_status status = moe_launched(NULL, "plan_count");
    if (status != MOE_OK)
        return status;
    plan_scan<<<(unsigned)moe_ceil_div(groups, 32), dim3(32, 32), 0, (cudaStream_t)stream>>>(*args, chunks);
    status = moe_launched(NULL, "plan_scan");
    if (status != MOE_OK)
        return status;
    plan_place<<<blocks, warps * 32, shared, (cudaStream_t)stream>>>(*args, chunk, chunks);
    return moe_launched(NULL, "plan_place");
}
