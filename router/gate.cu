// SPDX-License-Identifier: Apache-2.0
// The gate on the GPU: logits with fp32 FMAs, then the top-k of each token in one warp.
#include "kernels/cuda/common/dtype.cuh"
#include "kernels/cuda/common/launch.cuh"
#include "router/router.h"

namespace
{

constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- Logits ----
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
}

template <typename X, typename W, int TM, int TE, bool ALIGNED>
void launch_logits(const struct moe_gate_args *args, int32_t max_sms, int32_t sms, cudaStream_t stream)
{
    const int64_t expert_tiles = moe_ceil_div(args->experts, TE);
    const int64_t tiles = moe_ceil_div(args->tokens, TM) * expert_tiles;
    unsigned grid = moe_grid(tiles, max_sms, sms, TM * TE == 1 ? 8 : 2);
    // A block whose stride is a multiple of the expert tiles keeps its experts' weights in L1.
    if (grid > expert_tiles)
        grid -= (unsigned)(grid % expert_tiles);
    logits_kernel<X, W, TM, TE, ALIGNED><<<grid, LOGIT_WARPS * 32, 0, stream>>>(*args);
}

// ---- Top-k ----
//
// One warp a token, PER logits a lane (expert 32 j + lane in key[j]). A key is the logit's bits turned so that unsigned
// order is the order of the contract: NaN above every number, -0 equal to 0. Key 0, below every logit's, stands for "no
// such expert" and "taken".

constexpr int TOPK_WARPS = 4;

__device__ inline uint32_t key_of(float logit)
{
    if (isnan(logit))
        return 0xffffffffu;
    const uint32_t bits = logit == 0.0f ? 0u : __float_as_uint(logit);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float logit_of(uint32_t key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

template <int PER> __global__ void __launch_bounds__(TOPK_WARPS * 32) topk_kernel(const moe_gate_args args)
{
    const int lane = threadIdx.x % 32;
    const int64_t t = (int64_t)blockIdx.x * TOPK_WARPS + threadIdx.x / 32;
    if (t >= args.tokens)
        return;
    const float *logits = args.logits + t * args.experts;

    uint32_t key[PER];
    uint32_t top = 0;
#pragma unroll
    for (int j = 0; j < PER; j++) {
        key[j] = j * 32 + lane < args.experts ? key_of(logits[j * 32 + lane]) : 0;
        top = key[j] > top ? key[j] : top;
    }
    const float largest = logit_of(__reduce_max_sync(ALL_LANES, top));

    float all = 0.0f;
#pragma unroll
    for (int j = 0; j < PER; j++)
        if (key[j] != 0)
            all += expf(logit_of(key[j]) - largest);
    for (int d = 16; d > 0; d /= 2)
        all += __shfl_xor_sync(ALL_LANES, all, d);

    // Round k finds the k-th largest; lane k % 32 keeps it.
    int32_t id[MOE_MAX_TOP_K / 32] = {};
    float weight[MOE_MAX_TOP_K / 32] = {};
    float selected = 0.0f;
    for (int k = 0; k < args.top_k; k++) {
        uint32_t best = 0;
        int best_j = 0;
#pragma unroll
        for (int j = 0; j < PER; j++)
            if (key[j] > best) {
                best = key[j];
                best_j = j;
            }
        const uint32_t won = __reduce_max_sync(ALL_LANES, best);
        const int mine = best_j * 32 + lane;
        const int expert = __reduce_min_sync(ALL_LANES, best == won ? mine : INT32_MAX);
#pragma unroll
        for (int j = 0; j < PER; j++)
            if (j * 32 + lane == expert)
                key[j] = 0;

        const float p = expf(logit_of(won) - largest) / all;
        selected += p;
#pragma unroll
        for (int i = 0; i < MOE_MAX_TOP_K / 32; i++)
            if (k == i * 32 + lane) {
                id[i] = expert;
                weight[i] = p;
            }
    }

#pragma unroll
    for (int i = 0; i < MOE_MAX_TOP_K / 32; i++) {
        const int k = i * 32 + lane;
        if (k < args.top_k) {
            const float p = args.renormalize ? weight[i] / selected : weight[i];
            args.ids[t * args.top_k + k] = id[i];
            args.weights[t * args.top_k + k] = moe_round_to(p, args.topk_weight_dtype);
        }
    }
}

template <int PER> void launch_topk(const struct moe_gate_args *args, cudaStream_t stream)
{
    if constexpr (PER * 32 < MOE_MAX_EXPERTS) {
        if (args->experts > PER * 32) {
            launch_topk<PER * 2>(args, stream);
            return;
        }
    }
    const unsigned grid = (unsigned)moe_ceil_div(args->tokens, TOPK_WARPS);
    topk_kernel<PER><<<grid, TOPK_WARPS * 32, 0, stream>>>(*args);
}

} // namespace

moe_status moe_logits_cuda(const struct moe_gate_args *args, int32_t max_sms, void *stream)
{
    if (args->tokens == 0)
        return MOE_OK;

    int device = 0, sms = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return moe_launched(NULL, "logits");

    const bool aligned = args->hidden % VEC == 0 && moe_aligned16(args->x) && moe_aligned16(args->gate);
    // Large tiles read x and the gate less often; small ones keep every SM busy with few tokens.
    const bool large = moe_ceil_div(args->tokens, 4) * moe_ceil_div(args->experts, 8) >= sms;
    moe_with_dtype(args->x_dtype, [&](auto x) {
        moe_with_dtype(args->gate_dtype, [&](auto w) {
            typedef decltype(x) X;
            typedef decltype(w) W;
            if (!aligned)
                launch_logits<X, W, 1, 1, false>(args, max_sms, sms, (cudaStream_t)stream);
            else if (large)
                launch_logits<X, W, 4, sizeof(W) == 4 ? 4 : 8, true>(args, max_sms, sms, (cudaStream_t)stream);
            else
                launch_logits<X, W, 1, 1, true>(args, max_sms, sms, (cudaStream_t)stream);
        });
    });
    return moe_launched(NULL, "logits");
}

moe_status moe_topk_cuda(const struct moe_gate_args *args, void *stream)
{
    if (args->tokens == 0)
        return MOE_OK;
    launch_topk<1>(args, (cudaStream_t)stream);
    return moe_launched(NULL, "topk");
}
