// SPDX-License-Identifier: Apache-2.0
// The plan on the GPU: a stable counting sort of all (token, slot) pairs by group. The pairs are cut into one range for
// each block. The blocks first count their ranges; then each adds up the counts of the blocks before it, which says
// where its rows of each group begin, and places its pairs. Few pairs do both in one launch, by one block or by a
// cluster of blocks, which read each other's counts in shared memory; many need two launches, between which the counts
// lie in the scratch. Up to some hundred tokens get a kernel that chooses their ids as well, and sorts them by simpler
// means (where decode's FFN does not do that itself); more whose ids are chosen just before get one that goes by a
// tally (plan_tally.cu).
//
// A block places a tile of pairs at a time, one pair a thread: a warp ranks its 32 pairs among themselves, a sum over
// the warps before it ranks the warp. So a tile costs a few hundred cycles of latency, whatever the routing.
#include <algorithm>

#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "router/plan.cuh"
#include "router/topk.cuh"

namespace
{

// A thread looks after these groups: threadIdx.x + blockDim.x * i.
constexpr int PER_THREAD = MOE_MAX_EXPERTS / THREADS;

// What a cluster has: as many blocks as every device with clusters can run; a large one more than that, for which a
// kernel has to be allowed to have clusters of a size that is not portable.
constexpr int CLUSTER = 8, LARGE_CLUSTER = 16;

// Up to this many pairs a block, one launch is quicker than two, which share the stores among all SMs: of rows all over
// memory an SM stores one element a cycle at best.
constexpr int64_t WHOLE_PAIRS = THREADS;

// Up to this many tokens one block chooses their experts as quickly as a cluster, in which the counts have to go
// around: that takes about as long as the instructions of four tokens, instead of one, on each scheduler.
constexpr int64_t ALONE_TOKENS = 16;

// More tokens than this are chosen for by a large cluster, if there is one: with 256 that takes 1 us less, with 128
// nothing worth more SMs at the same time.
constexpr int64_t LARGE_TOKENS = 128;

// Experts are chosen here for up to so many tokens a block, 256 in a cluster, 512 in a large one: a bit each in a word.
// With more, what a block's schedulers have to issue takes longer than another launch, which spreads the tokens over
// all SMs. A thread has one (token, slot) pair at most, and one expert. The block is small enough to be there while the
// kernel of the logits still runs, where that does not have all of an SM's shared memory.
constexpr int64_t CHOOSING_TOKENS = 32;
constexpr int CHOOSING_THREADS = 512;
constexpr int CHOOSING_EXPERTS = CHOOSING_THREADS;
constexpr int CHOOSING_TOP_K = 32;
static_assert(ALONE_TOKENS * CHOOSING_TOP_K <= CHOOSING_THREADS, "one block has threads for its pairs");

// Dynamic shared memory: int32 [2][groups], then uint16 [ranking warps][groups], all within the 48 KB that need no
// leave. With very many groups not all warps have counters; the others then take no pairs.
constexpr int SHARED_BYTES = 46 * 1024;
constexpr int GROUP_BYTES = 2 * sizeof(int32_t);
static_assert(SHARED_BYTES >= MOE_MAX_EXPERTS * (GROUP_BYTES + 2), "a warp's counters must fit");

struct layout {
    int threads, ranking; // ranking warps
    size_t bytes;         // of shared memory
};

// Of a block with `range` pairs and work for so many threads.
inline layout lay_out(int groups, int64_t range, int64_t work)
{
    const int64_t wanted = std::max({work, range, (int64_t)groups, (int64_t)128});
    const int warps = (int)(std::min(wanted, (int64_t)THREADS) + 31) / 32;
    const int64_t fixed = (int64_t)groups * GROUP_BYTES;
    const int64_t fit = (SHARED_BYTES - fixed) / (groups * 2), useful = std::max(moe_ceil_div(range, 32), (int64_t)1);
    const int ranking = (int)std::min({fit, useful, (int64_t)warps});
    return {warps * 32, ranking, (size_t)(fixed + moe_ceil_div((int64_t)ranking * groups, 2) * 4)};
}

// The pairs of a block, [begin, end).
struct block_pairs {
    const moe_plan_args &args;
    int64_t begin, end;

    // The group of pair i; -1: none.
    __device__ int group(int64_t i) const
    {
        if (i >= end)
            return -1;
        const int64_t id = args.ids_dtype == MOE_I64 ? ((const int64_t *)args.ids)[i] : ((const int32_t *)args.ids)[i];
        if (id < 0 || id >= args.experts)
            return -1;
        return args.expert_group ? args.expert_group[id] : (int)id;
    }

    __device__ float weight(int64_t i) const
    {
        return i >= end ? 0.0f : args.weights[i];
    }
};

__device__ inline block_pairs pairs_of_block(const moe_plan_args &args, int64_t range)
{
    const int64_t all = args.tokens * args.slots, begin = min(blockIdx.x * range, all);
    return {args, begin, min(begin + range, all)};
}

// Pairs counted into counts[groups] in shared memory, by the whole block. Which thread adds first has no influence on a
// sum of integers.
__device__ inline void count_pairs(const block_pairs &pairs, int32_t *counts)
{
    constexpr int AHEAD = 4;
    const int threads = blockDim.x;
    for (int g = threadIdx.x; g < pairs.args.groups; g += threads)
        counts[g] = 0;
    __syncthreads();
    for (int64_t i = pairs.begin + threadIdx.x; i < pairs.end; i += AHEAD * threads) {
        int group[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            group[a] = pairs.group(i + a * threads);
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (group[a] >= 0)
                atomicAdd(&counts[group[a]], 1);
    }
    __syncthreads();
}

// Where the next row of each group of this thread goes, next[i] for its i-th. count_of(g, count, before) says how many
// pairs a group has and how many of them the blocks before this one. The first block writes the plan's counts and
// offsets.
template <typename F>
__device__ inline void begin_rows(const moe_plan_args &args, F count_of, int32_t (&next)[PER_THREAD])
{
    __shared__ int32_t warp_sums[PER_THREAD][WARPS];
    const int groups = args.groups;
    int32_t rows = 0;
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
        if (k * blockDim.x >= groups)
            break;
        const int g = k * blockDim.x + threadIdx.x;
        int32_t count = 0, before = 0, sum;
        if (g < groups)
            count_of(g, count, before);
        const int32_t offset = rows + scan_block(count, warp_sums[k], sum);
        rows += sum;
        next[k] = offset + before;
        if (blockIdx.x == 0 && g < groups) {
            args.plan.counts[g] = count;
            args.plan.offsets[g] = offset;
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        args.plan.offsets[groups] = rows;
}

// A block's counters for a tile: uint16 [ranking][groups], and of each group the row that its first pair gets.
struct tile_counters {
    int groups, ranking;
    int32_t *first;
    uint16_t *counts;

    // All counters zero, after the block's next barrier.
    __device__ void clear() const
    {
        for (int c = threadIdx.x; c < (ranking * groups + 1) / 2; c += blockDim.x)
            ((uint32_t *)counts)[c] = 0;
    }

    // Ranks a tile of pairs, one a thread, by the whole block: g is its group, -1: none. Returns how many lower lanes
    // of the warp have the same group; counts[warp][g] becomes how many threads of lower warps do. total[i] is how many
    // pairs there are of this thread's i-th group.
    __device__ int rank(int g, int32_t (&total)[PER_THREAD]) const
    {
        constexpr int AHEAD = 8;
        const unsigned same = __match_any_sync(ALL_LANES, g), lower = same & ((1u << threadIdx.x % 32) - 1);
        if (g >= 0 && lower == 0)
            counts[threadIdx.x / 32 * groups + g] = (uint16_t)__popc(same);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            const int own = threadIdx.x + k * blockDim.x;
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
            total[k] = before;
        }
        return __popc(lower);
    }

    // The rows of this thread's groups in this tile begin at next[i]; all threads know it after the next barrier.
    __device__ void set_first(const int32_t (&next)[PER_THREAD]) const
    {
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++)
            if (threadIdx.x + k * blockDim.x < groups)
                first[threadIdx.x + k * blockDim.x] = next[k];
    }

    // The row of a pair, by what rank() returned for it; -1: none.
    __device__ int32_t row(int g, int rank) const
    {
        return g >= 0 ? first[g] + counts[threadIdx.x / 32 * groups + g] + rank : -1;
    }
};

// Places the pairs of a block, tile by tile. next[i]: where the next row of this thread's i-th group goes.
__device__ inline void place_tiles(const block_pairs &pairs, const tile_counters &counters, int32_t (&next)[PER_THREAD])
{
    const int tile = counters.ranking * 32;
    const auto group = [&](int64_t i) { return threadIdx.x < tile ? pairs.group(i) : -1; };
    int following = group(pairs.begin + threadIdx.x);
    for (int64_t i0 = pairs.begin; i0 < pairs.end; i0 += tile) {
        const int64_t i = i0 + threadIdx.x;
        const bool mine = threadIdx.x < tile && i < pairs.end;
        const int g = following;
        following = group(i + tile);
        const float weight = mine ? pairs.weight(i) : 0.0f;
        const uint32_t token = (uint32_t)i / (uint32_t)pairs.args.slots;

        counters.clear();
        __syncthreads();
        int32_t total[PER_THREAD] = {};
        const int rank = counters.rank(g, total);
        counters.set_first(next);
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++)
            next[k] += total[k];
        __syncthreads();
        if (mine)
            moe_place_pair(pairs.args.plan, pairs.args.slots, i, token, counters.row(g, rank), weight);
        __syncthreads(); // the counters are written again
    }
}

// ---- One launch ----

// The grid is one block, or one cluster.
__global__ void __launch_bounds__(THREADS, 1) plan_whole(const moe_plan_args args, int64_t range, int ranking)
{
    extern __shared__ int2 shared[];
    moe_grid_launch_dependents();
    int32_t *const own = (int32_t *)shared; // this block's counts
    const int groups = args.groups;
    const tile_counters counters = {groups, ranking, own + groups, (uint16_t *)(own + 2 * groups)};
    const block_pairs pairs = pairs_of_block(args, range);
    const bool one_tile = range <= ranking * 32;
    const int64_t i = pairs.begin + threadIdx.x;
    const uint32_t token = (uint32_t)i / (uint32_t)args.slots;
    if (one_tile)
        counters.clear();
    __syncthreads();
    moe_grid_wait();
    moe_set_zeroed(args.zeroed, args.zeroed_bytes);

    int g = -1, rank = 0;
    float weight = 0.0f;
    int32_t next[PER_THREAD] = {};
    if (one_tile) {
        g = pairs.group(i);
        weight = pairs.weight(i);
        int32_t total[PER_THREAD] = {};
        rank = counters.rank(g, total);
#pragma unroll
        for (int k = 0; k < PER_THREAD; k++)
            if (threadIdx.x + k * blockDim.x < groups)
                own[threadIdx.x + k * blockDim.x] = total[k];
    } else {
        count_pairs(pairs, own);
    }

    const bool cluster = gridDim.x > 1;
    if (cluster) {
        moe_cluster_arrive();
        moe_cluster_wait();
    }
    const auto count_of = [&](int of, int32_t &count, int32_t &before) {
        if (!cluster) {
            count = own[of];
            return;
        }
#pragma unroll
        for (int b = 0; b < CLUSTER; b++) {
            const int32_t theirs = moe_cluster_load(own + of, b);
            count += theirs;
            before += b < blockIdx.x ? theirs : 0;
        }
    };
    begin_rows(args, count_of, next);
    if (cluster)
        moe_cluster_arrive(); // this block has read

    if (one_tile) {
        counters.set_first(next);
        __syncthreads();
        if (i < pairs.end)
            moe_place_pair(args.plan, args.slots, i, token, counters.row(g, rank), weight);
    } else {
        place_tiles(pairs, counters, next);
    }
    if (cluster)
        moe_cluster_wait(); // its counts stay until all have
}

// How many blocks can work on one launch. A cluster needs its SMs at the same time, and near each other: if other
// kernels hold more than half of them, it might wait for these.
inline int most_blocks(const moe_gpu &gpu)
{
    const int sms = gpu.max_sms > 0 ? gpu.max_sms : gpu.sms;
    return gpu.dependent && moe_built_for_90() && sms >= CLUSTER && 2 * sms >= gpu.sms ? CLUSTER : 1;
}

// The same where experts are chosen. A caller that bounds the SMs gets no large cluster.
inline int choosing_blocks(int64_t tokens, const moe_gpu &gpu)
{
    const int blocks = tokens <= ALONE_TOKENS ? 1 : most_blocks(gpu);
    const bool large = tokens > LARGE_TOKENS && gpu.max_sms == 0 && gpu.cluster >= LARGE_CLUSTER;
    return blocks > 1 && large ? LARGE_CLUSTER : blocks;
}

// Threads a block that set memory to zero with four stores each.
inline int64_t zeroing_threads(const moe_plan_args &args, int blocks)
{
    return (int64_t)(args.zeroed_bytes / sizeof(uint4)) / (4 * blocks);
}

// ---- One launch that chooses the ids first ----
//
// A token's ids differ and each of them gets a row: so a word for each expert, with a bit for each of the block's
// tokens that have chosen it, tells the expert's count and the order of its rows.

// What a block has in shared memory.
struct choice {
    int2 *pairs;       // [tokens][top_k]: ids and bits of weights
    uint32_t *chosen;  // [experts]: by which of its tokens
    int32_t *first;    // [experts]: the row of the first of those
    int32_t *received; // [blocks][experts], in a cluster: the counts of all of them

    __device__ choice(int2 *shared, int n, int experts)
        : pairs(shared), chosen((uint32_t *)(shared + n)), first((int32_t *)chosen + experts), received(first + experts)
    {
    }
};

constexpr size_t choice_bytes(int pairs, int experts, int blocks)
{
    return pairs * sizeof(int2) + (size_t)(blocks > 1 ? 2 + blocks : 2) * experts * sizeof(int32_t);
}
static_assert(choice_bytes(CHOOSING_THREADS, CHOOSING_EXPERTS, LARGE_CLUSTER) <= SHARED_BYTES,
              "a block's share must fit");

// The grid is one block, or one cluster of BLOCKS; each takes `tokens` tokens, PER experts a lane.
template <int PER, int BLOCKS>
__global__ void __launch_bounds__(CHOOSING_THREADS)
    plan_chosen(const moe_gate_args gate, const moe_plan_args args, int tokens)
{
    extern __shared__ int2 shared[];
    __shared__ int32_t warp_sums[WARPS];
    __shared__ uint64_t barrier;
    moe_grid_launch_dependents();
    const int thread = threadIdx.x, block = blockIdx.x, experts = gate.experts, top_k = gate.top_k;
    const bool cluster = gridDim.x > 1, has_expert = thread < experts;
    const choice own = {shared, tokens * top_k, experts};

    // This block's tokens, and this thread's pair of them.
    const int token0 = block * tokens, here = min((int)gate.tokens - token0, tokens);
    const uint32_t token = (uint32_t)thread / (uint32_t)top_k;
    const bool has_pair = (int)token < here;
    if (cluster) {
        if (thread == 0)
            moe_cluster_expect(&barrier, BLOCKS * experts * sizeof(int32_t));
        moe_cluster_arrive_relaxed();
    }

    if (has_expert)
        own.chosen[thread] = 0;
    __syncthreads();
    if (cluster)
        moe_cluster_wait(); // all of its blocks have started
    moe_grid_wait();

#pragma unroll 1
    for (int t = thread / 32; t < here; t += blockDim.x / 32) {
        const int64_t all = token0 + t;
        moe_topk_token<PER, 1, 1>(gate, gate.logits + all * experts, gate.ids + all * top_k, gate.weights + all * top_k,
                                  own.pairs + t * top_k, [&](int id) { atomicOr(&own.chosen[id], 1u << t); });
    }
    moe_set_zeroed(args.zeroed, args.zeroed_bytes); // by warps without a token meanwhile
    __syncthreads();

    int2 pair = {};
    int rank = 0;
    if (has_pair) {
        pair = own.pairs[thread];
        rank = __popc(own.chosen[pair.x] & ((1u << token) - 1));
    }
    int32_t count = has_expert ? __popc(own.chosen[thread]) : 0, before = 0, sum;
    if (cluster && has_expert) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
            moe_cluster_store(own.received + block * experts + thread, b, count, &barrier);
        moe_barrier_wait(moe_shared(&barrier), 0);
        count = 0;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int32_t theirs = own.received[b * experts + thread];
            count += theirs;
            before += b < block ? theirs : 0;
        }
    }
    const int32_t offset = scan_block(count, warp_sums, sum);
    if (has_expert)
        own.first[thread] = offset + before;
    if (block == 0) {
        if (has_expert) {
            args.plan.counts[thread] = count;
            args.plan.offsets[thread] = offset;
        }
        if (thread == 0)
            args.plan.offsets[experts] = sum;
    }
    __syncthreads();
    if (has_pair)
        moe_place_pair(args.plan, args.slots, token0 * top_k + thread, token0 + token, own.first[pair.x] + rank,
                       __int_as_float(pair.y));
}

// ---- Two launches ----

// Threads that add up the counts of one group together, at most.
constexpr int MOST_SHARING = 32;

// Scratch [block][groups]: each block's counts.
__global__ void __launch_bounds__(THREADS) plan_count(const moe_plan_args args, int64_t range)
{
    extern __shared__ int2 shared[];
    int32_t *const counts = (int32_t *)shared;
    moe_grid_launch_dependents();
    moe_grid_wait();
    moe_set_zeroed(args.zeroed, args.zeroed_bytes);
    count_pairs(pairs_of_block(args, range), counts);
    for (int g = threadIdx.x; g < args.groups; g += blockDim.x)
        ((int32_t *)args.scratch)[(int64_t)blockIdx.x * args.groups + g] = counts[g];
}

// The counts of blocks b0, b0 + step, ... added up, for group g: x of all, y of those before this block.
__device__ inline int2 add_counts(const moe_plan_args &args, int g, int b0, int step)
{
    constexpr int AHEAD = 16;
    const int32_t *counts = (const int32_t *)args.scratch + g;
    const int blocks = gridDim.x;
    int2 sum = {};
    for (; b0 < blocks; b0 += AHEAD * step) {
        int32_t count[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int b = b0 + a * step;
            count[a] = b < blocks ? counts[(int64_t)b * args.groups] : 0;
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            sum.x += count[a];
            sum.y += b0 + a * step < blockIdx.x ? count[a] : 0;
        }
    }
    return sum;
}

__global__ void __launch_bounds__(THREADS, 1) plan_place(const moe_plan_args args, int64_t range, int ranking)
{
    extern __shared__ int2 shared[];
    const tile_counters counters = {args.groups, ranking, (int32_t *)shared,
                                    (uint16_t *)((int32_t *)shared + args.groups)};
    moe_grid_launch_dependents();
    moe_grid_wait();

    // With few groups several threads share one: it takes as long as its loads that wait for each other. What they have
    // added up lies where the tiles' counters will be.
    int2 *const shares = shared;
    const int groups = args.groups, sharing = min((int)blockDim.x / groups, MOST_SHARING);
    if (sharing > 1) {
        const int share = threadIdx.x / groups;
        if (share < sharing)
            shares[threadIdx.x] = add_counts(args, threadIdx.x - share * groups, share, sharing);
        __syncthreads();
    }
    const auto count_of = [&](int g, int32_t &count, int32_t &before) {
        int2 sum = {};
        if (sharing <= 1)
            sum = add_counts(args, g, 0, 1);
        for (int share = 0; sharing > 1 && share < sharing; share++) {
            sum.x += shares[share * groups + g].x;
            sum.y += shares[share * groups + g].y;
        }
        count = sum.x;
        before = sum.y;
    };
    int32_t next[PER_THREAD] = {};
    begin_rows(args, count_of, next);
    place_tiles(pairs_of_block(args, range), counters, next);
}

} // namespace

// With no tokens the counts and offsets are still written, as zeros.
moe_status moe_plan_cuda(const struct moe_plan_args *args, const struct moe_gpu *gpu)
{
    const int64_t pairs = args->tokens * args->slots;
    const int blocks = pairs <= THREADS ? 1 : most_blocks(*gpu);
    if (pairs <= blocks * WHOLE_PAIRS) {
        const int64_t range = moe_ceil_div(pairs, blocks);
        const layout shared = lay_out(args->groups, range, zeroing_threads(*args, blocks));
        moe_launch_cluster(plan_whole, blocks, blocks, shared.threads, shared.bytes, gpu->stream, gpu->dependent, *args,
                           range, shared.ranking);
        return moe_launched(NULL, "plan_whole");
    }

    // A whole number of MOE_PLAN_BLOCK pairs each, so that there are no more blocks than the scratch has room for.
    const int64_t parts = moe_ceil_div(pairs, MOE_PLAN_BLOCK);
    const int64_t most = gpu->max_sms > 0 && gpu->max_sms < MOE_PLAN_BLOCKS ? gpu->max_sms : MOE_PLAN_BLOCKS;
    const int64_t range = MOE_PLAN_BLOCK * moe_ceil_div(parts, most);
    const unsigned grid = (unsigned)moe_ceil_div(pairs, range);
    const layout shared = lay_out(args->groups, range, THREADS);
    moe_launch(plan_count, grid, (unsigned)std::min(range, (int64_t)THREADS), args->groups * sizeof(int32_t),
               gpu->stream, gpu->dependent, *args, range);
    const moe_status status = moe_launched(NULL, "plan_count");
    if (status != MOE_OK)
        return status;
    const size_t bytes = std::max(shared.bytes, THREADS * sizeof(int2));
    moe_launch(plan_place, grid, THREADS, bytes, gpu->stream, gpu->dependent, *args, range, shared.ranking);
    return moe_launched(NULL, "plan_place");
}

// For more tokens than one launch takes, or none.
static moe_status topk_then_plan(const struct moe_gate_args *gate, const struct moe_plan_args *args,
                                 const struct moe_gpu *gpu)
{
    if (gate->tokens == 0 || gate->experts > MOE_TALLY_EXPERTS || gate->top_k > MOE_TALLY_TOP_K ||
        args->expert_group != NULL) {
        const moe_status status = moe_topk_cuda(gate, gpu);
        return status == MOE_OK ? moe_plan_cuda(args, gpu) : status;
    }
    struct moe_tally tally = {(uint32_t *)args->scratch, 0};
    const moe_status status = moe_topk_tally_cuda(gate, &tally, gpu);
    return status == MOE_OK ? moe_plan_tally_cuda(args, &tally, gpu) : status;
}

moe_status moe_topk_plan_cuda(const struct moe_gate_args *gate, const struct moe_plan_args *args,
                              const struct moe_gpu *gpu)
{
    const int blocks = choosing_blocks(gate->tokens, *gpu);
    const int64_t tokens = moe_ceil_div(gate->tokens, blocks), pairs = tokens * gate->top_k;
    if (tokens == 0 || tokens > CHOOSING_TOKENS || pairs > CHOOSING_THREADS || gate->top_k > CHOOSING_TOP_K ||
        gate->experts > CHOOSING_EXPERTS || args->expert_group != NULL)
        return topk_then_plan(gate, args, gpu);
    const int64_t work = std::max({32 * tokens, pairs, zeroing_threads(*args, blocks), (int64_t)128});
    const int threads = std::max((int)std::min(work, (int64_t)CHOOSING_THREADS), gate->experts);
    moe_with_experts_a_lane<CHOOSING_EXPERTS / 32>(gate->experts, [&](auto per) {
        const auto large = plan_chosen<per.value, LARGE_CLUSTER>, kernel = plan_chosen<per.value, CLUSTER>;
        if (blocks > CLUSTER)
            cudaFuncSetAttribute(large, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        moe_launch_cluster(blocks > CLUSTER ? large : kernel, blocks, blocks, (threads + 31) / 32 * 32,
                           choice_bytes((int)pairs, gate->experts, blocks), gpu->stream, gpu->dependent, *gate, *args,
                           (int)tokens);
    });
    return moe_launched(NULL, "plan_chosen");
}
