// SPDX-License-Identifier: Apache-2.0
// Logits of many tokens on compute capability 9.0: a GEMM of few columns, where what counts is how soon x and the gate
// are in shared memory.
//
// A cluster takes a tile of tokens with up to 256 experts, each of its blocks a slice of the hidden dimension: so tiles
// can be large, which reads the gate less often, and still every SM has one. A block has a ring of stages of 64
// columns; each of its warpgroups multiplies 64 of the tokens. The slices' sums meet in shared memory, where each block
// adds up those of its share of the tokens, in the order of slices. So a token gets the same bits in every run, though
// not in batches of which the slices are others.
//
// The kernels of top-k and of the plan come next, with little to do but to start. They do that meanwhile if they find
// room beside these blocks, which saves more than the fastest logits would: hence no more of shared memory and
// registers than it takes to keep memory busy.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/hopper.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "kernels/cuda/common/tensor_map.h"
#include "kernels/cuda/common/wgmma.cuh"
#include "router/logits_wgmma.h"
#include "router/place.cuh"

namespace
{

constexpr int COLS = 64, ROW_BYTES = COLS * 2; // of a stage
constexpr int WARPGROUP = 128, M = 64;         // threads and tokens of one
constexpr int RING_BYTES = 128 * 1024, MOST_STAGES = 16;
constexpr int MOST_GROUPS = 2; // warpgroups
constexpr int MOST_SLICES = 8; // a cluster of more blocks is not to be had everywhere

struct logits_args {
    moe_gate_args gate;
    CUtensorMap x, experts; // boxes of a stage's columns, with the tile's tokens and experts
    uint32_t tiles;
    int expert_tiles;
    int blocks, each; // blocks of COLS columns: all, and those of a slice
    int slices;       // as many as blocks in a cluster
};

// A tile of GROUPS * 64 tokens and N experts.
template <int N_, int GROUPS_> struct logits_shape {
    static constexpr int N = N_, GROUPS = GROUPS_, TOKENS = GROUPS * M;
    static constexpr int THREADS = GROUPS * WARPGROUP;
    static constexpr int STAGE = (TOKENS + N) * ROW_BYTES;

    // A slice's sums lie where the stages were, with eight more floats in a row: then no two lanes that store or load
    // at once want the same bank.
    static constexpr int PITCH = N + 8, SUM_BYTES = TOKENS * PITCH * 4;
    static constexpr int LEAST = (SUM_BYTES + STAGE - 1) / STAGE, ENOUGH = RING_BYTES / STAGE;
    static constexpr int STAGES = LEAST > ENOUGH ? LEAST : ENOUGH < MOST_STAGES ? ENOUGH : MOST_STAGES;

    static constexpr int FULL = STAGES * STAGE, EMPTY = FULL + STAGES * 8, BYTES = EMPTY + STAGES * 8;
    static_assert(STAGE % 1024 == 0 && BYTES <= 227 * 1024);
};

// Starts the copies of a stage, by one thread: the gate's rows, which a forward may read at once (moe_layer_weights in
// moe.h), and x.
template <class Shape> struct stage_loader {
    const logits_args &args;
    const uint32_t shared;
    const int token, expert; // the tile's first ones

    __device__ __forceinline__ uint32_t full(uint32_t stage) const
    {
        return shared + Shape::FULL + stage * 8;
    }

    __device__ __forceinline__ uint32_t empty(uint32_t stage) const
    {
        return shared + Shape::EMPTY + stage * 8;
    }

    __device__ __forceinline__ void gate(uint32_t stage, int block) const
    {
        moe_barrier_expect(full(stage), Shape::STAGE);
        moe_tensor_load_2d(shared + stage * Shape::STAGE + Shape::TOKENS * ROW_BYTES, &args.experts, block * COLS,
                           expert, full(stage));
    }

    __device__ __forceinline__ void tokens(uint32_t stage, int block) const
    {
        moe_tensor_load_2d(shared + stage * Shape::STAGE, &args.x, block * COLS, token, full(stage));
    }
};

// A warpgroup's 64 tokens with all of the tile's experts, over columns [begin, end) in blocks of COLS. The first stages
// are on their way; the first warp starts the others.
template <typename T, class Shape>
__device__ __forceinline__ void multiply(float (&sum)[Shape::N / 2], const stage_loader<Shape> &load,
                                         moe_ring_place &stage, int begin, int end)
{
    const uint32_t shared = load.shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t tokens = moe_wgmma_matrix(shared + warp / 4 * (M * ROW_BYTES));
    const uint32_t experts = moe_wgmma_matrix(shared + Shape::TOKENS * ROW_BYTES);
    moe_ring_place before;
#pragma unroll 1
    for (int block = begin; block < end; block++) {
        moe_barrier_wait(load.full(stage.at), stage.parity);
        const uint32_t at = stage.at * (Shape::STAGE / 16);
        moe_wgmma_fence();
#pragma unroll
        for (int k = 0; k < COLS / 16; k++)
            moe_wgmma<T, Shape::N>::run(sum, tokens + at + k * 2, experts + at + k * 2, 1);
        moe_wgmma_commit();
        // Meanwhile the stage before this one is filled again, when all have read it.
        const int next = block - 1 + Shape::STAGES;
        if (warp == 0 && block > begin && next < end) {
            moe_barrier_wait(load.empty(before.at), before.parity);
            if (moe_elect()) {
                load.gate(before.at, next);
                load.tokens(before.at, next);
            }
            __syncwarp();
        }
        moe_wgmma_wait();
        if (lane == 0)
            moe_barrier_arrive(load.empty(stage.at));
        before = stage;
        stage.next(Shape::STAGES);
    }
}

// This block's share of the tile's tokens: what all slices have of them, added up, to memory.
template <class Shape>
__device__ __forceinline__ void add_slices(const moe_gate_args &args, const float *sums, int slices, int slice, int t0,
                                           int e0)
{
    constexpr int VEC = 4, ACROSS = Shape::N / VEC;
    const int share = Shape::TOKENS / slices;
    const bool aligned = args.experts % VEC == 0 && (uintptr_t)args.logits % (VEC * sizeof(float)) == 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < share * ACROSS; i += Shape::THREADS) {
        const int row = slice * share + i / ACROSS, column = i % ACROSS * VEC;
        float4 part[MOST_SLICES]; // all on their way at once
#pragma unroll
        for (int s = 0; s < MOST_SLICES; s++)
            part[s] = s < slices ? moe_cluster_load((const float4 *)(sums + row * Shape::PITCH + column), s) : float4();
        float v[VEC] = {part[0].x, part[0].y, part[0].z, part[0].w};
#pragma unroll
        for (int s = 1; s < MOST_SLICES; s++) {
            v[0] += part[s].x;
            v[1] += part[s].y;
            v[2] += part[s].z;
            v[3] += part[s].w;
        }
#pragma unroll
        for (int j = 0; j < VEC; j++)
            v[j] = moe_round_to(v[j], args.logits_dtype);
        float *const to = args.logits + (int64_t)(t0 + row) * args.experts + e0 + column;
        const int left = t0 + row < args.tokens ? args.experts - e0 - column : 0;
        if (aligned && left > 0)
            moe_store<true>(to, VEC, v);
        else
            moe_store<false>(to, left, v);
    }
}

template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1) logits_many(const __grid_constant__ logits_args args)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char logits_memory[];
    float *const sums = (float *)logits_memory;
    const uint32_t shared = moe_shared(logits_memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slices = args.slices, slice = slices > 1 ? (int)moe_cluster_rank() : 0;
    const int begin = min(slice * args.each, args.blocks), end = min(begin + args.each, args.blocks);
    moe_grid_launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::STAGES; i++) {
            moe_barrier_init(shared + Shape::FULL + i * 8, 1);
            moe_barrier_init(shared + Shape::EMPTY + i * 8, Shape::THREADS / 32);
        }
        moe_barrier_init_done();
    }
    __syncthreads();

    moe_ring_place stage;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x / (uint32_t)slices; tile < args.tiles; tile += gridDim.x / (uint32_t)slices) {
        const uint32_t of_tokens = tile / (uint32_t)args.expert_tiles;
        const int t0 = (int)of_tokens * Shape::TOKENS, e0 = (int)(tile - of_tokens * args.expert_tiles) * Shape::N;
        const stage_loader<Shape> load = {args, shared, t0, e0};
        if (warp == 0 && moe_elect()) {
            const int ahead = min(end - begin, Shape::STAGES);
            moe_ring_place first = stage, second = stage;
#pragma unroll 1
            for (int i = 0; i < ahead; i++, first.next(Shape::STAGES)) {
                moe_barrier_wait(load.empty(first.at), first.parity ^ 1); // it is, since the tile before this one
                load.gate(first.at, begin + i);
            }
            moe_grid_wait();
            moe_fence_async(); // what the kernel ahead stored comes before the tensor copies
#pragma unroll 1
            for (int i = 0; i < ahead; i++, second.next(Shape::STAGES))
                load.tokens(second.at, begin + i);
        }
        __syncwarp();
        float sum[Shape::N / 2] = {};
        multiply<T>(sum, load, stage, begin, end);

        __syncthreads(); // no product of this block reads a stage any more
        float *const own = sums + (warp * 16 + lane / 4) * Shape::PITCH + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < Shape::N / 2; i += 2)
            *(float2 *)(own + i / 2 % 2 * 8 * Shape::PITCH + i / 4 * 8) = make_float2(sum[i], sum[i + 1]);
        moe_cluster_arrive();
        moe_grid_wait(); // those ahead may still read logits
        moe_cluster_wait();
        add_slices<Shape>(args.gate, sums, slices, slice, t0, e0);
        moe_fence_async(); // sums have been stored, and read by all blocks, before the next tile's copies come
        moe_cluster_arrive();
        moe_cluster_wait();
    }
    moe_set_zeroed(args.gate.zeroed, args.gate.zeroed_bytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "built for 9.0 without its own instructions this kernel would do nothing: build for 90a"
#endif
}

// ---- Host ----

int sms_of(const struct moe_gpu *gpu)
{
    return gpu->max_sms > 0 && gpu->max_sms < gpu->sms ? gpu->max_sms : gpu->sms;
}

// Experts of a tile.
int tile_experts(const struct moe_gate_args *args)
{
    int n = 256;
    while (n > 32 && n / 2 >= args->experts)
        n /= 2;
    return n;
}

// Clusters that run at once. Those of more than two blocks leave some SMs unused.
int64_t clusters_of(int sms, int slices)
{
    return std::max((slices > 2 ? sms * 7 / 8 : sms) / slices, 1);
}

// What a choice is judged by, as measured: the bytes that the busiest SM takes in. Sums cost more than what comes by
// the copy engine, and when blocks meet that takes time as well. Beside two warpgroups on every SM the kernels that
// come next do not all find room.
int64_t cost(const struct moe_gate_args *args, int sms, const struct moe_logits_tile &tile)
{
    constexpr int64_t MEETING = 64 << 10;
    const int64_t n = tile_experts(args), tokens = tile.groups * M, slices = tile.slices;
    const int64_t tiles = moe_ceil_div(args->tokens, tokens) * moe_ceil_div(args->experts, n);
    const int64_t rows = tokens + std::min((int64_t)args->experts, n);
    const int64_t operands = rows * ROW_BYTES * moe_ceil_div(moe_ceil_div(args->hidden, COLS), slices);
    const int64_t sums = slices > 1 ? 2 * tokens * n * 4 * (slices - 1) / slices + MEETING : 0;
    const int64_t clusters = clusters_of(sms, tile.slices);
    const bool crowded = tile.groups > 1 && std::min(tiles, clusters) * slices > sms * 3 / 4;
    return moe_ceil_div(tiles, clusters) * (operands + sums) * (crowded ? 13 : 10) / 10;
}

// A cluster needs its SMs at the same time: with a bound of less than half of them there are none (max_sms in moe.h).
struct moe_logits_tile choose(const struct moe_gate_args *args, const struct moe_gpu *gpu)
{
    const int sms = sms_of(gpu), most_slices = 2 * sms < gpu->sms ? 1 : std::min({MOST_SLICES, (int)gpu->cluster, sms});
    struct moe_logits_tile best = {1, 1};
    for (int32_t groups = 1; groups <= MOST_GROUPS; groups++)
        for (int32_t slices = 1; slices <= most_slices; slices *= 2) {
            const struct moe_logits_tile tile = {groups, slices};
            if (cost(args, sms, tile) < cost(args, sms, best))
                best = tile;
        }
    return best;
}

template <typename T, int N, int GROUPS>
bool launch(const struct moe_gate_args *gate, const struct moe_gpu *gpu, int slices)
{
    typedef logits_shape<N, GROUPS> Shape;
    logits_args args = {};
    args.gate = *gate;
    args.expert_tiles = (int)moe_ceil_div(gate->experts, N);
    args.tiles = (uint32_t)(moe_ceil_div(gate->tokens, Shape::TOKENS) * args.expert_tiles);
    args.blocks = (int)moe_ceil_div(gate->hidden, COLS);
    args.each = (int)moe_ceil_div(args.blocks, slices);
    args.slices = slices;
    const uint64_t strides[] = {(uint64_t)gate->hidden * 2};
    const auto map = [&](CUtensorMap *to, const void *base, int64_t rows, uint32_t of_tile) {
        const uint64_t sizes[] = {(uint64_t)gate->hidden, (uint64_t)rows};
        const uint32_t box[] = {COLS, of_tile};
        return moe_tensor_map(to, gate->x_dtype, 2, base, sizes, strides, box, NULL) == MOE_OK;
    };
    if (!map(&args.x, gate->x, gate->tokens, Shape::TOKENS) || !map(&args.experts, gate->gate, gate->experts, N))
        return false;
    const auto kernel = logits_many<T, Shape>;
    const unsigned clusters = (unsigned)std::min((int64_t)args.tiles, clusters_of(sms_of(gpu), slices));
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::BYTES);
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    moe_launch_cluster(kernel, slices, clusters * slices, Shape::THREADS, Shape::BYTES, gpu->stream, gpu->dependent,
                       args);
    return true;
}

template <typename T, int N>
bool launch(const struct moe_gate_args *args, const struct moe_gpu *gpu, const struct moe_logits_tile &tile)
{
    return (tile.groups == 1 ? launch<T, N, 1> : launch<T, N, MOST_GROUPS>)(args, gpu, tile.slices);
}

template <typename T>
bool launch(const struct moe_gate_args *args, const struct moe_gpu *gpu, const struct moe_logits_tile &tile)
{
    const int n = tile_experts(args);
    return (n == 32    ? launch<T, 32>
            : n == 64  ? launch<T, 64>
            : n == 128 ? launch<T, 128>
                       : launch<T, 256>)(args, gpu, tile);
}

} // namespace

// With less of x than that, or few experts, what clusters and copies take to start is more than what they save.
bool moe_logits_wgmma_pays(const struct moe_gate_args *args, const struct moe_gpu *gpu)
{
    constexpr int64_t SOME_OF_X = 1 << 20, MANY_TOKENS = 8192; // elements
    constexpr int32_t SOME_EXPERTS = 32;
    return gpu->dependent && moe_built_for_90() && args->tokens * args->hidden >= SOME_OF_X &&
           (args->experts >= SOME_EXPERTS || args->tokens >= MANY_TOKENS);
}

bool moe_logits_wgmma(const struct moe_gate_args *args, const struct moe_gpu *gpu, const struct moe_logits_tile *tile)
{
    const struct moe_logits_tile chosen = tile != NULL ? *tile : choose(args, gpu);
    return (args->x_dtype == MOE_F16 ? launch<__half> : launch<__nv_bfloat16>)(args, gpu, chosen);
}
