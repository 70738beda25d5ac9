// SPDX-License-Identifier: Apache-2.0
// Top-k of one token by one warp: what the kernel of that name does for many tokens (gate.cu), the plan's for fewer
// before it goes on with them (plan.cu), and decode's FFN for the fewest (kernels/cuda/decode/route.cuh). All get the
// same bits.
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

// A token's logits, which are aligned like args.logits or better, -> the keys of this lane's experts.
template <int PER>
static __device__ inline void moe_load_keys(const moe_gate_args &args, const float *logits, uint32_t (&key)[PER])
{
    constexpr int VEC = PER < 4 ? PER : 4;
    const int first = threadIdx.x % 32 * PER, here = args.experts - first;

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
#pragma unroll
    for (int j = 0; j < PER; j++)
        key[j] = j < here ? moe_key_of_logit(logit[j]) : 0;
}

// Sorts a lane's keys, the largest first, equal ones in the order in which they are. Returns where each was, four bits
// for each, the first key's are the lowest.
template <int PER> static __device__ inline uint32_t moe_sort_keys(uint32_t (&key)[PER])
{
    static_assert(PER <= 8, "all must fit");
    uint32_t at[PER], order = 0;
#pragma unroll
    for (int j = 0; j < PER; j++)
        at[j] = j;
#pragma unroll
    for (int round = 0; round < PER; round++)
#pragma unroll
        for (int j = round % 2; j + 1 < PER; j += 2) {
            const uint32_t a = key[j], b = key[j + 1], at_a = at[j], at_b = at[j + 1];
            key[j] = a < b ? b : a;
            key[j + 1] = a < b ? a : b;
            at[j] = a < b ? at_b : at_a;
            at[j + 1] = a < b ? at_a : at_b;
        }
#pragma unroll
    for (int j = 0; j < PER; j++)
        order |= at[j] << 4 * j;
    return order;
}

// The top_k largest keys, in order, as (id, key) in chosen[top_k] in shared memory, complete when the function returns;
// the keys are gone then. The loop over top_k is unrolled UNROLL times; largest(key) is called before it.
//
// Round k finds the k-th largest; the first lane that has it writes it down and goes on to its next best. What a round
// waits for is a chain of a few instructions if that is known already: so keys are sorted where a lane has few.
template <int PER, int UNROLL, typename F>
static __device__ inline void moe_choose_keys(uint32_t (&key)[PER], int top_k, int2 *chosen, F largest)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    constexpr bool SORTED = PER <= 8;
    const int lane = threadIdx.x % 32, first = lane * PER;
    uint32_t order = 0;
    uint32_t best = moe_largest_key(key), winner = __reduce_max_sync(ALL_LANES, best);
    largest(winner);
    if constexpr (SORTED)
        order = moe_sort_keys(key);

    const unsigned self = 1u << lane, up_to_self = self | (self - 1);
    int2 *to = chosen;
#pragma unroll UNROLL
    for (int k = 0; k < top_k; k++) {
        const bool mine = (__ballot_sync(ALL_LANES, best == winner) & up_to_self) == self;
        int at = 0;
        if constexpr (SORTED) {
            at = order % 16;
            if (mine) {
#pragma unroll
                for (int j = 0; j + 1 < PER; j++)
                    key[j] = key[j + 1];
                key[PER - 1] = 0;
                order /= 16;
            }
            best = key[0];
        } else {
#pragma unroll
            for (int j = PER - 1; j >= 0; j--)
                at = key[j] == winner ? j : at;
#pragma unroll
            for (int j = 0; j < PER; j++)
                key[j] = mine && j == at ? 0 : key[j];
            best = moe_largest_key(key);
        }
        if (mine)
            *to = make_int2(first + at, (int)winner);
        to++;
        winner = __reduce_max_sync(ALL_LANES, best);
    }
    __syncwarp();
}

// This lane's part of the softmax's sum over all experts: of N keys from key J on. Neighbours are added first, here and
// where the lanes' parts meet: so the sum has the same bits however many experts a lane has.
template <int PER, int J = 0, int N = PER>
static __device__ inline float moe_sum_keys(const uint32_t (&key)[PER], float largest)
{
    if constexpr (N > 1)
        return moe_sum_keys<PER, J, N / 2>(key, largest) + moe_sum_keys<PER, J + N / 2, N / 2>(key, largest);
    else
        return key[J] != 0 ? expf(moe_logit_of_key(key[J]) - largest) : 0.0f;
}

// What moe_choose_keys() has left of a token -> its top_k <= 32 KEPT ids and weights, and these as (id, bits of the
// weight) in chosen[top_k], complete when the function returns. taken(id) is called once for each id, by some lane.
// `sum` is the lane's part of the softmax's sum; of renormalized weights 0: dividing them by the sum over the chosen
// would cancel it, so that sum is taken in its place.
template <int KEPT, typename F>
static __device__ inline void moe_weigh(const moe_gate_args &args, float largest, float sum, int32_t *ids,
                                        float *weights, int2 *chosen, F taken)
{
    constexpr unsigned ALL_LANES = 0xffffffffu;
    const int lane = threadIdx.x % 32, top_k = args.top_k;
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
    for (int d = 1; d < 32; d *= 2)
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

// All of it: the logits of a token -> ids, weights and chosen. UNROLL as above.
template <int PER, int KEPT, int UNROLL, typename F>
static __device__ inline void moe_topk_token(const moe_gate_args &args, const float *logits, int32_t *ids,
                                             float *weights, int2 *chosen, F taken)
{
    uint32_t key[PER];
    float largest, sum = 0.0f;
    moe_load_keys(args, logits, key);
    moe_choose_keys<PER, UNROLL>(key, args.top_k, chosen, [&](uint32_t largest_key) {
        largest = moe_logit_of_key(largest_key);
        if (!args.renormalize)
            sum = moe_sum_keys(key, largest);
    });
    moe_weigh<KEPT>(args, largest, sum, ids, weights, chosen, taken);
}

#endif
