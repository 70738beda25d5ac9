// SPDX-License-Identifier: Apache-2.0
// Top-k of one token by one warp: what the kernel of that name does for many tokens (gate.cu), and the plan's for few
// before it goes on with them (plan.cu). Both get the same bits.
//
// A lane holds PER neighbouring experts, so that of equal logits the first in the lowest lane has the lowest id. A key
// is the logit's bits turned so that unsigned order is the order of the contract: NaN above every number, -0 equal to
// 0. Key 0, below every logit's, stands for "no such expert" and "taken".
#ifndef MOE_ROUTER_TOPK_CUH
#define MOE_ROUTER_TOPK_CUH

#include <type_traits>

#include "kernels/cuda/common/dtype.cuh"
#include "router/router.h"

// Calls f with the constant PER, a power of two up to LAST, by which a warp holds all of `experts`.
template <int LAST, int PER = 1, typename F> void moe_with_experts_a_lane(int32_t experts, F f)
{
    if constexpr (PER < LAST) {
        if (experts > PER * 32) {
            moe_with_experts_a_lane<LAST, PER * 2>(experts, f);
            return;
        }
    }
    f(std::integral_constant<int, PER>());
}

// Without branches, of which a lane would take one for each of its experts.
static __device__ inline uint32_t moe_key_of_logit(float logit)
{
    const uint32_t bits = __float_as_uint(logit + 0.0f); // of -0: those of 0
    const uint32_t key = bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
    return isnan(logit) ? 0xffffffffu : key;
}

static __device__ inline float moe_logit_of_key(uint32_t key)
{
    return __uint_as_float(key ^ (~(uint32_t)((int32_t)key >> 31) | 0x80000000u));
}

template <int PER> static __device__ inline uint32_t moe_largest_key(const uint32_t (&key)[PER])
{
    uint32_t best = key[0];
#pragma unroll
    for (int j = 1; j < PER; j++)
        best = key[j] > best ? key[j] : best;
    return best;
}

// The logits of a token -> its top_k <= 32 KEPT ids and weights, and the same as (id, bits of the weight) in
// chosen[top_k] in shared memory, which is complete when the function returns. taken(id) is called once for each id, by
// some lane. The loop over top_k is unrolled UNROLL times.
template <int PER, int KEPT, int UNROLL, typename F>
static __device__ inline void moe_topk_token(const moe_gate_args &args, const float *logits, int32_t *ids,
                                             float *weights, int2 *chosen, F taken)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    constexpr int VEC = PER < 4 ? PER : 4;
    const int lane = threadIdx.x % 32, first = lane * PER, here = args.experts - first, top_k = args.top_k;

    float logit[PER] = {};
    const auto load = [&](auto aligned) {
#pragma unroll
        for (int j = 0; j < PER; j += VEC)
            if (j < here) {
                float v[VEC];
                moe_load<aligned.value>(logits + first + j, here - j, v);
#pragma unroll
                for (int i = 0; i < VEC; i++)
                    logit[j + i] = v[i];
            }
    };
    if (args.experts % VEC == 0 && (uintptr_t)args.logits % (VEC * sizeof(float)) == 0)
        load(moe_bool<true>());
    else
        load(moe_bool<false>());
    uint32_t key[PER];
#pragma unroll
    for (int j = 0; j < PER; j++)
        key[j] = j < here ? moe_key_of_logit(logit[j]) : 0;

    uint32_t best = moe_largest_key(key), winner = __reduce_max_sync(ALL_LANES, best);
    const float largest = moe_logit_of_key(winner);

    // The softmax's sum over all experts. Dividing by the sum over the chosen afterwards would cancel it: then that sum
    // is taken in its place, further down.
    float sum = 0.0f;
    if (!args.renormalize)
#pragma unroll
        for (int j = 0; j < PER; j++)
            if (key[j] != 0)
                sum += expf(moe_logit_of_key(key[j]) - largest);

    // Round k finds the k-th largest; the first lane that has it writes it down and looks for its next best.
    const unsigned self = 1u << lane, up_to_self = self | (self - 1);
    int2 *to = chosen;
#pragma unroll UNROLL
    for (int k = 0; k < top_k; k++) {
        const bool mine = (__ballot_sync(ALL_LANES, best == winner) & up_to_self) == self;
        int at = 0;
#pragma unroll
        for (int j = PER - 1; j >= 0; j--)
            at = key[j] == winner ? j : at;
#pragma unroll
        for (int j = 0; j < PER; j++)
            key[j] = mine && j == at ? 0 : key[j];
        if (mine)
            *to = make_int2(first + at, (int)winner);
        to++;
        best = moe_largest_key(key);
        winner = __reduce_max_sync(ALL_LANES, best);
    }
    __syncwarp();

    int32_t id[KEPT];
    float weight[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int k = i * 32 + lane;
        const int2 pair = k < top_k ? chosen[k] : int2();
        id[i] = pair.x;
        weight[i] = k < top_k ? expf(moe_logit_of_key((uint32_t)pair.y) - largest) : 0.0f;
        if (k < top_k)
            taken(id[i]);
        if (args.renormalize)
            sum += weight[i];
    }
    for (int d = 16; d > 0; d /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, d);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int k = i * 32 + lane;
        if (k < top_k) {
            const float rounded = moe_round_to(weight[i] / sum, args.topk_weight_dtype);
            chosen[k].y = __float_as_int(rounded);
            ids[k] = id[i];
            weights[k] = rounded;
        }
    }
    __syncwarp();
}

#endif
