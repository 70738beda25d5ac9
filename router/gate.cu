// SPDX-License-Identifier: Apache-2.0
// The gate on the GPU: logits on tensor cores (with FMAs where dtypes or sizes rule those out; of many tokens see
// logits_wgmma.cu), which also set memory of later steps to zero; then the top-k of each token in one warp.
#include <type_traits>

#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "kernels/cuda/common/ptx.cuh"
#include "router/logits_wgmma.h"
#include "router/place.cuh"
#include "router/tally.cuh"
#include "router/topk.cuh"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- Logits on tensor cores: x and gate both bf16 or both f16 ----
//
// The hidden dimension is cut into SLICES equal slices. A block takes up to 16 MI tokens x 8 NI experts; its warp w
// takes slice w of them all, so that no byte enters an SM twice for a tile, and the slices' sums are added in order.
// Operands go from memory straight to registers: a lane loads 16 bytes of row lane / 4, columns 8 (lane % 4) on of 32,
// which is what it multiplies in two mma.m16n8k16, if the columns of a product are counted as memory has them for this
// lane. The order does not matter to a sum of products as long as both operands agree; and the tile does not change it.

constexpr int SLICES = 8;
constexpr int STEP = 32; // columns of a row that four lanes load at once

// Both products of one piece of the tile: x0 and x1 are of token rows r and r + 8, w of expert row r.
template <typename T> __device__ inline void multiply(float (&sum)[4], const uint4 &x0, const uint4 &x1, const uint4 &w)
{
    const uint32_t first[4] = {x0.x, x1.x, x0.y, x1.y}, second[4] = {x0.z, x1.z, x0.w, x1.w};
    moe_mma(sum, first, w.x, w.y, T());
    moe_mma(sum, second, w.z, w.w, T());
}

// What the host works out for a launch, so that the blocks need not divide.
struct tiling {
    int tokens, experts; // of a tile
    int expert_tiles;
    uint32_t tiles; // 2^32 would have more logits than there is memory
    int slice;      // columns
};

// A tile has tokens <= 16 MI and experts <= 8 NI. AHEAD steps are on their way at any time, each thread for itself, so
// that nobody waits for another. HALF, with MI = 1: it has at most 8 tokens, whose rows are rows 8 to 15 of the product
// as well.
template <typename T, int MI, int NI, int AHEAD, int BLOCKS, bool HALF>
__global__ void __launch_bounds__(SLICES * 32, BLOCKS) logits_tensor(const moe_gate_args args, const tiling cut)
{
    constexpr int PIECES = MI * NI;         // m16n8
    constexpr int ROWS = HALF ? 1 : 2 * MI; // of x in a lane
    constexpr int ROUND = PIECES < SLICES ? PIECES : SLICES;
    static_assert(PIECES % ROUND == 0, "pieces are added up in rounds");
    __shared__ float4 parts[ROUND][SLICES][32];
    static_assert(PIECES > 1 || sizeof parts == MOE_LOGITS_SHARED_BYTES, "others count on it");
    moe_grid_launch_dependents();

    // The gate's rows and x come as far as L2, all of them once, by the first blocks: while whoever makes x is still at
    // work, or at least while the instructions come from as far away.
    const int hidden = (int)args.hidden, experts = args.experts;
    if (threadIdx.x == 0) {
        const int e0 = blockIdx.x * cut.experts;
        if (e0 < experts)
            moe_prefetch_l2((const char *)args.gate + (int64_t)e0 * hidden * sizeof(T),
                            min(experts - e0, cut.experts) * hidden * sizeof(T));
        if (blockIdx.x < args.tokens)
            moe_prefetch_l2((const char *)args.x + (int64_t)blockIdx.x * hidden * sizeof(T), hidden * sizeof(T));
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quad = lane % 4;
    const int begin = warp * cut.slice, end = min(begin + cut.slice, hidden);
    moe_grid_wait();

#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < cut.tiles; tile += gridDim.x) {
        const uint32_t token_tile = tile / (uint32_t)cut.expert_tiles;
        const int64_t t0 = (int64_t)token_tile * cut.tokens;
        const int e0 = (int)(tile - token_tile * cut.expert_tiles) * cut.experts;
        const int tokens_here = (int)min(args.tokens - t0, (int64_t)cut.tokens);
        const int experts_here = min(experts - e0, cut.experts);
        const char *x = (const char *)args.x + t0 * hidden * sizeof(T) + quad * sizeof(uint4);
        const char *gate = (const char *)args.gate + (int64_t)e0 * hidden * sizeof(T) + quad * sizeof(uint4);

        // Rows past the last token or expert are that one again; their sums are not stored. hidden is at most 2^20, so
        // that a tile spans less than 4 GB.
        uint32_t x_row[ROWS], gate_row[NI];
#pragma unroll
        for (int i = 0; i < ROWS; i++)
            x_row[i] = (uint32_t)min(i * 8 + row, tokens_here - 1) * (uint32_t)(hidden * sizeof(T));
#pragma unroll
        for (int j = 0; j < NI; j++)
            gate_row[j] = (uint32_t)min(j * 8 + row, experts_here - 1) * (uint32_t)(hidden * sizeof(T));

        // Step a of a round is multiplied, then its registers take the same step of the round at `next`; `whole`: all
        // of that round is in the slice. Columns past the slice count as zero.
        float sum[MI][NI][4] = {};
        uint4 xv[AHEAD][ROWS], wv[AHEAD][NI];
        const auto load = [&](int a, int next, auto whole) {
            const char *x_at = x + next * sizeof(T), *gate_at = gate + next * sizeof(T);
            const bool there = whole.value || next + a * STEP + quad * 8 < end;
#pragma unroll
            for (int i = 0; i < ROWS; i++)
                xv[a][i] = there ? *(const uint4 *)(x_at + x_row[i] + a * STEP * sizeof(T)) : uint4();
#pragma unroll
            for (int j = 0; j < NI; j++)
                wv[a][j] = there ? *(const uint4 *)(gate_at + gate_row[j] + a * STEP * sizeof(T)) : uint4();
        };
        const auto multiply_step = [&](int a) {
#pragma unroll
            for (int j = 0; j < NI; j++)
#pragma unroll
                for (int i = 0; i < MI; i++)
                    multiply<T>(sum[i][j], xv[a][2 * i], xv[a][HALF ? 0 : 2 * i + 1], wv[a][j]);
        };
        if constexpr (PIECES == 1) {
            // With so little to do it takes longest to fetch the instructions: so they are here only once.
#pragma unroll 1
            for (int next = begin; next < end; next += AHEAD * STEP) {
#pragma unroll
                for (int a = 0; a < AHEAD; a++)
                    load(a, next, moe_bool<false>());
                __syncwarp(); // keeps the compiler from waiting for the first before it has asked for the last
#pragma unroll
                for (int a = 0; a < AHEAD; a++)
                    multiply_step(a);
            }
        } else {
            const auto round = [&](int next, auto whole) {
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    multiply_step(a);
                    load(a, next, whole);
                }
            };
#pragma unroll
            for (int a = 0; a < AHEAD; a++)
                load(a, begin, moe_bool<false>());
            int next = begin + AHEAD * STEP;
#pragma unroll 1
            for (; next + AHEAD * STEP <= end; next += AHEAD * STEP)
                round(next, moe_bool<true>());
#pragma unroll 1
            for (; next - AHEAD * STEP < end; next += AHEAD * STEP)
                round(next, moe_bool<false>());
        }

#pragma unroll
        for (int first = 0; first < PIECES; first += ROUND) {
#pragma unroll
            for (int p = 0; p < ROUND; p++) {
                const float(&v)[4] = sum[(first + p) / NI][(first + p) % NI];
                parts[p][warp][lane] = make_float4(v[0], v[1], v[2], v[3]);
            }
            __syncthreads();
            // A thread adds up float i of the 128 of a piece: of lane i / 4, its number i % 4.
#pragma unroll
            for (int i0 = 0; i0 < ROUND * 128; i0 += SLICES * 32) {
                const int p = (i0 + threadIdx.x) / 128, i = threadIdx.x % 128;
                if (p >= ROUND)
                    break;
                float v = 0.0f;
#pragma unroll
                for (int s = 0; s < SLICES; s++)
                    v += ((const float *)parts[p][s])[i];
                const int t = (first + p) / NI * 16 + i % 4 / 2 * 8 + i / 16;
                const int e = (first + p) % NI * 8 + i / 4 % 4 * 2 + i % 2;
                if (t < tokens_here && e < experts_here)
                    args.logits[(t0 + t) * experts + e0 + e] = moe_round_to(v, args.logits_dtype);
            }
            __syncthreads(); // parts are written again
        }
    }
    moe_set_zeroed(args.zeroed, args.zeroed_bytes);
}

// Rows of x and gate that the busiest SM reads with tiles of this size: what a tile shape is judged by, since the
// kernel waits for memory, L2 at the least.
inline int64_t rows_per_sm(const struct moe_gate_args *args, int sms, int tokens, int experts)
{
    const int64_t tiles = moe_ceil_div(args->tokens, tokens) * moe_ceil_div(args->experts, experts);
    return moe_ceil_div(tiles, sms) * (tokens + experts);
}

template <typename T, int MI, int NI, int AHEAD, int BLOCKS, bool HALF = false> struct tensor_tile {
    enum { TOKENS = HALF ? 8 : 16 * MI, EXPERTS = 8 * NI };

    static void launch(const struct moe_gate_args *args, const struct moe_gpu *gpu, int tokens, int experts)
    {
        const int64_t tiles = moe_ceil_div(args->tokens, tokens) * moe_ceil_div(args->experts, experts);
        const unsigned grid = moe_grid(tiles, gpu->max_sms, gpu->sms, BLOCKS);
        const int64_t slice = moe_ceil_div(moe_ceil_div(args->hidden, STEP), SLICES) * STEP;
        const tiling cut = {tokens, experts, (int)moe_ceil_div(args->experts, experts), (uint32_t)tiles, (int)slice};
        const auto kernel = logits_tensor<T, MI, NI, AHEAD, BLOCKS, HALF>;
        if (MI * NI == 1 && gpu->dependent) // the FFN's blocks, which need a lot of it, can start beside these
            cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
        moe_launch(kernel, grid, SLICES * 32, 0, gpu->stream, gpu->dependent, *args, cut);
    }
};

// All but the smallest tiles, which can be cut down. 16 loads or more in flight a thread, as far as registers go.
template <typename T, typename F> void for_each_tile(F f)
{
    f(tensor_tile<T, 4, 8, 1, 1>());
    f(tensor_tile<T, 4, 4, 2, 1>());
    f(tensor_tile<T, 2, 8, 2, 1>());
    f(tensor_tile<T, 2, 4, 4, 1>());
    f(tensor_tile<T, 2, 2, 2, 2>());
    f(tensor_tile<T, 2, 1, 4, 2>());
}

// Large tiles read less from L2, small ones keep every SM busy. A tile twice as wide as there are experts would only
// multiply zeros.
template <typename T> void launch_tensor(const struct moe_gate_args *args, const struct moe_gpu *gpu)
{
    const int sms = gpu->max_sms > 0 ? gpu->max_sms : gpu->sms;
    int64_t least = INT64_MAX;
    int tokens = 0, experts = 0;
    const auto consider = [&](int t, int e) {
        const int64_t rows = rows_per_sm(args, sms, t, e);
        if (rows < least) {
            least = rows;
            tokens = t;
            experts = e;
        }
    };
    for_each_tile<T>([&](auto tile) {
        if (args->experts > tile.EXPERTS / 2)
            consider(tile.TOKENS, tile.EXPERTS);
    });
    typedef tensor_tile<T, 1, 1, 8, 2> smallest;
    for (int t = smallest::TOKENS; t > 0; t /= 2)
        for (int e = smallest::EXPERTS; e > 0; e /= 2)
            consider(t, e);

    // Eight steps of a slice are on their way at once, or as many as it has, if 12 are enough for that.
    typedef tensor_tile<T, 1, 1, 8, 2, true> half;
    typedef tensor_tile<T, 1, 1, 12, 2, true> half_12;
    const int64_t steps = moe_ceil_div(args->hidden, STEP * SLICES);
    if (tokens <= half::TOKENS)
        (steps > 8 && steps <= 12 ? half_12::launch : half::launch)(args, gpu, tokens, experts);
    else if (tokens <= smallest::TOKENS)
        smallest::launch(args, gpu, tokens, experts);
    else
        for_each_tile<T>([&](auto tile) {
            if (tile.TOKENS == tokens && tile.EXPERTS == experts)
                tile.launch(args, gpu, tokens, experts);
        });
}

// ---- Logits with FMAs ----
//
// A block takes TM tokens x TE experts. Its warps share the hidden dimension, piece by piece of VEC elements a lane;
// the lanes' sums meet in a fixed tree and the warps' in order. The order of additions for one token and expert depends
// on neither TM nor TE nor the batch, so that a token gets the same logits in any batch.

constexpr int LOGIT_WARPS = 8;
constexpr int VEC = 8;

template <typename X, typename W, int TM, int TE, bool ALIGNED>
__global__ void __launch_bounds__(LOGIT_WARPS * 32, 2) logits_kernel(const moe_gate_args args)
{
    __shared__ float parts[LOGIT_WARPS][TM * TE];
    moe_grid_launch_dependents();
    moe_grid_wait();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t hidden = args.hidden;
    const int expert_tiles = (args.experts + TE - 1) / TE;
    const int64_t tiles = (args.tokens + TM - 1) / TM * expert_tiles;

    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t t0 = tile / expert_tiles * TM;
        const int e0 = (int)(tile % expert_tiles) * TE;
        float sum[TM][TE] = {};

        // Past the last token or expert the last one is computed again; it is not stored.
        const X *x[TM];
        const W *gate[TE];
#pragma unroll
        for (int m = 0; m < TM; m++)
            x[m] = (const X *)args.x + (t0 + m < args.tokens ? t0 + m : args.tokens - 1) * hidden;
#pragma unroll
        for (int e = 0; e < TE; e++)
            gate[e] = (const W *)args.gate + (e0 + e < args.experts ? e0 + e : args.experts - 1) * hidden;

        for (int64_t h = threadIdx.x * VEC; h < hidden; h += LOGIT_WARPS * 32 * VEC) {
            float xv[TM][VEC];
#pragma unroll
            for (int m = 0; m < TM; m++)
                moe_load<ALIGNED>(x[m] + h, hidden - h, xv[m]);
#pragma unroll
            for (int e = 0; e < TE; e++) {
                float wv[VEC];
                moe_load<ALIGNED>(gate[e] + h, hidden - h, wv);
#pragma unroll
                for (int m = 0; m < TM; m++)
#pragma unroll
                    for (int i = 0; i < VEC; i++)
                        sum[m][e] = fmaf(xv[m][i], wv[i], sum[m][e]);
            }
        }

#pragma unroll
        for (int m = 0; m < TM; m++)
#pragma unroll
            for (int e = 0; e < TE; e++) {
                float v = sum[m][e];
                for (int d = 16; d > 0; d /= 2)
                    v += __shfl_xor_sync(ALL_LANES, v, d);
                if (lane == 0)
                    parts[warp][m * TE + e] = v;
            }
        __syncthreads();
        if (threadIdx.x < TM * TE) {
            const int64_t t = t0 + threadIdx.x / TE;
            const int e = e0 + threadIdx.x % TE;
            float v = 0.0f;
            for (int w = 0; w < LOGIT_WARPS; w++)
                v += parts[w][threadIdx.x];
            if (t < args.tokens && e < args.experts)
                args.logits[t * args.experts + e] = moe_round_to(v, args.logits_dtype);
        }
        __syncthreads(); // the next tile writes parts again
    }
    moe_set_zeroed(args.zeroed, args.zeroed_bytes);
}

template <typename X, typename W, int TM, int TE, bool ALIGNED>
void launch_logits(const struct moe_gate_args *args, const struct moe_gpu *gpu)
{
    const int64_t expert_tiles = moe_ceil_div(args->experts, TE);
    const int64_t tiles = moe_ceil_div(args->tokens, TM) * expert_tiles;
    unsigned grid = moe_grid(tiles, gpu->max_sms, gpu->sms, TM * TE == 1 ? 8 : 2);
    // A block whose stride is a multiple of the expert tiles keeps its experts' weights in L1.
    if (grid > expert_tiles)
        grid -= (unsigned)(grid % expert_tiles);
    moe_launch(logits_kernel<X, W, TM, TE, ALIGNED>, grid, LOGIT_WARPS * 32, 0, gpu->stream, gpu->dependent, *args);
}

// ---- Top-k: one warp a token ----

constexpr int TOPK_WARPS = 8;

// Of a block with short ranges of a tally, a warp for each token.
constexpr int MOST_TOPK_WARPS = 16;

template <int PER> constexpr bool CAN_TALLY = PER * 32 <= MOE_TALLY_EXPERTS;

// A block takes `range` tokens at a time, and says in the tally, where there is one, who has chosen each expert.
template <int PER>
__global__ void __launch_bounds__((CAN_TALLY<PER> ? MOST_TOPK_WARPS : TOPK_WARPS) * 32)
    topk_kernel(const moe_gate_args args, const moe_tally tally)
{
    __shared__ int2 chosen[CAN_TALLY<PER> ? MOST_TOPK_WARPS : TOPK_WARPS][MOE_MAX_TOP_K];
    __shared__ uint32_t row[MOE_TALLY_EXPERTS / 4];
    moe_grid_launch_dependents();
    const bool tallies = CAN_TALLY<PER> && tally.counts != NULL;
    if (tallies) {
        moe_tally_clear(row, args.experts);
        __syncthreads();
    }
    moe_grid_wait();
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const auto taken = [&](int id) {
        if (tallies)
            moe_tally_add(row, id);
    };
    for (int64_t r = blockIdx.x; r * tally.range < args.tokens; r += gridDim.x) {
        const int64_t end = min((r + 1) * tally.range, args.tokens);
        for (int64_t t = r * tally.range + warp; t < end; t += warps)
            moe_topk_token<PER, MOE_MAX_TOP_K / 32, 4>(args, args.logits + t * args.experts, args.ids + t * args.top_k,
                                                       args.weights + t * args.top_k, chosen[warp], taken);
        if (tallies) {
            __syncthreads();
            moe_tally_store(tally, r, row, args.experts);
            __syncthreads();
        }
    }
}

moe_status launch_topk(const struct moe_gate_args *args, const struct moe_tally &tally, int warps,
                       const struct moe_gpu *gpu)
{
    if (args->tokens == 0)
        return MOE_OK;
    const unsigned grid = moe_grid(moe_ceil_div(args->tokens, tally.range), gpu->max_sms, gpu->sms, 8);
    moe_with_experts_a_lane<MOE_MAX_EXPERTS / 32>(args->experts, [&](auto per) {
        if (gpu->dependent) // beside the logits' blocks, which need a lot of it
            cudaFuncSetAttribute(topk_kernel<per.value>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
        moe_launch(topk_kernel<per.value>, grid, warps * 32, 0, gpu->stream, gpu->dependent, *args, tally);
    });
    return moe_launched(NULL, "topk");
}

} // namespace

moe_status moe_logits_cuda(const struct moe_gate_args *args, const struct moe_gpu *gpu)
{
    if (args->tokens == 0)
        return MOE_OK;

    const bool aligned = args->hidden % VEC == 0 && moe_aligned16(args->x) && moe_aligned16(args->gate);
    // Large tiles read x and the gate less often; small ones keep every SM busy with few tokens.
    const bool large = moe_ceil_div(args->tokens, 4) * moe_ceil_div(args->experts, 8) >= gpu->sms;
    moe_with_dtype(args->x_dtype, [&](auto x) {
        moe_with_dtype(args->gate_dtype, [&](auto w) {
            typedef decltype(x) X;
            typedef decltype(w) W;
            if constexpr (sizeof(X) == 2 && std::is_same<X, W>::value) {
                if (aligned) {
                    if (!moe_logits_wgmma_pays(args, gpu) || !moe_logits_wgmma(args, gpu, NULL))
                        launch_tensor<X>(args, gpu);
                    return;
                }
            }
            if (!aligned)
                launch_logits<X, W, 1, 1, false>(args, gpu);
            else if (large)
                launch_logits<X, W, 4, sizeof(W) == 4 ? 4 : 8, true>(args, gpu);
            else
                launch_logits<X, W, 1, 1, true>(args, gpu);
        });
    });
    return moe_launched(NULL, "logits");
}

moe_status moe_topk_cuda(const struct moe_gate_args *args, const struct moe_gpu *gpu)
{
    return launch_topk(args, {NULL, TOPK_WARPS}, TOPK_WARPS, gpu);
}

// Long ranges leave less for the plan to add up, short ones share the tokens more evenly among the SMs. By reckoning
// half a range costs an SM 60 cycles a token and the plan 3 a range, with 128 experts, and both in proportion with
// others: so the best range has tokens / 10 for its square. This is about the nearest power of two.
moe_status moe_topk_tally_cuda(const struct moe_gate_args *args, struct moe_tally *tally, const struct moe_gpu *gpu)
{
    tally->range = MOE_TALLY_RANGE;
    while (tally->range < 128 && (int64_t)tally->range * tally->range * 24 < args->tokens)
        tally->range *= 2;
    return launch_topk(args, *tally, tally->range <= MOST_TOPK_WARPS ? tally->range : TOPK_WARPS, gpu);
}
